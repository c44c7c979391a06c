"""Sweeps: simulate every combination of settings and compare the results."""
