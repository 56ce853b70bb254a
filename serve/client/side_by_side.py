"""The answers of both models side by side, for a terminal or a file.

Each token has the colour of its divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from protos.tandem.v1 import inference_pb2 as pb

Arms = dict[pb.Role, list[pb.Sample]]

# A token's k3 in nats, up to which it has a style; the last one takes the rest.
SCALE: tuple[tuple[float, str], ...] = (
    (0.05, ""),
    (0.2, "green"),
    (0.5, "yellow"),
    (2.0, "dark_orange"),
    (math.inf, "bold red"),
)
# Answers shown in full per model; of the others only the extracted answer is.
_MAX_SHOWN = 2
_ROLES = {pb.ROLE_STUDENT: "student", pb.ROLE_TEACHER: "teacher"}


def render(
    prompt: str, models: pb.GetModelsResponse, response: pb.CompareResponse
) -> RenderableType:
    """Return answers, legend, votes and speeds; for a terminal or, without colours, a file."""
    arms = {role: [sample for sample in response.samples if sample.role == role] for role in _ROLES}
    parts: list[RenderableType] = [
        Panel(Text(prompt), title="prompt", title_align="left", border_style="dim"),
        _answers(models, arms),
        legend(),
        _numbers(response, arms),
    ]
    parts.append(
        Text(
            f"repeat with --seed {response.usage.seed}; both models ran at the same time "
            f"({response.usage.seconds:.1f} s)",
            style="dim",
        )
    )
    return Group(*parts)


def legend() -> Text:
    """Return the scale of token colours."""
    text = Text("k3 per token (nats): ")
    low = 0.0
    for limit, style in SCALE:
        label = f"≥ {low:g}" if math.isinf(limit) else f"< {limit:g}"
        text.append(f" {label} ", style=style)
        low = limit
    return text


def style_of(k3: float) -> str:
    """Return the style of a token; a divergence that is not a number counts as the largest.

    >>> style_of(0.0), style_of(0.3), style_of(float("nan"))
    ('', 'yellow', 'bold red')
    """
    return next((style for limit, style in SCALE if k3 < limit), SCALE[-1][1])


def _answers(models: pb.GetModelsResponse, arms: Arms) -> Table:
    described = {model.role: _describe(model) for model in models.models}
    table = Table(expand=True, show_lines=True, border_style="dim")
    for role, name in _ROLES.items():
        table.add_column(Text(f"{name} · {described.get(role, '?')}"), ratio=1)
    shown = max(len(samples[:_MAX_SHOWN]) for samples in arms.values())
    for index in range(shown):
        table.add_row(*(_cell(samples, index) for samples in arms.values()))
    if any(len(samples) > _MAX_SHOWN for samples in arms.values()):
        table.add_row(*(_rest(samples[_MAX_SHOWN:]) for samples in arms.values()))
    return table


def _describe(model: pb.Model) -> str:
    return f"{model.num_parameters / 1e6:.0f}M {model.precision} {model.backend}/{model.device}"


def _cell(samples: Sequence[pb.Sample], index: int) -> RenderableType:
    if index >= len(samples):
        return ""
    sample = samples[index]
    if sample.error:
        return Text(f"failed: {sample.error}", style="red")
    note = Text(style="dim")
    note.append(pb.FinishReason.Name(sample.finish_reason).removeprefix("FINISH_REASON_").lower())
    if sample.HasField("answer"):
        note.append(f" · answer {sample.answer}{_mark(sample)}")
    if sample.HasField("divergence"):
        note.append(f" · k3 {_nats(sample.divergence)}")
    elif sample.divergence_error:
        note.append(f" · no divergence: {sample.divergence_error}")
    return Group(coloured(sample), note)


def coloured(sample: pb.Sample) -> Text:
    """Return the sample's text, each token in the colour of its k3."""
    text, start = Text(), 0
    k3s = sample.divergence.per_token_k3
    for position, end in enumerate(sample.text_ends):
        style = style_of(k3s[position]) if position < len(k3s) else ""
        text.append(sample.text[start:end], style=style)
        start = end
    text.append(sample.text[start:])
    return text


def _rest(samples: Sequence[pb.Sample]) -> Text:
    answers = (
        f"{sample.answer}{_mark(sample)}" if sample.HasField("answer") else "–"
        for sample in samples
    )
    return Text(f"{len(samples)} more: {', '.join(answers)}")


def _mark(sample: pb.Sample) -> str:
    if not sample.HasField("correct"):
        return ""
    return " ✓" if sample.correct else " ✗"


def _nats(divergence: pb.Divergence) -> str:
    return f"{divergence.k3_mean:.3f}" if divergence.HasField("k3_mean") else "not finite"


def _numbers(response: pb.CompareResponse, arms: Arms) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in (*_ROLES.values(), "student : teacher"):
        table.add_column(name, justify="right")
    _add_latency(table, list(arms.values()))
    table.add_row("k3, nats per token", *(_mean_k3(samples) for samples in arms.values()))
    if response.HasField("agreement"):
        _add_agreement(table, response.agreement)
    return table


def _add_latency(table: Table, arms: list[list[pb.Sample]]) -> None:
    """Add the time to the first token, and tokens per second over all samples of a model."""
    ttfts = [min((s.timings.ttft_s for s in arm if s.token_ids), default=0.0) for arm in arms]
    speeds = [_tokens_per_s(arm) for arm in arms]
    table.add_row(
        "first token", *(f"{1e3 * ttft:.0f} ms" if ttft else "–" for ttft in ttfts), _ratio(*ttfts)
    )
    table.add_row(
        "tokens per second",
        *(f"{speed:.1f}" if speed else "–" for speed in speeds),
        _ratio(*speeds),
    )


def _tokens_per_s(samples: list[pb.Sample]) -> float:
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    seconds = max((s.timings.ttft_s + s.timings.decode_s for s in samples), default=0.0)
    return num_tokens / seconds if seconds else 0.0


def _ratio(student: float, teacher: float) -> str:
    return f"{student / teacher:.2f}×" if student and teacher else "–"


def _mean_k3(samples: list[pb.Sample]) -> str:
    """Return the mean over all finite tokens of all samples."""
    divergences = [sample.divergence for sample in samples if sample.HasField("divergence")]
    num_tokens = sum(d.num_tokens - d.nonfinite_tokens for d in divergences)
    return f"{sum(d.k3_sum for d in divergences) / num_tokens:.3f}" if num_tokens else "–"


def _add_agreement(table: Table, agreement: pb.Agreement) -> None:
    votes = [
        _vote(getattr(agreement, name)) if agreement.HasField(name) else "–"
        for name in _ROLES.values()
    ]
    same = "–"
    if agreement.HasField("same_answer"):
        same = "same answer" if agreement.same_answer else "different answers"
    table.add_row("majority", *votes, same)
    gold = "gold answer" if agreement.reference_kind == pb.REFERENCE_KIND_GOLD else "teacher's vote"
    student, teacher = agreement.student_pass_at_k, agreement.teacher_pass_at_k
    for k in sorted({*student, *teacher}):
        values = (f"{by_k[k]:.3f}" if k in by_k else "–" for by_k in (student, teacher))
        table.add_row(f"pass@{k}", *values, f"against the {gold}")


def _vote(vote: pb.Vote) -> str:
    if vote.HasField("answer"):
        return f"{vote.answer} ({vote.share:.0%} of {vote.num_valid})"
    return f"tie ({vote.num_valid} valid)" if vote.tie else "no answer"
