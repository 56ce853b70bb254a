"""Wrong credentials: UNAUTHENTICATED; no good client fails while tokens and certificates rotate.

Expired certificates, those of another CA and none at all are refused in the TLS handshake, before
there is a call that could have a status: for the client that is UNAVAILABLE, not UNAUTHENTICATED as
the table has it. No token, wrong ones, those of another scope and those that were taken out of the
file are UNAUTHENTICATED.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import trustme

from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient, Tls
from serve.rpc.credentials.tokens import new_token
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of

NUM_ROTATIONS = {Size.CI: 1, Size.FULL: 40}
LOOK_S = 1.2  # the server looks at the file once a second
NUM_TEMPLATES = 50
NUM_CLIENTS = 4
CALLS_PER_CONNECTION = 8
PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
WITHDRAWN = "withdrawn token"
METHOD = "/tandem.v1.InferenceService/GetModels"


class Site:
    """A CA, the server's files and the good clients', which are replaced while they are in use."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self._tokens, self._cert, self._key = (folder / name for name in ("tokens", "cert", "key"))
        self._ca_path, self._client_cert, self._client_key = (
            folder / name for name in ("ca", "client.cert", "client.key")
        )
        self.ca.cert_pem.write_to_path(self._ca_path)
        (self.token, good), (self.lasting, lasts), (self.other_scope, other) = (
            new_token() for _ in range(3)
        )
        self._fixed = [f"lasting {lasts} inference", f"ops {other} control"]
        self._lines = [f"good {good} inference"]
        self.withdrawn: list[str] = []
        self.num_users = Counter[str]()  # connections of good clients, by token
        self._write_tokens()
        self.issue()

    def settings(self) -> dict[str, Path]:
        """Return the server's settings."""
        return {
            "tls_cert": self._cert,
            "tls_key": self._key,
            "tls_client_ca": self._ca_path,
            "auth_tokens": self._tokens,
        }

    def connect(self, address: str, token: str | None = None) -> AsyncClient:
        """Return a good client, with the files as they are now; by default its token lasts."""
        tls = Tls(ca=self._ca_path, cert=self._client_cert, key=self._client_key)
        return AsyncClient(
            address, token=token or self.lasting, tls=tls, max_attempts=1, timeout_s=30
        )

    def issue(self) -> None:
        """Give server and clients new certificates, each file whole, one after the other."""
        for cert, key in ((self._cert, self._key), (self._client_cert, self._client_key)):
            issued = self.ca.issue_cert("127.0.0.1")
            replace_file(key, issued.private_key_pem.bytes())
            replace_file(cert, b"".join(pem.bytes() for pem in issued.cert_chain_pems))

    async def rotate(self, number: int) -> None:
        """Replace certificates and token as one should: the new one is known before it is used."""
        self.issue()
        token, sha256 = new_token()
        self._lines.append(f"good{number} {sha256} inference")
        self._write_tokens()
        await asyncio.sleep(LOOK_S)
        old, self.token = self.token, token
        self.withdrawn.append(old)
        while self.num_users[old]:
            await asyncio.sleep(0.01)
        del self._lines[0]
        self._write_tokens()

    def _write_tokens(self) -> None:
        replace_file(self._tokens, "\n".join([*self._fixed, *self._lines]).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is never half there."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class BadClient:
    """Credentials that must not do: `tls` None is a connection in clear."""

    name: str
    code: str
    tls: grpc.ChannelCredentials | None
    token: str | None

    async def call(self, address: str) -> str:
        """Connect anew and call once; return the code."""
        metadata = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = (
            grpc.aio.secure_channel(address, self.tls, options)
            if self.tls
            else grpc.aio.insecure_channel(address, options)
        )
        async with channel:
            try:
                await channel.unary_unary(METHOD)(b"", timeout=10, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code().name
        return "OK"


def bad_clients(site: Site) -> list[BadClient]:
    """Return a client for each thing that can be wrong, everything else of it being right."""
    good, eve = site.ca.issue_cert("good"), trustme.CA()
    expired = site.ca.issue_cert("old", not_after=PAST)

    def tls(leaf: trustme.LeafCert | None, ca: trustme.CA = site.ca) -> grpc.ChannelCredentials:
        key = leaf.private_key_pem.bytes() if leaf else None
        chain = leaf.cert_chain_pems[0].bytes() if leaf else None
        return grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)

    no_token, no_tls = "UNAUTHENTICATED", "UNAVAILABLE"
    return [
        BadClient("no token", no_token, tls(good), None),
        BadClient("wrong token", no_token, tls(good), new_token()[0]),
        BadClient("empty token", no_token, tls(good), " "),
        BadClient("token of another scope", no_token, tls(good), site.other_scope),
        BadClient("expired certificate", no_tls, tls(expired), site.lasting),
        BadClient("certificate of another CA", no_tls, tls(eve.issue_cert("eve")), site.lasting),
        BadClient("no certificate", no_tls, tls(None), site.lasting),
        BadClient("another CA for the server", no_tls, tls(good, eve), site.lasting),
        BadClient("in clear", no_tls, None, site.lasting),
    ]


class Rotation:
    """Good and bad clients of one server, whose credentials rotate meanwhile."""

    def __init__(self, rig: Rig, site: Site) -> None:
        self._address = rig.server.address
        self._site = site
        self._numbers = itertools.count()
        self._is_over = asyncio.Event()
        self.answers = Counter[tuple[str, str, str]]()  # name, code wanted, code

    async def run(self, num_rotations: int, path: Path) -> None:
        """Rotate so often, and try at the end every token that was withdrawn."""
        with Journal(path) as journal:
            good = [asyncio.create_task(self._good(journal)) for _ in range(NUM_CLIENTS)]
            bad = asyncio.create_task(self.bad_calls())
            for number in range(num_rotations):
                await self._site.rotate(number)
            self._is_over.set()
            await asyncio.gather(bad, *good)
        await asyncio.sleep(LOOK_S)
        (first, *_) = bad_clients(self._site)
        for token in self._site.withdrawn:
            await self._try(replace(first, name=WITHDRAWN, token=token))

    async def _good(self, journal: Journal) -> None:
        """Connect anew every few calls, with the token and the files as they are by then."""
        while not self._is_over.is_set():
            token = self._site.token
            self._site.num_users[token] += 1
            client = self._site.connect(self._address, token)
            for _ in range(CALLS_PER_CONNECTION):
                request = numbered(next(self._numbers))
                journal.sent(request)
                await journal.follow(request, client.generate(request))
            await client.close()
            self._site.num_users[token] -= 1

    async def bad_calls(self) -> None:
        clients = bad_clients(self._site)
        while not self._is_over.is_set():
            for client in clients:
                await self._try(client)

    async def _try(self, client: BadClient) -> None:
        self.answers[client.name, client.code, await client.call(self._address)] += 1


def numbered(number: int) -> pb.GenerateRequest:
    """Return one of `NUM_TEMPLATES` requests, under an id of its own."""
    (request,) = requests_of(1, seed=number % NUM_TEMPLATES)
    request.request_id = f"good {number}"
    return request


def run(size: Size) -> RowResult:
    """Rotate under load, with every wrong credential beside it."""
    result = RowResult("R21", "wrong and rotated credentials")
    with tempfile.TemporaryDirectory() as name:
        site = Site(folder := Path(name))
        with Rig(folder, connect=site.connect, max_replays=0, **site.settings()) as rig:
            reference = rig.drive(map(numbered, range(NUM_TEMPLATES)), "reference")
            rotation = Rotation(rig, site)
            rig.run(rotation.run(NUM_ROTATIONS[size], journal := folder / "good.jsonl"))
            ledger = rig.ledger(journal, reference)
            result.add(ledger)
            result.leaks = rig.leaks()
    failed = {code: n for code, n in ledger.codes.items() if code != "OK"}
    result.demand(not failed, f"good clients failed: {failed}")
    tried = {name for name, _, _ in rotation.answers}
    untried = {WITHDRAWN, *(client.name for client in bad_clients(site))} - tried
    result.demand(not untried, f"never tried: {sorted(untried)}")
    for (name, wanted, code), n in rotation.answers.items():
        result.demand(code == wanted, f"{name}: {code} ({n} times), not {wanted}")
    result.num_requests += rotation.answers.total()
    result.measured = {
        "num_rotations": NUM_ROTATIONS[size],
        "num_good": ledger.num_requests,
        "refused": {name: n for (name, _, _), n in rotation.answers.items()},
    }
    return result
