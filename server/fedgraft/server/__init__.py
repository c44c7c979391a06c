"""The code that runs at the coordinator: rounds, aggregation, runs, reports."""
