"""Malformed messages, HTTP/1, raw bytes, bombs, huge metadata: no crash, no traceback in a reply.

At most one log line a second and peer, and good clients beside it lose nothing. 10,000 of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb
from serve.app.grpc_log import quiet_grpc, quiet_grpc_tracebacks
from tests.faults.requests.hostile import PONG, knock, mutate, raw_connections
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of
from tests.support.backends import HistoryBackend
from tests.support.rpc.http2 import called

NUM_MESSAGES = {Size.CI: 350, Size.FULL: 10_000}
NUM_GOOD = {Size.CI: 100, Size.FULL: 4_000}
NUM_SENDERS = 16
RAW_SHARE, METADATA_SHARE = 0.2, 0.02
METADATA_BYTES = 64 << 10
# What is wrong is the client's: everything else would be a fault of the server.
CODES = {"OK", "INVALID_ARGUMENT", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION"}
HUGE_METADATA = "RESOURCE_EXHAUSTED"
NEVER_SAID = (b"Traceback", b'File "', b" object at 0x", b"/serve/")
BOMB_ANSWER = b"bytes when decompressed"

TANDEM, OIP = "/tandem.v1.InferenceService", "/inference.GRPCInferenceService"
_PROMPT = pb.TokenIds(ids=[5, 6, 7])
_SAMPLING = pb.SamplingParams(max_tokens=4, seed=1, stop=["ab"], temperature=0.5)
_INPUT = oip.ModelInferRequest.InferInputTensor(name="input_ids", datatype="INT64", shape=[1, 2])
_INFER = oip.ModelInferRequest(
    model_name="student", inputs=[_INPUT], raw_input_contents=[bytes(16)], id="x"
)
_GENERATE = pb.GenerateRequest(prompt_token_ids=_PROMPT, sampling=_SAMPLING)
MESSAGES = {
    f"{TANDEM}/Generate": _GENERATE,
    f"{TANDEM}/Compare": pb.CompareRequest(prompt="ab", sampling=_SAMPLING),
    f"{TANDEM}/Score": pb.ScoreRequest(prompt="ab", completions=[pb.Completion(text="c")]),
    f"{TANDEM}/GetModels": pb.GetModelsRequest(),
    f"{OIP}/ModelInfer": _INFER,
    f"{OIP}/ModelStreamInfer": _INFER,
    f"{OIP}/ModelConfig": oip.ModelConfigRequest(name="student"),
    f"{OIP}/ModelReady": oip.ModelReadyRequest(name="teacher"),
    f"{OIP}/RepositoryIndex": oip.RepositoryIndexRequest(ready=True),
}


class TextBackend(HistoryBackend):
    """Has a row for every token of the tokenizer: what is mutated may have text in it."""

    VOCAB_SIZE = 259


class Storm:
    """Bad clients of one server, and what they got."""

    def __init__(self, address: str, rng: random.Random) -> None:
        self.address = address
        self.rng = rng
        self.codes: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.num_silent = 0
        self._raw = raw_connections(rng)

    async def run(self, count: int) -> None:
        """Send so many, from several connections at the same time."""
        kinds = iter(range(count))

        async def sender(channel: grpc.aio.Channel) -> None:
            for number in kinds:
                await self._send_one(channel, number)

        async with grpc.aio.insecure_channel(self.address) as channel:
            await asyncio.gather(*(sender(channel) for _ in range(NUM_SENDERS)))

    async def _send_one(self, channel: grpc.aio.Channel, number: int) -> None:
        drawn = self.rng.random()
        if drawn < RAW_SHARE:
            names = list(self._raw)
            await self._knock(names[number % len(names)])
        elif drawn < RAW_SHARE + METADATA_SHARE:
            metadata = (("x-filler", "y" * METADATA_BYTES),)
            await self._call(channel, f"{TANDEM}/GetModels", b"", {HUGE_METADATA}, metadata)
        else:
            method = self.rng.choice(list(MESSAGES))
            data = mutate(self.rng, MESSAGES[method].SerializeToString())
            await self._call(channel, method, data, CODES)

    async def _knock(self, name: str) -> None:
        try:
            # What only our own bound says: gRPC's would come when the bomb has gone off.
            until = BOMB_ANSWER if name == "gzip bomb" else PONG
            reply = await knock(self.address, self._raw[name], until)
        except TimeoutError:
            self.problems[f"{name}: neither the answer nor an end"] += 1
            return
        self._check_words(name, reply)
        self.codes["(raw)"] += 1

    async def _call(
        self,
        channel: grpc.aio.Channel,
        method: str,
        data: bytes,
        codes: set[str],
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Send bytes as a message, twice in a stream."""

        async def messages() -> AsyncIterator[bytes]:
            yield data
            yield data

        try:
            if method.endswith("ModelStreamInfer"):
                call = channel.stream_stream(method)(messages(), timeout=30, metadata=metadata)
            else:
                call = channel.unary_stream(method)(data, timeout=30, metadata=metadata)
            async for response in call:
                self._check_words(method, response)
            code, details = "OK", ""
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, error.details() or ""
        self._check_words(method, details.encode())
        self.codes[code] += 1
        if code not in codes:
            self.problems[f"{method}: {code}: {details[:80]}"] += 1

    def _check_words(self, name: str, reply: bytes) -> None:
        for words in NEVER_SAID:
            if words in reply:
                self.problems[f"{name}: the reply says {words!r}"] += 1


class Lines(logging.Handler):
    """Counts log records by the whole second since its making."""

    def __init__(self) -> None:
        super().__init__()
        self.started_s = time.monotonic()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # grpc.aio's complaint of a process with several event loops, as one that runs tests is.
        if "PollerCompletionQueue" in record.getMessage():
            return
        self.texts.append(f"{record.name}: {record.getMessage()}"[:120])


@contextmanager
def logged(folder: Path) -> Iterator[tuple[Lines, Callable[[], list[str]]]]:
    """Yield the log records, and what reads the lines that came on stderr, of the block."""
    quiet_grpc()
    quiet_grpc_tracebacks()
    lines, kept, path = Lines(), os.dup(2), folder / "stderr"
    root = logging.getLogger()
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        root.addHandler(lines)
        try:
            yield lines, lambda: path.read_text("utf-8", "replace").splitlines()
        finally:
            root.removeHandler(lines)
            os.dup2(kept, 2)
            os.close(kept)


def run(size: Size) -> RowResult:
    """Storm a server that good clients use."""
    result = RowResult("R7", "malformed messages, HTTP/1, raw bytes, gzip bombs, huge metadata")
    count, num_good = NUM_MESSAGES[size], NUM_GOOD[size]
    with (
        tempfile.TemporaryDirectory() as name,
        Rig(folder := Path(name), make_backend=TextBackend, max_replays=0) as rig,
    ):
        reference = rig.drive(requests_of(200), "reference")
        storm = Storm(rig.server.address, random.Random(7))
        with logged(folder) as (lines, stderr):
            # gRPC's core is silent only where it was told so before it was loaded.
            rig.run(knock(rig.server.address, called(b"", grpc_timeout=b"soon")))
            is_core_quiet = not stderr()
            num_before = len(stderr())
            working = asyncio.run_coroutine_threadsafe(storm.run(count), rig.loop)
            journal = rig.drive(requests_of(num_good), "beside", num_clients=8)
            working.result()
            seconds = time.monotonic() - lines.started_s
        ledger = rig.ledger(journal, reference)
        result.add(ledger)
        failed = ledger.codes.keys() - {"OK"}
        result.demand(not failed, f"good clients failed: {dict(ledger.codes)}")
        result.num_requests += count
        result.leaks = rig.leaks()
        core = [text for text in stderr()[num_before:] if text] if is_core_quiet else []
    result.problems += [f"{text} ({n} times)" for text, n in storm.problems.most_common(5)]
    num_lines = len(lines.texts) + len(core)
    result.demand(
        num_lines <= seconds + 1,
        f"{num_lines} log lines in {seconds:.1f} s: {[*core, *lines.texts][:4]}",
    )
    result.measured = {
        "codes": dict(storm.codes),
        "num_log_lines": dict(Counter(text.partition(":")[0] for text in lines.texts)),
        "num_core_log_lines": len(core),
        "storm_s": round(seconds, 2),
        "is_core_log_counted": is_core_quiet,
    }
    return result
