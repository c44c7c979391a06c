"""Flower's grid in a simulation: simulated sites, workers, and the Ray engine."""
