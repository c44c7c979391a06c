"""Pre-trained models: found, refused, loaded and stored."""
