"""The stages of a round: requests, replies, their validation, and the sums, clear or masked."""
