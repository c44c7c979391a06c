"""An adapter: attached to a backbone, as one vector, as a PEFT folder with a model card."""
