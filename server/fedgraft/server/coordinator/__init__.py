"""The processes of a coordinator: supervisor, SuperLink, nginx, gRPC services."""
