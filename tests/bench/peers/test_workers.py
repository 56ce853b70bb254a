"""The worker protocol on a tiny real model, GGUF files, and the machine."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.peers import kl as peer_kl
from bench.peers import machine as peer_machine
from bench.peers import worker as peer_worker
from bench.peers.client import Worker, WorkerFailedError
from bench.peers.engines import peer_tandem, peer_transformers
from bench.peers.engines.peer_gguf import write_gguf
from bench.peers.machine import busy_cpu_s, describe_machine, process_cpu_s, watch_foreign_share
from tests.support.models.model_folders import TINY, write_model_folder
from tests.support.polling import wait_until


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
        children = psutil.Process().children()
        wait_until(lambda: psutil.STATUS_STOPPED in [child.status() for child in children])
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
    status = Path(f"/proc/{int(ended.stdout)}/stat")
    wait_until(lambda: not status.exists() or ") Z" in status.read_text())


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
