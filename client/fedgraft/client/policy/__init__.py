"""A site's policy, the approvals of its people, and the record of everything that left."""
