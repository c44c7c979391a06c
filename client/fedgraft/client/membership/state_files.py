"""The names of files and folders in a site's state folder, where several modules open them."""

__all__ = [
    "APPROVALS",
    "AUDIT",
    "BACKBONES",
    "CA",
    "CERTIFICATE",
    "IDENTITY",
    "MEMBERSHIP",
    "ROSTER",
    "TLS_KEY",
]

CA = "ca.pem"
CERTIFICATE = "certificate.pem"
TLS_KEY = "tls.key"
IDENTITY = "identity.pem"
MEMBERSHIP = "membership.json"
ROSTER = "roster.toml"
AUDIT = "audit.jsonl"
APPROVALS = "approvals"
BACKBONES = "backbones"
