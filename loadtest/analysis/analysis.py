"""Turns the records of a run into its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from estimators.estimate import Estimate
from loadtest.analysis.metrics import RATIOS
from loadtest.analysis.percentiles import (
    Clustered,
    distribution,
    log_histogram,
    percentile,
    quantile_ratio,
)
from loadtest.analysis.quality import Pair, agreement_share, correctness_p, differences, quality
from loadtest.analysis.statistics import ratio_of_ratios, wilson
from loadtest.analysis.summary import ArmComparison, Cell, Distribution, Summary, Validity
from loadtest.config import RunConfig, parse_slo
from loadtest.records import Phase, RequestRecord

if TYPE_CHECKING:
    from loadtest.client.runner import BlockCost

MAX_CLIENT_CPU_SHARE = 0.8
MIN_SEND_LAG_LIMIT_S = 0.001
MAX_SEND_LAG_SHARE = 0.01

_LEAST_ITL_S = 1e-5


def summarize(
    config: RunConfig,
    schedule_sha256: str,
    records: Sequence[RequestRecord],
    costs: Sequence[BlockCost],
    *,
    versions: dict[str, str],
    models: Sequence[dict[str, object]],
    cross_check: dict[str, object] | None = None,
    problems: Sequence[str] = (),
    is_interrupted: bool = False,
    notes: Sequence[str] = (),
) -> Summary:
    """Return what the measured requests come to; the warm-up's are left out.

    `problems` say why a part of the load is missing, `notes` what went wrong with the server.

    Raises:
        ValueError: `config.slo` cannot be read.
    """
    measured = [record for record in records if record.plan.phase is Phase.MEASURED]
    groups = {
        (load, arm): _of(measured, arm, load)
        for load in sorted({record.plan.load for record in measured})
        for arm in config.arms
    }
    cells = [summarize_cell(config, arm, load, of) for (load, arm), of in groups.items()]
    comparisons = [
        compare_arms(config, groups[load, config.arms[0]], of)
        for (load, arm), of in groups.items()
        if arm != config.arms[0]
    ]
    return Summary(
        config=config.model_dump(mode="json"),
        schedule_sha256=schedule_sha256,
        versions=versions,
        models=tuple(models),
        validity=judge_validity(measured, costs, problems),
        num_errors=sum(cell.outcomes.get("error", 0) for cell in cells),
        cells=tuple(cells),
        comparisons=tuple(each for each in comparisons if each is not None),
        cross_check=cross_check,
        is_interrupted=is_interrupted,
        notes=tuple(notes),
    )


def summarize_cell(
    config: RunConfig, arm: str, load: float, offered: Sequence[RequestRecord]
) -> Cell:
    """Return one arm at one load; latency and quality are those of its OK requests."""
    slo = parse_slo(config.slo)
    ended = [record for record in offered if record.is_ok]
    seconds = _load_s(config, offered)
    itls = _latencies(ended, "itl")
    has_goodput = slo.objectives and offered
    return Cell(
        arm=arm,
        load=load,
        num_offered=len(offered),
        statuses=dict(Counter(record.status for record in offered)),
        ttft=_distribution(ended, "ttft"),
        itl=distribution(itls),
        tpot=_distribution(ended, "tpot"),
        e2e=_distribution(ended, "e2e"),
        itl_histogram=log_histogram(itls.values, _LEAST_ITL_S),
        throughput_rps=len(ended) / seconds,
        output_tokens_per_s=sum(map(_num_tokens, ended)) / seconds,
        goodput=wilson(sum(map(slo.is_good, offered)), len(offered)) if has_goodput else None,
        quality=quality(ended, _ks(config)),
    )


def compare_arms(
    config: RunConfig, a: Sequence[RequestRecord], b: Sequence[RequestRecord]
) -> ArmComparison | None:
    """Return how a compares with b at one load, over the pairs both ended OK; None without any."""
    pairs = pair_up(a, b)
    if not pairs:
        return None
    return ArmComparison(
        load=pairs[0][0].plan.load,
        arm_a=pairs[0][0].plan.arm,
        arm_b=pairs[0][1].plan.arm,
        num_pairs=len(pairs),
        ratios=ratios(pairs),
        differences=differences(pairs, _ks(config)),
        mcnemar_p=correctness_p(pairs),
        agreement=agreement_share(pairs),
    )


def pair_up(a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> list[Pair]:
    """Return the OK requests of both sides that have the same `pair`."""
    others = {record.plan.pair: record for record in b if record.is_ok}
    return [(each, others[each.plan.pair]) for each in a if each.is_ok and each.plan.pair in others]


def ratios(pairs: Sequence[Pair]) -> dict[str, Estimate]:
    """Return how many times as fast a is, by metric, as in `ArmComparison`.

    Left out: percentiles with too few values, and those of a that are 0.
    """
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    found = {
        f"{metric}_p{percent}": quantile_ratio(
            _latencies(seconds, metric), _latencies(firsts, metric), percent / 100
        )
        for metric, percent in RATIOS
    }
    found["output_tokens_per_s"] = _token_rate_ratio(pairs)
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _token_rate_ratio(pairs: Sequence[Pair]) -> Estimate | None:
    speaking = [pair for pair in pairs if all(map(_num_tokens, pair))]
    if not speaking:
        return None
    rates = [
        ([float(_num_tokens(each)) for each in side], [each.e2e_s for each in side])
        for side in zip(*speaking, strict=True)
    ]
    return ratio_of_ratios(rates[0], rates[1], [a.plan.prompt_id for a, _ in speaking])


def judge_validity(
    measured: Sequence[RequestRecord], costs: Sequence[BlockCost], known: Sequence[str] = ()
) -> Validity:
    """Return whether the client was on time and had time to spare; each arm and load by itself."""
    problems = list(known)
    if not measured:
        problems.append("no request was measured")
    groups: dict[tuple[str, float], list[RequestRecord]] = {}
    for record in measured:
        groups.setdefault((record.plan.arm, record.plan.load), []).append(record)
    for (arm, load), group in groups.items():
        problems += _lag_problems(f"{arm} at load {load:g}", group)
    blocks = {record.plan.block for record in measured}
    costs = [cost for cost in costs if cost.block in blocks]
    problems += _cost_problems(costs)
    lags_s = _lags_s(measured)
    return Validity(
        is_valid=not problems,
        problems=tuple(problems),
        send_lag_p99_s=percentile(lags_s, 99) if lags_s else None,
        max_client_cpu_share=max((cost.cpu_share for cost in costs), default=None),
    )


def _cost_problems(costs: Sequence[BlockCost]) -> Iterator[str]:
    cpu_share = max((cost.cpu_share for cost in costs), default=0.0)
    if cpu_share > MAX_CLIENT_CPU_SHARE:
        yield (
            f"a client process used {cpu_share:.0%} of a core, more than"
            f" {MAX_CLIENT_CPU_SHARE:.0%}: give it more processes or a faster machine"
        )
    num_idle = len({cost.block for cost in costs if cost.has_run_out})
    if num_idle:
        yield (
            f"in {num_idle} blocks the closed loop had sent all that was planned for it before the"
            " end: the server answers faster than a closed loop can ask"
        )


def _lag_problems(name: str, records: Sequence[RequestRecord]) -> list[str]:
    lags_s, ended = _lags_s(records), [record.e2e_s for record in records if record.is_ok]
    limit_s = MIN_SEND_LAG_LIMIT_S
    if ended:
        limit_s = max(limit_s, MAX_SEND_LAG_SHARE * percentile(ended, 50))
    if not lags_s or (lag_s := percentile(lags_s, 99)) <= limit_s:
        return []
    return [
        f"{name}: requests were sent {1000 * lag_s:.3g} ms late at p99, more than"
        f" {1000 * limit_s:.3g} ms (1 ms, or 1 % of the median latency)"
    ]


def _lags_s(records: Sequence[RequestRecord]) -> list[float]:
    return [lag_s for record in records if (lag_s := record.send_lag_s) is not None]


def _of(records: Sequence[RequestRecord], arm: str, load: float) -> list[RequestRecord]:
    return [record for record in records if (record.plan.arm, record.plan.load) == (arm, load)]


def _ks(config: RunConfig) -> tuple[int, ...]:
    return config.pass_at_k or tuple(sorted({1, config.num_samples}))


def _load_s(config: RunConfig, records: Sequence[RequestRecord]) -> float:
    """Return how long an arm was under a load: as planned, or longer where requests outlived it.

    An arm's turns add up; the others' turns between them are not its time.
    """
    turns: dict[int, tuple[float, float]] = {}
    for record in records:
        first_s, last_s = turns.get(record.plan.block, (record.start_s, record.ended_s))
        turns[record.plan.block] = (min(first_s, record.start_s), max(last_s, record.ended_s))
    return max(config.duration_s, sum(last_s - first_s for first_s, last_s in turns.values()))


def _latencies(records: Sequence[RequestRecord], metric: str) -> Clustered:
    values: list[float] = []
    prompts: list[str] = []
    for record in records:
        found = _latencies_of(record, metric)
        values += found
        prompts += [record.plan.prompt_id] * len(found)
    return Clustered(values, prompts)


def _latencies_of(record: RequestRecord, metric: str) -> list[float]:
    """Return what a request adds to a metric, in seconds: nothing where it has no such latency."""
    if metric == "itl":
        return record.itls_s
    value_s = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}[metric]
    return [] if value_s is None else [value_s]


def _distribution(records: Sequence[RequestRecord], metric: str) -> Distribution:
    return distribution(_latencies(records, metric))


def _num_tokens(record: RequestRecord) -> int:
    return sum(len(sample.token_ids) for sample in record.samples)
