"""What a site allows, what its people approved, and the record of what left."""
