"""The metrics of a model as sums, with intervals and verdicts."""
