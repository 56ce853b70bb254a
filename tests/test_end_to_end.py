"""From a tiny random teacher to answers on the wire: one recipe, one bundle, one real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

import tandem.cli
from bundle.manifest import Manifest, load_manifest, write_manifest
from bundle.verify import verify_bundle
from estimators.divergence import k1, k2, k3
from export.pipeline import run_export
from export.run.recipe import load_config
from loadtest.server_metrics import scrape
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, violations
from tandem.demo import compare_with_responses, demo, serving
from tests.support.recipes import ACCEPT_ALL, RecordingReporter, write_recipe

SETTINGS: dict[str, Any] = {
    "tasks": {"max_train": 32, "max_test": 6},
    "sample": {"max_tokens": 16, "max_num_seqs": 16, "max_model_len": 256},
    "prune": {"num_removed_layers": 1, "num_texts": 4},
    "accept": ACCEPT_ALL,
    "distill": {
        "phases": [
            {"num_epochs": 2, "learning_rate": 1e-3, "tokens_per_step": 64},
            {
                "data": "student",
                "divergence": "reverse_kl",
                "num_prompts_per_round": 16,
                "learning_rate": 1e-4,
                "tokens_per_step": 64,
            },
        ],
        "freeze_shared_layers": True,
    },
    "variants": {
        "int8": {"bits": 8, "block_size": 32},
        "int4": {"bits": 4, "block_size": 32},
        "trained": {
            "bits": 4,
            "block_size": 32,
            "method": "gptq",
            "num_calibration_texts": 8,
            "overrides": {"lm_head": {"bits": 8, "block_size": 32}},
            "train": {"alpha": 1.0, "temperature": 1.0, "tokens_per_step": 64},
        },
    },
    "evaluate": {
        "max_num_seqs": 6,
        "max_task_prompts": 3,
        "num_samples": 2,
        "k": [1, 2],
        "task_max_tokens": 8,
        "num_timed_tokens": 8,
        "num_rounds": 1,
    },
    # Random weights are no teacher to come near; what the runtimes do to them is held to account.
    "gates": {"student_kl": 20.0, "onnx_kl": 1e-6, "quantized_kl": 0.02},
}
TEMPERATURE = 0.8


@dataclass
class Exported:
    recipe: Path
    bundle: Path
    reporter: RecordingReporter

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.bundle)


@pytest.fixture(scope="module")
def exported(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("end_to_end")
    paths = {"teacher": tiny_teacher, "output_dir": folder / "run", "cache_dir": folder / "cache"}
    recipe = write_recipe(folder / "recipe.yaml", SETTINGS, **paths)
    reporter = RecordingReporter()
    return Exported(recipe, run_export(load_config(recipe), reporter), reporter)


class Live:
    """A served bundle, a client, and every Compare response that it gave."""

    def __init__(self, bundle: Path) -> None:
        self.responses: list[pb.CompareResponse] = []
        self._stack = ExitStack()
        ready = self._stack.enter_context(serving(bundle))
        self.address, self.metrics_url = ready["address"], ready["metrics_url"]
        self.client = self._stack.enter_context(Client(self.address, timeout_s=60))

    def compare(self, text: str = "What is 3 plus 4?", **sampling: Any) -> pb.CompareResponse:
        response = self.client.compare(question(text, **sampling))
        self.responses.append(response)
        return response

    def stop(self) -> None:
        """Send SIGTERM; UserError unless the server exits with 0."""
        self._stack.close()


def messages(text: str) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=text)])


def question(text: str, **sampling: Any) -> pb.CompareRequest:
    settings = {"num_samples": 8, "temperature": TEMPERATURE, "max_tokens": 24, "seed": 7}
    return pb.CompareRequest(
        messages=messages(text),
        sampling=pb.SamplingParams(**settings | sampling),
        evaluation=pb.EvaluationOptions(
            answer_format="last_number", reference_answer="7", pass_at_k=[1, 2]
        ),
    )


@pytest.fixture(scope="module")
def live(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Serves a copy whose default is int8: which variant is the fastest here is chance."""
    bundle = tmp_path_factory.mktemp("served") / "bundle"
    shutil.copytree(exported.bundle, bundle)
    write_manifest(bundle, exported.manifest.model_copy(update={"default_variant": "int8"}))
    live = Live(bundle)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def response(live: Live) -> pb.CompareResponse:
    return live.compare()


# --- the bundle


def test_bundle_is_what_its_manifest_says(exported: Exported) -> None:
    assert verify_bundle(exported.bundle) == exported.manifest


def test_student_has_one_layer_fewer(exported: Exported) -> None:
    student = exported.manifest.student
    (pruned,) = [stage for stage in exported.manifest.lineage if stage.name == "prune"]
    (removed,) = pruned.summary["removed_layers"]
    assert student.num_layers == 3
    assert student.kept_layers == tuple(layer for layer in range(4) if layer != removed)
    config = json.loads((exported.bundle / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3


def test_training_brought_the_student_closer(exported: Exported) -> None:
    lines = (exported.bundle / "student" / "training.jsonl").read_text().splitlines()
    soft = [json.loads(line)["soft"] for line in lines]
    assert np.mean(soft[-3:]) < np.mean(soft[:3])


def test_gates_are_judged_and_the_default_passed(exported: Exported) -> None:
    variants = exported.manifest.variants
    assert set(variants) == {"fp32", "int8", "int4", "trained"}
    passed = {(name, gate.name): gate.passed for name, v in variants.items() for gate in v.gates}
    assert passed == {
        ("fp32", "kl_to_teacher"): True,
        ("fp32", "parity_with_torch"): True,
        ("fp32", "logit_difference"): True,
        ("int8", "kl_to_teacher"): True,
        ("int8", "kl_to_float_student"): True,
        ("int4", "kl_to_teacher"): True,
        ("int4", "kl_to_float_student"): False,
        ("trained", "kl_to_teacher"): True,
        ("trained", "kl_to_float_student"): True,
    }
    assert variants[exported.manifest.default_variant].is_passed


def test_lineage_names_every_stage_in_order(exported: Exported) -> None:
    assert [stage.name for stage in exported.manifest.lineage] == [
        "sample",
        "accept",
        "prune",
        "distill",
        "onnx-fp32",
        "onnx-int8",
        "onnx-int4",
        "grid-trained",
        "onnx-trained",
        "evaluate",
    ]


def test_every_progress_bar_ends_at_its_total(exported: Exported) -> None:
    assert {label: shown[-1][0] for label, shown in exported.reporter.progress.items()} == {
        label: shown[-1][1] for label, shown in exported.reporter.progress.items()
    }
    assert set(exported.reporter.progress) == {
        "teacher answers",
        "layers tried",
        "training, per mille",
        "held-out prompts",
        "task answers",
    }


def test_second_run_builds_nothing(exported: Exported) -> None:
    folder, reporter = exported.bundle.parent, RecordingReporter()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run_export(load_config(exported.recipe), reporter) == exported.bundle
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert reporter.progress == {}
    assert all("finished before" in line for line in reporter.said)


def test_damaged_bundle_is_packaged_again_from_the_stages(exported: Exported) -> None:
    files, reporter = exported.manifest.files, RecordingReporter()
    (exported.bundle / "README.md").write_text("damaged")
    run_export(load_config(exported.recipe), reporter)
    assert verify_bundle(exported.bundle).files == files
    assert reporter.progress == {}


def test_command_verifies_the_bundle(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        tandem.cli.main(["export", "verify", str(exported.bundle)])
    assert "files are what the manifest says" in capsys.readouterr().out


# --- on the wire


def test_both_models_are_served(live: Live) -> None:
    student, teacher = live.client.get_models().models
    assert (student.role, student.backend) == (pb.ROLE_STUDENT, "onnx")
    assert (teacher.role, teacher.backend) == (pb.ROLE_TEACHER, "torch")
    assert (student.precision, teacher.precision) == ("int8", "bfloat16")
    assert student.tokenizer_hash == teacher.tokenizer_hash


def test_compare_answers_with_8_samples_of_each_model(response: pb.CompareResponse) -> None:
    roles = [sample.role for sample in response.samples]
    assert roles == [pb.ROLE_STUDENT] * 8 + [pb.ROLE_TEACHER] * 8
    endings = {pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH}
    assert {sample.finish_reason for sample in response.samples} == endings
    for sample in response.samples:
        assert len(sample.token_ids) == len(sample.logprobs) == sample.divergence.num_tokens
        assert sample.divergence.nonfinite_tokens == 0


def test_sums_recompute_from_the_log_probabilities(response: pb.CompareResponse) -> None:
    for sample in response.samples:
        divergence = sample.divergence
        pair = sample.logprobs, divergence.reference_logprobs
        assert divergence.k1_sum == pytest.approx(k1(*pair).sum(), abs=1e-5)
        assert divergence.k2_sum == pytest.approx(k2(*pair).sum(), abs=1e-5)
        assert divergence.k3_sum == pytest.approx(k3(*pair).sum(), abs=1e-5)


def token_ids(response: pb.CompareResponse) -> list[list[int]]:
    return [list(sample.token_ids) for sample in response.samples]


def test_same_seed_gives_the_same_tokens_again(live: Live, response: pb.CompareResponse) -> None:
    assert token_ids(live.compare()) == token_ids(response)


def test_same_seed_gives_the_same_tokens_while_other_requests_run(
    live: Live, response: pb.CompareResponse
) -> None:
    texts = ["Name a colour.", "Write a poem about the sea.", "What is 3 plus 4?", "Hello!"]
    long = {"num_samples": 2, "max_tokens": 150, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(live.compare, text, seed=seed, **long) for seed, text in enumerate(texts)
        ]
        again = [token_ids(live.compare()) for _ in range(2)]
        assert not all(other.done() for other in others), "nothing else ran"
        for other in others:
            other.result()
    assert again == [token_ids(response)] * 2


def test_another_seed_gives_other_tokens(live: Live, response: pb.CompareResponse) -> None:
    assert token_ids(live.compare(seed=8)) != token_ids(response)


@pytest.mark.parametrize(
    "sampling", [{}, {"num_samples": 3, "max_tokens": 300, "ignore_eos": True}]
)
def test_score_gives_the_log_probabilities_back(live: Live, sampling: dict[str, Any]) -> None:
    """Also in a long text, where int8 activations tip a rounding now and then."""
    samples = live.compare(**sampling).samples
    completions = [pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids)) for sample in samples]
    chat = messages("What is 3 plus 4?")
    scores = live.client.score(
        pb.ScoreRequest(messages=chat, completions=completions, temperature=TEMPERATURE)
    ).scores
    logprobs = {(score.role, score.index): score.logprobs for score in scores}
    for index, sample in enumerate(samples):
        reference = pb.ROLE_STUDENT + pb.ROLE_TEACHER - sample.role
        own, others = logprobs[sample.role, index], logprobs[reference, index]
        np.testing.assert_allclose(own, sample.logprobs, atol=1e-3)
        np.testing.assert_allclose(others, sample.divergence.reference_logprobs, atol=1e-3)


def test_refused_request_names_its_field_and_the_server_goes_on(live: Live) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        live.client.compare(question("Hello!", temperature=float("nan")))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(refused.value)) == ["sampling.temperature"]
    assert len(live.client.get_models().models) == 2


def test_ask_prints_the_response_as_json(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", "--target", live.address, "--num-samples", "2", "--seed", "5"]
    words += ["--max-tokens", "8", "--reference", "7", "--json", "What is 3 plus 4?"]
    with pytest.raises(SystemExit, match="0"):
        tandem.cli.main(words)
    response = json_format.Parse(capsys.readouterr().out, pb.CompareResponse())
    live.responses.append(response)
    assert len(response.samples) == 4
    assert response.usage.seed == 5


def test_metrics_are_what_the_responses_said(live: Live, response: pb.CompareResponse) -> None:
    metrics = scrape(live.metrics_url).values
    assert compare_with_responses(metrics, live.responses) == []
    assert compare_with_responses(metrics, live.responses[1:]) != []


def test_sigterm_ends_the_server_with_exit_code_0(live: Live) -> None:
    live.stop()


# --- `tandem demo`


def test_demo_finds_the_recipe_finished_and_shows_it_all(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(exported.recipe)
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 11
    assert f"{exported.manifest.default_variant} (default)" in shown
    assert shown.count("k3, nats per token") == 5
    assert 'tandem_consensus_total{outcome="' in shown
    assert 'tandem_pass_at_k_prompts_total{k="8",reference="gold",role="student"' in shown
    assert "The metrics are what the answers said; the server stopped cleanly." in shown
