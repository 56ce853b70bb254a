"""Move ROUTE_AUTO traffic to the student in steps, and back if it strays from the teacher.

    python examples/canary.py --target 127.0.0.1:50052 --metrics http://127.0.0.1:9464/metrics

The target is the control address. Each step waits until the teacher has scored so many more of the
student's tokens, in the shadow where clients did not ask for it, and takes their mean k3 in nats.
Too high, too few or interrupted: the policy becomes what it was, and the exit status is 1.
"""

import argparse
import signal
import sys
import time

import grpc

from bundle.errors import UserError
from loadtest.server_metrics import scrape
from serve.client import ControlClient, explain

ENDINGS = (signal.SIGINT, signal.SIGTERM)


def scored(url: str) -> tuple[float, float]:
    """Return the nats and the number of the student's tokens since the server's start."""
    found = scrape(url)
    nats, tokens = (
        found.total(f"tandem_divergence_{name}_total", estimator="k3", policy="student")
        for name in ("nats_sum", "tokens")
    )
    return nats, tokens


def mean_k3(url: str, min_tokens: int, timeout_s: float) -> float:
    """Wait for so many more tokens and return their mean, nats; exit without them."""
    end_s = time.monotonic() + timeout_s
    first_nats, first_tokens = scored(url)
    while time.monotonic() < end_s:
        if signal.sigtimedwait(ENDINGS, 0.2):
            sys.exit("interrupted")
        nats, tokens = scored(url)
        if tokens - first_tokens >= min_tokens:
            return (nats - first_nats) / (tokens - first_tokens)
    sys.exit(f"the teacher scored fewer than {min_tokens} tokens in {timeout_s} s")


def climb(control: ControlClient, args: argparse.Namespace) -> None:
    """Raise the student's share; whoever else sets the policy meanwhile has the last word."""
    before = now = control.policy()
    try:
        for share in args.shares:
            now = control.set_policy(
                student_weight=share,
                teacher_weight=1 - share,
                shadow_rate=args.shadow_rate,
                expected_revision=now.revision,
            )
            k3 = mean_k3(args.metrics, args.min_tokens, args.step_timeout_s)
            print(f"{share:.0%} of the traffic to the student: k3 {k3:.4f}", flush=True)
            if k3 > args.max_k3:
                sys.exit(f"k3 is above {args.max_k3}")
    except BaseException:
        control.set_policy(
            student_weight=before.student_weight,
            teacher_weight=before.teacher_weight,
            shadow_rate=before.shadow_rate,
            expected_revision=now.revision,
        )
        print("rolled back", flush=True)
        raise
    control.set_policy(shadow_rate=before.shadow_rate, expected_revision=now.revision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50052")
    parser.add_argument("--metrics", default="http://127.0.0.1:9464/metrics")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.25, 1.0])
    parser.add_argument("--shadow-rate", type=float, default=0.5)
    parser.add_argument("--max-k3", type=float, default=0.5)
    parser.add_argument("--min-tokens", type=int, default=1000)
    parser.add_argument("--step-timeout-s", type=float, default=600.0)
    args = parser.parse_args()
    # They wait for a pause between calls: a change that was cut off could not be taken back.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    with ControlClient(args.target, timeout_s=10) as control:
        climb(control, args)


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(explain(error))
    except UserError as error:
        sys.exit(f"cannot read the metrics: {error}")
