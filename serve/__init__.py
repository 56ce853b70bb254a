"""Bundle in, gRPC out: teacher and student side by side, with live divergence.

`docs/architecture.md` follows one request through these modules.
"""
