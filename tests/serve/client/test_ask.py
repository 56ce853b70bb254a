from __future__ import annotations

import io
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from bundle.errors import UserError
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc
from serve.client import Tls, ask
from serve.client.access import to_json
from serve.client.ask import Question, run
from serve.client.side_by_side import coloured, legend, render

DIVERGENCE = pb.Divergence(k3_mean=0.3, k3_sum=0.6, num_tokens=2, per_token_k3=[0.01, 3.0])
SAMPLE = pb.Sample(
    role=pb.ROLE_STUDENT,
    text="It is 4",
    token_ids=[5, 6],
    text_ends=[6, 7],
    finish_reason=pb.FINISH_REASON_STOP,
    answer="4",
    correct=True,
    divergence=DIVERGENCE,
    timings=pb.Timings(ttft_s=0.01, decode_s=0.01),
)
MODELS = pb.GetModelsResponse(
    models=[
        pb.Model(role=role, backend="onnx", device="cpu", precision="int8", num_parameters=10**8)
        for role in (pb.ROLE_STUDENT, pb.ROLE_TEACHER)
    ]
)


def rendered(response: pb.CompareResponse, width: int = 100, **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **settings)
    console.print(render("What is 2+2?", MODELS, response))
    return str(console.file.getvalue())


def response_of(*samples: pb.Sample, **fields: Any) -> pb.CompareResponse:
    usage = pb.Usage(seed=7, seconds=0.5)
    return pb.CompareResponse(samples=samples, usage=usage, **fields)


def teacher(**changes: Any) -> pb.Sample:
    sample = pb.Sample()
    sample.CopyFrom(SAMPLE)
    sample.role = pb.ROLE_TEACHER
    sample.MergeFrom(pb.Sample(**changes))
    return sample


def test_prompt_is_a_chat_message_unless_raw() -> None:
    request = Question("Hi").to_request()
    assert [(m.role, m.content) for m in request.messages.messages] == [("user", "Hi")]
    assert Question("Hi", is_raw=True).to_request().prompt == "Hi"


def test_reference_asks_for_pass_at_1_and_n() -> None:
    evaluation = Question("Hi", num_samples=8, reference="4").to_request().evaluation
    assert (evaluation.answer_format, evaluation.reference_answer) == ("last_number", "4")
    assert list(evaluation.pass_at_k) == [1, 8]


def test_what_is_not_given_is_left_to_the_server() -> None:
    request = Question("Hi").to_request()
    assert not request.sampling.HasField("temperature")
    assert not request.sampling.HasField("seed")
    assert not request.evaluation.HasField("answer_format")


def test_tokens_have_the_colour_of_their_k3() -> None:
    text = coloured(SAMPLE)
    assert text.plain == "It is 4"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(6, 7, "bold red")]


def test_text_behind_the_last_token_is_kept() -> None:
    assert coloured(pb.Sample(text="abc", text_ends=[1])).plain == "abc"


def test_legend_names_the_scale() -> None:
    assert "nats" in legend().plain and "≥ 2" in legend().plain


def test_answers_votes_and_ratio_are_shown() -> None:
    vote = pb.Vote(answer="4", share=1.0, num_valid=1, num_samples=1)
    agreement = pb.Agreement(
        student=vote,
        teacher=vote,
        same_answer=True,
        student_pass_at_k={1: 1.0},
        teacher_pass_at_k={1: 0.5},
        reference_kind=pb.REFERENCE_KIND_GOLD,
    )
    slow = teacher(timings=pb.Timings(ttft_s=0.05, decode_s=0.05))
    text = rendered(response_of(SAMPLE, slow, agreement=agreement))
    for part in ("student · 100M int8 onnx/cpu", "answer 4 ✓", "k3 0.300", "4 (100% of 1)"):
        assert part in text
    for part in ("same answer", "pass@1", "0.500", "gold answer", "10 ms", "5.00×", "--seed 7"):
        assert part in text


def test_more_than_two_samples_are_listed_by_answer() -> None:
    text = rendered(response_of(*[SAMPLE] * 5, *[teacher()] * 5))
    assert "3 more: 4 ✓, 4 ✓, 4 ✓" in text


def test_failures_are_shown_as_such() -> None:
    student = pb.Sample(role=pb.ROLE_STUDENT, divergence_error="the teacher is down")
    broken = pb.Sample(role=pb.ROLE_TEACHER, error="out of memory")
    text = rendered(response_of(student, broken))
    assert "no divergence: the teacher is" in text
    assert "failed: out of memory" in text


@pytest.mark.parametrize("width", [60, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = rendered(response_of(SAMPLE, teacher()), width).splitlines()
    assert max(map(len, lines)) <= width


def test_a_file_gets_no_colours_and_a_terminal_does() -> None:
    assert "\x1b[" not in rendered(response_of(SAMPLE))
    assert "\x1b[" in rendered(response_of(SAMPLE), force_terminal=True, color_system="truecolor")


def test_markup_in_an_answer_is_text() -> None:
    sample = pb.Sample(role=pb.ROLE_STUDENT, text="[bold]x[/bold]")
    assert "[bold]x[/bold]" in rendered(response_of(sample))


def test_json_keeps_proto_names_and_zeros() -> None:
    parsed = json.loads(to_json(response_of(SAMPLE)))
    assert parsed["samples"][0]["token_ids"] == [5, 6]
    assert parsed["samples"][0]["index"] == 0


def test_command_asks_a_server(live: Any) -> None:
    app = Typer()
    app.command()(ask.ask)
    arguments = ["2+2", "--target", live.server.address, "--seed", "3", "--max-tokens", "9"]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    response = json.loads(result.stdout)
    assert (response["usage"]["seed"], len(response["samples"])) == ("3", 2)
    shown = CliRunner().invoke(app, [*arguments, "--reference", "4"], catch_exceptions=False)
    assert "pass@1" in shown.stdout


def test_refusal_is_a_user_error_with_the_field(live: Any) -> None:
    question = Question("x", num_samples=99)
    with pytest.raises(UserError, match=r"sampling\.num_samples is 99; must be 1 to 64"):
        run(live.server.address, question, as_json=False, timeout_s=10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"token": "secret"}, "in clear"),
        ({"tls": Tls(ca=Path("absent.pem"))}, r"No such file.*absent\.pem"),
    ],
)
def test_connection_that_cannot_be_made_is_a_user_error(settings: Any, text: str) -> None:
    with pytest.raises(UserError, match=f"example.com:1: .*{text}"):
        run("example.com:1", Question("x"), as_json=False, timeout_s=10, **settings)


class Silent(inference_pb2_grpc.InferenceServiceServicer):
    """Never answers Compare, and sends this process SIGINT as soon as it is asked."""

    def __init__(self) -> None:
        self.is_cancelled = threading.Event()

    def GetModels(self, request: Any, context: Any) -> pb.GetModelsResponse:  # noqa: N802
        return MODELS

    def Compare(self, request: Any, context: Any) -> pb.CompareResponse:  # noqa: N802
        context.add_callback(self.is_cancelled.set)
        os.kill(os.getpid(), signal.SIGINT)
        assert self.is_cancelled.wait(60)
        return pb.CompareResponse()


def test_ctrl_c_cancels_the_call_and_exits_with_130() -> None:
    server, service = grpc.server(ThreadPoolExecutor(2)), Silent()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with pytest.raises(SystemExit) as caught:
        run(target, Question("x"), as_json=False, timeout_s=30)
    assert caught.value.code == 130
    assert service.is_cancelled.wait(60)
    server.stop(None).wait()
