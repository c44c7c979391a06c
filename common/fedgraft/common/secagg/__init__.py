"""Secure aggregation: what both parties of the protocol must compute alike.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (the
active variant), on the sparse graphs of Bell et al. 2020, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead". Read ``statements`` (who says what), ``transcript`` (what is signed),
``graph`` (who shares with whom, and the thresholds), then ``keys``, ``shamir``, ``quantize`` and
``masking``. Nothing here touches a network, a disk or a log.
"""
