"""The job file: its sections, the reader, and the check of settings that do not work together."""
