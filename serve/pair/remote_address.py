"""`grpc://host:port`, `grpc+unix:/path`: where another server answers for a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve.addresses import is_unix, join_port, parse_unix

_FORM = re.compile(
    r"(grpcs?)://(\[[0-9a-fA-F:.]+(?:%[\w.-]+)?\]|[^\[\]:/@\s]+):(\d{1,5})/?", re.ASCII
)
_SOCKET = "grpc+"


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """A server elsewhere; `grpcs` says that the connection is encrypted.

    `host` is a Unix socket's address where that is meant; the port is 0 then.
    """

    host: str
    port: int
    is_encrypted: bool

    @classmethod
    def parse(cls, text: str) -> RemoteAddress:
        """Return the address that a text names.

        Raises:
            ValueError: it names none.

        >>> RemoteAddress.parse("grpc://teacher.example:50051").target
        'dns:///teacher.example:50051'
        >>> str(RemoteAddress.parse("grpcs://[::1]:443"))
        'grpcs://[::1]:443'
        >>> RemoteAddress.parse("grpc+unix:///run/teacher.sock").target
        'unix:/run/teacher.sock'
        """
        if text.startswith(_SOCKET) and is_unix(text.removeprefix(_SOCKET)):
            return cls(parse_unix(text.removeprefix(_SOCKET)), 0, is_encrypted=False)
        found = _FORM.fullmatch(text)
        if found is None or not 1 <= int(found[3]) <= 65535:
            raise ValueError(
                f"{text!r} is no address; must be grpc://HOST:PORT, grpcs://HOST:PORT or "
                "grpc+unix:/PATH"
            )
        host = found[2].strip("[]").replace("%25", "%")
        return cls(host, int(found[3]), found[1] == "grpcs")

    @property
    def target(self) -> str:
        """The name that gRPC resolves to all addresses of the host, to spread calls over them."""
        place = join_port(self.host, self.port)
        return place if is_unix(place) else f"dns:///{place}"

    def __str__(self) -> str:
        if is_unix(self.host):
            return _SOCKET + self.host
        return f"grpc{'s' if self.is_encrypted else ''}://{join_port(self.host, self.port)}"


def is_remote(text: object) -> bool:
    """Say whether a text means an address, a right one or not, rather than a folder.

    >>> is_remote("grpc://teacher:50051"), is_remote("models/teacher"), is_remote("http://x")
    (True, False, True)
    >>> is_remote("grpc+unix:/run/teacher.sock")
    True
    """
    return isinstance(text, str) and ("://" in text or text.startswith(_SOCKET))
