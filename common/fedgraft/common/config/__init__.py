"""The job file: its sections, how it is read, and which settings go together."""
