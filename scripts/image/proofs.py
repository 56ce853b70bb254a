"""What the image promises, each promise tried on a container that runs hardened."""

from __future__ import annotations

import errno
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.image.containers import Containers, ToolError

PROBE = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
SERVER = "tandem-image-server"
MEMORY_MIB = 3072
CLIENT_MEMORY_MIB = 512
START_S, GRACE_S = 180, 60
SIGKILLED = 128 + 9
# Writes where the image's user may not, and where nobody may: as root it is the file system's no.
WRITE = "open('/opt/tandem/written', 'w')"
ALLOCATE = "print(len(bytearray(128 << 20)))"


@dataclass(frozen=True, slots=True)
class Proof:
    """A promise, whether it was kept, and what was seen."""

    name: str
    is_kept: bool
    seen: str


@dataclass(frozen=True, slots=True)
class ServerContainer:
    """A container with a server that is ready."""

    containers: Containers
    image: str
    ready_after_s: float

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.containers.inspect(SERVER)["State"]
        return state

    def execute(self, code: str, user: int = 10001) -> str:
        """Return what Python code prints inside; its last line of stderr when it fails."""
        command = ["exec", f"--user={user}", SERVER, "python", "-c", code]
        try:
            return self.containers.podman(*command).strip()
        except ToolError as error:
            return str(error).splitlines()[-1]

    def client(self, mode: str) -> list[str]:
        """Return the command of a client beside the server: its network, its own processes."""
        return self.containers.hardened(
            "--rm",
            "--no-healthcheck",
            "--entrypoint=python",
            self.image,
            "-c",
            PROBE,
            mode,
            memory_mib=CLIENT_MEMORY_MIB,
            network=f"container:{SERVER}",
        )


@contextmanager
def serving(
    containers: Containers, image: str, bundle: Path, teacher: Path | None
) -> Iterator[ServerContainer]:
    """Start a server, wait until its HEALTHCHECK passes, remove it in the end.

    Raises:
        ToolError: it ended, or was not ready in time; with the end of its log.
    """
    volumes = [f"--volume={bundle}:/bundle:ro"]
    if teacher is None:
        volumes.append("--env=TANDEM_NO_TEACHER=true")
    else:
        volumes += [f"--volume={teacher}:/teacher:ro", "--env=TANDEM_TEACHER=/teacher"]
    settings = [f"--env=TANDEM_DRAIN_GRACE_S={GRACE_S}", "--env=TANDEM_DEVICE=cpu"]
    containers.podman("rm", "--force", "--ignore", "--time=0", SERVER)
    start = [f"--name={SERVER}", *volumes, *settings, image]
    try:
        began = time.monotonic()
        run_detached(containers, start)
        _wait_until_healthy(containers)
        yield ServerContainer(containers, image, time.monotonic() - began)
    finally:
        containers.podman("rm", "--force", "--ignore", "--time=0", SERVER)


def run_detached(containers: Containers, arguments: list[str]) -> None:
    command = containers.hardened("--detach", *arguments, memory_mib=MEMORY_MIB)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"the container does not start:\n{done.stderr}")


def _wait_until_healthy(containers: Containers) -> None:
    deadline = time.monotonic() + START_S
    while not _is_healthy(containers):
        is_running = containers.inspect(SERVER)["State"]["Running"]
        if not is_running or time.monotonic() > deadline:
            log = _log(containers)
            raise ToolError(f"the server is not ready, {is_running=}; the end of its log:\n{log}")
        time.sleep(0.5)


def _is_healthy(containers: Containers) -> bool:
    command = containers.podman_command("healthcheck", "run", SERVER)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _log(containers: Containers) -> str:
    command = containers.podman_command("logs", "--tail=15", SERVER)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# --- the promises --------------------------------------------------------------------------------


def prove_running(server: ServerContainer) -> Iterator[Proof]:
    """Yield what can be seen of a server that runs. The drain, which ends it, comes last."""
    status = _status(server.state["Pid"])
    yield Proof("HEALTHCHECK passes", True, f"healthy {server.ready_after_s:.1f} s after start")
    identity = {status["Uid"], status["Gid"]}
    yield Proof("runs as 10001", identity == {"\t".join(["10001"] * 4)}, f"Uid {status['Uid']}")
    yield Proof("is PID 1", status["NSpid"].split()[-1] == "1", f"NSpid {status['NSpid']}")
    capabilities = {status[key] for key in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
    yield Proof("no capabilities", capabilities == {"0" * 16}, f"CapEff {status['CapEff']}, all 5")
    yield Proof("no new privileges", status["NoNewPrivs"] == "1", f"{status['NoNewPrivs']}")
    yield Proof("seccomp filter", status["Seccomp"] == "2", f"Seccomp {status['Seccomp']}")
    written = server.execute(WRITE, user=0)
    yield Proof("root is read-only", f"Errno {errno.EROFS}" in written, f"as uid 0: {written}")
    interfaces = server.execute("import os; print(*os.listdir('/sys/class/net'))")
    yield Proof("no network", interfaces == "lo", f"interfaces: {interfaces}")
    yield from prove_memory_limit(server)
    yield prove_doctor(server)
    yield from prove_answers(server)
    files = server.execute("from pathlib import Path; print(*sorted(Path('/tmp').rglob('*')))")
    yield Proof("no telemetry", "onnxruntime" not in files and "/tmp/" in files, f"/tmp: {files}")
    yield prove_drain(server)


def _status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status as the host sees it."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def prove_memory_limit(server: ServerContainer) -> Iterator[Proof]:
    """Yield the limit that the kernel has, and that it kills what goes beyond such a limit."""
    limit = server.execute(
        "from pathlib import Path; v1 = Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'); "
        "print((v1 if v1.exists() else Path('/sys/fs/cgroup/memory.max')).read_text())"
    )
    yield Proof("memory limit is set", limit == str(MEMORY_MIB << 20), f"{limit} bytes")
    tight, loose = (_allocate(server, memory_mib) for memory_mib in (64, 256))
    seen = f"128 MiB: exit code {tight} under a limit of 64 MiB, {loose} under 256"
    yield Proof("memory limit is enforced", (tight, loose) == (SIGKILLED, 0), seen)


def _allocate(server: ServerContainer, memory_mib: int) -> int:
    """Return the exit code of a process that takes 128 MiB under a limit."""
    flags = ["--rm", "--no-healthcheck", "--entrypoint=python", server.image, "-c", ALLOCATE]
    command = server.containers.hardened(*flags, memory_mib=memory_mib)
    return subprocess.run(command, capture_output=True, check=False).returncode


def prove_doctor(server: ServerContainer) -> Proof:
    found = server.execute(
        "import subprocess; words = ['tandem', 'doctor', '--role', 'serve', '--json']; "
        "print(subprocess.run(words, capture_output=True, text=True).stdout)"
    )
    findings = json.loads(found)
    problems = [finding for finding in findings if finding["level"] == "problem"]
    return Proof("tandem doctor", bool(findings) and not problems, f"problems: {problems}")


def prove_answers(server: ServerContainer) -> Iterator[Proof]:
    """Yield health and a Compare of both models, with their k3."""
    done = subprocess.run(server.client("answer"), capture_output=True, text=True, check=False)
    if done.returncode:
        yield Proof("answers", False, done.stderr[-500:])
        return
    facts = json.loads(done.stdout)
    yield Proof("gRPC health", facts["health"] == "SERVING", facts["health"])
    samples = facts["samples"]
    roles = sorted(sample["role"] for sample in samples)
    is_whole = roles == ["ROLE_STUDENT"] * 2 + ["ROLE_TEACHER"] * 2 and all(
        sample["num_tokens"] == 16 and sample["k3_mean"] is not None for sample in samples
    )
    k3 = [round(sample["k3_mean"], 4) for sample in samples if sample["k3_mean"] is not None]
    yield Proof("Compare", is_whole, f"{len(samples)} samples of 16 tokens, k3 {k3}")


def prove_drain(server: ServerContainer) -> Proof:
    """Return whether a call that ran at SIGTERM came to its end, and the server then to its."""
    client = subprocess.Popen(
        server.client("drain"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    first = client.stdout.readline()
    signalled_at = time.time()
    server.containers.podman("kill", "--signal=TERM", SERVER)
    rest, errors = client.communicate(timeout=GRACE_S * 2)
    code = int(server.containers.podman("wait", SERVER))
    ended_s = time.time() - signalled_at
    if first.strip() != "running" or client.returncode:
        return Proof("drains on SIGTERM", False, f"the call failed: {first}{errors[-500:]}")
    facts = json.loads(rest)
    reasons = [sample["finish_reason"] for sample in facts["samples"]]
    went_on_s = facts["ended_at"] - signalled_at
    is_kept = code == 0 and went_on_s > 0 and ended_s < GRACE_S
    is_whole = reasons == ["FINISH_REASON_LENGTH"] * 8
    seen = (
        f"the stream went on for {went_on_s:.1f} s, {len(reasons)} samples, all "
        f"{set(reasons)}; exit code {code} {ended_s:.1f} s after the signal"
    )
    return Proof("drains on SIGTERM", is_kept and is_whole, seen)
