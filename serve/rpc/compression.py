"""Compressed messages, decompressed within the bound that plain ones have.

gRPC decompresses whatever comes and looks at the size then: 1 MiB of gzip took a server 1 GiB. With
`grpc.per_message_decompression` off it hands over the bytes as they came, without saying so.
"""

from __future__ import annotations

import zlib

from serve.rpc.decoding import MalformedMessageError

MAX_MESSAGE_BYTES = 4 << 20

_GZIP, _ZLIB = b"\x1f\x8b", b"\x78"
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32


def decompress(data: bytes) -> bytes:
    """Return a message as it was before the client compressed it, if it did: gzip or deflate.

    No message is taken for compressed by chance: both formats end with a checksum, and no field's
    tag begins as gzip does.

    Raises:
        MalformedMessageError: it has more than `MAX_MESSAGE_BYTES`.
    """
    if not data.startswith((_GZIP, _ZLIB)):
        return data
    decoder = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = decoder.decompress(data, MAX_MESSAGE_BYTES + 1)
    except zlib.error:
        return data
    if len(plain) > MAX_MESSAGE_BYTES:
        raise MalformedMessageError(
            f"the request has more than {MAX_MESSAGE_BYTES} bytes when decompressed"
        )
    return plain if decoder.eof else data


def decompress_or_keep(data: bytes) -> bytes:
    """Do as `decompress`, but leave what is too large as it is, which no parser takes."""
    try:
        return decompress(data)
    except MalformedMessageError:
        return data
