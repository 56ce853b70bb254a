"""Text as a config file or as variables: settings, or one error that says what is wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from serve.app.config import ServeConfig
from serve.app.settings import env_of, load_settings

NAMES = tuple(ServeConfig.model_fields)
_YAML, _TOML, _ENVIRONMENT = range(3)


def check(data: bytes) -> None:
    """Treat the first byte as the source and the rest as its text; raises where something is wrong.

    Variables are lines, the first character of each names the setting. What is taken must be
    printed as a file that says the same.
    """
    kind = data[0] % 3 if data else _YAML
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("settings.toml" if kind == _TOML else "settings.yaml")
        try:
            if kind == _ENVIRONMENT:
                settings = load_settings({}, _environment(data[1:]), None)
            else:
                path.write_bytes(data[1:])
                settings = load_settings({}, {}, path)
        except UsageError as error:
            assert str(error).strip()
            return
        printed = Path(folder) / "printed.yaml"
        printed.write_text(settings.to_yaml(), encoding="utf-8")
        again = load_settings({}, {}, printed)
        assert _located(again.config) == _located(settings.config)


def _located(config: ServeConfig) -> dict[str, Any]:
    """Return the settings, with paths as they are printed."""
    values = config.model_dump()
    return {name: v.absolute() if isinstance(v, Path) else v for name, v in values.items()}


def _environment(data: bytes) -> dict[str, str]:
    lines = data.decode("utf-8", "ignore").replace("\0", "").splitlines()
    return {env_of(NAMES[(ord(line[0]) - 32) % len(NAMES)]): line[1:] for line in lines if line}


# What settings say of each other, and forms of their own.
_TEXTS = (
    "teacher: grpc://127.0.0.1:1\nteacher_token_file: t", "teacher: grpcs://x:1\nteacher_tls_ca: c",
    "teacher: grpcs://x:1\nteacher_tls_cert: c", "teacher_tls_ca: c", "teacher: grpc://x:70000",
    "teacher: grpc://x:1\nteacher_tls_ca: c", "teacher: 'grpcs://[::1%1]:1/'", "teacher: t",
    "teacher: grpc://x:1\nno_student: true", "no_teacher: true\nno_student: true",
    "no_teacher: true\nteacher: t", "tls_cert: c", "tls_client_ca: c", "host: 0.0.0.0",
    "host: 0.0.0.0\ntls_cert: c\ntls_key: k\nauth_tokens: t", "host: localhost", "host: ''",
    "student_weight: 0\nteacher_weight: 0", "student_wieght: 1", "1: 2", "? [a]\n: b", "a: 1\na: 2",
    "answer_formats: {boxed: x}", "answer_formats: {A: (x)}", "answer_formats: {a: (}",
    "answer_formats: {a: x}", "answer_formats: {a: '(x){99999999999}'}",
    "answer_formats: {a: '" + "(" * 3000 + ")" * 3000 + "'}", "port: !!python/name:os.system",
    "&a [*a]", "- *a", "port: 0x" + "f" * 4000, "port: 2001-01-01", "tasks: !!set {a, b}",
    "answer_formats: &x {a: *x}", "tasks: &t [*t]", "bundle: c", "host: !!binary aGk=",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    """Yield a file of each kind, and variables."""
    yield (
        bytes([_YAML]) + b"bundle: b\nmax_num_seqs: 4\ntasks: [a]\nanswer_formats:\n  hex: '(x)'\n"
    )
    yield bytes([_YAML]) + b'{"bundle": "b", "host": "::1", "teacher": "grpc://x:1"}'
    yield bytes([_YAML]) + b"bundle: &a b\ntls_cert: *a\n<<: {port: 1}\n"
    yield bytes([_TOML]) + b'bundle = "b"\nshadow_rate = 0.5\n[answer_formats]\nhex = "(x)"\n'
    variables = {"bundle": "b", "port": "1", "tasks": '["a"]', "shadow_rate": "0.5"}
    lines = [chr(NAMES.index(name) + 32) + text for name, text in variables.items()]
    yield bytes([_ENVIRONMENT]) + "\n".join(lines).encode()
    for text in _TEXTS:
        yield bytes([_YAML]) + b"bundle: b\n" + text.encode()
    for name in NAMES:
        for value in (
            "1",
            "-1",
            "true",
            "x",
            "null",
            "[]",
            "{a: b}",
            "1e999",
            "'::1'",
            "~nobody/x",
        ):
            yield bytes([_YAML]) + f"bundle: b\n{name}: {value}\n".encode()
