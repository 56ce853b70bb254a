"""100,000 distinct texts wherever a client may put one: the number of metric series stays the same.

They are request ids, tasks, cache salts, answer formats, models, metadata and methods that are not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import grpc

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import check
from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of
from tests.faults.rig import send as send_one

NUM_LABELS = {Size.CI: 600, Size.FULL: 100_000}
NUM_WARM = 300
# Every other call is refused, for texts that no answered request can have.
NUM_KINDS = 6


def labelled(count: int, first: int) -> Iterable[pb.GenerateRequest]:
    """Yield requests with texts that no other one has, each of which is answered."""
    short = pb.SamplingParams(num_samples=1, seed=1, max_tokens=1)
    # Of the same few templates each time, so that no answer is of a kind that is new.
    requests = requests_of(count, num_templates=8, sampling=short)
    for number, request in enumerate(requests, first):
        request.request_id = f"label {number}"
        request.cache_salt = f"salt {number}"
        request.evaluation.task = f"task {number}"
        yield request


async def refused(channel: grpc.aio.Channel, number: int) -> str:
    """Make a call whose text is refused; return its code."""
    text = f"label{number}"
    infer = f"/{oip.DESCRIPTOR.services_by_name['GRPCInferenceService'].full_name}/ModelInfer"
    tandem = "/tandem.v1.InferenceService"
    path, message, metadata = [
        (f"{tandem}/{text}", b"", ()),
        (f"/{text}/Generate", b"", ()),
        (infer, oip.ModelInferRequest(model_name=text).SerializeToString(), ()),
        (f"{tandem}/Compare", _with_format(text), ()),
        (f"{tandem}/Score", pb.ScoreRequest(request_id=text).SerializeToString(), ()),
        (f"{tandem}/GetModels", b"\xff", (("x-label", text), ("user-agent", text))),
    ][number % NUM_KINDS]
    try:
        await channel.unary_unary(path)(message, timeout=30, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def _open(address: str) -> grpc.aio.Channel:
    """Return a channel of the loop that this runs on."""
    return grpc.aio.insecure_channel(address)


def _with_format(text: str) -> bytes:
    options = pb.EvaluationOptions(answer_format=text, task=text)
    return pb.CompareRequest(prompt="x", evaluation=options).SerializeToString()


def num_series(rig: Rig) -> int:
    """Return how many series a scrape of the server gets."""
    return sum(len(metric.samples) for metric in rig.metrics.registry.collect())


def run(size: Size) -> RowResult:
    """Send texts of every kind, and count the series before and after."""
    result = RowResult("R19", "100,000 distinct label strings")
    count = NUM_LABELS[size]
    codes = set[str]()
    num_sent = 0
    with tempfile.TemporaryDirectory() as name, Rig(Path(name)) as rig:

        async def send(client: AsyncClient, request: pb.GenerateRequest, journal: Journal) -> None:
            nonlocal num_sent
            num_sent += 1
            if num_sent % 2:
                await send_one(client, request, journal)
            else:
                codes.add(await refused(channel, num_sent // 2))

        channel = rig.run(_open(rig.server.address))
        rig.drive(labelled(NUM_WARM, 10**6), "warm", send=send)
        num_before = num_series(rig)
        journal = rig.drive(labelled(count, 2 * 10**6), "labelled", send=send)
        num_after = num_series(rig)
        rig.run(channel.close())
        ledger = check(read_journal([journal]))
        result.add(ledger)
        failed = ledger.codes.keys() - {"OK"}
        result.demand(not failed, f"calls with labels failed: {dict(ledger.codes)}")
        result.num_requests = count
        result.leaks = rig.leaks()
    result.measured = {"num_series_before": num_before, "num_series_after": num_after}
    result.demand(num_after == num_before, f"{num_after} series, {num_before} before")
    result.demand("OK" not in codes, f"a call with a text that is none was answered: {codes}")
    return result
