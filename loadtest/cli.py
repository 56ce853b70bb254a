"""`tandem loadtest`: flags only. What a command needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bundle.errors import UsageError, UserError
from loadtest.flags import parse_config, with_config_flags
from loadtest.progress import ProgressReporter
from serve.client.access import TlsCa, TlsCert, TlsKey, TokenFile, read_token, tls_of

if TYPE_CHECKING:
    from loadtest.client.targets import Credentials
    from loadtest.config import RunConfig
    from loadtest.verdicts.find_max import MaxRate
    from loadtest.workload.schedule import Schedule

HELP = """Measure under load which model is faster, which is worse, and whether it is real.

Exit codes: 0 done; 1 an expected error, in one line; 2 wrong usage; 3 a gate failed, or the run is
INVALID: its client was not fast enough to be believed, or a part of its load is missing; 4 more
requests failed than --max-failure-rate allows. With 3 and 4 the run's folder is whole.
"""

app = typer.Typer(help=HELP, no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of a run.", exists=True, file_okay=False)]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Write the result as JSON, on the last line of stdout. By default it is text.",
    ),
]


class InvalidRunError(UserError):
    """A run was made, but its numbers are not those of the server."""

    exit_code = 3


class TooManyFailuresError(UserError):
    """A run was made, but more of its requests failed than are allowed."""

    exit_code = 4


class GateFailedError(UserError):
    """A run is beyond a limit."""

    exit_code = 3


@app.command()
@with_config_flags
def run(
    find_max: Annotated[
        bool,
        typer.Option(
            "--find-max",
            help="Search the highest rate, in requests per second, that meets --slo, from the "
            "lowest of --rates on. By default each rate is tested.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the run that --out holds. By default that is an error."
        ),
    ] = False,
    as_json: AsJson = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    **flags: str | None,
) -> None:
    """Put the load on a server, and write what came of it to --out."""
    config = parse_config(flags)
    from loadtest.client.targets import Credentials

    credentials = Credentials(read_token(token_file), tls_of(tls_ca, tls_cert, tls_key))
    if find_max:
        _find_max(config, credentials, as_json, overwrite)
    else:
        _run(config, credentials, as_json, overwrite)


def _run(config: RunConfig, credentials: Credentials, as_json: bool, may_overwrite: bool) -> None:
    from loadtest import run
    from loadtest.analysis.summary import read_summary, to_json
    from loadtest.report.summary_text import describe_excess

    folder = run.run(config, credentials, ProgressReporter(), may_overwrite=may_overwrite)
    summary = read_summary(folder)
    if as_json:
        _print_json({"out": str(folder), "summary": json.loads(to_json(summary))})
    else:
        typer.echo((folder / "summary.md").read_text(encoding="utf-8"))
        typer.echo(str(folder / "report.html"))
    if excess := describe_excess(summary):
        raise TooManyFailuresError("; ".join([f"{folder}: {excess}", *summary.notes]))
    if not summary.validity.is_valid:
        raise InvalidRunError(f"{folder} is INVALID: {'; '.join(summary.validity.problems)}")


def _find_max(
    config: RunConfig, credentials: Credentials, as_json: bool, may_overwrite: bool
) -> None:
    if not config.slo or config.arrival not in ("poisson", "constant"):
        raise UsageError("--find-max needs --slo, and --arrival poisson or constant")
    from loadtest import run

    found = run.find_max(config, credentials, ProgressReporter(), may_overwrite=may_overwrite)
    if as_json:
        _print_json(json.loads((config.out / "find_max.json").read_text(encoding="utf-8")))
    else:
        typer.echo("\n".join(_describe_rate(arm, rate) for arm, rate in found.items()))


def _describe_rate(arm: str, rate: MaxRate) -> str:
    if rate.meets_rps is None:
        return f"{arm}: does not meet the SLO, not even at {rate.fails_rps:g} requests per second"
    if rate.fails_rps is None:
        return f"{arm}: meets the SLO at {rate.meets_rps:g} requests per second, the most tried"
    return (
        f"{arm}: meets the SLO at {rate.meets_rps:g} requests per second, "
        f"not for sure at {rate.fails_rps:g}"
    )


@app.command()
@with_config_flags
def plan(as_json: AsJson = False, **flags: str | None) -> None:
    """Show what `run` with the same flags would send, and send nothing."""
    config = parse_config({**flags, "out": flags["out"] or "."})
    from loadtest.workload import dataset, schedule

    prompts = dataset.load_prompts(config)
    found = schedule.plan(config, prompts)
    if as_json:
        _print_json(_facts(config, found))
    else:
        typer.echo(_describe(config, found))


def _facts(config: RunConfig, schedule: Schedule) -> dict[str, object]:
    """A closed loop's number of requests is not known before: null."""
    return {
        "schedule_sha256": schedule.sha256,
        "num_requests": len(schedule.requests) if config.is_open_loop else None,
        "num_blocks": len(schedule.blocks),
        "loads": schedule.loads,
        "duration_s": schedule.duration_s,
    }


def _describe(config: RunConfig, schedule: Schedule) -> str:
    num_requests = f"{len(schedule.requests)} requests" if config.is_open_loop else "closed loop"
    loads = ", ".join(f"{load:g}" for load in schedule.loads)
    loads = f"{loads} requests per second" if config.is_open_loop else f"concurrency {loads}"
    return (
        f"{num_requests} in {len(schedule.blocks)} blocks, {schedule.duration_s:.0f} s; "
        f"{loads} for {', '.join(config.arms)}\n"
        f"schedule {schedule.sha256}"
    )


@app.command()
def report(folder: Folder) -> None:
    """Write a run's report.html anew; a run that died is summed up from what it has left."""
    from loadtest.folder import REPORT_FILE, is_partial
    from loadtest.report.page import write_report
    from loadtest.sum_up import sum_up

    if is_partial(folder):
        sum_up(folder)
        typer.echo((folder / "summary.md").read_text(encoding="utf-8"))
        typer.echo(str(folder / REPORT_FILE))
    else:
        typer.echo(str(write_report(folder)))


@app.command()
def compare(
    before: Folder,
    after: Folder,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Compare runs that were asked different things, too. By default that is an error.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two runs: what got faster or slower, better or worse."""
    from loadtest.verdicts import compare

    found = compare.compare_runs(before, after, is_forced=force)
    if as_json:
        typer.echo(compare.to_json(found))
    else:
        typer.echo(compare.to_text(found), nl=False)


def _limit(flag: str, help: str) -> Any:
    return typer.Option(
        flag, metavar="ARM.METRIC=NUMBER", help=f"{help} May be repeated (default: none)."
    )


@app.command()
def gate(
    folder: Folder,
    lower: Annotated[
        list[str] | None,
        _limit(
            "--min",
            "The metric must be at least this; ARM@LOAD.METRIC=… asks it at one load alone.",
        ),
    ] = None,
    upper: Annotated[
        list[str] | None,
        _limit(
            "--max", "The metric must be at most this, in seconds for times: student.ttft_p95=0.3."
        ),
    ] = None,
    max_regress: Annotated[
        list[str] | None,
        _limit(
            "--max-regress",
            "The metric may be worse than that of --baseline by this share, 0.1 for 10 %.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an earlier run (default: none).", exists=True, file_okay=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold a run against limits: the gate passes, or the exit code is 3 and says what failed."""
    from loadtest.analysis.summary import read_summary
    from loadtest.verdicts.gate import check, parse_limit

    limits = [parse_limit("min", text) for text in lower or ()]
    limits += [parse_limit("max", text) for text in upper or ()]
    limits += [parse_limit("max-regress", text) for text in max_regress or ()]
    if not limits:
        raise UsageError("a gate needs a limit; give --min, --max, --max-regress")
    broken = check(read_summary(folder), read_summary(baseline) if baseline else None, limits)
    reasons = [str(each) for each in broken]
    if as_json:
        _print_json({"is_open": not broken, "broken": reasons})
    elif not broken:
        typer.echo(f"gate passed: {folder} keeps all {len(limits)} limits")
    if broken:
        raise GateFailedError(f"gate failed: {folder}: {'; '.join(reasons)}")


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, allow_nan=False))
