"""Both runtimes on one tiny Llama: rows are independent, and the cache changes nothing.

The torch runtime has the other architectures in test_torch_backend.py.

Float models compare within rounding. The int8 graph compares bit for bit, but only along one path:
its kernels round a pass over many tokens differently from a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from serve.engine.engine import Engine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishedEvent, GenerationRequest
from serve.models.noise import measure_noise_floor
from serve.models.onnx_backend import OnnxBackend
from serve.models.torch_backend import TorchBackend
from serve.sampling.params import SamplingParams
from tests.support.models.tiny_graphs import MAX_POSITIONS, VOCAB_SIZE

MAX_MODEL_LEN = 48
MAX_NUM_SEQS = 5
KINDS = ("torch", "onnx", "int8")
FOLDERS = {"onnx": "fp32", "int8": "int8"}
FLOATS = ("torch", "onnx")
LIMITS = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN}

Rows = list[list[int]]


@pytest.fixture(scope="module")
def load(graphs: Path) -> Callable[[str], Any]:
    """`load(kind)`: one backend per kind; tests overwrite each other's rows."""
    loaded: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in loaded:
            loaded[kind] = (
                TorchBackend.load(graphs, device="cpu", dtype=torch.float32, **LIMITS)
                if kind == "torch"
                else OnnxBackend.load(graphs / FOLDERS[kind], device="cpu", num_threads=1, **LIMITS)
            )
        return loaded[kind]

    return load


@pytest.fixture(scope="module")
def reference(graphs: Path) -> Callable[[list[int]], torch.Tensor]:
    """`reference(token_ids)`: transformers' own logits behind every token, `(T, V)`."""
    model = LlamaForCausalLM.from_pretrained(graphs, attn_implementation="eager").eval()

    @torch.no_grad()
    def logits(token_ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
        return found

    return logits


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def every_position(rows: Rows) -> list[range]:
    return [range(len(row)) for row in rows]


@pytest.mark.parametrize("kind", FLOATS)
def test_logits_are_those_of_transformers(load: Any, reference: Any, kind: str) -> None:
    ids = text(20)
    assert_close(load(kind).forward(0, [ids], [0], every_position([ids])), reference(ids))


@pytest.mark.parametrize("kind", FLOATS)
def test_ragged_prefill_equals_each_prompt_alone(load: Any, reference: Any, kind: str) -> None:
    rows = [text(7, 1), text(1, 2), text(12, 3), text(4, 4)]
    logits = load(kind).forward(0, rows, [0] * 4)
    assert_close(logits, torch.stack([reference(row)[-1] for row in rows]))


@pytest.mark.parametrize("kind", FLOATS)
def test_cached_decoding_equals_one_uncached_pass(load: Any, reference: Any, kind: str) -> None:
    ids, backend = text(15), load(kind)
    steps = [backend.forward(0, [ids[:6]], [0]).clone()]
    steps += [backend.forward(0, [[ids[i]]], [i]).clone() for i in range(6, 15)]
    assert_close(torch.cat(steps), reference(ids)[5:])


@pytest.mark.parametrize("kind", FLOATS)
def test_ragged_decoding_equals_each_row_alone(load: Any, reference: Any, kind: str) -> None:
    rows, backend = [text(9, 1), text(2, 2), text(14, 3)], load(kind)
    backend.forward(0, [row[:-1] for row in rows], [0] * 3)
    logits = backend.forward(0, [row[-1:] for row in rows], [len(row) - 1 for row in rows])
    assert_close(logits, torch.stack([reference(row)[-1] for row in rows]))


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("num_new", [2, 3, 5])
def test_chunks_behind_cached_tokens_equal_the_whole(
    load: Any, reference: Any, kind: str, num_new: int
) -> None:
    rows, backend = [text(6 + num_new, 1), text(2 + num_new, 2)], load(kind)
    pasts = [len(row) - num_new for row in rows]
    backend.forward(1, [row[:-num_new] for row in rows], [0, 0])
    new = [row[-num_new:] for row in rows]
    logits = backend.forward(1, new, pasts, every_position(new))
    assert_close(logits, torch.cat([reference(row)[-num_new:] for row in rows]))


@pytest.mark.parametrize("kind", FLOATS)
def test_ragged_chunks_behind_ragged_pasts_equal_the_whole(
    load: Any, reference: Any, kind: str
) -> None:
    rows, pasts, backend = [text(9, 1), text(4, 2), text(6, 3)], [5, 3, 1], load(kind)
    backend.forward(0, [row[:n] for row, n in zip(rows, pasts, strict=True)], [0] * 3)
    new = [row[n:] for row, n in zip(rows, pasts, strict=True)]
    logits = backend.forward(0, new, pasts)
    assert_close(logits, torch.stack([reference(row)[-1] for row in rows]))


@pytest.mark.parametrize("kind", KINDS)
def test_logit_indices_pick_rows_in_order(load: Any, kind: str) -> None:
    rows, backend = [text(7, 1), text(4, 2)], load(kind)
    everything = backend.forward(0, rows, [0, 0], every_position(rows)).clone()
    picked = backend.forward(0, rows, [0, 0], [[1, 6], [0, 3]])
    assert picked.shape == (4, VOCAB_SIZE) and picked.dtype == torch.float32
    assert_close(picked, everything[[1, 6, 7, 10]])


@pytest.mark.parametrize("kind", FLOATS)
def test_copied_row_goes_its_own_way(load: Any, reference: Any, kind: str) -> None:
    prompt, backend = text(8), load(kind)
    backend.forward(2, [prompt], [0])
    backend.copy_kv(2, 3, 8)
    logits = backend.forward(2, [[1], [2]], [8, 8]).clone()
    assert_close(logits, torch.stack([reference([*prompt, i])[-1] for i in (1, 2)]))
    again = backend.forward(2, [[5], [6]], [9, 9])
    expected = [reference([*prompt, i, i + 4])[-1] for i in (1, 2)]
    assert_close(again, torch.stack(expected))


@pytest.mark.parametrize("kind", FLOATS)
def test_row_may_be_filled_to_the_last_token_beside_a_short_one(
    load: Any, reference: Any, kind: str
) -> None:
    rows, backend = [text(MAX_MODEL_LEN, 1), text(3, 2)], load(kind)
    backend.forward(0, [row[:-1] for row in rows], [0, 0])
    logits = backend.forward(0, [row[-1:] for row in rows], [MAX_MODEL_LEN - 1, 2])
    assert_close(logits, torch.stack([reference(row)[-1] for row in rows]))


@pytest.mark.parametrize("kind", FLOATS)
def test_padding_beside_a_full_row_overwrites_no_token(
    load: Any, reference: Any, kind: str
) -> None:
    full, short, backend = text(MAX_MODEL_LEN, 1), text(8, 2), load(kind)
    backend.forward(0, [full[:-1], short[:2]], [0, 0])
    logits = backend.forward(0, [full[-1:], short[2:]], [MAX_MODEL_LEN - 1, 2])
    assert_close(logits, torch.stack([reference(full)[-1], reference(short)[-1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_longest_prompt_fits(load: Any, kind: str) -> None:
    ids = text(MAX_MODEL_LEN)
    assert load(kind).forward(0, [ids], [0]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_stale_tokens_of_an_earlier_sequence_are_not_seen(load: Any, kind: str) -> None:
    ids, backend = text(6), load(kind)
    backend.forward(0, [text(40, 9)], [0])
    first = backend.forward(0, [ids], [0]).clone()
    backend.forward(0, [text(30, 8)], [0])
    assert torch.equal(backend.forward(0, [ids], [0]), first)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_int8_decode_step_has_the_same_bits_whatever_the_batch(load: Any, num_rows: int) -> None:
    rows, backend = [text(3 + i, i) for i in range(num_rows)], load("int8")
    alone = []
    for row in rows:
        backend.forward(0, [row[:-1]], [0])
        alone.append(backend.forward(0, [row[-1:]], [len(row) - 1]).clone())
    for index, row in enumerate(rows):
        backend.forward(index, [row[:-1]], [0])
    batch = backend.forward(0, [row[-1:] for row in rows], [len(row) - 1 for row in rows])
    assert torch.equal(batch, torch.cat(alone))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_int8_prefill_has_the_same_bits_whatever_the_batch(load: Any, num_rows: int) -> None:
    rows, backend = [text(2 + 3 * i, i) for i in range(num_rows)], load("int8")
    alone = [backend.forward(0, [row], [0]).clone() for row in rows]
    assert torch.equal(backend.forward(0, rows, [0] * num_rows), torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_start_finds_a_way_that_holds(load: Any, kind: str) -> None:
    backend = load(kind)
    backend.choose_kernels()
    assert backend.info.batch_invariant


@pytest.mark.parametrize("row_multiple", [2, 4, 8])
def test_larger_multiples_of_rows_compute_the_same(graphs: Path, row_multiple: int) -> None:
    class Multiple(OnnxBackend):
        ROW_MULTIPLES = (row_multiple,)

    backend = Multiple.load(graphs / "int8", device="cpu", num_threads=1, **LIMITS)
    whole = text(MAX_MODEL_LEN)
    expected = backend.forward(0, [whole], [0]).clone()
    backend.choose_kernels()
    for rows in ([whole], [text(5), whole], [text(7), text(3), whole]):
        found = backend.forward(0, rows, [0] * len(rows))[-1]
        torch.testing.assert_close(found, expected[0], rtol=0, atol=0.05)
        past = [len(row) - 1 for row in rows]
        step = backend.forward(0, [row[-1:] for row in rows], past)[-1]
        torch.testing.assert_close(step, expected[0], rtol=0, atol=0.05)


def generate(backend: Any, **settings: Any) -> list[tuple[int, ...]]:
    """Return the completions of several requests, by request and sample."""
    engine, endings = Engine(backend, eos_token_ids=frozenset({0})), dict[tuple[int, int], Any]()
    for number in range(4):

        def sink(events: list[Any], number: int = number) -> None:
            for event in events:
                if isinstance(event, FinishedEvent):
                    endings[number, event.index] = event.token_ids

        params = SamplingParams(num_samples=2, max_tokens=12, seed=number, **settings)
        prompt = tuple(text(3 + 2 * number, number))
        engine.submit(GenerationRequest(str(number), prompt, params), sink)
    while len(endings) < 8:
        engine.core.step()
    return [endings[key] for key in sorted(endings)]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_make_way_for_others_go_on_with_the_same_tokens(load: Any, kind: str) -> None:
    completions, num_aside = [], 0
    for num_others in (0, 6):
        engine = Engine(load(kind), eos_token_ids=frozenset({0}))
        endings: list[Any] = []
        params = SamplingParams(num_samples=9, max_tokens=16, seed=5, ignore_eos=True)
        engine.submit(GenerationRequest("r", tuple(text(7)), params, client="a"), endings.extend)
        while sum(isinstance(event, FinishedEvent) for event in endings) < 9:
            engine.core.step()
            num_aside += sum(s.kv is not None for s in engine.core.scheduler.rows.waiting)
            if num_others:
                num_others -= 1
                short = SamplingParams(max_tokens=3, seed=num_others, ignore_eos=True)
                other = GenerationRequest("o", tuple(text(5)), short, client=f"b{num_others}")
                engine.submit(other, lambda events: None)
        finished = [event for event in endings if isinstance(event, FinishedEvent)]
        completions.append({event.index: (event.token_ids, event.logprobs) for event in finished})
    assert num_aside > 3
    assert completions[0] == completions[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_torch_and_onnx_generate_the_same_tokens(load: Any, temperature: float) -> None:
    assert generate(load("torch"), temperature=temperature) == generate(
        load("onnx"), temperature=temperature
    )


def test_int8_scores_by_forced_decoding_are_the_bits_of_its_samples(load: Any) -> None:
    engine = Engine(load("int8"), eos_token_ids=frozenset({0}), scores_in_one_pass=False)
    endings: list[Any] = []
    params = SamplingParams(num_samples=3, max_tokens=9, seed=5, ignore_eos=True)
    engine.submit(GenerationRequest("r", tuple(text(7)), params), endings.extend)
    while sum(isinstance(event, FinishedEvent) for event in endings) < 3:
        engine.core.step()
    finished = [event for event in endings if isinstance(event, FinishedEvent)]
    completions = tuple(event.token_ids for event in finished)
    future = engine.score(ScoringRequest("s", tuple(text(7)), completions))
    while not future.done():
        engine.core.step()
    assert [tuple(one.logprobs) for one in future.result()] == [e.logprobs for e in finished]


@pytest.mark.parametrize(("kind", "in_one_pass"), [("torch", True), ("int8", False)])
def test_greedy_completion_is_greedy_token_by_token(
    load: Any, kind: str, in_one_pass: bool
) -> None:
    engine = Engine(load(kind), eos_token_ids=frozenset({0}), scores_in_one_pass=in_one_pass)
    endings: list[Any] = []
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    engine.submit(GenerationRequest("r", tuple(text(7)), params), endings.extend)
    while not endings or not isinstance(endings[-1], FinishedEvent):
        engine.core.step()
    greedy = endings[-1].token_ids
    other = (*greedy[:4], (greedy[4] + 1) % 100, *greedy[5:])
    future = engine.score(ScoringRequest("s", tuple(text(7)), (greedy, other)))
    while not future.done():
        engine.core.step()
    found = [one.is_greedy.tolist() for one in future.result()]
    assert found[0] == [True] * 9 and found[1][:5] == [True] * 4 + [False]


@pytest.mark.parametrize("kind", FLOATS)
def test_float_paths_differ_by_rounding_alone(load: Any, kind: str) -> None:
    assert measure_noise_floor(load(kind)).path_nats < 1e-4


@pytest.mark.parametrize(("kind", "backend"), [("torch", "torch"), ("onnx", "onnx")])
def test_info_describes_the_model(load: Any, kind: str, backend: str) -> None:
    info = load(kind).info
    assert (info.backend, info.device, info.vocab_size) == (backend, "cpu", VOCAB_SIZE)
    assert (info.max_model_len, info.max_num_seqs) == (MAX_MODEL_LEN, MAX_NUM_SEQS)


@pytest.mark.parametrize("kind", FLOATS)
def test_context_beyond_the_models_positions_is_refused(graphs: Path, kind: str) -> None:
    with pytest.raises(
        ValueError, match=f"max_model_len {MAX_POSITIONS + 1} exceeds the {MAX_POSITIONS}"
    ):
        if kind == "torch":
            TorchBackend.load(
                graphs,
                device="cpu",
                dtype=torch.float32,
                max_num_seqs=1,
                max_model_len=MAX_POSITIONS + 1,
            )
        else:
            OnnxBackend.load(
                graphs / FOLDERS[kind],
                device="cpu",
                max_num_seqs=1,
                max_model_len=MAX_POSITIONS + 1,
            )
