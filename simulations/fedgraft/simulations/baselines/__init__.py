"""The models that a federation is compared with: local, central and zero-shot models."""
