"""Where servers listen: how an address is written, and which ones only this machine can reach.

The latter matters for listeners without TLS, and for tokens without it. `parse_host` reads what a
server listens on, `parse_target` what a client calls, `RemoteAddress` where the remote teacher is.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

UNIX, ABSTRACT = "unix:", "unix-abstract:"
DATA_PORT, CONTROL_PORT = 50051, 50052
_PLACE = re.compile(r"(\[[^\[\]\s/@,]+\]|[^\s:/\[\]@,]*)(?::(\d{1,9}))?", re.ASCII)
# Of sockaddr_un.sun_path, without the byte that ends it (unix(7)).
MAX_UNIX_BYTES = 107
# gRPC takes what follows "unix:" for a URI, and several of them for a list.
_UNIX_NAME = re.compile(r"[^\s%?#,\x00-\x1f\x7f]+(?: +[^\s%?#,\x00-\x1f\x7f]+)*")
_REMOTE_FORM = re.compile(
    r"(grpcs?)://(\[[0-9a-fA-F:.]+(?:%[\w.-]+)?\]|[^\[\]:/@\s]+):(\d{1,5})/?", re.ASCII
)
_REMOTE_SOCKET = "grpc+"


def is_unix(address: str) -> bool:
    """Say whether an address is a Unix socket's: `unix:/PATH` or `unix-abstract:NAME`."""
    return address.startswith((UNIX, ABSTRACT))


def parse_unix(address: str) -> str:
    """Return a Unix socket's address as `unix:/PATH` or `unix-abstract:NAME`.

    Raises:
        ValueError: no socket can have it.

    >>> parse_unix("unix:///run/tandem.sock"), parse_unix("unix-abstract:tandem")
    ('unix:/run/tandem.sock', 'unix-abstract:tandem')
    """
    if address.startswith(ABSTRACT):
        kind, name = ABSTRACT, address.removeprefix(ABSTRACT)
    else:
        kind, name = UNIX, re.sub("^//(?=/)", "", address.removeprefix(UNIX))
    if kind == UNIX and not re.match("/(?!/)", name):
        raise ValueError("a socket's path must be absolute: unix:/PATH or unix:///PATH")
    if not _UNIX_NAME.fullmatch(name):
        raise ValueError("a socket's name must be without % ? # commas and spaces around it")
    num_bytes = len(name.encode())
    if num_bytes > MAX_UNIX_BYTES:
        raise ValueError(
            f"the name of a Unix socket has {num_bytes} bytes; must have at most {MAX_UNIX_BYTES}"
        )
    return kind + name


def parse_host(text: str) -> str:
    """Return a host to listen on as it is used here: an IPv6 address without its brackets.

    Raises:
        ValueError: it is none; says what it may be.

    >>> parse_host("[::1]"), parse_host("fe80::1%eth0"), parse_host("unix:///run/tandem.sock")
    ('::1', 'fe80::1%eth0', 'unix:/run/tandem.sock')
    >>> parse_host("127.0.0.1:50051")
    Traceback (most recent call last):
    ValueError: has a port, which is a setting of its own
    """
    if is_unix(text):
        return parse_unix(text)
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_ip(host):
        return host
    if re.fullmatch(r"(\[.*\]|[^:]*):\d+", text):
        raise ValueError("has a port, which is a setting of its own")
    if not re.fullmatch(r"[^\s:/\[\]%@,]+", host):
        raise ValueError(
            "must be a name, an IPv4 or IPv6 address, unix:/PATH or unix-abstract:NAME"
        )
    return host


def parse_target(text: str, default_port: int = DATA_PORT) -> str:
    """Return where a client is to call, as gRPC takes it: HOST:PORT, a Unix socket, or dns:///….

    Raises:
        ValueError: it is none of them; says what to write, with `default_port` where there is none.

    >>> parse_target("localhost:50051"), parse_target("[::1]:80"), parse_target("unix:///run/x")
    ('localhost:50051', '[::1]:80', 'unix:/run/x')
    >>> parse_target("http://tandem.example:50051/v1")
    Traceback (most recent call last):
    ValueError: is a URL; write tandem.example:50051
    """
    if is_unix(text):
        return parse_unix(text)
    if re.match(r"(dns|ipv4|ipv6):", text):
        return text
    scheme, mark, rest = text.rpartition("://")
    place = rest.partition("/")[0] if mark else text
    host, port = _split(place)
    right = join_port(host or "127.0.0.1", default_port if port is None else port)
    if mark:
        encrypted = ", with --tls-ca for TLS" if scheme in ("https", "grpcs") else ""
        raise ValueError(f"is a URL; write {right}{encrypted}")
    if not host:
        raise ValueError(f"has no host; write {right}")
    if port is None:
        raise ValueError(f"has no port; write {right}")
    if not 1 <= port <= 65535:
        raise ValueError(f"has port {port}; must be 1 to 65535")
    if ":" in host and not place.startswith("["):
        raise ValueError(f"is an IPv6 address without brackets; write {right}")
    return right


def _split(place: str) -> tuple[str, int | None]:
    """Return host, without brackets, and port, as far as they are there; ValueError for others."""
    if _is_ip(place):
        return place, None
    if place.isascii() and place.isdecimal():
        return "", int(place)
    host, _, port = place.rpartition(":")
    if ":" in host and _is_ip(host) and port.isdecimal():
        return host, int(port)
    found = _PLACE.fullmatch(place)
    host = found[1].strip("[]").replace("%25", "%") if found else ""
    if found is None or ("[" in place and not _is_ip(host)):
        raise ValueError("is no address; write HOST:PORT, such as 127.0.0.1:50051, or unix:/PATH")
    return host, int(found[2]) if found[2] else None


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine's own; of names only `localhost` is.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "::1%lo", "localhost", "unix:/x")]
    [True, True, True, True, True]
    >>> [is_loopback(host) for host in ("0.0.0.0", "::", "example")]
    [False, False, False]
    """
    if host == "localhost" or is_unix(host):
        return True
    return _is_ip(host) and ipaddress.ip_address(host).is_loopback


def join_port(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets; a Unix socket has no port.

    The percent sign of a zone is written as in a URI (RFC 6874), which gRPC takes it for.

    >>> join_port("localhost", 80), join_port("::1", 80), join_port("fe80::1%eth0", 80)
    ('localhost:80', '[::1]:80', '[fe80::1%25eth0]:80')
    >>> join_port("unix:/run/tandem.sock", 1)
    'unix:/run/tandem.sock'
    """
    if is_unix(host):
        return host
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """A remote server; `grpcs` says that the connection is encrypted.

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
        if text.startswith(_REMOTE_SOCKET) and is_unix(text.removeprefix(_REMOTE_SOCKET)):
            return cls(parse_unix(text.removeprefix(_REMOTE_SOCKET)), 0, is_encrypted=False)
        found = _REMOTE_FORM.fullmatch(text)
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
            return _REMOTE_SOCKET + self.host
        return f"grpc{'s' if self.is_encrypted else ''}://{join_port(self.host, self.port)}"


def is_remote(text: object) -> bool:
    """Say whether a text means an address, a right one or not, rather than a folder.

    >>> is_remote("grpc://teacher:50051"), is_remote("models/teacher"), is_remote("http://x")
    (True, False, True)
    >>> is_remote("grpc+unix:/run/teacher.sock")
    True
    """
    return isinstance(text, str) and ("://" in text or text.startswith(_REMOTE_SOCKET))
