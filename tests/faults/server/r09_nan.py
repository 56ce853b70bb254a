"""NaN logits are injected: that request alone fails, its batch mates are byte-identical.

Over the wire: of 5,000 requests a fifth have logits with NaN or +inf from some token on. Tokens,
log-probabilities and divergences of all others are equal to the last bit to those of a run without.
On real models the NaN lies in the KV cache: neither the batch that it is in nor who uses the row
afterwards may notice. At the size of the tests that is torch alone, otherwise onnxruntime as well.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.ledger.journal import OK
from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.sequence import Event, FinishedEvent, FinishReason, GenerationRequest
from serve.models.onnx_backend import OnnxBackend
from serve.models.torch_backend import TorchBackend
from serve.sampling.params import SamplingParams
from tests.faults.answers import answers_of, codes_of
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of
from tests.faults.server.faulty import quiet_log
from tests.support.backends import HistoryBackend
from tests.support.tiny_bundle import shared_tiny_bundle

NUM_REQUESTS = {Size.CI: 80, Size.FULL: 5000}
NUM_ROUNDS = {Size.CI: 1, Size.FULL: 40}
SPOILED_PART = 5  # one of so many requests
MARK = 1
"""A prompt that begins with it is spoiled."""
RealBackend = TorchBackend | OnnxBackend


class SpoiledBackend(HistoryBackend):
    """Spoils sequences that begin with `MARK`, from the length that their second token says."""

    is_on = False

    def logits_after(self, token_ids: Sequence[int]) -> torch.Tensor:
        logits = super().logits_after(token_ids)
        if not self.is_on or token_ids[0] != MARK or len(token_ids) < token_ids[1]:
            return logits
        logits = logits.clone()
        match token_ids[1] % 3:
            case 0:
                logits[:] = torch.nan
            case 1:
                logits[-1] = torch.nan
            case 2:
                logits[0] = torch.inf
        return logits


def run(size: Size) -> RowResult:
    """Spoil a fifth of the requests, on the wire and on real models."""
    result = RowResult("R9", "NaN logits injected")
    with ExitStack() as stack:
        stack.enter_context(quiet_log())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        rig = stack.enter_context(Rig(Path(folder), max_replays=0, make_backend=SpoiledBackend))
        requests = list(_requests(NUM_REQUESTS[size]))
        reference = rig.drive(iter(requests), "reference")
        _switch(rig, is_on=True)
        journal = rig.drive(iter(requests), "spoiled")
        result.add(rig.ledger(journal, reference))
        _switch(rig, is_on=False)
        result.leaks = rig.leaks()
        _judge(result, requests, journal, reference)
    for backend in _real_backends(size):
        _spoil_a_real_one(result, backend, NUM_ROUNDS[size])
    return result


def _requests(count: int) -> Iterator[pb.GenerateRequest]:
    for number, request in enumerate(requests_of(count, seed=9)):
        if number % SPOILED_PART == 0:
            # Longer than its prompt, that logits are spoiled in prefills and in decode steps.
            length = 4 + number // SPOILED_PART % 20
            prompt = [MARK, length, *request.prompt_token_ids.ids]
            request.prompt_token_ids.CopyFrom(pb.TokenIds(ids=prompt))
        yield request


def _switch(rig: Rig, *, is_on: bool) -> None:
    for backend in rig.backends.values():
        assert isinstance(backend, SpoiledBackend)
        backend.is_on = is_on


def _judge(
    result: RowResult, requests: Sequence[pb.GenerateRequest], journal: Path, reference: Path
) -> None:
    """Hold the codes of the spoiled requests, and all that the others brought, to the targets."""
    ended, answers, expected = codes_of(journal), answers_of(journal), answers_of(reference)
    spoiled = [r.request_id for r in requests if r.prompt_token_ids.ids[0] == MARK]
    good = ended.keys() - set(spoiled)
    codes = Counter(ended[request_id] for request_id in spoiled)
    different = sorted(i for i in good if answers[i] != expected[i])
    result.measured = {
        "num_spoiled": len(spoiled),
        "num_failed": codes["INTERNAL"],
        "num_good": len(good),
        "num_good_that_differ": len(different),
    }
    result.demand(codes["INTERNAL"] * 3 > len(spoiled), f"only {codes['INTERNAL']} failed")
    odd = set(codes) - {OK, "INTERNAL"}
    result.demand(not odd, f"spoiled requests ended with {sorted(odd)}")
    result.demand(not different, f"{len(different)} batch mates differ: {different[:5]}")


# -- real models --------------------------------------------------------------------------------


def _real_backends(size: Size) -> Iterator[RealBackend]:
    """Yield a tiny model in the runtimes; it takes onnx many seconds to write one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    limits = {"max_num_seqs": 4, "max_model_len": 64}
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(config).eval().to(dtype)
        yield TorchBackend.take(model, device="cpu", **limits)
    if size is Size.FULL:
        graph = shared_tiny_bundle() / "onnx" / "fp32"
        yield OnnxBackend.load(graph, device="cpu", num_threads=1, **limits)


def _spoil_a_real_one(result: RowResult, backend: RealBackend, num_rounds: int) -> None:
    """Run the same requests with and without NaN in the cache of the marked ones.

    Without, these end by themselves where the NaN ends them, so that batches are the same.
    """
    runs = []
    for is_on in (False, True):
        backend.cache.tensor.zero_()
        forward = backend.forward
        if is_on:
            _spoil_cache(backend)
        engine = Engine(backend, eos_token_ids=frozenset(), max_pass_tokens=16)
        runs.append([_answers(engine, number, is_on=is_on) for number in range(num_rounds)])
        backend.forward = forward  # type: ignore[method-assign]
        load = engine.load()
        if load.num_running or load.num_waiting or load.num_unaccounted:
            result.leaks.append(f"{backend.info.backend}: {load}")
    result.num_requests += sum(len(answers) for answers in runs[1])
    num_different = sum(
        mine != theirs
        for of_mine, of_theirs in zip(*runs, strict=True)
        for mine, theirs in zip(of_mine, of_theirs, strict=True)
    )
    name = f"{backend.info.backend} {backend.info.precision}"
    result.measured[f"num_different, {name}"] = num_different
    result.num_altered += num_different
    result.demand(num_different == 0, f"{name}: {num_different} answers differ beside NaN")


def _spoil_cache(backend: RealBackend) -> None:
    """Have the keys and values of marked prompts be NaN once they are in the cache."""
    forward = backend.forward

    def spoiled(first_row: int, ids: Sequence[Sequence[int]], past: Sequence[int],
                *rest: Any) -> torch.Tensor:  # fmt: skip
        logits = forward(first_row, ids, past, *rest)
        for row, new in enumerate(ids, first_row):
            if past[row - first_row] == 0 and new[0] == MARK:
                backend.cache.tensor[:, row, :, : len(new)] = torch.nan
        return logits

    backend.forward = spoiled  # type: ignore[method-assign]


def _answers(engine: Engine, number: int, *, is_on: bool) -> list[Any]:
    """Run a batch of which every fourth request is marked; those must fail where it `is_on`."""
    ended: dict[int, FinishedEvent] = {}
    for place in range(12):
        is_marked = place % 4 == 1
        length = 3 + (place * 5 + number) % 24  # with prompts of several chunks
        prompt = (MARK if is_marked else 7, 10 + number % 30, *range(10, 10 + length))
        max_tokens = 1 if is_marked and not is_on and len(prompt) <= 16 else 8

        def sink(events: list[Event], place: int = place) -> None:
            if isinstance(events[-1], FinishedEvent):
                ended[place] = events[-1]

        sampling = SamplingParams(max_tokens=max_tokens, seed=place, ignore_eos=True)
        engine.submit(
            GenerationRequest(f"{number}-{place}", prompt, sampling, cache_salt=None), sink
        )
    for _ in OfflineEngine(engine).run():
        pass
    return [
        (event.finish_reason is FinishReason.ERROR) is is_on or "marked"
        if place % 4 == 1
        else (event.token_ids, event.logprobs, event.finish_reason)
        for place, event in sorted(ended.items())
    ]
