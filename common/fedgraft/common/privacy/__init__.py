"""``[privacy]``: what the coordinator may learn of a site; one file a mechanism."""

from fedgraft.common.privacy.secure_aggregation import FEWEST, SecureAggregation
from fedgraft.common.section import Section

__all__ = ["FEWEST", "Privacy", "SecureAggregation"]


class Privacy(Section):
    """``[privacy]``."""

    secure_aggregation: SecureAggregation = SecureAggregation()
