"""`tandem demo`: the whole product on a real model, from nothing to a checked conversation.

Runs the demo recipe (or finds it finished), serves the bundle beside its teacher, asks five
prompts, holds the server's metrics against the answers, and stops the server.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bundle.errors import UserError
from loadtest.server_metrics import Series, scrape

if TYPE_CHECKING:
    from protos.tandem.v1 import inference_pb2 as pb

RECIPE = Path(__file__).parents[1] / "export" / "recipes" / "demo.yaml"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0

SHOWN_METRICS = (
    "tandem_divergence_nats_sum_total",
    "tandem_divergence_tokens_total",
    "tandem_consensus_total",
    "tandem_pass_at_k_sum_total",
    "tandem_pass_at_k_prompts_total",
)

# Every series of these is one that an answer speaks of.
WHOLE_METRICS = (
    "tandem_samples_total",
    "tandem_generation_tokens_total",
    "tandem_consensus_total",
    "tandem_pass_at_k_sum_total",
)


def demo(
    recipe: Annotated[
        Path, typer.Option(help="Recipe to run.", show_default="export/recipes/demo.yaml")
    ] = RECIPE,
) -> None:
    """Distil a student, serve it beside its teacher, ask both, and check the metrics."""
    from rich.console import Console

    from export.console import ConsoleReporter
    from export.pipeline import run_export
    from export.run.recipe import load_config

    console = Console(width=None if sys.stdout.isatty() else 100)
    bundle = run_export(load_config(recipe), ConsoleReporter())
    show_bundle(console, bundle)
    with serving(bundle) as ready:
        responses = list(ask_all(console, ready["address"]))
        metrics = scrape(ready["metrics_url"]).values
    _show_metrics(console, metrics)
    differences = compare_with_responses(metrics, responses)
    if differences:
        raise UserError(f"the metrics are not what the answers said: {'; '.join(differences)}")
    console.print("The metrics are what the answers said; the server stopped cleanly.")
    console.print(
        "\nNext:\n"
        f"  .venv/bin/tandem serve --bundle {bundle}\n"
        "  .venv/bin/tandem ask --target 127.0.0.1:50051 'Explain tides in one sentence.'\n"
        f"  .venv/bin/tandem export run YOUR_RECIPE.yaml   # start from {recipe}"
    )


@contextmanager
def serving(bundle: Path, flags: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Run `tandem serve` on free ports; yields its addresses, and stops it with SIGTERM.

    Raises UserError, with the server's log, when it does not become ready, or ends otherwise than
    by SIGTERM with exit code 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ready_file, log_path = Path(scratch) / "ready.json", Path(scratch) / "server.log"
        command = [sys.executable, "-m", "tandem", "serve", "--bundle", str(bundle), *flags]
        command += ["--port", "0", "--control-port", "0", "--metrics-port", "0"]
        command += ["--ready-file", str(ready_file)]
        with log_path.open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _wait_ready(server, ready_file, log_path)
        finally:
            code = _stop(server)
        if code != 0:
            raise UserError(f"the server ended with exit code {code}: {log_path.read_text()}")


def _stop(server: subprocess.Popen[bytes]) -> int:
    """Return the exit code; a server that does not stop is killed, and a UserError."""
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise UserError(f"the server did not stop within {STOP_TIMEOUT_S} s") from None


def _wait_ready(server: subprocess.Popen[bytes], ready_file: Path, log: Path) -> dict[str, str]:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not ready_file.exists():
        if server.poll() is not None or time.monotonic() > deadline_s:
            raise UserError(f"the server did not become ready: {log.read_text()}")
        time.sleep(0.1)
    ready: dict[str, str] = json.loads(ready_file.read_text())
    return ready


def ask_all(console: Any, address: str) -> Iterator[pb.CompareResponse]:
    from serve.client import Client
    from serve.client.ask import Question
    from serve.client.side_by_side import render

    questions = (
        Question("Explain why the sky is blue in two sentences.", temperature=0.0, max_tokens=80),
        Question("Give three tips for a good night's sleep.", temperature=0.7, seed=1),
        Question("Write a two-line poem about the sea.", temperature=0.7, max_tokens=60, seed=2),
        Question(
            "What is 4 plus 5? Reply with the number only.",
            num_samples=8, temperature=0.7, max_tokens=32, seed=3, reference="9",
        ),
        Question(
            "Tom has 6 apples and gets 3 more. How many apples does Tom have now? "
            "Reply with the number only.",
            num_samples=8, temperature=0.7, max_tokens=32, seed=4, reference="9",
        ),
    )  # fmt: skip
    with Client(address, timeout_s=120.0) as client:
        models = client.get_models()
        for question in questions:
            response = client.compare(question.to_request())
            console.print(render(question.prompt, models, response))
            yield response


def show_bundle(console: Any, bundle: Path) -> None:
    from rich.table import Table

    from bundle.manifest import load_manifest

    manifest = load_manifest(bundle)
    values = manifest.metrics.values
    table = Table(title="variants of the student, measured in one run on this machine")
    for column in ("variant", "size", "KL to float", "KL to teacher", "argmax", "tok/s", "gates"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, variant in manifest.variants.items():
        metrics = variant.metrics
        table.add_row(
            f"{name} (default)" if name == manifest.default_variant else name,
            f"{variant.size_bytes / 1e6:.0f} MB",
            f"{metrics.get('kl_to_student', math.nan):.4f}",
            f"{metrics.get('kl_to_teacher', math.nan):.3f}",
            f"{metrics['argmax_agreement_with_teacher']:.3f}",
            f"{metrics['decode_tokens_per_s']:.0f}",
            "passed" if variant.is_passed else "FAILED",
        )
    console.print(table)
    best = manifest.variants[manifest.default_variant].metrics
    console.print(
        f"{manifest.student.num_layers} layers, {manifest.student.num_parameters / 1e6:.0f} M "
        f"parameters, from {manifest.teacher.num_parameters / 1e6:.0f} M. On "
        f"{manifest.metrics.num_prompts} held-out prompts KL(teacher ‖ student) is "
        f"{values['student_kl']:.3f} nats per token, top-1 agreement "
        f"{values['student_argmax_agreement']:.3f}.\n"
        f"One sequence, tokens per second: {manifest.default_variant} student "
        f"{best['decode_tokens_per_s']:.0f}, teacher in Tandem (bf16) "
        f"{values['teacher_torch_tokens_per_s']:.0f}, teacher in transformers (bf16) "
        f"{values['teacher_transformers_tokens_per_s']:.0f}: "
        f"{best['speedup_over_torch_teacher']:.1f}× and "
        f"{best['speedup_over_transformers']:.1f}×."
    )


# -- metrics against answers ----------------------------------------------------------------------


def _show_metrics(console: Any, metrics: Series) -> None:
    for (name, labels), value in sorted(metrics.items(), key=lambda item: item[0][0]):
        if name in SHOWN_METRICS and value:
            shown = ",".join(f'{key}="{text}"' for key, text in sorted(labels))
            console.print(f"{name}{{{shown}}} {value:g}", markup=False, highlight=False)


def compare_with_responses(metrics: Series, responses: list[pb.CompareResponse]) -> list[str]:
    """Return what `/metrics` counts otherwise than the responses do; empty when they agree."""
    expected = expected_metrics(responses)
    differences = [
        f"{name}{dict(labels)} is {_total(metrics, name, labels):g}, the answers say {said:g}"
        for (name, labels), said in expected.items()
        if abs(_total(metrics, name, labels) - said) > 1e-6 * max(1.0, abs(said))
    ]
    return differences + [
        f"{name}{dict(labels)} is {value:g}, of which the answers say nothing"
        for (name, labels), value in metrics.items()
        if value and name in WHOLE_METRICS
        if not any(name == known and said <= labels for known, said in expected)
    ]


def expected_metrics(responses: list[pb.CompareResponse]) -> Series:
    """Count in the responses what the server counts in its metrics."""
    from protos.tandem.v1 import inference_pb2 as pb

    said: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()

    def add(name: str, value: float, **labels: str) -> None:
        said[name, frozenset(labels.items())] += value  # type: ignore[assignment]

    for response in responses:
        for sample in response.samples:
            role = pb.Role.Name(sample.role).removeprefix("ROLE_").lower()
            reason = pb.FinishReason.Name(sample.finish_reason).removeprefix("FINISH_REASON_")
            add("tandem_samples_total", 1, role=role, finish_reason=reason.lower())
            add("tandem_generation_tokens_total", len(sample.token_ids), role=role)
            divergence = sample.divergence
            add("tandem_divergence_nats_sum_total", divergence.k3_sum, estimator="k3", policy=role)
            num_finite = divergence.num_tokens - divergence.nonfinite_tokens
            add("tandem_divergence_tokens_total", num_finite, estimator="k3", policy=role)
        if response.HasField("agreement"):
            agreement = response.agreement
            if agreement.HasField("student") and agreement.HasField("teacher"):
                add("tandem_consensus_total", 1, outcome=outcome_of(agreement))
            for role in ("student", "teacher"):
                for k, value in getattr(agreement, f"{role}_pass_at_k").items():
                    add("tandem_pass_at_k_sum_total", value, role=role, k=str(k))
    return dict(said)


def outcome_of(agreement: pb.Agreement) -> str:
    if agreement.HasField("same_answer"):
        return "agree" if agreement.same_answer else "disagree"
    votes = (agreement.student, agreement.teacher)
    return "no_majority" if all(vote.num_valid for vote in votes) else "invalid"


def _total(metrics: Series, name: str, labels: frozenset[tuple[str, str]]) -> float:
    """Sum the series of `name` that carry at least these labels."""
    return sum(value for (n, found), value in metrics.items() if n == name and labels <= found)
