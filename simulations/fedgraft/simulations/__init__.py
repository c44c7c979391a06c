"""A whole federation on one machine, with the code that sites and coordinator run."""
