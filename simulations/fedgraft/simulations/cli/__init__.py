"""The verbs of a simulation."""
