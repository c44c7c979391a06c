"""``[privacy]``: limits on the information that the coordinator gets; one file per mechanism."""

from fedgraft.common.privacy.secure_aggregation import FEWEST, SecureAggregation
from fedgraft.common.section import Section

__all__ = ["FEWEST", "Privacy", "SecureAggregation"]


class Privacy(Section):
    """The section ``[privacy]``."""

    secure_aggregation: SecureAggregation = SecureAggregation()
