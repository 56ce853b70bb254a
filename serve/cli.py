"""`tandem serve` and `tandem ask`: flags only. What they need is imported when they run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from bundle.errors import UserError


def serve(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle to serve.")],
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of the teacher; by default the bundle's, where it still lies."),
    ] = None,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Serve the student alone.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    port: Annotated[int, typer.Option(help="gRPC port; 0 picks a free one.")] = 50051,
    metrics_port: Annotated[int, typer.Option(help="HTTP port; 0 picks a free one.")] = 9464,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written as JSON with the addresses when ready.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="ONNX variant; by default the bundle's.")
    ] = None,
    student_backend: Annotated[str, typer.Option(help="onnx or torch.")] = "onnx",
    teacher_backend: Annotated[str, typer.Option(help="torch or onnx.")] = "torch",
    teacher_dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32 (torch).")
    ] = "bfloat16",
    max_num_seqs: Annotated[int, typer.Option(help="Samples running per model.")] = 16,
    max_model_len: Annotated[int, typer.Option(help="Prompt and completion tokens.")] = 2048,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of one step; by default as many as it may use.")
    ] = None,
    max_pass_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a prefill or scoring pass; by default 256 on the CPU."),
    ] = None,
    prefix_cache_mib: Annotated[
        int, typer.Option(help="MiB of earlier prompts to copy from, per model; 0 for none.")
    ] = 256,
    drain_grace_s: Annotated[float, typer.Option(help="Seconds running work may take.")] = 30.0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="Allow a host that is not loopback.")
    ] = False,
) -> None:
    """Serve a bundle's student, and its teacher, over gRPC until SIGTERM."""
    config = _config(**locals())  # the flags are ServeConfig's fields
    from serve import server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    server.serve(config)


def _config(**settings: Any) -> Any:
    """Return the ServeConfig; UserError names the flag that is out of bounds."""
    from pydantic import ValidationError

    from serve.config import ServeConfig

    try:
        return ServeConfig(**settings)
    except ValidationError as error:
        raise UserError("; ".join(map(_one_line, error.errors(include_url=False)))) from None


def _one_line(found: Any) -> str:
    text: str = found["msg"].removeprefix("Value error, ")
    return f"--{found['loc'][0].replace('_', '-')}: {text}" if found["loc"] else text


def ask(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    target: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:50051",
    num_samples: Annotated[int, typer.Option(help="Answers per model.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens per answer at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats the draws of an earlier run.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The right answer, for correctness and pass@k.")
    ] = None,
    answer_format: Annotated[
        str | None,
        typer.Option(help="last_number (default with --reference), boxed, choice, final_line."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the text as it stands, not as a chat message.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the Compare response as JSON.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the answers.")] = 300.0,
) -> None:
    """Ask both models; show their answers side by side, coloured by divergence."""
    from serve.ask import Question, run

    run(
        target,
        Question(
            prompt=prompt,
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            reference=reference,
            answer_format=answer_format,
            is_raw=raw,
        ),
        as_json=as_json,
        timeout_s=timeout_s,
    )
