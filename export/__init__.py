"""From a teacher to a verified bundle; `docs/export.md` is the guide."""

import os

from serve.cpus import bound_spinning

# As in serve: onnxruntime's official builds send usage data unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
bound_spinning()
