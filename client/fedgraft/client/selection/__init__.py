"""Statistics by which backbones are ranked before any training."""
