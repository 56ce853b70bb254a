"""An engine on its caller's thread: nothing is lost, and what fails is raised."""

from __future__ import annotations

import pytest

from serve.engine.offline import OfflineEngine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import GenerationRequest
from serve.errors import QueueFullError
from serve.sampling.params import SamplingParams
from tests.support.engines import PROMPT, backend_of, is_idle, make_engine, run, submit


def requests(num_samples: int = 3) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            str(n), (*PROMPT, n), SamplingParams(num_samples, max_tokens=8 - n, seed=n)
        )
        for n in range(4)
    ]


def test_generate_yields_the_end_of_every_sample_beside_its_request() -> None:
    engine = make_engine(max_num_seqs=3)
    readers = {
        r.request_id: submit(
            engine, r.request_id, r.prompt_token_ids, num_samples=3,
            max_tokens=r.sampling.max_tokens, seed=r.sampling.seed,
        )
        for r in requests()
    }  # fmt: skip
    run(engine)
    ends = list(OfflineEngine(make_engine(max_num_seqs=3)).generate(requests()))
    found = {(request.request_id, event.index): event.token_ids for request, event in ends}
    assert len(ends) == len(found) == 12
    for request_id, reader in readers.items():
        for index, event in reader.endings.items():
            assert found[request_id, index] == event.token_ids


def test_generate_yields_before_everything_has_ended() -> None:
    engine = make_engine(max_num_seqs=1)
    ends = OfflineEngine(engine).generate(requests(num_samples=1))
    assert next(ends)[0].request_id == "0" and not is_idle(engine)
    assert len(list(ends)) == 3 and is_idle(engine)


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_score_returns_completions_by_request(in_one_pass: bool) -> None:
    asked = [ScoringRequest(str(n), PROMPT, ((4,) * (n + 1), (5,))) for n in range(3)]
    scored = OfflineEngine(make_engine(scores_in_one_pass=in_one_pass)).score(asked)
    assert [[len(one.logprobs) for one in of_one] for of_one in scored] == [[1, 1], [2, 1], [3, 1]]


def test_model_that_fails_is_told() -> None:
    engine = make_engine()
    backend_of(engine).error = RuntimeError("the device is lost")
    with pytest.raises(RuntimeError, match="the device is lost"):
        list(OfflineEngine(engine).generate(requests()))


def test_more_samples_than_may_wait_are_refused() -> None:
    with pytest.raises(QueueFullError):
        list(OfflineEngine(make_engine(max_num_seqs=1, max_waiting=4)).generate(requests()))
