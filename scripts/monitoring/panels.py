"""What the dashboard shows: rows of panels, their queries and what their numbers mean.

Numbers that alerts judge come from the recording rules, so that a plot shows what an alert saw.
"""

from __future__ import annotations

from dataclasses import dataclass

SELECTED = 'namespace=~"$namespace", job=~"$job"'
TASK = f'{SELECTED}, task=~"$task"'
POLICY = f'{TASK}, policy=~"$policy"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class GrafanaPanel:
    """One plot. `queries` are (PromQL, legend); `unit` is Grafana's name of it."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    is_stacked: bool = False


def _quantiles(record: str) -> tuple[tuple[str, str], ...]:
    return ((f"{record}{{{SELECTED}}}", "{{role}} p{{quantile}}"),)


def _rate(metric: str, by: str, selected: str = SELECTED) -> str:
    return f"sum by ({by}) (rate({metric}{{{selected}}}{RATE}))"


def _mean(metric: str, by: str) -> str:
    return f"{_rate(f'{metric}_sum', by)} / {_rate(f'{metric}_count', by)}"


OVERVIEW = (
    GrafanaPanel(
        "Servers",
        "Servers that answer Prometheus.",
        "short",
        ((f"sum(up{{{SELECTED}}})", "up"),),
        "stat",
    ),
    GrafanaPanel(
        "Models up",
        "Servers whose model takes work; a remote teacher counts while it can be reached.",
        "short",
        ((f"sum by (role) (tandem_model_up{{{SELECTED}}})", "{{role}}"),),
        "stat",
    ),
    GrafanaPanel(
        "Failed calls",
        "Calls that failed through the server's fault; above 5 % TandemErrorsHigh fires.",
        "percentunit",
        ((f"tandem:requests_failed:ratio_rate5m{{{SELECTED}}}", "{{job}}"),),
        "stat",
    ),
    GrafanaPanel(
        "First tokens later than promised",
        "Of the last hour; the promise is 1 %, the thresholds are in the recording rules.",
        "percentunit",
        ((f"tandem:ttft_slow:ratio_rate1h{{{SELECTED}}}", "{{role}}"),),
        "stat",
    ),
    GrafanaPanel(
        "KL from the other model",
        "Mean k3 of the last 5 minutes: 0 is the same model. What is usual depends on the pair.",
        "nats/token",
        ((f'tandem:kl_nats:mean5m{{estimator="k3", {POLICY}}}', "{{policy}}, {{task}}"),),
        "stat",
    ),
    GrafanaPanel(
        "Alerts that fire",
        "By name; docs/runbook.md says what to do about each.",
        "short",
        (
            (
                'count by (alertname) (ALERTS{alertname=~"Tandem.+", alertstate="firing"})',
                "{{alertname}}",
            ),
        ),
        "stat",
    ),
)

LATENCY = (
    GrafanaPanel(
        "Time to first token",
        "From a request's arrival to the first token of any sample, median and 95th percentile.",
        "s",
        _quantiles("tandem:ttft_seconds:quantile5m"),
    ),
    GrafanaPanel(
        "Between tokens",
        "From one token of a sample to the next: 1 over this is the speed that a reader sees.",
        "s",
        _quantiles("tandem:itl_seconds:quantile5m"),
    ),
    GrafanaPanel(
        "Whole request",
        "From arrival to a model's last scored sample, median and 95th percentile.",
        "s",
        _quantiles("tandem:request_seconds:quantile5m"),
    ),
    GrafanaPanel(
        "Wait in the queue",
        "From a request's arrival to its first prefill, 95th percentile.",
        "s",
        (
            (
                "histogram_quantile(0.95, "
                f"{_rate('tandem_request_queue_seconds_bucket', 'role, le')})",
                "{{role}}",
            ),
        ),
    ),
    GrafanaPanel(
        "First tokens later than promised",
        "Short and long window of the fast-burning alert, and its line: 14.4 times the promise.",
        "percentunit",
        (
            (f"tandem:ttft_slow:ratio_rate5m{{{SELECTED}}}", "{{role}} 5m"),
            (f"tandem:ttft_slow:ratio_rate1h{{{SELECTED}}}", "{{role}} 1h"),
            ("14.4 * (1 - scalar(tandem:slo_ttft:objective_ratio))", "alert"),
        ),
    ),
    GrafanaPanel(
        "Engine step",
        "Mean time of one pass of a model, and the part of it that is not the model.",
        "s",
        (
            (_mean("tandem_engine_step_seconds", "role, phase"), "{{role}} {{phase}}"),
            (_mean("tandem_engine_host_seconds", "role"), "{{role}} host"),
        ),
    ),
)

THROUGHPUT = (
    GrafanaPanel(
        "Calls by status",
        "Calls per second by gRPC status; OK among them.",
        "reqps",
        ((f"tandem:requests:rate5m{{{SELECTED}}} > 0", "{{code}}"),),
        is_stacked=True,
    ),
    GrafanaPanel(
        "Tokens generated",
        "Tokens per second that each model sampled, those of shadows excluded: these only score.",
        "tokens/s",
        ((f"tandem:generation_tokens:rate5m{{{SELECTED}}}", "{{role}}"),),
    ),
    GrafanaPanel(
        "Samples running and waiting",
        "More waiting than running for 10 minutes fires TandemQueueGrowing.",
        "short",
        (
            (f"tandem:sequences_running:sum{{{SELECTED}}}", "{{role}} running"),
            (f"tandem:sequences_waiting:sum{{{SELECTED}}}", "{{role}} waiting"),
        ),
    ),
    GrafanaPanel(
        "Batch",
        "Sequences in the last step, mean over servers: the larger, the cheaper a token.",
        "short",
        ((f"avg by (role) (tandem_batch_size{{{SELECTED}}})", "{{role}}"),),
    ),
    GrafanaPanel(
        "Samples by their end",
        "stop and length are good ends; cancelled, deadline, error and shutdown are not.",
        "ops",
        ((_rate("tandem_samples_total", "role, finish_reason"), "{{role}} {{finish_reason}}"),),
    ),
    GrafanaPanel(
        "Refused, and tokens wasted",
        "Valid calls that were refused, and tokens of samples that did not end by themselves.",
        "ops",
        (
            (_rate("tandem_admission_rejections_total", "reason"), "refused: {{reason}}"),
            (_rate("tandem_wasted_tokens_total", "role, reason"), "wasted: {{role}} {{reason}}"),
        ),
    ),
    GrafanaPanel(
        "KV cache",
        "Slots in use, and the part of the prompt tokens whose keys and values were there already.",
        "percentunit",
        (
            (f"avg by (role) (tandem_kv_slots_used_ratio{{{SELECTED}}})", "{{role}} slots used"),
            (
                f"{_rate('tandem_cached_prompt_tokens_total', 'role')}"
                f" / {_rate('tandem_prompt_tokens_total', 'role')}",
                "{{role}} prompt tokens cached",
            ),
        ),
    ),
    GrafanaPanel(
        "Draining and ledger",
        "Servers that take no new work, and work that a server lost count of: always 0.",
        "short",
        (
            (f"sum by (job) (tandem_draining{{{SELECTED}}})", "{{job}} draining"),
            (f"sum by (job) (tandem_ledger_imbalance{{{SELECTED}}})", "{{job}} ledger"),
        ),
    ),
)

DIVERGENCE = (
    GrafanaPanel(
        "Mean k3, live",
        "GRPO's estimate of KL(policy || other model), nats per token; policy: whose samples.",
        "nats/token",
        ((f'tandem:kl_nats:mean5m{{estimator="k3", {POLICY}}}', "{{policy}} {{task}}"),),
    ),
    GrafanaPanel(
        "Mean exact KL",
        "Over the full vocabulary, of requests that ask for it; unbiased under any sampling.",
        "nats/token",
        ((f'tandem:kl_nats:mean5m{{estimator="exact", {POLICY}}}', "{{policy}} {{task}}"),),
    ),
    GrafanaPanel(
        "What TandemKlDrift sees",
        "The last half hour, the day before it, and the limit; no value below 2000 tokens.",
        "nats/token",
        (
            (f"tandem:kl_k3_nats:mean30m{{{POLICY}}}", "{{job}} {{policy}} {{task}} now"),
            (
                "1.5 * tandem:kl_k3_nats:baseline1d"
                '{namespace=~"$namespace", task=~"$task", policy=~"$policy"}',
                "{{policy}} {{task}} alert",
            ),
            ("tandem:kl_k3:limit_nats", "limit"),
        ),
    ),
    GrafanaPanel(
        "Samples by their mean k3",
        "How the divergence spreads: a few bad answers, or all a little.",
        "short",
        (
            (
                "sum by (le) (increase(tandem_divergence_nats_bucket"
                f'{{estimator="k3", {POLICY}}}{RATE}))',
                "{{le}}",
            ),
        ),
        "heatmap",
    ),
    GrafanaPanel(
        "Same likeliest token, predicted acceptance",
        "Positions on which both models favour one token; part of the student's draft tokens that "
        "the teacher would accept.",
        "percentunit",
        (
            (f"tandem:argmax_agreement:ratio_rate5m{{{TASK}}}", "same likeliest, {{task}}"),
            (f"tandem:predicted_acceptance:mean5m{{{TASK}}}", "acceptance, {{task}}"),
        ),
    ),
    GrafanaPanel(
        "Tokens without a finite estimate",
        "Part of the compared tokens; above 0.1 % TandemNonfiniteTokens fires.",
        "percentunit",
        ((f"tandem:divergence_nonfinite:ratio_rate5m{{{SELECTED}}}", "{{policy}}"),),
    ),
    GrafanaPanel(
        "What the estimates rest on",
        "Tokens compared per second, and samples whose k3 is biased: greedy, top-k, top-p.",
        "ops",
        (
            (
                _rate("tandem_divergence_tokens_total", "estimator, policy", POLICY),
                "{{policy}} {{estimator}} tokens",
            ),
            (
                _rate("tandem_divergence_truncated_samples_total", "policy"),
                "{{policy}} biased samples",
            ),
        ),
    ),
)

CONSENSUS = (
    GrafanaPanel(
        "Votes by outcome",
        "Pairs of majority votes: same answer, another, no majority, or no answer at all.",
        "ops",
        ((_rate("tandem_consensus_total", "outcome", TASK), "{{outcome}}"),),
        is_stacked=True,
    ),
    GrafanaPanel(
        "Agreement",
        "Pairs with the same majority answer, of all pairs. The alert: 1h, the day before.",
        "percentunit",
        (
            (f"tandem:agreement:ratio5m{{{TASK}}}", "{{task}} 5m"),
            (f"tandem:agreement:ratio1h{{{TASK}}}", "{{task}} 1h"),
            (
                'tandem:agreement:baseline1d{namespace=~"$namespace", task=~"$task"}',
                "{{task}} day before",
            ),
        ),
    ),
    GrafanaPanel(
        "Share of the winner",
        "The majority's part of the votes, mean: 1 is unanimous.",
        "percentunit",
        ((_mean("tandem_consensus_vote_share", "role"), "{{role}}"),),
    ),
    GrafanaPanel(
        "Answers undecided",
        "Samples whose answer could not be judged: too slow, failed, or too many.",
        "ops",
        ((_rate("tandem_answers_undecided_total", "reason"), "{{reason}}"),),
    ),
)

PASS_AT_K = (
    GrafanaPanel(
        "pass@k",
        "Chance that one of k samples is right; against a gold answer or the teacher's majority.",
        "percentunit",
        ((f"tandem:pass_at_k:mean5m{{{TASK}}}", "{{role}} @{{k}} {{reference}} {{task}}"),),
    ),
    GrafanaPanel(
        "The teacher's lead",
        "Teacher minus student, last hour and the day before; above 10 points more fires "
        "TandemPassAtKDrop. No value below 200 prompts.",
        "percentunit",
        (
            (f"tandem:pass_at_k_gap:mean1h{{{TASK}}}", "@{{k}} {{reference}} {{task}} 1h"),
            (
                'tandem:pass_at_k_gap:baseline1d{namespace=~"$namespace", task=~"$task"}',
                "@{{k}} {{reference}} {{task}} day before",
            ),
        ),
    ),
    GrafanaPanel(
        "Prompts judged",
        "Prompts per second that pass@k counts: how much the plots beside it rest on.",
        "ops",
        ((_rate("tandem_pass_at_k_prompts_total", "role, k, reference", TASK), "{{role}} @{{k}}"),),
    ),
)

SHADOWING = (
    GrafanaPanel(
        "Shadows by outcome",
        "Answers that the other model scored behind the answer; all but compared are lost.",
        "ops",
        ((f"tandem:shadows:rate5m{{{SELECTED}}}", "{{outcome}}"),),
        is_stacked=True,
    ),
    GrafanaPanel(
        "Shadows lost",
        "Part that was dropped, late or failed; above 20 % TandemShadowsLost fires.",
        "percentunit",
        ((f"tandem:shadows_lost:ratio_rate5m{{{SELECTED}}}", "{{job}}"),),
    ),
    GrafanaPanel(
        "Calls to the remote teacher",
        "By gRPC status; empty where the teacher runs in the same server.",
        "reqps",
        ((f"{_rate('tandem_remote_calls_total', 'rpc, code')} > 0", "{{rpc}} {{code}}"),),
    ),
    GrafanaPanel(
        "Models served",
        "What each server runs; two manifests of one role are a rollout that has not ended.",
        "short",
        (
            (
                "count by (job, role, backend, device, precision, manifest) "
                f"(tandem_model_info{{{SELECTED}}})",
                "",
            ),
            (f"count by (job, version) (tandem_build_info{{{SELECTED}}})", ""),
        ),
        "table",
    ),
)

ROWS = {
    "Overview": OVERVIEW,
    "Latency": LATENCY,
    "Throughput": THROUGHPUT,
    "Divergence": DIVERGENCE,
    "Consensus": CONSENSUS,
    "pass@k": PASS_AT_K,
    "Shadowing": SHADOWING,
}

VARIABLES = {
    "namespace": "label_values(tandem_build_info, namespace)",
    "job": 'label_values(tandem_build_info{namespace=~"$namespace"}, job)',
    "task": f"label_values(tandem_requests_total{{{SELECTED}}}, task)",
    "policy": f"label_values(tandem_divergence_tokens_total{{{SELECTED}}}, policy)",
}
