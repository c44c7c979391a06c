"""The membership of sites: provisioning, registry, enrolment and backbone services."""
