"""What client, server and simulation must agree on."""
