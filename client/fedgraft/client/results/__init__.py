"""The result of a run at this site: the kept adapter, the comparison, the report."""
