"""`tandem doctor`: what is wrong with this installation, and what to do about it.

`tandem.installation` looks at the machine, `diagnose` judges what it saw and touches nothing.
`examine` judges a bundle or a model's folder that is named, and loads nothing of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from bundle.errors import UsageError, UserError, one_line
from tandem.installation import RUNTIMES, Environment, gather
from tandem.roles import CLIENT, ROLES, install_command

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
MIN_MEMORY_BYTES = 4 * 2**30

Level = Literal["ok", "note", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact about the installation; a problem always says what to do."""

    level: Level
    subject: str
    message: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class BadPair:
    """Two packages that install together and then fail."""

    first: str
    second: str
    message: str
    remedy: str


BAD_PAIRS = (
    BadPair(
        "transformers>=4.58",
        "optimum-onnx<0.2",
        "optimum-onnx 0.1 works with transformers below 4.58 only",
        "pip install 'transformers>=4.56,<4.58'",
    ),
    BadPair(
        "grpcio-tools>=1.85",
        "protobuf<7.35",
        "the stubs that these tools write refuse protobuf below 7.35",
        "pip install 'grpcio-tools>=1.75.1,<1.76'",
    ),
)


# --- judging -------------------------------------------------------------------------------------


def diagnose(environment: Environment, required: Sequence[str] = (CLIENT,)) -> list[Finding]:
    """Return every finding, in the order in which they are worth reading.

    A role that is not installed is a problem if it is `required`, and else a note.
    """
    return [
        *_check_python(environment),
        *_check_roles(environment, {CLIENT, *required}),
        *_check_versions(environment),
        *_check_onnxruntime(environment),
        *_check_pairs(environment),
        *_check_stubs(environment),
        *_check_dependents(environment),
        *_check_imports(environment),
        *_check_hardware(environment),
        *_check_cuda(environment),
    ]


def _check_python(environment: Environment) -> Iterator[Finding]:
    found, allowed = environment.python_version, environment.requires_python
    if _is_within(found, allowed):
        yield Finding("ok", "python", found)
    else:
        remedy = "make a virtual environment with an allowed Python: python3.11 -m venv .venv"
        yield Finding("problem", "python", f"{found} is not {allowed}", remedy)


def _check_roles(environment: Environment, required: Collection[str]) -> Iterator[Finding]:
    for role in environment.requirements:
        missing = _missing(environment, role)
        if not missing:
            yield Finding("ok", f"role {role}", "installed")
        else:
            level: Level = "problem" if role in required else "note"
            message = f"is not installed; missing: {', '.join(missing)}"
            yield Finding(level, f"role {role}", message, install_command(role))


def _missing(environment: Environment, role: str) -> list[str]:
    needed = (Requirement(text).name for text in environment.requirements[role])
    return [name for name in needed if canonicalize_name(name) not in environment.packages]


def _check_versions(environment: Environment) -> Iterator[Finding]:
    for requirement in _wanted(environment):
        name = canonicalize_name(requirement.name)
        found = environment.packages.get(name)
        if found is None:
            continue
        if _is_within(found, str(requirement.specifier)):
            yield Finding("ok", name, found)
        else:
            remedy = f"pip install '{requirement}'"
            yield Finding("problem", name, f"{found} is not {requirement.specifier}", remedy)


def _wanted(environment: Environment) -> list[Requirement]:
    """Return what any role needs, each requirement once."""
    texts = (text for role in environment.requirements.values() for text in role)
    return [Requirement(text) for text in dict.fromkeys(texts)]


def _check_onnxruntime(environment: Environment) -> Iterator[Finding]:
    installed = sorted(RUNTIMES & environment.packages.keys())
    if len(installed) == 2:
        yield Finding(
            "problem",
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite one another's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install 'tandem[cpu]' or '[gpu]'",
        )
    elif installed:
        providers = ", ".join(environment.execution_providers) or "none"
        found = environment.packages[installed[0]]
        yield Finding("ok", installed[0], f"{found}, execution providers: {providers}")
    elif not _missing(environment, "serve"):
        remedy = "pip install 'tandem[cpu]' (or 'tandem[gpu]', never both)"
        yield Finding("problem", "onnxruntime", "is missing: no student can be served", remedy)


def _check_pairs(environment: Environment) -> Iterator[Finding]:
    for pair in BAD_PAIRS:
        first, second = Requirement(pair.first), Requirement(pair.second)
        if _has(environment, first) and _has(environment, second):
            subject = " + ".join(
                f"{r.name} {environment.packages[canonicalize_name(r.name)]}"
                for r in (first, second)
            )
            yield Finding("problem", subject, pair.message, pair.remedy)


def _check_stubs(environment: Environment) -> Iterator[Finding]:
    found = environment.packages.get("grpcio")
    needed = environment.stubs_grpcio_version
    if found and needed and Version(found) < Version(needed):
        remedy = f"pip install 'grpcio>={needed}', or `make protos` with older grpcio-tools"
        message = f"{found} is older than the generated stubs, which refuse it below {needed}"
        yield Finding("problem", "grpcio", message, remedy)


def _check_dependents(environment: Environment) -> Iterator[Finding]:
    """Other packages in this environment (vllm, tensorflow …) that pin what Tandem needs."""
    ours = {canonicalize_name(requirement.name) for requirement in _wanted(environment)}
    for dependent, texts in sorted(environment.dependencies.items()):
        for requirement in filter(_applies, _parse(texts)):
            name = canonicalize_name(requirement.name)
            found = environment.packages.get(name)
            if (
                name in ours
                and found is not None
                and not _is_within(found, str(requirement.specifier))
            ):
                message = f"needs {name}{requirement.specifier}, installed is {found}"
                remedy = f"give {dependent} a virtual environment of its own"
                yield Finding("problem", dependent, message, remedy)


def _check_imports(environment: Environment) -> Iterator[Finding]:
    for name, error in environment.import_errors.items():
        remedy = f"pip install --force-reinstall -c constraints.txt {name}"
        yield Finding("problem", name, f"cannot be imported: {error}", remedy)


def _check_hardware(environment: Environment) -> Iterator[Finding]:
    features = [flag for flag in CPU_FEATURES if flag in environment.cpu_flags]
    cores = f"{environment.num_cores} core" + "s" * (environment.num_cores != 1)
    text = f"{environment.cpu_model}, {cores}, {' '.join(features) or 'features unknown'}"
    yield Finding("ok", "cpu", text)
    if environment.cpu_flags and not any("vnni" in flag for flag in features):
        yield Finding("note", "cpu", "has no VNNI: int8 students decode several times slower")
    memory = f"{environment.memory_bytes / 2**30:.1f} GiB"
    if environment.memory_bytes < MIN_MEMORY_BYTES:
        remedy = f"distilling the demo needs {MIN_MEMORY_BYTES / 2**30:.0f} GiB"
        yield Finding("note", "memory", memory, remedy)
    else:
        yield Finding("ok", "memory", memory)


def _check_cuda(environment: Environment) -> Iterator[Finding]:
    if "torch" not in environment.packages:
        return
    if not environment.cuda_devices:
        yield Finding("ok", "cuda", "no device seen by torch; everything runs on the CPU")
        return
    yield Finding("ok", "cuda", ", ".join(environment.cuda_devices))
    if "CUDAExecutionProvider" not in environment.execution_providers:
        remedy = "pip uninstall -y onnxruntime, then install 'tandem[gpu]'"
        yield Finding("note", "cuda", "the student cannot use it: no CUDAExecutionProvider", remedy)


def _has(environment: Environment, requirement: Requirement) -> bool:
    found = environment.packages.get(canonicalize_name(requirement.name))
    return found is not None and _is_within(found, str(requirement.specifier))


def _parse(texts: Iterable[str]) -> Iterator[Requirement]:
    """Read what other packages require; the few that are malformed say nothing about ours."""
    for text in texts:
        with contextlib.suppress(InvalidRequirement):
            yield Requirement(text)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _is_within(version: str, specifier: str) -> bool:
    """Whether a version lies in a range; the "+cpu" of a local build does not count.

    >>> _is_within("2.13.0+cpu", ">=2.8"), _is_within("not a version", ">=1")
    (True, False)
    """
    try:
        return SpecifierSet(specifier).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False


# --- folders ------------------------------------------------------------------------------------


def examine(folder: Path) -> Finding:
    """Return whether a bundle, or a model's folder, can be used."""
    try:
        described = _describe(folder)
    except UserError as error:
        remedy = "fix what is named, or give another folder; nothing of this one was loaded"
        return Finding("problem", one_line(str(folder)), str(error), remedy)
    return Finding("ok", one_line(str(folder)), described)


def _describe(folder: Path) -> str:
    """Say what a folder holds; UserError for one that cannot be used."""
    # Imported here, so that an installation without them can be told so.
    from bundle.manifest import MANIFEST_NAME
    from bundle.model_folder import open_model_folder
    from bundle.token_ids import read_eos_token_ids
    from bundle.verify import check_models, verify_bundle
    from serve.text.tokenizer import Tokenizer

    what = ""
    if (folder / MANIFEST_NAME).exists():
        manifest = verify_bundle(folder)
        model = check_models(folder, manifest)
        what = f"a bundle of {', '.join(manifest.variants)}; its student: "
    else:
        model = open_model_folder(folder)
    Tokenizer.load(model.path)
    read_eos_token_ids(model.path)
    size = f"{model.num_parameters / 1e6:,.1f} M parameters in {model.dtype}"
    unread = model.config.ignored_keys
    return f"{what}{model.config.model_type}, {size}" + (
        f"; config.json, not read: {', '.join(unread)}" if unread else ""
    )


# --- telling -------------------------------------------------------------------------------------


def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundles, and folders of models, to be judged as well."),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="A role that must be installed: client, loadtest, serve or export. May be given "
            "several times; by default only client must be."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the findings as JSON; by default one per line."),
    ] = False,
) -> None:
    """Say which roles are installed, what is wrong, and what to do about it.

    Folders that are named are read, not loaded: nothing in them is run, nothing is fetched.

    Exits with 1 when there is a problem.
    """
    for unknown in set(role or ()) - set(ROLES):
        raise UsageError(f"--role {unknown}: the roles are {', '.join(ROLES)}")
    findings = [*diagnose(gather(), role or ()), *map(examine, folders or ())]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        typer.echo(render(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def render(findings: list[Finding]) -> str:
    """Return one line per finding, what to do below it, and a verdict."""
    signs = {"ok": " ok ", "note": "note", "problem": "FAIL"}
    lines = []
    for finding in findings:
        lines.append(f"{signs[finding.level]}  {finding.subject}: {finding.message}")
        if finding.remedy:
            lines.append(f"      → {finding.remedy}")
    num_problems = sum(finding.level == "problem" for finding in findings)
    verdict = f"{num_problems} problem" + "s" * (num_problems != 1) + " found"
    return "\n".join([*lines, "", verdict if num_problems else "Healthy."])
