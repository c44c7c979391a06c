"""How sites become members: provisioning, registry, enrolment and backbone services."""
