"""The GPU checks tried out on the CPU with a tiny model, and what each must refuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check.__main__ import CHECKS, NO_CUDA, main, run_checks
from bench.gpu_check.machine import TINY, Bench, CheckFailedError, make_random_model
from bench.gpu_check.parity import check_divergence, compare_graphs
from bench.gpu_check.placement import check_placement, refusal

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SKIPPED = {
    "placement_bfloat16": "onnx has no bfloat16 kernels on cpu",
    "parity_onnx_bfloat16": "onnx has no bfloat16 kernels on cpu",
    "parity_torch_float16": "torch has no float16 kernels on cpu",
    "float32_is_refused": "needs CUDA",
    "cuda_graphs_onnx": "needs CUDA",
    "cuda_graphs_torch": "needs CUDA",
    "decode_static_transformers": "needs CUDA",
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
        name: f"skipped: {SKIPPED[name]}" if name in SKIPPED else "passed" for name in CHECKS
    }


def test_parity_is_tight_in_float32_and_loose_in_bfloat16(results: dict[str, Any]) -> None:
    tight, loose = results["parity_onnx_float32"], results["parity_torch_bfloat16"]
    assert tight["mean_kl_nats"] < 1e-8 < loose["mean_kl_nats"]
    assert tight["num_same_greedy_tokens"] == [16, 16] and tight["same_argmax"] == 1


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_decode_names_speed_and_bandwidth_of_each_side(
    results: dict[str, Any], runtime: str
) -> None:
    for batch in ("1", "2"):
        found = results[f"decode_{runtime}"][batch]
        for side in (runtime, "transformers"):
            tokens_per_s = 1e3 * int(batch) / found[side]["ms"]["median"]
            assert found[side]["tokens_per_s"] == pytest.approx(tokens_per_s)
        assert set(found["share_of_copy_bandwidth"]) == {runtime, "transformers"}
        assert found["ratio"] > 0


def test_placement_counts_the_nodes_of_three_steps(results: dict[str, Any]) -> None:
    found = results["placement_float32"]
    assert found["num_nodes_run"] > 0 and found["num_nodes_run"] % 3 == 0
    assert found["num_memcpy"] == 0


def test_side_by_side_keeps_its_p99_for_enough_samples(results: dict[str, Any]) -> None:
    found = results["side_by_side"]["shadowed"]
    assert found["num_intervals"] == TINY.num_itl_tokens - 1
    assert found["p50_ms"] > 0 and found["p99_ms"] is None


def test_failing_check_is_recorded_and_the_rest_goes_on(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    checks = {name: CHECKS[name] for name in ("placement_float32", "copy_bandwidth")}
    results = run_checks(bench, checks, out)
    assert results["placement_float32"]["status"] == "failed"
    assert "model.onnx" in results["placement_float32"]["error"]
    assert results["copy_bandwidth"]["status"] == "passed"
    assert json.loads(out.read_text()) == results


def test_failed_check_makes_the_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "bench.gpu_check.parity.MAX_MEAN_KL", {"float32": 1, "float16": 1, "bfloat16": 0}
    )
    out = tmp_path / "results.json"
    arguments = ["--random", "tiny", "--device", "cpu", "--only"]
    assert main([*arguments, "parity_torch_bfloat16", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["parity_torch_bfloat16"]
    assert found["error"] == "more than 0 nats from float32" and found["mean_kl_nats"] > 0


def test_without_cuda_the_exit_status_is_3(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["--random", "tiny"]) == NO_CUDA
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("nodes", "num_memcpy", "elsewhere"),
    [
        ({(CUDA, "Add"): 2, (CPU, "Cast"): 1}, 0, {f"{CPU} Cast": 1}),
        ({(CUDA, "MemcpyToHost"): 3, (CUDA, "Add"): 1}, 3, {}),
        ({}, 0, {}),
    ],
)
def test_nodes_elsewhere_copies_and_no_nodes_fail(
    nodes: dict[tuple[str, str], int], num_memcpy: int, elsewhere: dict[str, int]
) -> None:
    with pytest.raises(CheckFailedError, match=f"not every node runs on {CUDA}") as caught:
        check_placement(Counter(nodes), CUDA)
    assert caught.value.found["num_memcpy"] == num_memcpy
    assert caught.value.found["elsewhere"] == elsewhere


def test_loading_what_must_be_refused_fails() -> None:
    with pytest.raises(CheckFailedError, match="was loaded"):
        refusal(lambda: None)


def test_refusal_returns_the_reason() -> None:
    assert refusal(lambda: int("no CUDA kernel"))["error"].endswith("'no CUDA kernel'")


def test_divergence_beyond_the_limit_fails() -> None:
    for mean_kl_nats in (0.02, float("nan")):
        with pytest.raises(CheckFailedError, match=r"more than 0.01 nats from float32"):
            check_divergence({"mean_kl_nats": mean_kl_nats}, 0.01)


def test_graphs_that_change_a_token_fail() -> None:
    with pytest.raises(CheckFailedError, match=r"greedy tokens at batch sizes \[8\]"):
        compare_graphs({1: ([[1]], 2.0), 8: ([[1]], 2.0)}, {1: ([[1]], 1.0), 8: ([[2]], 1.0)})


def test_graphs_that_keep_the_tokens_have_a_ratio() -> None:
    found = compare_graphs({1: ([[1]], 2e-3)}, {1: ([[1]], 1e-3)})
    assert found["1"] == {"off_ms": 2.0, "on_ms": 1.0, "ratio": 2.0}
