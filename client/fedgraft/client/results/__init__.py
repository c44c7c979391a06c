"""What a run came to at this site: the kept adapter, the comparison, the report."""
