"""Selection: rank backbones on a simulated federation."""
