"""`make loadtest`: a minute of A/B between the demo bundle's student and its teacher.

    python -m tandem.demo_load [--bundle runs/demo/bundle] [--out runs/loadtest]

Two rates, blocks of five seconds in turns, eight samples per prompt so that pass@8 can be told.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bundle.errors import UserError
from loadtest.client.targets import Credentials
from loadtest.config import RunConfig
from loadtest.progress import ProgressReporter
from loadtest.run import run
from tandem.demo import serving

RATES_RPS = (0.5, 1.0)
DURATION_S = 15.0  # per arm and rate: two arms at two rates make a minute
NUM_SAMPLES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("runs/demo/bundle"))
    parser.add_argument("--out", type=Path, default=Path("runs/loadtest"))
    arguments = parser.parse_args()
    try:
        folder = run_demo(arguments.bundle, arguments.out)
    except UserError as error:
        sys.exit(f"loadtest: {error}")
    print((folder / "summary.md").read_text(encoding="utf-8"))
    print(folder / "report.html")


def run_demo(bundle: Path, out: Path) -> Path:
    """Serve the bundle, put the load on it, and return the folder; an earlier run's is replaced."""
    if (out / "run.json").exists():
        shutil.rmtree(out)
    with serving(bundle) as addresses:
        config = RunConfig(
            target=addresses["address"],
            metrics_url=addresses["metrics_url"],
            out=out,
            rates_rps=RATES_RPS,
            num_samples=NUM_SAMPLES,
            max_tokens=32,
            duration_s=DURATION_S,
            warmup_s=5.0,
            slo="ttft_p95=0.5,itl_p95=0.1",
        )
        return run(config, Credentials(), ProgressReporter())


if __name__ == "__main__":
    main()
