"""The coordinator's status page and Prometheus figures."""
