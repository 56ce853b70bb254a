"""Peak memory of a graph in use, measured in a process of its own.

`python -m export.measure.memory VARIANT_DIR` loads the graph as the server does, runs a prompt and
some decode steps, and prints JSON. Counted is what comes on top of an interpreter that has the same
modules loaded, so weights, the cache and onnxruntime's buffers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from export.run.usage import PeakMemory, resident_bytes

PROMPT_TOKENS = 64
NUM_DECODE_STEPS = 8


def measure_peak_bytes(variant_dir: Path) -> int:
    """Return the peak resident bytes of one sequence on the CPU, `export.measure.memory`'s way."""
    command = [sys.executable, "-m", "export.measure.memory", str(variant_dir)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory measurement of {variant_dir} failed:\n{done.stderr}")
    peak_bytes: int = json.loads(done.stdout)["peak_bytes"]
    return peak_bytes


def run_graph(variant_dir: Path) -> int:
    """Load and run the graph in this process; returns the peak bytes it added."""
    from serve.models.onnx_backend import OnnxBackend

    before_bytes = resident_bytes()
    memory = PeakMemory()
    backend = OnnxBackend.load(
        variant_dir,
        device="cpu",
        max_num_seqs=1,
        max_model_len=PROMPT_TOKENS + NUM_DECODE_STEPS,
    )
    backend.forward(0, [[0] * PROMPT_TOKENS], [0])
    for step in range(NUM_DECODE_STEPS):
        backend.forward(0, [[0]], [PROMPT_TOKENS + step])
    return memory.read_bytes() - before_bytes


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": run_graph(Path(sys.argv[1]))}))
