"""The faults of `bench.proxy.faults`: each yields what its load saw, and when it happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.proxy.load import Ask, CallLoad, Right, comparing, generating, list_models, right_answers
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client
from tests.support.processes import ENVOY_CONFIG, EnvoyProcess, TandemProcess

AS_SHIPPED, HALF = (90, 10), (50, 50)
CALM_S = 3.0  # before a fault, and behind it
OVERLOAD = 5.0
OVERLOAD_S = 20.0
REFILL = 3000
LAST_PAUSE_S = 12.0


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """How much of everything; a fifth of the kills for what takes longer."""

    num_kills: int
    num_workers: int
    max_tokens: int

    @property
    def num_rare(self) -> int:
        return max(self.num_kills // 5, 1)


@dataclass(frozen=True, slots=True)
class Site:
    """The servers, of which all are ready between scenarios, and the right answers."""

    stable: TandemProcess
    canary: TandemProcess
    teacher: TandemProcess
    small: TandemProcess
    folder: Path
    plan: FaultPlan
    right: Right

    @property
    def generate(self) -> Ask:
        return generating(self.plan.max_tokens)

    def load(self, target: str, ask: Ask, **settings: Any) -> CallLoad:
        return CallLoad(
            target, ask, self.right, **{"num_workers": self.plan.num_workers, **settings}
        )

    @contextmanager
    def envoy(self, weights: tuple[int, int] = HALF, config: str = "") -> Iterator[EnvoyProcess]:
        text = config or ENVOY_CONFIG.read_text()
        addresses = self.stable.address, self.canary.address
        envoy = EnvoyProcess(self.folder, text, *addresses, weights)
        try:
            yield envoy
        finally:
            envoy.kill()


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """`faults_s` are monotonic; `num_attempts` as the servers count, None where nobody could."""

    name: str
    load: CallLoad
    faults_s: Sequence[float] = ()
    num_attempts: int | None = None
    note: str = ""


def start_site(
    stack: ExitStack, folder: Path, flags: Sequence[str], teacher_folder: Path, plan: FaultPlan
) -> Site:
    """Start all servers, which end with the stack, and learn what they answer."""
    teacher_flags = ["--no-student", "--teacher", str(teacher_folder)]
    teacher = TandemProcess("teacher", folder, [*flags, *teacher_flags])
    student_flags = [*flags, "--teacher", f"grpc://{teacher.address}", "--drain-delay-s", "5"]
    stable, canary = (TandemProcess(n, folder, student_flags) for n in ("stable", "canary"))
    small_flags = [*flags, "--no-teacher", "--max-num-seqs", "2", "--max-waiting", "6"]
    small = TandemProcess("small", folder, small_flags)
    for server in (teacher, stable, canary):
        stack.callback(server.kill)
        server.start()
    for server in (teacher, stable, canary):
        server.wait_ready()
    stack.callback(small.kill)
    wait_for_divergence(stable.address)
    right = right_answers(stable.address, comparing(plan.max_tokens))
    return Site(stable, canary, teacher, small, folder, plan, right)


def wait_for_divergence(target: str, timeout_s: float = 60.0) -> float:
    """Return the seconds until a student has its teacher; TimeoutError if that does not come."""
    request = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=2))
    began_s = time.monotonic()
    with Client(target, timeout_s=60) as client:
        while not client.generate(request).result().samples[0].HasField("divergence"):
            if time.monotonic() > began_s + timeout_s:
                raise TimeoutError(f"{target} did not find its teacher within {timeout_s:g} s")
            time.sleep(0.05)
    return time.monotonic() - began_s


def split(site: Site) -> Iterator[ScenarioResult]:
    num_before = site.canary.count_calls(rpc="GetModels")
    with site.envoy(AS_SHIPPED) as envoy, site.load(envoy.address, list_models) as load:
        load.wait_for_calls(20_000)
    share = (site.canary.count_calls(rpc="GetModels") - num_before) / load.num_calls
    yield ScenarioResult("split 90 : 10", load, note=f"canary {share:.2%}")


def killed_student(site: Site) -> Iterator[ScenarioResult]:
    """Kill both in turns, behind Envoy and without it."""
    with site.envoy() as envoy:
        with site.load(envoy.address, site.generate) as load:
            faults_s = _kill_in_turns(site, site.plan.num_kills)
        num_attempts = envoy.count_attempts()
    yield ScenarioResult("student killed, behind Envoy", load, faults_s, num_attempts)
    direct = f"ipv4:{site.stable.address},{site.canary.address}"
    with site.load(direct, site.generate) as load:
        faults_s = _kill_in_turns(site, site.plan.num_kills)
    yield ScenarioResult("student killed, round_robin", load, faults_s)


def _kill_in_turns(site: Site, num_kills: int) -> list[float]:
    faults_s = []
    for num_before in range(num_kills):
        time.sleep(CALM_S)
        server = (site.canary, site.stable)[num_before % 2]
        server.kill()
        faults_s.append(time.monotonic())
        time.sleep(1)
        server.start()
        server.wait_ready()
    time.sleep(CALM_S)
    return faults_s


def killed_stream(site: Site) -> Iterator[ScenarioResult]:
    """Kill while answers are streamed: what has begun cannot be repeated by gRPC."""
    ask = generating(site.plan.max_tokens, is_streamed=True)
    with site.envoy() as envoy, site.load(envoy.address, ask) as load:
        faults_s = _kill_in_turns(site, site.plan.num_rare)
    yield ScenarioResult(
        "student killed, streams", load, faults_s, note="failed: streams that had begun"
    )


def restarted_server(site: Site) -> Iterator[ScenarioResult]:
    """Kill the only server that the clients know; it comes back as soon as it can.

    With Compare, which gRPC repeats: `serve.client.streams` begins a Generate again
    (docs/proxy.md).
    """
    faults_s, downs_s = [], []
    with site.load(site.stable.address, comparing(site.plan.max_tokens)) as load:
        for _ in range(site.plan.num_rare):
            time.sleep(CALM_S)
            faults_s.append(time.monotonic())
            site.stable.kill()
            site.stable.start()
            site.stable.wait_ready()
            downs_s.append(time.monotonic() - faults_s[-1])
            # Until the last pause is over, in which a call has one attempt left. A restart takes
            # up to 256 tokens of the budget, which good calls give back.
            time.sleep(LAST_PAUSE_S)
            with site.load(site.stable.address, list_models, num_workers=4) as refill:
                refill.wait_for_calls(REFILL)
    note = f"away {min(downs_s):.1f} to {max(downs_s):.1f} s, {REFILL} good calls in between"
    yield ScenarioResult("only server restarts, Compare", load, faults_s, note=note)


def drained_student(site: Site) -> Iterator[ScenarioResult]:
    """SIGTERM, with clients that repeat nothing."""
    faults_s = []
    with (
        site.envoy() as envoy,
        site.load(envoy.address, site.generate, max_attempts=1) as load,
    ):
        for _ in range(site.plan.num_rare):
            time.sleep(CALM_S)
            faults_s.append(time.monotonic())
            site.canary.begin_drain()
            code = site.canary.wait_exit(60)
            assert code == 0, f"the drain ended with exit code {code}"
            site.canary.start()
            site.canary.wait_ready()
        time.sleep(CALM_S)
    yield ScenarioResult("student drained, no retries", load, faults_s)


def killed_teacher(site: Site) -> Iterator[ScenarioResult]:
    """Kill the teacher below Compare, whose primary answer is the student's."""
    faults_s, backs_s = [], []
    with (
        site.envoy() as envoy,
        site.load(envoy.address, comparing(site.plan.max_tokens)) as load,
    ):
        for _ in range(site.plan.num_rare):
            time.sleep(CALM_S)
            site.teacher.kill()
            faults_s.append(time.monotonic())
            time.sleep(CALM_S)
            site.teacher.start()
            site.teacher.wait_ready()
            backs_s.append(wait_for_divergence(site.stable.address))
    num_with = sum(outcome.has_divergences for outcome in load.outcomes)
    note = f"{num_with} with divergence; back after {max(backs_s):.1f} s"
    yield ScenarioResult("teacher killed, Compare", load, faults_s, note=note)


def overloaded(site: Site) -> Iterator[ScenarioResult]:
    """Send five times what a server can do, in an open loop."""
    site.small.start()
    site.small.wait_ready()
    with site.load(site.small.address, site.generate, num_workers=6) as load:
        load.wait_for_calls(20)
        num_before, began_s = load.num_calls, time.monotonic()
        time.sleep(CALM_S)
        capacity_rps = (load.num_calls - num_before) / (time.monotonic() - began_s)
    num_before = site.small.count_calls(rpc="Generate")
    rate_rps = OVERLOAD * capacity_rps
    with site.load(site.small.address, site.generate, num_workers=0, rate_rps=rate_rps) as load:
        time.sleep(OVERLOAD_S)
    num_attempts = site.small.count_calls(rpc="Generate") - num_before
    site.small.kill()
    goodput = load.codes()["OK"] / OVERLOAD_S / capacity_rps
    note = f"{rate_rps:.0f}/s to a server of {capacity_rps:.0f}/s; goodput {goodput:.2f} of that"
    yield ScenarioResult("overload, 5 times", load, num_attempts=num_attempts, note=note)


def dead_arm(site: Site) -> Iterator[ScenarioResult]:
    """Leave the canary dead: behind plain weighted clusters, and behind what ships."""
    site.canary.kill()
    plain = without_care(ENVOY_CONFIG.read_text())
    for name, config, max_attempts in (
        ("plain weights, no retries", plain, 1),
        ("plain weights, client retries", plain, 5),
        ("as shipped, no retries", "", 1),
    ):
        with (
            site.envoy(AS_SHIPPED, config) as envoy,
            site.load(envoy.address, list_models, max_attempts=max_attempts) as load,
        ):
            load.wait_for_calls(2000)
        yield ScenarioResult(f"dead arm of 10 %: {name}", load)
    site.canary.start()
    site.canary.wait_ready()


def without_care(config: str) -> str:
    """Return an Envoy configuration without health checks, outlier detection, retries, fallback."""
    tree: dict[str, Any] = yaml.safe_load(config)
    resources = tree["static_resources"]
    for cluster in resources["clusters"]:
        cluster.pop("health_checks", None)
        cluster.pop("outlier_detection", None)
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    del route["retry_policy"]
    for cluster in route["weighted_clusters"]["clusters"]:
        cluster["name"] = cluster["name"].removesuffix("-first")
    # `None`: the innermost mappings in braces, as in the file.
    text: str = yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, width=1000)
    return text


SCENARIOS: Mapping[str, Callable[[Site], Iterator[ScenarioResult]]] = {
    "split": split,
    "dead-arm": dead_arm,
    "killed-student": killed_student,
    "killed-stream": killed_stream,
    "restarted-server": restarted_server,
    "drained-student": drained_student,
    "killed-teacher": killed_teacher,
    "overloaded": overloaded,
}
