"""Sites that vanish, are late or lie, in a simulation."""
