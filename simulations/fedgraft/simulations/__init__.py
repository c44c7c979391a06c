"""Simulations: a whole federation on one machine, with the code of real sites and coordinators."""
