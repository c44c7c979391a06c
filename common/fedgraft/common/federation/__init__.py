"""Who takes part: roster, kits, certificates and the audit log."""
