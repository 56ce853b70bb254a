"""The clients of a server and what each may call: a file with the hashes of their tokens.

    # NAME  SHA256HEX                                                         SCOPE[,SCOPE...]
    ada     8281e31fa6574f3561cfa2070634eabf2e91a1d55c18b601428d1a06ca040011  inference,control

The tokens themselves are random and stay with the clients: `new_token` makes one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bundle.errors import UserError
from serve.rpc.credentials.reloading import Reloaded

SCOPES = frozenset({"inference", "control", "reflection"})

_NUM_TOKEN_BYTES = 32
MIN_INTERVAL_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a token belongs to, and the scopes that it opens."""

    name: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Entry:
    client: Identity
    sha256: bytes
    line: int


def new_token() -> tuple[str, str]:
    """Return a random token, and its SHA-256 in hex, which is what a token file holds.

    >>> token, sha256 = new_token()
    >>> len(token), sha256 == hashlib.sha256(token.encode()).hexdigest()
    (43, True)
    """
    token = secrets.token_urlsafe(_NUM_TOKEN_BYTES)
    return token, _hash(token).hex()


class TokenFile:
    """Knows clients by their tokens; follows its file, which is looked at once per second."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. UserError: it is unreadable or malformed; the text names the line."""
        self._entries = Reloaded(
            [path], partial(_read, path), min_interval_s=MIN_INTERVAL_S, clock=clock
        )

    def identify(self, token: str) -> Identity | None:
        """Return whose token it is; the time taken does not depend on which entry matches."""
        sha256 = _hash(token)
        found = None
        for entry in self._entries.current():
            if hmac.compare_digest(entry.sha256, sha256):
                found = entry.client
        return found


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(path: Path) -> tuple[_Entry, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"token file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"token file {path}: not UTF-8 text") from None
    entries: list[_Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        if fields := line.partition("#")[0].split():
            try:
                entry = _parse(fields, number)
                _check_distinct(entry, entries)
            except ValueError as error:
                raise UserError(f"token file {path}, line {number}: {error}") from None
            entries.append(entry)
    if not entries:
        # Also what a reader sees of a file that is being written.
        raise UserError(f"token file {path}: no client in it; a line is NAME SHA256HEX SCOPE,...")
    return tuple(entries)


def _parse(fields: list[str], line: int) -> _Entry:
    """Return a line's entry. ValueError: what is allowed; nothing of the line, which is secret."""
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} fields; a line is NAME SHA256HEX SCOPE[,SCOPE...]")
    name, sha256, scope_list = fields
    if not _SHA256.fullmatch(sha256):
        raise ValueError("the second field is the token's SHA-256: 64 hexadecimal digits")
    client = parse_client(name, scope_list)
    return _Entry(client, bytes.fromhex(sha256), line)


def parse_client(name: str, scope_list: str) -> Identity:
    """Return the client of a line; ValueError says what name and scopes may be."""
    scopes = scope_list.split(",")
    if not _NAME.fullmatch(name):
        raise ValueError("a name is 1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit")
    if not SCOPES.issuperset(scopes) or len(set(scopes)) < len(scopes):
        raise ValueError(f"scopes are {', '.join(sorted(SCOPES))}, each once, joined by commas")
    return Identity(name, frozenset(scopes))


def _check_distinct(entry: _Entry, others: list[_Entry]) -> None:
    """Raise ValueError if another line has the name or the hash."""
    for other in others:
        if entry.client.name == other.client.name:
            raise ValueError(f"the name of line {other.line} again; names are unique")
        if entry.sha256 == other.sha256:
            raise ValueError(f"the hash of line {other.line} again; every client has its own token")
