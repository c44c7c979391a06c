"""Pre-trained models: they are found, checked, loaded and stored."""
