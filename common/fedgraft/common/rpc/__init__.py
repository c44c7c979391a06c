"""The gRPC services in ``fedgraft_v1.proto``; the other files here are made from it."""
