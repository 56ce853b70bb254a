from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.json_format import Parse

from bundle.errors import UserError
from protos.tandem.v1 import control_pb2
from protos.tandem.v1 import inference_pb2 as pb
from serve import cli
from serve.app.config import ServeConfig
from serve.app.settings import flag_of
from serve.client.access import read_token, tls_of
from serve.client.control import describe_status
from serve.rpc.credentials.tokens import TokenFile
from tests.support.rpc.authorities import Pki

# tandem serve


def test_every_setting_has_a_flag() -> None:
    app = typer.Typer()
    app.command()(cli.serve)
    flags = {flag for each in typer.main.get_command(app).params for flag in each.opts}
    assert {flag_of(name) for name in ServeConfig.model_fields} <= flags


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--no-teacher"], "no_teacher: true  # flag --no-teacher"),
        (["--with-teacher"], "no_teacher: false  # flag --no-teacher"),
        (["--insecure-listen", "--host", "0.0.0.0"], 'host: "0.0.0.0"  # flag --host'),
        (["--no-reflection"], "reflection: false  # flag --reflection"),
        (["--port", "0"], "port: 0  # flag --port"),
        ([], "port: 7  # env TANDEM_PORT"),
    ],
)
def test_print_config_shows_the_settings_in_force(
    tandem_main: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    monkeypatch.setenv("TANDEM_PORT", "7")
    code, printed, _ = tandem_main("serve", "--bundle", "/nowhere", "--print-config", *words)
    assert code == 0
    assert line in printed.splitlines()


def test_wrong_settings_exit_with_2_and_a_line_each(
    tandem_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_MAX_NUM_SEQ", "3")
    code, _, complaints = tandem_main("serve", "--bundle", "b", "--port", "x")
    assert code == 2
    assert [line.split(": ")[:2] for line in complaints.splitlines()] == [
        ["tandem", "flag --port"],
        ["env TANDEM_MAX_NUM_SEQ", "there is no such setting; did you mean TANDEM_MAX_NUM_SEQS?"],
    ]


def test_settings_are_read_without_loading_a_model_library() -> None:
    code = (
        "import sys, tandem\n"
        "try: tandem.cli.main(['serve', '--bundle', '/nowhere', '--print-config'])\n"
        "finally: print(sorted({'torch', 'transformers', 'onnxruntime', 'grpc', 'numpy'}"
        " & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


# Credentials


def test_token_prints_the_token_and_its_line_of_the_token_file(
    tandem_main: Any, tmp_path: Path
) -> None:
    code, token, line = tandem_main("token", "ada", "--scope", "inference,control")
    assert code == 0
    assert line.split() == [
        "ada",
        hashlib.sha256(token.strip().encode()).hexdigest(),
        "inference,control",
    ]
    (tmp_path / "tokens").write_text(line)
    client = TokenFile(tmp_path / "tokens").identify(token.strip())
    assert client is not None and client.scopes == {"inference", "control"}


def test_token_of_an_unknown_scope_is_wrong_usage(tandem_main: Any) -> None:
    code, token, complaint = tandem_main("token", "ada", "--scope", "inference,root")
    assert (code, token) == (2, "")
    assert "control, inference, reflection" in complaint


@pytest.fixture
def guarded(serving: Any, make_pair: Any, tmp_path: Path, tandem_main: Any) -> Any:
    """A server with TLS and one client, whose token lies in `tmp_path/token`, the CA in `ca`."""
    pki = Pki(tmp_path)
    _, token, line = tandem_main("token", "ada", "--scope", "inference,control")
    (tmp_path / "token").write_text(f"{token}# ada's\n")
    (tmp_path / "tokens").write_text(line)
    secured = {"tls_cert": pki.cert, "tls_key": pki.key, "auth_tokens": tmp_path / "tokens"}
    with serving(make_pair(), **secured) as live:
        yield live.server


def test_commands_show_their_credentials(guarded: Any, tandem_main: Any, tmp_path: Path) -> None:
    calls = {
        guarded.address: ["ask", "2+2", "--max-tokens", "3"],
        guarded.control_address: ["control", "policy"],
    }
    for address, words in calls.items():
        known = [*words, "--target", address, "--tls-ca", str(tmp_path / "ca")]
        token = ["--token-file", str(tmp_path / "token")]
        assert tandem_main(*known, *token)[0] == 0
        code, _, complaint = tandem_main(*known)
        assert code == 1 and "UNAUTHENTICATED" in complaint


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "cannot be read: No such file"), (b"\xff", "is not UTF-8"), (b"\nx", "first line is")],
)
def test_token_file_without_a_token_is_refused(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    path = tmp_path / "token"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_token(path)


def test_half_of_a_certificate_is_refused() -> None:
    with pytest.raises(UserError, match="--tls-cert and --tls-key: a client certificate needs"):
        tls_of(None, Path("cert"), None)


def test_no_credentials_are_none() -> None:
    assert (read_token(None), tls_of(None, None, None)) == (None, None)


# tandem control


def test_status_is_shown_to_people_and_as_json(live: Any, tandem_main: Any) -> None:
    words = ["control", "status", "--target", live.server.control_address]
    code, shown, _ = tandem_main(*words)
    first, student, teacher, ledger, policy = shown.splitlines()
    assert code == 0 and first.startswith("serving for ")
    assert (student, teacher) == ("student: 0 of 8 running, 0 waiting",
                                  "teacher: 0 of 8 running, 0 waiting")  # fmt: skip
    assert ledger == "requests: 0, shadows: 0, ledger imbalance: 0"
    assert policy == "policy 1: student 1, teacher 0, shadow rate 0"
    status = Parse(tandem_main(*words, "--json")[1], control_pb2.GetStatusResponse())
    assert status.state == control_pb2.SERVER_STATE_SERVING


def test_dead_engine_is_shown() -> None:
    engine = control_pb2.EngineStatus(role=pb.ROLE_TEACHER)
    assert "teacher: down" in describe_status(control_pb2.GetStatusResponse(engines=[engine]))


def test_policy_is_changed_unless_someone_was_faster(
    serving: Any, make_pair: Any, tandem_main: Any
) -> None:
    with serving(make_pair()) as live:
        target = ["--target", live.server.control_address]
        change = ["control", "set-policy", *target, "--expected-revision", "1"]
        _, shown, _ = tandem_main(*change, "--teacher-weight", "0.25", "--shadow-rate", "0.5")
        assert shown == "policy 2: student 1, teacher 0.25, shadow rate 0.5\n"
        assert tandem_main("control", "policy", *target)[1] == shown
        code, _, complaint = tandem_main(*change, "--student-weight", "2")
        assert code == 1 and "FAILED_PRECONDITION" in complaint


def test_policy_without_a_change_is_wrong_usage(tandem_main: Any) -> None:
    code, _, complaint = tandem_main("control", "set-policy")
    assert code == 2 and "--shadow-rate" in complaint


def test_running_request_is_aborted(serving: Any, make_pair: Any, tandem_main: Any) -> None:
    pair = make_pair()
    for backend in pair.backends.values():
        backend.may_run.clear()
    with serving(pair) as live:
        target = ["--target", live.server.control_address]
        call = live.stub.Compare.future(pb.CompareRequest(request_id="r1", prompt="2+2"))
        while "requests: 1" not in tandem_main("control", "status", *target)[1]:
            pass  # it has not arrived yet
        assert tandem_main("control", "abort", "r1", *target)[1] == "aborted r1\n"
        assert call.code() is grpc.StatusCode.CANCELLED


def test_server_is_asked_to_drain(serving: Any, make_pair: Any, tandem_main: Any) -> None:
    asked = threading.Event()
    with serving(make_pair(), on_drain=asked.set) as live:
        target = ["--target", live.server.control_address]
        assert tandem_main("control", "drain", *target)[1] == "draining\n"
        assert asked.is_set()
