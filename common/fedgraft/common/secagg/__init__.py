"""Secure aggregation: the computations that both parties of the protocol must do identically.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (the
active variant), on the sparse graphs of Bell et al. 2020, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead". Read ``statements`` (the messages of each party), ``transcript`` (the
signed content), ``graph`` (the neighbours that share secrets, and the thresholds), then ``keys``,
``shamir``, ``quantize`` and ``masking``. No code here uses a network, a disk or a log.
"""
