"""Submitted jobs: the queue and how far each one is."""
