from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UsageError
from serve.app.config import ServeConfig
from serve.app.flags import SECTIONS, default_of, metavar_of
from serve.app.settings import Settings, env_of, load_settings

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs/serve.md"


def load(
    file: Path | None = None, environ: dict[str, str] | None = None, **flags: Any
) -> ServeConfig:
    return load_settings({"bundle": "b"} | flags, environ or {}, file).config


def refusal(file: Path | None = None, environ: dict[str, str] | None = None, **flags: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_settings({"bundle": "b"} | flags, environ or {}, file)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Which source wins


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "port: 1\nmax_num_seqs: 1\nthreads: 1\n")
    settings = load_settings(
        {"bundle": "b", "port": "3", "device": None},
        {"TANDEM_PORT": "2", "TANDEM_MAX_NUM_SEQS": "2", "HOME": "/h"},
        file,
    )
    config = settings.config
    assert (config.port, config.max_num_seqs, config.threads, config.device) == (3, 2, 1, "auto")
    assert settings.origins == {
        "bundle": "flag --bundle",
        "port": "flag --port",
        "max_num_seqs": "env TANDEM_MAX_NUM_SEQS",
        "threads": f"file {file}: threads",
    }


def test_bundle_may_come_from_the_environment() -> None:
    assert load_settings({"bundle": None}, {"TANDEM_BUNDLE": "x"}).config.bundle == Path("x")


def test_switch_that_is_off_wins_over_the_environment() -> None:
    environ = {"TANDEM_REFLECTION": "true"}
    assert load(environ=environ).reflection
    assert not load(environ=environ, reflection=False).reflection


# How values are read


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tasks", '["math", "code"]', {"math", "code"}),
        ("answer_formats", '{"hex": "0x([0-9a-f]+)"}', {"hex": "0x([0-9a-f]+)"}),
        ("threads", "null", None),
        ("variant", "null", None),
        ("host", "localhost", "localhost"),
        ("shadow_rate", "5e-2", 0.05),
        ("log_requests", "1", True),
        ("bundle", "~no_such_user/x", Path("~no_such_user/x")),
    ],
)
def test_text_of_a_flag_and_of_a_variable_mean_the_same(
    name: str, text: str, expected: object
) -> None:
    assert getattr(load(**{name: text}), name) == expected
    assert getattr(load(environ={env_of(name): text}, bundle=None if name == "bundle" else "b"),
                   name) == expected  # fmt: skip


def test_relative_paths_of_a_file_start_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    text = "teacher: models/t\ntls_key: ~/key.pem\ntls_cert: /etc/c.pem\nvariant: int4\n"
    (tmp_path / "conf").mkdir()
    config = load(write(Path("conf/s.yaml"), text), {"TANDEM_AUTH_TOKENS": "~/tokens"})
    assert config.teacher == tmp_path / "conf/models/t"
    assert config.tls_key == Path("/home/ada/key.pem")
    assert config.tls_cert == Path("/etc/c.pem")
    assert config.auth_tokens == Path("/home/ada/tokens")
    assert (config.bundle, config.variant) == (Path("b"), "int4")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.yaml", "port: 7\ntasks: [math]\nthreads: null"),
        ("s.json", '{"port": 7, "tasks": ["math"], "threads": null}'),
        ("s.toml", 'port = 7\ntasks = ["math"]'),
    ],
)
def test_file_is_yaml_json_or_toml(tmp_path: Path, name: str, text: str) -> None:
    config = load(write(tmp_path / name, text))
    assert (config.port, config.tasks, config.threads) == (7, {"math"}, None)


def test_file_of_comments_says_nothing(tmp_path: Path) -> None:
    assert load(write(tmp_path / "s.yaml", "# port: 7\n")) == load()


# What is refused


def test_all_errors_are_reported_together_a_line_each(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "max_num_seq: 3\nhost: 7\n")
    environ = {"TANDEM_PORT": "tcp://10.0.0.1:50051", "TANDEM_TASKS": "[math"}
    assert refusal(file, environ, device="tpu", shadow_rate="2").splitlines() == [
        "flag --device: Input should be 'auto', 'cpu' or 'cuda', got 'tpu'",
        f"file {file}: host: Input should be a valid string, got 7",
        "env TANDEM_PORT: Input should be a valid integer, unable to parse string as an integer, "
        "got 'tcp://10.0.0.1:50051'",
        "flag --shadow-rate: Input should be less than or equal to 1, got '2'",
        "env TANDEM_TASKS: Input should be a valid list as JSON, got '[math'",
        f"file {file}: max_num_seq: there is no such setting; did you mean max_num_seqs?",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("TANDEM_MAX_NUM_SEQ", "; did you mean TANDEM_MAX_NUM_SEQS?"),
        ("TANDEM_port", "; did you mean TANDEM_PORT?"),
        ("TANDEM_", ""),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest_name(key: str, hint: str) -> None:
    assert refusal(environ={key: "3"}) == f"env {key}: there is no such setting{hint}"


def test_error_within_a_collection_says_where() -> None:
    line = refusal(environ={"TANDEM_ANSWER_FORMATS": '{"hex": 3}'})
    assert line == "env TANDEM_ANSWER_FORMATS.hex: Input should be a valid string, got 3"


def test_missing_bundle_says_how_to_give_it() -> None:
    expected = "bundle is required: --bundle, TANDEM_BUNDLE, or bundle in --config FILE"
    assert refusal(bundle=None).startswith(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher": "t", "no_teacher": True}, "--teacher and --no-teacher contradict"),
        ({"no_student": True, "no_teacher": True}, "--no-teacher and --no-student leave no model"),
        (
            {"no_student": True, "teacher": "grpc://t:1"},
            "--no-student leaves no model here: --teacher grpc://t:1 is remote",
        ),
        ({"teacher_token_file": "t"}, "--teacher-token-file is for a --teacher grpc://HOST:PORT"),
        (
            {"teacher": "grpc://t:1", "teacher_token_file": "t"},
            "--teacher-token-file needs an encrypted --teacher grpcs://HOST:PORT",
        ),
        (
            {"teacher": "grpc://127.0.0.1:1", "teacher_tls_ca": "t"},
            "--teacher-tls-ca needs an encrypted --teacher grpcs://HOST:PORT",
        ),
        (
            {"teacher": "grpcs://t:1", "teacher_tls_cert": "t"},
            "--teacher-tls-cert and --teacher-tls-key belong together",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    flags: dict[str, Any], message: str
) -> None:
    assert refusal(**flags).startswith(message)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "0.0.0.0"}, "--host"),
        ({"control_host": "::"}, "--control-host"),
        ({"host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"}, "--auth-tokens"),
        ({"host": "0.0.0.0", "auth_tokens": "t"}, "--tls-cert"),
        ({"tls_cert": "c"}, "--tls-key"),
        ({"tls_key": "k"}, "--tls-cert"),
        ({"tls_client_ca": "a"}, "--tls-cert"),
    ],
)
def test_unsafe_settings_are_refused_by_flag(settings: dict[str, str], text: str) -> None:
    assert text in refusal(**settings)


@pytest.mark.parametrize("extra", [{"auth_tokens": "t"}, {"tls_client_ca": "a"}])
def test_open_address_with_tls_and_credentials_is_allowed(extra: dict[str, str]) -> None:
    assert ServeConfig(bundle="x", host="0.0.0.0", tls_cert="c", tls_key="k", **extra)


@pytest.mark.parametrize(
    "address",
    ["grpc://t", "grpc://:1", "grpc://t:0", "grpc://t:65536", "http://t:1", "grpc://a b:1"],
)
def test_address_of_a_teacher_that_is_none_is_refused(address: str) -> None:
    assert refusal(teacher=address) == (
        f"flag --teacher: {address!r} is no address; must be grpc://HOST:PORT, "
        f"grpcs://HOST:PORT or grpc+unix:/PATH, got {address!r}"
    )


def test_teacher_is_a_folder_or_an_address(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    for text, expected in (("t", tmp_path / "t"), ("grpc://t:1", "grpc://t:1")):
        file.write_text(f"bundle: b\nteacher: {text}\n")
        assert load_settings({}, {}, file).config.teacher == expected


def test_teacher_alone_needs_no_bundle() -> None:
    flags = {"no_student": True, "teacher": "folder"}
    assert load_settings(flags, {}).config.bundle is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.yaml", "port: [", "cannot be parsed: line 1: while parsing"),
        ("s.toml", "port 7", "cannot be parsed: Expected '='"),
        ("s.yaml", "since: 2026-13-45", "cannot be parsed: line 1: .* month must be"),
        ("s.yaml", "[" * 1000, "cannot be parsed: line 1: nested too deeply"),
        ("s.toml", "a = " + "[" * 3000, "cannot be parsed: nested too deeply"),
        ("s.yaml", "port: 0x" + "f" * 4000, "got a number of too many digits"),
        ("s.yaml", "- port", r"holds \['port'\], not settings by their names"),
        ("s.yaml", "7: 8", "7: there is no such setting$"),
    ],
)
def test_file_that_is_no_mapping_of_settings_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    file = write(tmp_path / name, text)
    assert re.search(message, refusal(file)) and str(file) in refusal(file)


def test_characters_that_yaml_refuses_are_printed_escaped(tmp_path: Path) -> None:
    name = "a\x7f\x85\u2028\ufeff\uffffé"
    printed = load_settings({"bundle": f"/{name}"}, {}, None).to_yaml()
    file = write(tmp_path / "s.yaml", printed)
    assert load_settings({}, {}, file).config.bundle == Path(f"/{name}")


def test_variable_that_is_nested_too_deeply_is_refused() -> None:
    assert "TANDEM_TASKS: " in refusal(environ={"TANDEM_TASKS": "[" * 100_000})[:100]


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "s.yaml"
    assert refusal(missing) == f"--config {missing} cannot be read: No such file or directory"
    (tmp_path / "b.yaml").write_bytes(b"\xff")
    assert "b.yaml cannot be parsed: line 1: not UTF-8" in refusal(tmp_path / "b.yaml")


# Printing


def test_printed_settings_load_as_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = '{"odd": "#: \\n\\"é\'(\\\\d+)"}'
    settings = load_settings(
        {"bundle": "b", "tasks": '["b", "a"]', "answer_formats": formats, "shadow_rate": "1e-6"},
        {"TANDEM_LOG_REQUESTS": "true"},
    )
    expected = settings.config.model_copy(update={"bundle": Path("b").absolute()})
    (tmp_path / "elsewhere").mkdir()
    file = write(tmp_path / "elsewhere/s.yaml", settings.to_yaml())
    monkeypatch.chdir(tmp_path)
    assert load_settings({}, {}, file).config == expected


def test_printed_settings_say_where_each_came_from(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "tasks: [b, a]\n")
    environ = {"TANDEM_PORT": "7"}
    lines = load_settings({"bundle": "/b"}, environ, file).to_yaml().splitlines()
    assert len(lines) == len(ServeConfig.model_fields)
    assert {
        'bundle: "/b"  # flag --bundle',
        "port: 7  # env TANDEM_PORT",
        f'tasks: ["a", "b"]  # file {file}: tasks',
        "threads: null  # default",
    } <= set(lines)


def test_setting_of_a_type_that_cannot_be_printed_is_a_bug() -> None:
    config = ServeConfig(bundle="b").model_copy(update={"port": 7j})
    with pytest.raises(AssertionError, match="no setting is a complex"):
        Settings(config, {}).to_yaml()


# docs/serve.md


def row_of(name: str) -> str:
    """Return what a setting's row begins with; its last cell says in words what it does."""
    is_required = ServeConfig.model_fields[name].is_required()
    default = "required" if is_required else default_of(name) or "none"
    return f"| `{name}` | `{env_of(name)}` | {unit_of(name)} | `{default}` | "


def unit_of(name: str) -> str:
    """Return the unit that a name ends with, or what kind of value it takes."""
    units = {"_s": "seconds", "_mib": "MiB", "_bytes": "bytes", "_tokens": "tokens",
             "_len": "tokens", "_seqs": "samples", "_samples": "samples",
             "_waiting": "samples", "_weight": "relative", "_rate": "0 to 1"}  # fmt: skip
    for ending, unit in units.items():
        if name.endswith(ending) and name != "auth_tokens":
            return unit
    if ServeConfig.model_fields[name].annotation is bool:
        return "true, false"
    return metavar_of(name).replace("|", ", ").replace("INTEGER", "number").lower()


def test_docs_list_every_setting_in_its_section() -> None:
    lines = DOCS.read_text().splitlines()
    found = [line for line in lines if line.startswith(("| `", "### "))]
    expected: list[str] = []
    for name in ServeConfig.model_fields:
        expected += [f"### {SECTIONS[name]}"] if name in SECTIONS else []
        expected.append(row_of(name))
    for line, start in zip_longest(found, expected, fillvalue=""):
        assert start and line.startswith(start), f"docs/serve.md has {line!r}, not {start!r}"
        assert line.removeprefix(start) != "|", f"docs/serve.md does not say what {start} does"


def test_sections_start_at_settings() -> None:
    assert set(SECTIONS) <= set(ServeConfig.model_fields)
    assert next(iter(SECTIONS)) == next(iter(ServeConfig.model_fields))


def test_example_of_the_docs_loads(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    config = load(write(tmp_path / "serve.yaml", example), bundle=None)
    assert config.bundle == tmp_path / "bundle"
    assert config.shadow_rate == 0.05
    assert config.answer_formats


def test_setting_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("bundle: b\nmax_num_seqs: 4\nmax_num_seqs: 5\n")
    with pytest.raises(UsageError, match="line 3: 'max_num_seqs' is given twice, first on line 2"):
        load_settings({}, {}, file)
