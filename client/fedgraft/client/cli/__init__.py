"""The verbs of a site."""
