"""What runs at the coordinator: rounds, aggregation, runs, reports."""
