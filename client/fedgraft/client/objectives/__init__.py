"""What is minimised and counted for each kind of target."""
