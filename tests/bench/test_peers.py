"""The arithmetic, resuming, absent peers, and the worker protocol on a tiny real model."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.peers import kl as peer_kl
from bench.peers import machine as peer_machine
from bench.peers import worker as peer_worker
from bench.peers.client import Worker, WorkerFailedError
from bench.peers.engines import peer_tandem, peer_transformers
from bench.peers.engines.peer_gguf import write_gguf
from bench.peers.environments import (
    ENVIRONMENTS,
    EnvironmentMissingError,
    PeerEnvironment,
    fingerprint,
    last_words,
    prepare,
    worker_variables,
)
from bench.peers.machine import busy_cpu_s, describe_machine, process_cpu_s, watch_foreign_share
from bench.peers.results import Config, Measurement, Results, SideRecord, read_results, resume
from bench.peers.rounds import SideTurn, draw_prompts, measure_round, shuffled_turns
from bench.peers.sides import FAMILIES, make_sides
from bench.peers.table import derived, ratios, render
from bench.plot import main as plot_main
from bench.prompts import MIN_PROMPTS, PromptSource, read_answers
from bundle.errors import UserError
from bundle.manifest import FileEntry, Manifest
from tests.support.model_folders import TINY, write_model_folder

CONFIG = Config("0" * 64, (1, 8), 64, 64, (512,), seed=0)


def make_results(seconds: dict[str, Sequence[float]], **kl_nats: float) -> Results:
    """Each side decodes 63 tokens in `seconds[side][round]` and prefills 512 in a tenth of it."""
    results = Results({"cpu": "test", "num_cores": 2}, CONFIG)
    for side, rounds in seconds.items():
        results.sides[side] = SideRecord("weights", kl_nats=kl_nats.get(side.replace("-", "_")))
        for number, decode_s in enumerate(rounds):
            for batch in CONFIG.batches:
                m = Measurement(number, side, "decode", batch, 1.0, 1.0 + decode_s)
                results.measurements.append(m)
            results.measurements.append(Measurement(number, side, "prefill", 512, decode_s / 10))
    return results


# -- arithmetic -----------------------------------------------------------------------------------


def test_decode_is_the_long_run_less_the_short_one() -> None:
    results = make_results({"vllm": [3.0]})
    assert results.values("vllm", "decode", 8) == {0: 63 * 8 / 3.0}
    assert results.values("vllm", "run", 8) == {0: 64 * 8 / 4.0}
    assert results.values("vllm", "prefill", 512) == {0: 0.3}


def test_ratio_is_taken_within_a_round_before_the_median() -> None:
    results = make_results({"tandem-int8": [1.0, 10.0, 1.0], "vllm": [2.0, 30.0, 4.0]})
    spread = results.ratio("tandem-int8", "vllm", "decode", 1)
    assert spread is not None
    assert (spread.median, spread.min, spread.max) == pytest.approx((3.0, 2.0, 4.0))
    prefill = results.ratio("tandem-int8", "vllm", "prefill", 512)
    assert prefill is not None and prefill.median == pytest.approx(3.0)


def test_rounds_that_one_side_lacks_are_not_paired() -> None:
    results = make_results({"tandem-int8": [1.0, 1.0], "vllm": [2.0]})
    spread = results.ratio("tandem-int8", "vllm", "decode", 1)
    assert spread is not None and spread.max == pytest.approx(2.0)
    assert results.ratio("tandem-int8", "genai-int8", "decode", 1) is None


def test_best_variant_is_the_fastest_that_passes_its_gate() -> None:
    seconds = {"tandem-int4": [1.0], "tandem-int8": [2.0], "tandem-fp32": [4.0]}
    kl = {"tandem_int4": 0.3, "tandem_int8": 0.02, "tandem_fp32": 0.0}
    assert make_results(seconds, **kl).best_variant() == "tandem-int8"
    assert make_results(seconds).best_variant() is None
    assert make_results({"tandem-torch": [0.1]}, tandem_torch=0.0).best_variant() is None


def test_a_variant_that_was_not_measured_at_every_batch_is_not_the_best() -> None:
    results = make_results({"tandem-int8": [1.0]}, tandem_int8=0.0)
    results.measurements = [m for m in results.measurements if m.size != 8]
    assert results.best_variant() is None


def test_ratios_know_their_targets() -> None:
    seconds = {"tandem-int8": [1.0], "genai-int8": [1.2], "transformers": [6.0], "vllm": [2.0]}
    rows = {(r.theirs, r.kind, r.size): r for r in ratios(make_results(seconds, tandem_int8=0.01))}
    assert rows["genai-int8", "decode", 1].is_met
    assert rows["genai-int8", "decode", 8].is_met is False  # 1.2 is below 1.25
    assert rows["transformers", "decode", 8].target == 2.0
    assert rows["vllm", "decode", 1].is_met is False
    best_prefill = rows["genai-int8", "prefill", 512]
    assert best_prefill.spread.median == pytest.approx(1.2) and best_prefill.is_met


def test_tables_name_the_kl_of_every_side_and_who_is_absent() -> None:
    results = make_results({"tandem-int8": [1.0], "genai-int8": [2.0]}, tandem_int8=0.0105)
    results.sides["vllm"] = SideRecord("student, bf16", absent="cannot be had: no wheel")
    text = render(results)
    assert "ABSENT vllm: cannot be had: no wheel" in text
    assert re.search(r"tandem-int8 +weights +0\.0105", text)
    assert re.search(r"decode +1 sequences +tandem-int8 / genai-int8: 2\.00 .* ≥ 1\.05  met", text)
    assert derived(results)["ratios"][0]["is_met"] is True


# -- one file -------------------------------------------------------------------------------------


def test_saved_results_are_read_back(tmp_path: Path) -> None:
    results = make_results({"tandem-int8": [1.0, 2.0]}, tandem_int8=0.01)
    results.save(tmp_path / "out.json", derived(results))
    assert read_results(tmp_path / "out.json") == results
    assert resume(tmp_path / "out.json", CONFIG) == results


def test_resume_refuses_another_setting(tmp_path: Path) -> None:
    results = make_results({"tandem-int8": [1.0]})
    results.save(tmp_path / "out.json", {})
    other = Config("1" * 64, (1,), 64, 64, (512,), seed=0)
    with pytest.raises(UserError, match="was measured with"):
        resume(tmp_path / "out.json", other)


def test_plot_draws_the_sides_that_were_measured(tmp_path: Path) -> None:
    results = make_results({"tandem-int8": [1.0, 1.1], "vllm": [2.0, 2.1]})
    results.sides["genai-int8"] = SideRecord("int8 graph", absent="no wheel")
    results.save(tmp_path / "out.json", {})
    plot_main([str(tmp_path / "out.json"), str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# -- rounds and prompts ---------------------------------------------------------------------------

SOURCE = PromptSource.of(range(2000), max_tokens=512, seed=0)


class CountingWorker:
    """Takes a second per token; fails at its `fails_at`th run."""

    peak_memory_bytes = 123

    def __init__(self, fails_at: int | None = None) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.num_runs = 0
        self.is_closed = False
        self._fails_at = fails_at

    def generate(self, prompts: list[list[int]], max_tokens: int) -> float:
        self.num_runs += 1
        if self.num_runs == self._fails_at:
            raise WorkerFailedError("out of memory")
        self.prompts += map(tuple, prompts)
        return float(max_tokens)

    def cpu_s(self) -> float:
        return 0.0

    def close(self) -> None:
        self.is_closed = True


def run_round(number: int, results: Results, **workers: CountingWorker) -> None:
    for side in workers:
        results.sides.setdefault(side, SideRecord("weights"))
    for _ in measure_round(number, workers, SOURCE, results):  # type: ignore[arg-type]
        pass


def test_every_side_is_measured_once_per_kind_on_the_same_prompts() -> None:
    results, a, b = make_results({}), CountingWorker(), CountingWorker()
    run_round(0, results, a=a, b=b)
    assert len(results.measurements) == 2 * 3
    assert a.prompts == b.prompts
    assert len(set(a.prompts)) == len(a.prompts) == 3 * (1 + 8) + 2
    assert results.sides["a"].peak_memory_bytes == 123


def test_no_prompt_comes_again_in_another_round() -> None:
    results, worker = make_results({}), CountingWorker()
    for number in range(3):
        run_round(number, results, a=worker)
    assert len(set(worker.prompts)) == len(worker.prompts) == 3 * 29


def test_resumed_round_measures_only_what_is_missing() -> None:
    results, first, second = make_results({}), CountingWorker(), CountingWorker()
    run_round(0, results, a=first)
    kept = results.measurements.pop(1)
    run_round(0, results, a=second)
    assert results.measurements[-1].kind == kept.kind and len(results.measurements) == 3
    assert 0 < second.num_runs <= 3 < first.num_runs


def test_side_that_fails_is_absent_from_then_on() -> None:
    results, good, bad = make_results({}), CountingWorker(), CountingWorker(fails_at=2)
    run_round(0, results, good=good, bad=bad)
    assert "out of memory" in (results.sides["bad"].absent or "") and bad.is_closed
    assert bad.num_runs == 2 and len(results.measurements) == 3
    assert results.sides["good"].absent is None


def test_the_sides_of_a_kind_are_neighbours_in_an_order_that_changes() -> None:
    orders = [list(shuffled_turns(n, ["a", "b", "c"], CONFIG)) for n in range(6)]
    for turns in orders:
        assert all(len({(t.kind, t.size) for t in turns[i : i + 3]}) == 1 for i in (0, 3, 6))
    assert len({tuple((t.side, t.kind) for t in turns) for turns in orders}) > 1


def test_prompts_have_the_length_of_their_kind() -> None:
    runs = draw_prompts(SOURCE, SideTurn(0, "a", "prefill", 512), CONFIG)
    assert [[len(prompt) for prompt in run] for run in runs] == [[512], [512], [512]]
    runs = draw_prompts(SOURCE, SideTurn(0, "a", "decode", 8), CONFIG)
    assert [{len(prompt) for prompt in run} for run in runs] == [{64}] * 3


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MIN_PROMPTS} are needed"):
        PromptSource.of(range(600), max_tokens=512, seed=0)


def test_answers_are_counted_in_tokens(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "student").symlink_to(tiny_teacher)
    (tmp_path / "eval").mkdir()
    record = {"prompt": "What is 1 + 2?", "teacher": "1 + 2 is 3.", "student": "3"}
    lines = "\n".join([json.dumps(record)] * 5)
    (tmp_path / "eval" / "texts.jsonl").write_text(lines)
    chats = read_answers(tmp_path, num_tokens=10)
    assert 1 <= len(chats) < 5 and sum(count for _, count in chats) >= 10
    assert all(0 < count < len(token_ids) for token_ids, count in chats)


# -- sides and environments -----------------------------------------------------------------------


def make_manifest() -> Manifest:
    """Only what the sides are made from."""
    weights = FileEntry(sha256="a" * 64, size_bytes=1)
    return Manifest.model_construct(
        files={"student/model.safetensors": weights},
        variants={"int8": None, "int4": None},
        default_variant="int8",
    )


def test_sides_share_the_default_graph(tmp_path: Path) -> None:
    sides = make_sides(tmp_path, make_manifest(), ["int8", "int4"], FAMILIES, tmp_path)
    names = [side.name for side in sides]
    assert names == [
        *("tandem-int8", "tandem-int4", "tandem-torch", "transformers"),
        *("ortmodel-int8", "genai-int8", "vllm", "llamacpp"),
    ]
    paths = {side.options["path"] for side in sides if side.name.endswith("-int8")}
    assert len(paths) == 1


def test_peers_can_be_chosen_and_unknown_names_are_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    sides = make_sides(tmp_path, manifest, ["int8"], ["vllm"], tmp_path)
    assert [side.name for side in sides] == ["tandem-int8", "tandem-torch", "vllm"]
    with pytest.raises(UserError, match="'int3' is none of int8, int4"):
        make_sides(tmp_path, manifest, ["int3"], [], tmp_path)
    with pytest.raises(UserError, match="'vlm' is none of transformers"):
        make_sides(tmp_path, manifest, ["int8"], ["vlm"], tmp_path)


def test_an_environment_that_cannot_be_installed_says_why(tmp_path: Path) -> None:
    environment = PeerEnvironment("none", ("./no-such-folder",))
    with pytest.raises(EnvironmentMissingError, match=r"none: ERROR: .*no-such-folder"):
        prepare(environment, tmp_path)
    assert not (tmp_path / "none" / "installed.json").exists()


def test_an_installation_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.environments.INSTALL_TIMEOUT_S", 0.0)
    with pytest.raises(EnvironmentMissingError, match="not installed within 0 s"):
        prepare(PeerEnvironment("none", ("x",)), tmp_path)


def test_an_installed_environment_is_used_as_it_is(tmp_path: Path) -> None:
    environment = PeerEnvironment("empty", ())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "installed.json").write_text(fingerprint(environment))
    assert prepare(environment, tmp_path) == tmp_path / "empty" / "bin" / "python"


def test_a_preloaded_library_is_the_environments_own(tmp_path: Path) -> None:
    preload = worker_variables(ENVIRONMENTS["vllm"], tmp_path)["LD_PRELOAD"]
    assert preload == str(tmp_path / "vllm" / "lib" / "libiomp5.so")
    assert worker_variables(ENVIRONMENTS["genai"], tmp_path) == {}


@pytest.mark.parametrize(
    ("log", "words"),
    [("\n\n", "a.log is empty"), ("one\ntwo\n", "two"), ("ERROR: one\nHint\n", "ERROR: one")],
)
def test_last_words_of_a_log(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / "a.log").write_text(log)
    assert last_words(tmp_path / "a.log") == words


# -- workers --------------------------------------------------------------------------------------


def test_worker_answers_and_rests_stopped(tiny_teacher: Path, tmp_path: Path) -> None:
    worker = Worker(Path(sys.executable), "bench.peers.engines.peer_tandem", tmp_path / "log", {})
    try:
        options = {"backend": "torch", "path": str(tiny_teacher), "num_threads": 1}
        loaded = worker.load({**options, "max_num_seqs": 2, "max_model_len": 64})
        assert loaded["versions"]["torch"] == torch.__version__ and loaded["load_s"] > 0
        assert worker.generate([[1, 2, 3], [4, 5, 6]], 4) > 0
        worker.write_logits([([1, 2, 3, 4], 2), ([5, 6, 7], 1)], tmp_path / "logits.npy")
        assert np.load(tmp_path / "logits.npy").shape == (3, 512)
        assert worker.peak_memory_bytes > 2**20 and worker.cpu_s() > 0
        _, status = os.waitpid(worker._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    finally:
        worker.close()


def test_worker_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    worker = Worker(Path(sys.executable), "bench.no_such_module", tmp_path / "log", {})
    with pytest.raises(WorkerFailedError, match=r"No module named 'bench\.no_such_module'"):
        worker.load({})
    with pytest.raises(WorkerFailedError, match="No module named"):
        worker.generate([[1]], 1)
    worker.close()


def test_a_stopped_process_dies_with_its_parent() -> None:
    child = "import os, signal; from bench.peers.worker import die_with_parent; die_with_parent();"
    child += "print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    parent = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]],"
    parent += "stdout=subprocess.PIPE, start_new_session=True).stdout.readline().decode())"
    ended = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, check=True)
    status, deadline_s = Path(f"/proc/{int(ended.stdout)}/stat"), time.monotonic() + 60
    while status.exists() and ") Z" not in status.read_text():
        assert time.monotonic() < deadline_s, status.read_text()


def test_worker_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.client.LOAD_TIMEOUT_S", 0.0)
    worker = Worker(Path(sys.executable), "bench.no_such_module", tmp_path / "log", {})
    with pytest.raises(WorkerFailedError, match="no answer within 0 s"):
        worker.load({})
    worker.close()


class EchoRunner:
    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> Sequence[Sequence[int]]:
        return [prompt[:max_tokens] for prompt in prompts]

    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        return np.zeros((num_rows, 8), np.float64)


def test_worker_refuses_a_run_that_is_too_short() -> None:
    request = {"op": "generate", "prompts": [[1, 2, 3], [4]], "max_tokens": 2}
    with pytest.raises(RuntimeError, match=re.escape("2 tokens each of 2, got [2, 1]")):
        peer_worker.handle(EchoRunner(), request)


def test_worker_refuses_an_unknown_request() -> None:
    with pytest.raises(ValueError, match="'sing' is none of load, generate, logits"):
        peer_worker.handle(EchoRunner(), {"op": "sing"})


def test_worker_saves_logits_as_float32(tmp_path: Path) -> None:
    request = {"op": "logits", "chats": [[[1, 2], 1]], "path": str(tmp_path / "x.npy")}
    assert peer_worker.handle(EchoRunner(), request) == {"num_tokens": 1}
    assert np.load(tmp_path / "x.npy").dtype == np.float32


def test_worker_loop_loads_first(tiny_teacher: Path) -> None:
    options = {"path": str(tiny_teacher), "dtype": "float32", "num_threads": 1}
    lines = [
        json.dumps({"op": "load", "options": options}),
        json.dumps({"op": "generate", "prompts": [[3, 4, 5]], "max_tokens": 2}),
    ]
    threads, replies = torch.get_num_threads(), io.StringIO()
    try:
        peer_worker.serve(
            "bench.peers.engines.peer_transformers", io.StringIO("\n".join(lines)), replies
        )
    finally:
        torch.set_num_threads(threads)
    loaded, generated = map(json.loads, replies.getvalue().splitlines())
    assert set(loaded) == {"versions", "load_s", "peak_memory_bytes"}
    assert generated["seconds"] > 0


def test_tandem_and_transformers_runners_agree(tiny_teacher: Path) -> None:
    from serve.models.torch_backend import TorchBackend

    backend = TorchBackend.load(
        tiny_teacher, device="cpu", dtype=torch.float32, max_num_seqs=2, max_model_len=64
    )
    ours = peer_tandem.TandemRunner(backend)
    theirs = peer_transformers.TransformersRunner(
        AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    )
    token_ids = [5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(
        ours.logits(token_ids, 3), theirs.logits(token_ids, 3), rtol=1e-3, atol=1e-3
    )
    prompts = [token_ids, token_ids[::-1]]
    for runner in (ours, theirs):
        completions = runner.generate(prompts, 5)
        assert [len(completion) for completion in completions] == [5, 5]
        assert completions[0][0] == int(runner.logits([*token_ids, 0], 1).argmax())


def test_kl_is_the_mean_over_positions(tmp_path: Path) -> None:
    p, q = np.log([[0.7, 0.2, 0.1]] * 100), np.log([[0.2, 0.3, 0.5]] * 100)
    np.save(tmp_path / "p.npy", p.astype(np.float32))
    np.save(tmp_path / "q.npy", q.astype(np.float32))
    kl, num_tokens = peer_kl.mean_kl(tmp_path / "p.npy", tmp_path / "q.npy")
    assert kl == pytest.approx(0.634897, abs=1e-5) and num_tokens == 100


# -- GGUF and machine -----------------------------------------------------------------------------


def test_gguf_has_the_students_weights(tiny_teacher: Path, tmp_path: Path) -> None:
    write_gguf(tiny_teacher, tmp_path / "tiny.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    query = tensors["blk.1.attn_q.weight"]
    got = gguf.dequantize(query.data, query.tensor_type)
    want = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    # Head 0 has 16 rows; ggml has row 0 of its first half next to row 0 of its second.
    np.testing.assert_allclose(got[1], want[8], atol=0.01)
    np.testing.assert_allclose(got[2], want[1], atol=0.01)
    assert len(tensors) == 2 + 9 * 4


def test_gguf_refuses_another_architecture(tmp_path: Path) -> None:
    names = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    write_model_folder(tmp_path, {**TINY, **names, "tie_word_embeddings": True})
    with pytest.raises(ValueError, match="no Llama with tied embeddings: qwen2"):
        write_gguf(tmp_path, tmp_path / "x.gguf")


def test_foreign_share_leaves_out_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2 s of 4 cores all processes took 3 s, of which 1 s is what is measured."""
    clock_s, busy_s, own_s = (iter(pair) for pair in ((7.0, 9.0), (100.0, 103.0), (5.0, 6.0)))
    monkeypatch.setattr(peer_machine, "time", SimpleNamespace(monotonic=lambda: next(clock_s)))
    monkeypatch.setattr(peer_machine, "busy_cpu_s", lambda: next(busy_s))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with watch_foreign_share(lambda: next(own_s)) as foreign:
        pass
    assert foreign.share == 0.25


def test_cpu_time_of_the_machine_and_of_a_process_is_read() -> None:
    assert 0 < process_cpu_s(os.getpid()) <= busy_cpu_s()


def test_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"] and machine["num_cores"] >= 1 and machine["memory_bytes"] > 2**30
