"""`grpc://host:port`: where another server answers for a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve.hosts import join_port

_FORM = re.compile(r"(grpcs?)://(\[[0-9a-fA-F:.%]+\]|[^\[\]:/@\s]+):(\d{1,5})/?")


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """A server elsewhere; `grpcs` says that the connection is encrypted."""

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
        """
        found = _FORM.fullmatch(text)
        if found is None or not 1 <= int(found[3]) <= 65535:
            raise ValueError(
                f"{text!r} is no address; must be grpc://HOST:PORT or grpcs://HOST:PORT"
            )
        return cls(found[2].strip("[]"), int(found[3]), found[1] == "grpcs")

    @property
    def target(self) -> str:
        """The name that gRPC resolves to all addresses of the host, to spread calls over them."""
        return f"dns:///{join_port(self.host, self.port)}"

    def __str__(self) -> str:
        return f"grpc{'s' if self.is_encrypted else ''}://{join_port(self.host, self.port)}"


def is_remote(text: object) -> bool:
    """Say whether a text means an address, a right one or not, rather than a folder.

    >>> is_remote("grpc://teacher:50051"), is_remote("models/teacher"), is_remote("http://x")
    (True, False, True)
    """
    return isinstance(text, str) and "://" in text
