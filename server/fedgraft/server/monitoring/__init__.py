"""The coordinator's page and Prometheus figures."""
