"""The code that runs at a partner site: its data, its training, its policy."""
