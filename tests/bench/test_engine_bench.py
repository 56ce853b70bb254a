"""The engine's benchmark on a tiny bundle: every check runs, on the wire too, and adds up."""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engine import __main__ as engine
from bench.engine.driver import QUICK, Driver, EngineStep, StepLog, drawn, greedy
from bench.engine.graph import lengthen
from bench.engine.measures import Measures, at_least, at_most, render
from bench.engine.server import mean_step_s
from bench.engine.stress import MIB, flatness
from bundle.errors import UserError
from bundle.manifest import write_manifest
from tandem.demo import serving
from tests.support.models.manifests import manifest_of

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def bundle(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher as its own student, its float graph, and some text."""
    from transformers import AutoModelForCausalLM

    from export.graph.trace import export_onnx

    folder = tmp_path_factory.mktemp("bench") / "bundle"
    graph, student = folder / "onnx" / "fp32", folder / "student"
    for target in (graph, student, folder / "eval"):
        target.mkdir(parents=True)
    for path in tiny_teacher.iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    (graph / "config.json").write_bytes((student / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn about themselves
        export_onnx(model, graph, max_model_len=2048)
    record = {"prompt": "What is 12 plus 30?", "teacher": "It is 42.", "student": "12 or 30?"}
    (folder / "eval" / "texts.jsonl").write_text(20 * (json.dumps(record) + "\n"))
    manifest = manifest_of(folder, tiny_teacher, variant="fp32", is_teacher_local=True)
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def run(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the command, return what it wrote."""
    out = tmp_path_factory.mktemp("out") / "engine.json"

    def run_checks(*words: str) -> dict[str, Any]:
        engine.main(["--bundle", str(bundle), "--out", str(out), "--quick", *words])
        written: dict[str, Any] = json.loads(out.read_text())
        return written

    return run_checks


@pytest.fixture(scope="module")
def in_process(run: Run) -> dict[str, Any]:
    return run("--only", ",".join(engine.IN_PROCESS))


# --- the command


def test_every_check_in_process_measures_something(in_process: dict[str, Any]) -> None:
    assert list(in_process["checks"]) == list(engine.IN_PROCESS)
    assert in_process["machine"]["versions"]["torch"] == torch.__version__
    assert in_process["config"]["scale"]["num_rounds"] == 1
    for measures in in_process["checks"].values():
        assert len(measures) > 1
        for measure in measures.values():
            assert measure["min"] <= measure["median"] <= measure["max"]


def test_checks_that_time_does_not_decide_come_out_right(in_process: dict[str, Any]) -> None:
    checks = in_process["checks"]
    assert checks["mixed"]["requests that end once and whole"]["values"] == [1.0]
    assert checks["soak"]["requests that end once and whole"]["values"] == [1.0]
    assert len(checks["soak"]["resident memory"]["values"]) == QUICK.num_soak / QUICK.soak_interval
    cached = checks["prefix"]["tokens from the cache"]["values"]
    assert cached == [QUICK.repeated_prompt_tokens]


def test_command_prints_the_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    measures = run("--only", "prefix")["checks"]["prefix"]
    printed = capsys.readouterr()
    assert all(name in printed.out for name in measures)
    assert "prefix …" in printed.err


def test_checks_on_the_wire_run_against_real_servers(run: Run) -> None:
    checks = run("--only", "grpc,shadow")["checks"]
    ratio = checks["grpc"]["gRPC over in process, 4 at once"]
    sides = (checks["grpc"][f"{side}, 4 at once"] for side in ("gRPC", "in process"))
    pairs = zip(*(side["values"] for side in sides), strict=True)
    assert ratio["values"] == [a / b for a, b in pairs]
    assert ratio["target"] == "≥ 0.92"
    shadow = checks["shadow"]
    for label in ("1 closed loop", "2 overlapping"):
        assert shadow[f"{label}, shadowed: mean teacher score step"]["median"] > 0
        assert f"{label}, unshadowed: mean teacher score step" not in shadow


def test_unknown_check_ends_the_command_with_the_choices(run: Run) -> None:
    with pytest.raises(SystemExit, match="--only speed: choose from host_time,decode"):
        run("--only", "speed")


def test_unknown_variant_is_refused(run: Run) -> None:
    with pytest.raises(SystemExit, match="'int8' is none of fp32"):
        run("--variant", "int8")


def test_bundle_whose_teacher_is_gone_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = manifest_of(bundle, bundle / "student", variant="fp32")
    reference = manifest.teacher.model_copy(update={"local_path": str(tmp_path / "gone")})
    options = argparse.Namespace(bundle=bundle, teacher=None)
    with pytest.raises(UserError, match="give --teacher"):
        engine.make_setting(options, manifest.model_copy(update={"teacher": reference}), "fp32")


def test_server_that_cannot_start_says_why() -> None:
    with pytest.raises(UserError, match="did not become ready"), serving(Path("nowhere")):
        pass


# --- arithmetic


def test_ratio_is_judged_by_its_median() -> None:
    measures = Measures()
    for value in (0.9, 1.0, 2.0):
        measures.add("ratio", "×", value, at_most(1.0))
        measures.add("speed", "tokens/s", value, at_least(1.1))
    assert [m.is_met for m in measures.by_name.values()] == [True, False]
    ratio, speed = render({"check": measures}).splitlines()[-2:]
    assert ratio.endswith("met") and speed.endswith("MISSED")
    assert "(0.9–2)" in ratio


def test_first_round_warms_up_and_orders_alternate() -> None:
    measures = Measures()
    orders = []
    for current in measures.rounds(2):
        current.add("number", "", current.number)
        orders.append("".join(current.order(["a", "b"])))
    assert measures.by_name["number"].values == [0, 1]
    assert orders == ["ab", "ba", "ab"]


def test_only_decode_steps_that_followed_each_other_are_pairs() -> None:
    log = StepLog()
    kinds = [("decode", 2), ("decode", 2), ("prefill", 1), ("decode", 2), ("decode", 1)]
    log.steps = [EngineStep(*kind, 1.0, 0.25, number) for number, kind in enumerate(kinds)]
    assert [(a.ended_s, b.ended_s) for a, b in log.decode_pairs(2)] == [(0, 1)]
    assert len(log.decodes(2)) == 3
    assert log.steps[0].model_s == 0.75


def test_steady_growth_of_memory_shows() -> None:
    steady = [1000 * MIB + 10 * MIB * number for number in range(20)]
    excess_bytes, allowed_bytes, slope_bytes = flatness(steady)
    assert excess_bytes == 45 * MIB
    assert slope_bytes == pytest.approx(10 * MIB)
    assert allowed_bytes == pytest.approx(0.05 * 1145 * MIB)


def test_mean_step_is_of_what_came_between_two_scrapes() -> None:
    def page(seconds: float, count: float) -> Any:
        labels = frozenset({("role", "teacher"), ("phase", "score")})
        name = "tandem_engine_step_seconds"
        return {(f"{name}_sum", labels): seconds, (f"{name}_count", labels): count}

    assert mean_step_s(page(1.0, 2), page(4.0, 8), "teacher", "score") == (0.5, 6)
    assert mean_step_s({}, {}, "student", "decode") == (0.0, 0.0)


# --- longer graphs


def test_lengthened_graph_computes_the_same_and_reaches_further(
    bundle: Path, tmp_path: Path
) -> None:
    from serve.models.onnx_backend import OnnxBackend

    lengthen(bundle / "onnx" / "fp32", tmp_path / "longer", 4096)
    limits: dict[str, Any] = {"device": "cpu", "max_num_seqs": 1, "num_threads": 1}
    short = OnnxBackend.load(bundle / "onnx" / "fp32", max_model_len=2048, **limits)
    long = OnnxBackend.load(tmp_path / "longer", max_model_len=4096, **limits)
    text = [5 + number % 400 for number in range(3000)]
    expected = short.forward(0, [text[:500]], [0])
    torch.testing.assert_close(long.forward(0, [text[:500]], [0]), expected, rtol=0, atol=1e-5)
    assert long.forward(0, [text], [0]).isfinite().all()


def test_scaled_rotary_tables_are_refused(bundle: Path, tmp_path: Path) -> None:
    variant = tmp_path / "scaled"
    shutil.copytree(bundle / "onnx" / "fp32", variant)
    config = json.loads((variant / "config.json").read_text())
    (variant / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    with pytest.raises(UserError, match="rotary tables are scaled"):
        lengthen(variant, tmp_path / "longer", 4096)


# --- the driver


def test_driver_runs_samples_to_their_length_and_scores_them(tiny_teacher: Path) -> None:
    from serve.models.torch_backend import TorchBackend

    backend = TorchBackend.load(
        tiny_teacher, device="cpu", dtype=torch.float32, max_num_seqs=4, max_model_len=64
    )
    driver = Driver(backend, num_torch_threads=1)
    (reader,) = driver.generate([[5, 6, 7]], drawn(6, num_samples=3))
    assert [len(completion) for completion in reader.completions] == [6, 6, 6]
    assert 0 < reader.ttft_s < reader.ended_s - reader.submitted_s
    assert len(driver.log.decodes(3)) == 5
    scored = driver.score([5, 6, 7], reader.completions)
    for sample, ending in zip(scored, sorted(reader.endings, key=lambda e: e.index), strict=True):
        assert sample.logprobs == pytest.approx(ending.logprobs, abs=1e-4)


def test_reader_refuses_completions_that_were_cut(tiny_teacher: Path) -> None:
    from serve.models.torch_backend import TorchBackend

    backend = TorchBackend.load(
        tiny_teacher, device="cpu", dtype=torch.float32, max_num_seqs=1, max_model_len=16
    )
    driver = Driver(backend, num_torch_threads=1)
    reader = driver.submit([5, 6], greedy(8))
    driver.engine.stop()
    with pytest.raises(AssertionError, match="SHUTDOWN"):
        _ = reader.completions
