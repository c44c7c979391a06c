"""Submitted jobs: the queue and the progress of each job."""
