"""A run's folder: checkpoints, summary, costs."""
