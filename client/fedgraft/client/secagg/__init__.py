"""The masking party of secure aggregation."""
