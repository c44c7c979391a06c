"""One frozen backbone and the adapters of several sites in one pass."""
