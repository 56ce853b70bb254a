from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import BundleError
from bundle.manifest import write_manifest
from estimators.bootstrap import bootstrap_mean_difference, bootstrap_ratio_difference
from estimators.estimate import Interval
from export.measure.compare import BundleComparison, MetricRow, compare_bundles, render
from export.measure.held_out import HeldOut, PromptRecord
from export.measure.summary import ModelQuality, write_summary
from export.measure.task_scores import TaskEvaluation, TaskResult
from export.run.errors import ExportError
from export.run.settings import EvaluateConfig
from tests.support.export.measured import TEACHER_REFERENCE, make_summary
from tests.support.models.manifests import minimal_manifest

NUM_PROMPTS = 20
SIZES = np.arange(5, 5 + NUM_PROMPTS)
KLS = 0.3 + 0.1 * np.random.default_rng(0).random(NUM_PROMPTS)
NUM_CORRECT = [0, 1, 2, 3, 4, 0, 2, 1]
INPUTS = {"config.json": "7" * 64}
ROWS = "eval/per_prompt.jsonl"


def make_held_out(kls: Sequence[float] | np.ndarray, prompts: str) -> HeldOut:
    """Student and int8 with the same KL per prompt and one flip in each."""
    pairs = [("teacher", "student"), ("teacher", "int8"), ("student", "int8")]
    records = tuple(
        PromptRecord(i, int(size), {}, dict.fromkeys(pairs, float(kl)), dict.fromkeys(pairs, 1))
        for i, (size, kl) in enumerate(zip(SIZES, kls, strict=True))
    )
    num_tokens = int(SIZES.sum())
    mean = float(np.asarray(kls) @ SIZES / num_tokens)
    agreement = ModelQuality(
        forward_kl=mean,
        forward_kl_ci=Interval(mean - 0.01, mean + 0.01) if np.isfinite(mean) else None,
        forward_kl_p99=None,
        argmax_agreement=1 - NUM_PROMPTS / num_tokens,
        num_tokens=num_tokens,
        num_flips=NUM_PROMPTS,
        flip_margins=None,
    )
    return HeldOut(prompts * 64, num_tokens, dict.fromkeys(pairs, agreement), {}, records)


def make_tasks(num_correct: Sequence[int], num_samples: int = 4) -> TaskEvaluation:
    results = tuple(
        TaskResult(f"t{i}", "add", num_samples, c, float(c > 2)) for i, c in enumerate(num_correct)
    )
    config = EvaluateConfig(num_samples=num_samples, k=(1, 4))
    return TaskEvaluation(config, {"student": results, "int8": results}, ())


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write the parts of a bundle that a comparison reads."""

    def make(
        name: str,
        kls: Any = KLS,
        tasks: TaskEvaluation | None = None,
        prompts: str = "a",
        teacher: str = "b",
        inputs: dict[str, str] | None = INPUTS,
        variant: str = "int8",
        tokens_per_s: float = 150.0,
    ) -> Path:
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        changes = {"weights_sha256": teacher * 64, "inputs": inputs}
        reference = TEACHER_REFERENCE.model_copy(update=changes)
        speed = {"decode_tokens_per_s": tokens_per_s}
        write_manifest(folder, minimal_manifest(reference, variant, speed, 150_000_000))
        held_out = make_held_out(kls, prompts)
        rows = held_out.rows() + (tasks.rows() if tasks else [])
        summary = make_summary(
            prompts_sha256=held_out.prompts_sha256,
            num_prompts=len(held_out.prompts),
            quality=held_out.quality,
            tasks=tasks.summary() if tasks else None,
        )
        write_summary(folder / "eval", summary)
        (folder / "eval/per_prompt.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return folder

    return make


def find(comparison: BundleComparison, model: str, metric: str) -> MetricRow:
    (row,) = [row for row in comparison.rows if (row.model, row.metric) == (model, metric)]
    return row


# --- differences


def test_comparison_of_kls_is_paired_by_prompt(make_bundle: Callable[..., Path]) -> None:
    """Every prompt is a little better: the single intervals overlap, the paired one excludes 0."""
    better = KLS - 0.005 - 0.001 * np.arange(NUM_PROMPTS) / NUM_PROMPTS
    comparison = compare_bundles(make_bundle("a"), make_bundle("b", better))
    row = find(comparison, "student", "KL(teacher ‖ model)")
    expected = bootstrap_ratio_difference(KLS * SIZES, SIZES, better * SIZES, SIZES)
    assert row.a is not None
    assert row.a.value == pytest.approx(KLS @ SIZES / SIZES.sum())
    assert row.a.interval is not None
    assert row.difference is not None
    assert row.difference.value == pytest.approx(expected.value)
    assert row.difference.value < 0
    assert (row.is_significant, row.verdict) == (True, "B is better")


@pytest.mark.parametrize(
    ("kls", "is_significant", "verdict"),
    [
        (1.05 * KLS, True, "B is worse"),
        (np.random.default_rng(1).permutation(KLS), False, "no difference shown"),
    ],
)
def test_comparison_says_worse_where_the_interval_excludes_0(
    make_bundle: Callable[..., Path], kls: Any, is_significant: bool, verdict: str
) -> None:
    comparison = compare_bundles(make_bundle("a"), make_bundle("b", kls))
    row = find(comparison, "int8", "KL(student ‖ model)")
    assert (row.is_significant, row.verdict) == (is_significant, verdict)


def test_comparison_of_a_bundle_with_itself_shows_no_difference(
    make_bundle: Callable[..., Path],
) -> None:
    bundle = make_bundle("a", tasks=make_tasks(NUM_CORRECT))
    rows = compare_bundles(bundle, bundle).rows
    assert [row.difference.value for row in rows if row.difference] == [0.0] * len(rows)
    assert {row.verdict for row in rows} == {""}


def test_comparison_of_pass_rates_is_paired_by_task(make_bundle: Callable[..., Path]) -> None:
    more = [min(c + 1, 4) for c in NUM_CORRECT]
    bundles = [make_bundle(n, tasks=make_tasks(c)) for n, c in (("a", NUM_CORRECT), ("b", more))]
    comparison = compare_bundles(*bundles)
    row = find(comparison, "student", "pass@1")
    scores = [np.array(counts) / 4 for counts in (NUM_CORRECT, more)]
    assert row.difference == bootstrap_mean_difference(*scores)
    assert row.verdict == "B is better"
    assert find(comparison, "int8", "pass@4").a is not None
    majority = find(comparison, "int8", "maj@n")
    assert majority.difference is not None
    assert majority.difference.value == pytest.approx(2 / 8)


def test_comparison_of_speed_and_size_has_no_interval(make_bundle: Callable[..., Path]) -> None:
    comparison = compare_bundles(make_bundle("a"), make_bundle("b", tokens_per_s=180.0))
    speed = find(comparison, "int8", "decode speed")
    assert speed.difference is not None
    assert (speed.difference.value, speed.is_significant, speed.verdict) == (30.0, None, "")
    assert find(comparison, "int8", "size of the graph").unit == "bytes"


def test_comparison_of_a_variant_of_one_bundle_has_no_difference(
    make_bundle: Callable[..., Path],
) -> None:
    comparison = compare_bundles(make_bundle("a"), make_bundle("b", variant="int4"))
    row = find(comparison, "int4", "decode speed")
    assert row.a is None
    assert row.b is not None
    assert row.difference is None
    assert find(comparison, "int8", "decode speed").b is None


def test_comparison_of_a_kl_that_is_no_number_has_no_values(
    make_bundle: Callable[..., Path],
) -> None:
    broken = [np.nan, *KLS[1:]]
    comparison = compare_bundles(make_bundle("a"), make_bundle("b", broken))
    row = find(comparison, "student", "KL(teacher ‖ model)")
    assert (row.b, row.difference) == (None, None)


# --- what cannot be compared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "c"}, r"the teachers' weights differ \(bbbbbbbbbbbb and cccccccccccc\)"),
        (
            {"inputs": {"config.json": "e" * 64}},
            r"the teachers' config.json differ \(777777777777 and eeeeeeeeeeee\)",
        ),
        ({"inputs": {}}, r"the teachers' config.json differ \(777777777777 and none\)"),
        ({"prompts": "d"}, r"the held-out prompts differ \(aaaaaaaaaaaa and dddddddddddd\)"),
        (
            {"teacher": "c", "prompts": "d"},
            r"teachers' weights differ \(\w+ and \w+\); the held-out prompts differ",
        ),
        ({"tasks": make_tasks([1, 2])}, "the tasks differ"),
        ({"tasks": make_tasks(NUM_CORRECT, 8)}, r"the tasks' num_samples differ \(4 and 8\)"),
    ],
)
def test_comparison_of_different_measurements_is_refused_unless_forced(
    make_bundle: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    a = make_bundle("a", tasks=make_tasks(NUM_CORRECT))
    b = make_bundle("b", **{"tasks": make_tasks(NUM_CORRECT), **changes})
    with pytest.raises(ExportError, match=message):
        compare_bundles(a, b)
    forced = compare_bundles(a, b, is_forced=True)
    assert re.search(message, "; ".join(forced.mismatches))
    assert f"not comparable: {forced.mismatches[0]}" in render(forced)


def test_comparison_of_other_prompts_is_never_paired(make_bundle: Callable[..., Path]) -> None:
    bundles = [
        make_bundle("a", tasks=make_tasks(NUM_CORRECT)),
        make_bundle("b", KLS - 0.1, tasks=make_tasks(NUM_CORRECT[1:]), prompts="d"),
    ]
    comparison = compare_bundles(*bundles, is_forced=True)
    for metric in ("KL(teacher ‖ model)", "pass@1", "maj@n"):
        row = find(comparison, "student", metric)
        assert row.difference is not None
        assert row.difference.interval is None


def test_comparison_with_tasks_of_one_bundle_is_no_mismatch(
    make_bundle: Callable[..., Path],
) -> None:
    """Nor that an older one does not say what its teacher's files were."""
    bundles = make_bundle("a"), make_bundle("b", tasks=make_tasks(NUM_CORRECT), inputs=None)
    comparison = compare_bundles(*bundles)
    assert comparison.mismatches == ()
    row = find(comparison, "student", "pass@4")
    assert (row.a, row.difference) == (None, None)
    assert row.b is not None


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda b: (b / "manifest.json").unlink(), BundleError, "is not a bundle"),
        (lambda b: (b / "eval/summary.json").write_text("{"), ExportError, "y.json is not JSON"),
        (lambda b: (b / ROWS).write_text("{"), ExportError, "per_prompt.jsonl is not JSON"),
        (lambda b: (b / ROWS).unlink(), ExportError, "per_prompt.jsonl does not exist"),
        (
            lambda b: (b / ROWS).write_text((b / ROWS).read_text().partition("\n")[2]),
            ExportError,
            r"has 19 held-out prompts, summary\.json says 20",
        ),
    ],
)
def test_comparison_of_a_damaged_bundle_is_refused(
    make_bundle: Callable[..., Path],
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    bundle = make_bundle("a")
    damage(bundle)
    with pytest.raises(error, match=message):
        compare_bundles(bundle, bundle)


# --- text


def test_comparison_is_rendered_with_values_intervals_and_verdicts(
    make_bundle: Callable[..., Path],
) -> None:
    bundles = [
        make_bundle("a", tasks=make_tasks(NUM_CORRECT)),
        make_bundle("b", 0.9 * KLS, tasks=make_tasks(NUM_CORRECT), tokens_per_s=180.0),
    ]
    text = render(compare_bundles(*bundles))
    mean = KLS @ SIZES / SIZES.sum()
    (line,) = [line for line in text.splitlines() if "student" in line and "KL(teacher" in line]
    assert f"{mean:.4f} [{mean - 0.01:.4f}, {mean + 0.01:.4f}]" in line
    assert f"-{0.1 * mean:.4f} [-" in line
    assert "B is better" in line
    (speed,) = [line for line in text.splitlines() if "decode speed" in line]
    assert [cell.strip() for cell in speed.split("│")[3:6]] == ["150", "180", "30"]
    (size,) = [line for line in text.splitlines() if "size of the graph" in line]
    assert [cell.strip() for cell in size.split("│")[3:6]] == ["150", "150", "0"]
    assert text.count("pass@1") == 2
    assert all(f"{x}: {folder}"[:40] in text for x, folder in zip("AB", bundles, strict=True))
