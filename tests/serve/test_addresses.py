"""Addresses as people write them."""

from __future__ import annotations

import pytest

from serve.addresses import MAX_UNIX_BYTES, parse_host, parse_target


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("unix:run/a.sock", "must be absolute"),
        ("unix://host/a.sock", "must be absolute"),
        ("unix:", "must be absolute"),
        ("unix:/a%b", "without % [?] # commas"),
        ("unix:/a,b", "without % [?] # commas"),
        ("unix:/a\n", "without % [?] # commas"),
        ("unix-abstract:", "without % [?] # commas"),
        ("unix:/" + "é" * 54, "has 109 bytes; must have at most 107"),
        ("127.0.0.1:50051", "has a port, which is a setting of its own"),
        ("[::1]:50051", "has a port"),
        ("http://localhost", "must be a name, an IPv4 or IPv6 address, unix:/PATH or"),
        ("", "must be a name"),
        ("[tandem]x", "must be a name"),
        ("a b", "must be a name"),
    ],
)
def test_host_that_is_none_is_refused(host: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_host(host)


def test_longest_name_of_a_socket_is_taken() -> None:
    longest = "unix:/" + "x" * (MAX_UNIX_BYTES - 1)
    assert parse_host(longest) == longest


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("tandem.example:50051", "tandem.example:50051"),
        ("[::1]:80", "[::1]:80"),
        ("[fe80::1%eth0]:80", "[fe80::1%25eth0]:80"),
        ("[fe80::1%25eth0]:80", "[fe80::1%25eth0]:80"),
        ("unix:///run/tandem.sock", "unix:/run/tandem.sock"),
        ("dns:///tandem.example:50051", "dns:///tandem.example:50051"),
    ],
)
def test_target_is_read(text: str, target: str) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://tandem.example:80/v1", "is a URL; write tandem.example:80"),
        ("http://tandem.example", "is a URL; write tandem.example:50051"),
        ("https://[::1]:443", "is a URL; write [::1]:443, with --tls-ca for TLS"),
        ("grpc://tandem:1", "is a URL; write tandem:1"),
        ("grpcs://tandem:1", "is a URL; write tandem:1, with --tls-ca for TLS"),
        ("localhost", "has no port; write localhost:50051"),
        ("127.0.0.1", "has no port; write 127.0.0.1:50051"),
        ("::1", "has no port; write [::1]:50051"),
        ("[::1]", "has no port; write [::1]:50051"),
        ("::1:50051", "is an IPv6 address without brackets; write [::1]:50051"),
        ("50052", "has no host; write 127.0.0.1:50052"),
        (":50052", "has no host; write 127.0.0.1:50052"),
        ("", "has no host; write 127.0.0.1:50051"),
        ("tandem:0", "has port 0; must be 1 to 65535"),
        ("tandem:70000", "has port 70000; must be 1 to 65535"),
        *(
            (text, "is no address; write HOST:PORT, such as 127.0.0.1:50051, or unix:/PATH")
            for text in ("a b:1", "a:b", "a:1/x", "a@b:1", "a:1,b:1", "[x]:1", "a:1 ")
        ),
        ("unix:run", "a socket's path must be absolute: unix:/PATH or unix:///PATH"),
    ],
)
def test_target_that_is_none_is_told_what_to_write(text: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_target(text)
    assert str(caught.value) == told
