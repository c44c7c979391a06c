"""Faults of sites in a simulation: sites vanish, are late or send wrong updates."""
