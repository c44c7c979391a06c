"""The members of a federation: roster, kits, certificates and the audit log."""
