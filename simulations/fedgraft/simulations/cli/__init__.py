"""The command-line verbs of a simulation."""
