"""The command-line verbs of a coordinator."""
