"""Statistics that rank backbones before any training."""
