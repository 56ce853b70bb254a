"""Bundle in, gRPC out: teacher and student side by side, with live divergence.

`docs/architecture.md` follows one request through these modules.
"""

import os

from serve.cpus import bound_spinning

# onnxruntime's official builds send usage data to their maker unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
bound_spinning()
