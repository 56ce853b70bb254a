"""The GPU checks tried out on the CPU with a tiny model, and what each must refuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import (
    CHECKS,
    NO_CUDA,
    TINY,
    Bench,
    CheckFailedError,
    check_divergence,
    check_placement,
    compare_graphs,
    main,
    make_random_model,
    refusal,
    run_checks,
)

NEED_CUDA = {
    "float32_is_refused",
    "cuda_graphs_onnx",
    "cuda_graphs_torch",
    "decode_static_transformers",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a whole run on the CPU writes."""
    out = tmp_path_factory.mktemp("run") / "results.json"
    assert main(["--random", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    written: dict[str, Any] = json.loads(out.read_text())
    return written


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny student without graphs."""
    folder = tmp_path_factory.mktemp("bench")
    student = make_random_model("tiny", 0, folder / "student")
    return Bench(student, student, folder / "onnx", torch.device("cpu"), TINY)


def test_every_check_passes_or_says_why_it_cannot_run(results: dict[str, Any]) -> None:
    statuses = {name: result["status"] for name, result in results.items()}
    assert statuses == {
        name: "skipped: needs CUDA" if name in NEED_CUDA else "passed" for name in CHECKS
    }


def test_parity_covers_both_runtimes_in_both_precisions(results: dict[str, Any]) -> None:
    cases = {k: v for k, v in results["parity"].items() if isinstance(v, dict)}
    assert set(cases) == {"torch float32", "torch bfloat16", "onnx float16", "onnx float32"}
    assert cases["onnx float32"]["mean_kl_nats"] < 1e-6 < cases["torch bfloat16"]["mean_kl_nats"]
    assert cases["onnx float32"]["num_same_greedy_tokens"] == [16, 16]


def test_decode_names_speed_and_bandwidth_of_each_side(results: dict[str, Any]) -> None:
    for batch in ("1", "2"):
        for side in ("onnx", "torch", "transformers"):
            found = results["decode"][batch][side]
            assert found["tokens_per_s"] == pytest.approx(1e3 * int(batch) / found["ms"]["median"])
        assert results["decode"][batch]["onnx_over_transformers"] > 0


def test_placement_counts_the_nodes_of_three_steps(results: dict[str, Any]) -> None:
    found = results["placement"]["float32"]
    assert found["num_nodes_run"] > 0 and found["num_nodes_run"] % 3 == 0
    assert found["num_memcpy"] == 0


def test_side_by_side_keeps_its_p99_for_enough_samples(results: dict[str, Any]) -> None:
    found = results["side_by_side"]["shadowed"]
    assert found["num_intervals"] == TINY.num_itl_tokens - 1
    assert found["p50_ms"] > 0 and found["p99_ms"] is None


def test_failing_check_is_recorded_and_the_rest_goes_on(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    checks = {"placement": CHECKS["placement"], "copy_bandwidth": CHECKS["copy_bandwidth"]}
    results = run_checks(bench, checks, out)
    assert results["placement"]["status"] == "failed"
    assert "model.onnx" in results["placement"]["error"]
    assert results["copy_bandwidth"]["status"] == "passed"
    assert json.loads(out.read_text()) == results


def test_failed_check_makes_the_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.gpu_check.MAX_MEAN_KL", dict.fromkeys(
        ("float32", "float16", "bfloat16"), 0.0
    ))  # fmt: skip
    assert main(["--random", "tiny", "--device", "cpu", "--only", "parity"]) == 1


def test_without_cuda_the_exit_status_is_3(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["--random", "tiny"]) == NO_CUDA
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({("CUDAExecutionProvider", "Add"): 2, ("CPUExecutionProvider", "Cast"): 1}, "Cast': 1"),
        ({("CUDAExecutionProvider", "MemcpyToHost"): 3}, "3 of them copies"),
        ({}, "0 nodes ran"),
    ],
)
def test_nodes_elsewhere_and_copies_fail(nodes: dict[tuple[str, str], int], message: str) -> None:
    with pytest.raises(CheckFailedError, match=message):
        check_placement(Counter(nodes), "CUDAExecutionProvider")


def test_loading_what_must_be_refused_fails() -> None:
    with pytest.raises(CheckFailedError, match="was loaded"):
        refusal(lambda: None)


def test_refusal_returns_the_reason() -> None:
    assert refusal(lambda: int("no CUDA kernel"))["error"].endswith("'no CUDA kernel'")


def test_divergence_beyond_the_limit_fails() -> None:
    with pytest.raises(CheckFailedError, match="too far from float32: onnx float16"):
        check_divergence({"onnx float16": {"mean_kl_nats": float("nan")}})


def test_graphs_that_change_a_token_fail() -> None:
    with pytest.raises(CheckFailedError, match=r"greedy tokens at batch sizes \[8\]"):
        compare_graphs({1: ([[1]], 2.0), 8: ([[1]], 2.0)}, {1: ([[1]], 1.0), 8: ([[2]], 1.0)})


def test_graphs_that_keep_the_tokens_have_a_ratio() -> None:
    found = compare_graphs({1: ([[1]], 2e-3)}, {1: ([[1]], 1e-3)})
    assert found["1"] == {"off_ms": 2.0, "on_ms": 1.0, "ratio": 2.0}
