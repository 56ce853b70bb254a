from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.manifest import Gate, Variant
from export.publish.select import GateError, choose_default, pareto_front
from export.run.errors import ExportError
from export.run.settings import SelectConfig


def variant(tokens_per_s: float, kl: float, measured: float | None = 0.0) -> Variant:
    passed = measured is not None and measured <= 0.02
    return Variant(
        precision="int8",
        opset=18,
        inputs=("input_ids",),
        outputs=("logits",),
        size_bytes=1,
        num_nodes=1,
        gates=(Gate(name="kl", measured=measured, threshold=0.02, passed=passed, unit="nats"),),
        metrics={"decode_tokens_per_s": tokens_per_s, "kl_to_teacher": kl},
    )


VARIANTS = {
    "fp32": variant(60, 0.300),
    "int8": variant(150, 0.305),
    "slow8": variant(100, 0.310),
    "int4": variant(200, 0.400),
    "broken": variant(900, 0.100, measured=0.5),
}


def choose(variants: dict[str, Variant], rule: str, max_kl_excess: float | None = None) -> str:
    config = SelectConfig.model_validate({"rule": rule, "max_kl_excess": max_kl_excess})
    return choose_default(variants, config)


# --- the front


def test_front_is_what_nothing_beats_fastest_first() -> None:
    assert pareto_front(VARIANTS) == ["int4", "int8", "fp32"]


def test_front_of_nothing_is_empty() -> None:
    assert pareto_front({"broken": VARIANTS["broken"]}) == []


def test_equal_variants_are_both_on_the_front() -> None:
    assert pareto_front({"b": variant(10, 0.1), "a": variant(10, 0.1)}) == ["a", "b"]


@pytest.mark.parametrize("worse", [variant(10, 0.2), variant(9, 0.1)])
def test_equal_in_one_and_worse_in_the_other_is_beaten(worse: Variant) -> None:
    assert pareto_front({"a": variant(10, 0.1), "worse": worse}) == ["a"]


points = st.tuples(st.integers(1, 9), st.integers(0, 9))


@settings(deadline=None)
@given(st.lists(points, min_size=1, max_size=8))
def test_every_variant_off_the_front_is_beaten_by_one_on_it(found: list[tuple[int, int]]) -> None:
    variants = {f"v{i}": variant(speed, kl) for i, (speed, kl) in enumerate(found)}
    front = pareto_front(variants)
    for (i, (speed, kl)), (j, (other_speed, other_kl)) in itertools.permutations(
        enumerate(found), 2
    ):
        is_beaten = other_speed >= speed and other_kl <= kl and found[i] != found[j]
        if is_beaten:
            assert f"v{i}" not in front
        if f"v{i}" not in front:
            assert any(
                s >= speed and k <= kl and (s, k) != (speed, kl)
                for s, k in (found[int(name[1:])] for name in front)
            )


# --- the rules


@pytest.mark.parametrize(("rule", "name"), [("fastest", "int4"), ("lowest_kl", "fp32")])
def test_rule_takes_an_end_of_the_front(rule: str, name: str) -> None:
    assert choose(VARIANTS, rule) == name


def test_knee_is_where_both_are_nearly_best() -> None:
    assert choose(VARIANTS, "knee") == "int8"


def test_knee_is_measured_in_the_logarithm_of_time() -> None:
    """In log time the steps of 1, 2 and 8 s stand at 0, 1/3 and 1, in time at 0, 1/7 and 1."""
    sides = {"fast": variant(1, 1.0), "slow": variant(1 / 8, 0.0)}
    assert choose({**sides, "middle": variant(1 / 2, 0.66)}, "knee") == "middle"
    assert choose({**sides, "middle": variant(1 / 2, 0.68)}, "knee") == "fast"


def test_knee_of_one_or_two_points_is_the_fastest() -> None:
    assert choose({"a": variant(10, 0.1)}, "knee") == "a"
    assert choose({"a": variant(10, 0.1), "b": variant(20, 0.2)}, "knee") == "b"


def test_knee_of_equal_points_is_the_first_name() -> None:
    assert choose({"b": variant(10, 0.1), "a": variant(10, 0.1)}, "knee") == "a"


@pytest.mark.parametrize("rule", ["fastest", "knee"])
def test_kl_excess_comes_before_the_rule(rule: str) -> None:
    assert choose(VARIANTS, rule, max_kl_excess=0.05) == "int8"


def test_variant_at_the_kl_excess_stays() -> None:
    variants = {"a": variant(10, 0.25), "b": variant(20, 0.5)}
    assert choose(variants, "fastest", max_kl_excess=0.25) == "b"


def test_kl_excess_counts_from_what_passed() -> None:
    assert choose(VARIANTS, "fastest", max_kl_excess=0.0) == "fp32"


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a")])
def test_ties_go_to_the_other_metric_and_then_to_the_name(order: tuple[str, ...]) -> None:
    same_speed = {"a": variant(10, 0.3), "b": variant(10, 0.2), "c": variant(10, 0.2)}
    assert choose({name: same_speed[name] for name in order}, "fastest") == "b"
    same_kl = {"a": variant(10, 0.2), "b": variant(20, 0.2), "c": variant(20, 0.2)}
    assert choose({name: same_kl[name] for name in order}, "lowest_kl") == "b"


# --- what cannot be chosen


def test_variant_at_its_threshold_has_passed() -> None:
    assert choose({"int8": variant(10, 0.1, measured=0.02)}, "fastest") == "int8"


def test_no_default_names_every_gate_that_failed() -> None:
    variants = {
        "fp32": variant(1, 0.1, measured=0.5),
        "int8": variant(1, 0.1, measured=None),
        "new": variant(1, 0.1).model_copy(update={"gates": ()}),
    }
    with pytest.raises(GateError) as failure:
        choose(variants, "fastest")
    assert failure.value.exit_code == 3
    assert str(failure.value) == (
        "no variant passed its gates: fp32: kl 0.5 exceeds 0.02 nats; "
        "int8: kl nan exceeds 0.02 nats; new: nothing was measured"
    )


@pytest.mark.parametrize("metrics", [{"kl_to_teacher": 0.1}, {"decode_tokens_per_s": 0.0}])
def test_variant_without_speed_is_refused(metrics: dict[str, float]) -> None:
    with pytest.raises(ExportError, match="'a' has decode_tokens_per_s"):
        pareto_front({"a": variant(1, 0).model_copy(update={"metrics": metrics})})


def test_variant_without_kl_is_refused() -> None:
    metrics = {"decode_tokens_per_s": 1.0}
    with pytest.raises(ExportError, match="'a' has no kl_to_teacher"):
        pareto_front({"a": variant(1, 0).model_copy(update={"metrics": metrics})})
