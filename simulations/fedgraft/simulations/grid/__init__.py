"""Flower's grid in this process: simulated sites, workers, and the Ray engine."""
