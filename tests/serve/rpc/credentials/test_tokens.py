"""The token file: what it may say, and who a token belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bundle.errors import UserError
from serve.rpc.credentials.tokens import Identity, TokenFile, new_token


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


A, B = sha256("a"), sha256("b")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_token_identifies_its_client(path: Path) -> None:
    path.write_text(f"# who\n\nada  {A.upper()}\tinference,control  # hers\nbob {B} reflection\n")
    tokens = TokenFile(path)
    assert tokens.identify("a") == Identity("ada", frozenset({"inference", "control"}))
    assert tokens.identify("b") == Identity("bob", frozenset({"reflection"}))


@pytest.mark.parametrize("token", ["", "c", "A", "a ", A, "ä", "a" * 10_000])
def test_other_tokens_identify_nobody(path: Path, token: str) -> None:
    path.write_text(f"ada {A} inference\n")
    assert TokenFile(path).identify(token) is None


def test_new_tokens_differ_and_are_found_by_their_hash(path: Path) -> None:
    (token, digest), (other, _) = new_token(), new_token()
    path.write_text(f"ada {digest} inference\n")
    tokens = TokenFile(path)
    assert tokens.identify(token) is not None
    assert tokens.identify(other) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"eve {B}", "2 fields; a line is NAME SHA256HEX SCOPE"),
        (f"eve {B} inference control", "4 fields; a line is NAME SHA256HEX SCOPE"),
        (f"-eve {B} inference", "a name is 1 to 64 of"),
        (f"{'e' * 65} {B} inference", "a name is 1 to 64 of"),
        (f"eve {B[:-1]} inference", "64 hexadecimal digits"),
        (f"eve {B[:-1]}g inference", "64 hexadecimal digits"),
        (f"eve inference {B}", "64 hexadecimal digits"),
        (f"eve {B} inference,admin", "scopes are control, inference, reflection"),
        (f"eve {B} inference,inference", "scopes are control, inference, reflection, each once"),
        (f"eve {B} inference,", "scopes are control, inference, reflection"),
        (f"ada {B} inference", "the name of line 1 again"),
        (f"eve {A} inference", "the hash of line 1 again"),
    ],
)
def test_malformed_line_is_named_and_not_shown(path: Path, line: str, message: str) -> None:
    path.write_text(f"ada {A} inference\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        TokenFile(path)
    text = str(caught.value)
    assert text.startswith(f"token file {path}, line 3: ")
    assert message in text
    assert not any(secret[:12] in text for secret in (A, B))


@pytest.mark.parametrize("content", [b"", b"# nobody\n\n"])
def test_file_without_clients_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match="no client in it"):
        TokenFile(path)


def test_missing_file_is_named(path: Path) -> None:
    with pytest.raises(UserError, match=f"token file {path}: No such file"):
        TokenFile(path)


def test_file_that_is_no_text_is_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        TokenFile(path)


def test_rotated_token_counts_from_the_next_look_on(path: Path) -> None:
    now_s = 0.0
    path.write_text(f"ada {A} inference\n")
    tokens = TokenFile(path, clock=lambda: now_s)
    path.write_text(f"ada {B} control\n")
    assert tokens.identify("a") is not None
    now_s = 1.0
    assert tokens.identify("a") is None
    assert tokens.identify("b") == Identity("ada", frozenset({"control"}))


def test_broken_new_file_keeps_the_old_clients(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    path.write_text(f"ada {A} inference\n")
    tokens = TokenFile(path, clock=lambda: now_s)
    path.write_text(f"ada {A[:20]}")
    now_s = 1.0
    assert tokens.identify("a") is not None
    now_s = 2.0
    assert tokens.identify("a") is not None
    assert len(caplog.records) == 1
    assert "line 1" in caplog.text and A[:12] not in caplog.text
