"""What somebody does who has never seen this before: it works, or one line says what to do."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tandem.cli
from serve.client import Client
from serve.client.access import wait_connected

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def live(serving: Any, make_pair: Any) -> Iterator[Any]:
    with serving(make_pair()) as live:
        yield live


@pytest.fixture
def free_target() -> Iterator[str]:
    """An address where nobody listens: bound, so that nobody else can, too."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


# Questions


@pytest.mark.parametrize("words", [("-- ", "-3 + 5 ="), ("-3 + 5 =",), ("--raw", "- a list")])
def test_question_may_begin_with_a_dash(
    tandem_main: Any, live: Any, words: tuple[str, ...]
) -> None:
    given = [word.strip() if word == "-- " else word for word in words]
    code, printed, complaint = tandem_main("ask", "--target", live.server.address, *given)
    assert (code, complaint) == (0, "")
    assert words[-1] in printed


def test_question_may_come_from_stdin(
    tandem_main: Any, live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, "Où est «x»?\n".encode())
    code, printed, _ = tandem_main("ask", "--target", live.server.address, "-")
    assert code == 0 and "Où est «x»?" in printed


@pytest.mark.parametrize(
    ("data", "told"), [(b"", "the question is empty"), (b"\xff", "no UTF-8 text: byte 0")]
)
def test_stdin_without_a_question_is_wrong_usage(
    tandem_main: Any, monkeypatch: pytest.MonkeyPatch, data: bytes, told: str
) -> None:
    feed(monkeypatch, data)
    code, _, complaint = tandem_main("ask", "-")
    assert code == 2 and told in complaint and complaint.count("\n") == 1


# Terminals


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_answer_is_shown_on_a_terminal_of_few_characters(live: Any, encoding: str) -> None:
    command = [sys.executable, "-m", "tandem", "ask", "--target", live.server.address, "x"]
    done = subprocess.run(
        [*command, "--reference", "4", "--seed", "3"],
        cwd=ROOT, capture_output=True, env={"PYTHONIOENCODING": encoding}, timeout=300,
    )  # fmt: skip
    shown = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr
    assert "student - " in shown.replace("·", "-") and ">= 2" in shown and "+--" in shown


def test_what_a_terminal_lacks_is_written_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    tandem.cli.write_what_can_be()
    print("KL(teacher ‖ student) ≥ 2×, é 漢")
    terminal.seek(0)
    assert terminal.read() == "KL(teacher || student) >= 2x, \\xe9 \\u6f22\n"


# Addresses


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("http://localhost:50051", "write localhost:50051"),
        ("localhost", "write localhost:50051"),
        ("50051", "write 127.0.0.1:50051"),
    ],
)
@pytest.mark.parametrize(
    "words", [("ask", "x"), ("loadtest", "run", "--out", "nowhere")], ids=["ask", "loadtest"]
)
def test_target_of_another_form_is_wrong_usage(
    tandem_main: Any, words: tuple[str, ...], target: str, told: str
) -> None:
    code, _, complaint = tandem_main(*words, "--target", target)
    assert code == 2 and told in complaint and complaint.count("\n") == 1


def test_control_without_a_port_is_told_that_of_control(tandem_main: Any) -> None:
    code, _, complaint = tandem_main("control", "status", "--target", "localhost")
    assert (code, complaint) == (
        2, "tandem: --target 'localhost' has no port; write localhost:50052\n",
    )  # fmt: skip


def test_control_at_the_data_port_is_told_where_control_is(tandem_main: Any, live: Any) -> None:
    code, _, complaint = tandem_main("control", "status", "--target", live.server.address)
    assert code == 1 and complaint.count("\n") == 1
    assert "no control listener is there; is it the server's data port?" in complaint
    assert "50052" in complaint


def test_question_to_the_control_port_is_told_where_the_models_are(
    tandem_main: Any, live: Any
) -> None:
    code, _, complaint = tandem_main("ask", "x", "--target", live.server.control_address)
    assert code == 1 and complaint.count("\n") == 1
    assert "is it the control listener?" in complaint and "50051" in complaint


def test_question_to_the_metrics_port_is_told_so(tandem_main: Any, live: Any) -> None:
    target = live.server.metrics_url.split("/")[2]
    code, _, complaint = tandem_main("ask", "x", "--target", target, "--connect-timeout-s", "1")
    assert code == 1
    assert "speaks no gRPC in clear: it has TLS, or is HTTP" in complaint.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ("ask", "x", "--connect-timeout-s", "0.5"),
        ("control", "status", "--connect-timeout-s", "0.5"),
        ("loadtest", "run", "--out", "OUT", "--connect-timeout", "0.5"),
    ],
    ids=["ask", "control", "loadtest"],
)
def test_server_that_is_not_there_is_waited_for_and_named(
    tandem_main: Any, free_target: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    given = [str(tmp_path / "run") if word == "OUT" else word for word in words]
    code, _, complaint = tandem_main(*given, "--target", free_target)
    waiting, told = complaint.splitlines()[-2:]
    assert code == 1
    assert waiting.endswith(f"waiting for {free_target}, up to 0.5 s ...")
    assert f"{free_target}: no connection in 0.5 s: " in told and "refused" in told
    assert "Is `tandem serve` running there" in told


def test_waiting_is_told_before_it_begins(free_target: str) -> None:
    told: list[str] = []

    class WaitedError(Exception):
        pass

    def tell(text: str) -> None:
        told.append(text)
        raise WaitedError

    with Client(free_target) as client, pytest.raises(WaitedError):
        wait_connected(client, free_target, 3600.0, client.get_models, tell)
    assert told == [f"waiting for {free_target}, up to 3600 s ..."]


# Bundles


def test_folder_around_a_bundle_and_its_manifest_are_told_apart(
    tandem_main: Any, tmp_path: Path
) -> None:
    bundle = tmp_path / "demo" / "bundle"
    bundle.mkdir(parents=True)
    manifest = bundle / "manifest.json"
    manifest.write_text(json.dumps({}))
    code, _, complaint = tandem_main("serve", "--bundle", bundle.parent)
    assert code == 1
    assert complaint.endswith(f"{bundle.parent} is not a bundle; did you mean {bundle}?\n")
    code, _, complaint = tandem_main("serve", "--bundle", manifest)
    assert code == 1
    assert complaint.endswith(f"{manifest} is not a bundle; give its folder, {bundle}\n")
