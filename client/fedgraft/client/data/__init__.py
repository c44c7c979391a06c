"""A site's rows: read from its files, checked, split, encoded once and cached."""
