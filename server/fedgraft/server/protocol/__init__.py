"""One stage of a round: requests, replies, validation, and the sums, clear or masked."""
