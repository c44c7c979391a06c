"""Ranks backbones over a simulated federation."""
