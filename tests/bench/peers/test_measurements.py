"""The arithmetic of results, resuming, rounds and their prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.peers.client import WorkerFailedError
from bench.peers.results import Config, Measurement, Results, SideRecord, read_results, resume
from bench.peers.rounds import SideTurn, draw_prompts, measure_round, shuffled_turns
from bench.peers.table import derived, ratios, render
from bench.plot import main as plot_main
from bench.prompts import MIN_PROMPTS, PromptSource, read_answers
from bundle.errors import UserError

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
