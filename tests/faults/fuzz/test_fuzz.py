"""The fuzz targets with a few hundred inputs each: hostile by hand, mutated, and drawn."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundle.errors import UserError
from protos.tandem.v1 import inference_pb2 as pb
from tests.faults.fuzz import answers as fuzz_answers
from tests.faults.fuzz import files as fuzz_files
from tests.faults.fuzz import http as fuzz_http
from tests.faults.fuzz import manifest as fuzz_manifest
from tests.faults.fuzz import settings as fuzz_settings
from tests.faults.fuzz import wire as fuzz_wire
from tests.faults.fuzz.__main__ import TARGETS, replay
from tests.faults.requests.hostile import mutate

NUM_MUTATIONS = 150
bounded = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", TARGETS)
def test_target_given_mutated_seeds_raises_nothing(name: str) -> None:
    target, rng = importlib.import_module(f"tests.faults.fuzz.{name}"), random.Random(8)
    seeds = list(target.seeds())
    for seed in seeds:
        target.check(seed)
    for number in range(NUM_MUTATIONS):
        seed = seeds[number % len(seeds)]
        target.check(seed[:1] + mutate(rng, seed[1:]))


@bounded
@given(st.integers(0, len(fuzz_wire.TYPES) - 1), st.binary(max_size=200))
def test_wire_given_any_bytes_raises_nothing(rpc: int, data: bytes) -> None:
    fuzz_wire.check(bytes([rpc]) + data)


@bounded
@given(
    num_samples=st.integers(0, 2**32 - 1),
    max_tokens=st.integers(0, 2**32 - 1),
    numbers=st.lists(st.floats(), min_size=4, max_size=4),
    stop=st.lists(st.text(max_size=300), max_size=20),
    texts=st.lists(st.text(max_size=200), min_size=4, max_size=4),
)
def test_wire_given_any_parameters_raises_nothing(
    num_samples: int, max_tokens: int, numbers: list[float], stop: list[str], texts: list[str]
) -> None:
    temperature, top_p, min_p, penalty = numbers
    request = pb.GenerateRequest(
        prompt=texts[0],
        request_id=texts[1],
        sampling=pb.SamplingParams(
            num_samples=num_samples, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
            min_p=min_p, repetition_penalty=penalty, stop=stop,
        ),
        evaluation=pb.EvaluationOptions(
            answer_format="boxed", reference_answer=texts[2], task=texts[3], pass_at_k=[num_samples]
        ),
    )  # fmt: skip
    fuzz_wire.check(
        bytes([fuzz_wire.TYPES.index(pb.GenerateRequest)]) + request.SerializeToString()
    )


@bounded
@given(
    st.sampled_from(fuzz_settings.NAMES),
    json_values,
    st.sampled_from(["bundle: b\n", "", "a: 1\n"]),
)
def test_settings_given_any_value_raise_nothing(name: str, value: Any, before: str) -> None:
    text = f"{before}{name}: {json.dumps(value)}\n"
    fuzz_settings.check(b"\0" + text.encode("utf-8", "surrogatepass"))


@bounded
@given(st.data())
def test_manifest_given_any_value_anywhere_raises_nothing(data: st.DataObject) -> None:
    manifest = fuzz_manifest.manifest()
    place: Any = manifest
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [value for value in place.values() if isinstance(value, dict) and value]
        place = data.draw(st.sampled_from(inner)) if inner else place
    key = data.draw(st.sampled_from(list(place)) | st.text(max_size=300))
    place[key] = data.draw(json_values)
    fuzz_manifest.check(json.dumps(manifest).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("target", "where", "data"),
    [
        (fuzz_wire, "validate_generate", next(iter(fuzz_wire.seeds()))),
        (fuzz_settings, "load_settings", next(iter(fuzz_settings.seeds()))),
        (fuzz_manifest, "verify_bundle", next(iter(fuzz_manifest.seeds()))),
        (fuzz_answers, "from_score", bytes([fuzz_answers.KINDS.index(fuzz_answers.score)])),
        (fuzz_files, "read_token", bytes([fuzz_files.KINDS.index("token")]) + b"abc"),
        (fuzz_http, "_Unnamed", b"GET / HTTP/1.0"),
    ],
)
def test_another_exception_is_found(
    target: Any, where: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("of a bug")

    monkeypatch.setattr(target, where, broken)
    with pytest.raises(KeyError, match="of a bug"):
        check: Callable[[bytes], None] = target.check
        check(data)


def test_answers_that_end_twice_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_answers.AnswerEvents, "end", lambda *_: [])
    with pytest.raises(AssertionError):
        fuzz_answers.check(b"\0")


@pytest.mark.parametrize("text", ["no name", "a\x1b[2J of token", "token " + "x" * 3000])
def test_errors_that_say_too_little_or_too_much_are_found(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise UserError(text)

    monkeypatch.setattr(fuzz_files, "read_token", refuse)
    with pytest.raises(AssertionError):
        fuzz_files.check(bytes([fuzz_files.KINDS.index("token")]))


def test_corpus_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "found").write_bytes(b"\0" + b"[" * 10)
    num_seeds = len(list(fuzz_answers.seeds()))
    replay("answers", tmp_path)
    replay("answers", None)
    assert capsys.readouterr().out == f"{num_seeds + 1} inputs\n{num_seeds} inputs\n"
