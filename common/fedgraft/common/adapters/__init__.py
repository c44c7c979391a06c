"""The adapter: attached to a backbone, as one vector, and as a PEFT folder with a model card."""
