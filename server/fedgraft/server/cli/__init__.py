"""The verbs of a coordinator."""
