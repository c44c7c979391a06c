"""Simulates every combination of settings and compares them."""
