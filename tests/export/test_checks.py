"""Everything that files can tell is told before anything runs, by `plan` as by `run`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import tandem.cli
from bundle.errors import UserError
from export.checks import check_room, check_run
from export.inputs import RunInputs
from export.pipeline import Pipeline
from export.run.errors import ExportError
from export.run.files import read_json, write_json
from export.run.recipe import load_recipe
from export.run.stages import QuietReporter
from export.teacher.model_files import TOKENIZER_FILES

LONG = "word " * 300
SETTINGS: dict[str, Any] = {
    "teacher": "teacher",
    "output_dir": "run",
    "tasks": {"max_train": 40, "max_test": 8, "sources": [{"kind": "jsonl", "path": "rows.jsonl"}]},
    "sample": {"max_tokens": 16, "max_model_len": 256},
    "prune": {"num_removed_layers": 1, "num_texts": 2},
    "evaluate": {"task_max_tokens": 16},
}
Edit = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher and rows, to run recipes in."""
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(folder: Path, *rows: dict[str, Any]) -> None:
    given = [{"prompt": f"Say {n}.", "split": "train"} for n in range(8)]
    given += [{"prompt": f"Repeat {n}.", "split": "test"} for n in range(4)]
    lines = [json.dumps(row) + "\n" for row in [*rows, *given]]
    (folder / "rows.jsonl").write_text("".join(lines))


def write_recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | sections))
    return path


def refusal(folder: Path, **sections: Any) -> str:
    recipe = load_recipe(write_recipe(folder, **sections))
    with pytest.raises(UserError) as refused:
        check_run(recipe.config, recipe.place)
    return str(refused.value)


def set_config(**keys: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "teacher" / "config.json"
        write_json(path, read_json(path) | keys)

    return edit


def save_model(folder: Path, teacher: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes | settings)).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(teacher / name, folder)
    return folder


# --- what a recipe asks for that its models cannot do


@pytest.mark.parametrize(
    ("sections", "edit", "line"),
    [
        ({}, set_config(max_position_embeddings=128), "sample.max_model_len 256 exceeds the teach"),
        (
            {"sample": {"max_tokens": 96, "max_model_len": 256}, "onnx": {"max_model_len": 96}},
            None,
            "sample.max_tokens 96 leaves no room for a prompt in the 96 of onnx.max_model_len",
        ),
        (
            {"sample": {"max_tokens": 256, "max_model_len": 256}},
            None,
            "sample.max_tokens 256 leaves no room for a prompt in the 256 of sample.max_model_len",
        ),
        (
            {"evaluate": {"task_max_tokens": 4096}},
            None,
            "evaluate.task_max_tokens 4096 leaves no room for a prompt in the 2048 of onnx.max_mod",
        ),
        (
            {"onnx": {"max_model_len": 100}},
            None,
            "onnx.max_model_len graphs are measured with 128 positions; onnx.max_model_len is 100",
        ),
        (
            {"evaluate": {"num_timed_tokens": 3000}},
            None,
            "evaluate.num_timed_tokens 3000 and a prompt of 64 tokens exceed the 2048 positions",
        ),
        ({"prune": {"num_removed_layers": 4, "num_texts": 2}}, None, "prune.num_removed_layers: "),
        ({"cache": {"kind": "top_k", "top_k": 512}}, None, "cache.top_k: cache.top_k 512 is not l"),
    ],
)
def test_setting_that_cannot_work_is_told_with_its_line(
    folder: Path, sections: dict[str, Any], edit: Edit | None, line: str
) -> None:
    if edit:
        edit(folder)
    told = refusal(folder, **sections)
    assert line in told
    key = line.split()[0].rstrip(":")
    lines = (folder / "recipe.yaml").read_text().splitlines()
    number = int(told.partition(line)[0].rpartition("recipe.yaml:")[2].split(":")[0])
    assert lines[number - 1].strip().split(":")[0] in key.split(".")


def test_lengths_of_the_recipe_are_looked_at_without_the_teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    sample = {"max_tokens": 512, "max_model_len": 1024}
    told = refusal(folder, teacher="no/model-7B", sample=sample, onnx={"max_model_len": 256})
    assert "sample.max_tokens 512 leaves no room for a prompt in the 256 of onnx.max_mod" in told


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            set_config(model_type="gpt_neox"),
            r"config\.json: model type 'gpt_neox' is not supported",
        ),
        (set_config(vocab_size=400), "config.json"),
        (lambda f: (f / "teacher/chat_template.jinja").unlink(), "teacher has no chat template"),
        (
            lambda f: (f / "teacher/chat_template.jinja").write_text("{% if"),
            "the chat template does not compile",
        ),
        (lambda f: (f / "teacher/tokenizer.json").write_text("{}"), r"tokenizer\.json"),
        (lambda f: (f / "teacher/tokenizer.json").unlink(), r"lacks tokenizer\.json"),
        (
            lambda f: (f / "teacher/chat_template.jinja").write_text("{{ raise_exception('no') }}"),
            r"rows\.jsonl:1: the teacher cannot be asked this: .*no",
        ),
    ],
)
def test_folder_that_cannot_teach_is_told(folder: Path, edit: Edit, message: str) -> None:
    edit(folder)
    with pytest.raises(UserError, match=message) as refused:
        check_run(load_recipe(write_recipe(folder)).config)
    assert "Traceback" not in str(refused.value)


def test_teacher_without_a_tokenizer_config_but_with_a_template_can_teach(folder: Path) -> None:
    (folder / "teacher" / "tokenizer_config.json").unlink()
    assert check_run(load_recipe(write_recipe(folder)).config).teacher is not None


def test_heads_that_the_graph_does_not_compute_are_told(folder: Path) -> None:
    model = save_model(folder / "odd", folder / "teacher", head_dim=100, num_hidden_layers=4)
    told = refusal(folder, teacher=str(model))
    assert told == (
        f"{model}/config.json: model type 'llama': head_dim is 100, the ONNX graph allows "
        "multiples of 16"
    )


@pytest.mark.parametrize(
    ("settings", "tokenizer", "message"),
    [
        ({"head_dim": 8}, None, r"config\.json: model type 'llama': head_dim is 8"),
        ({"vocab_size": 300}, None, r"config\.json has vocab_size 300"),
        ({"max_position_embeddings": 128}, None, None),
        ({"max_position_embeddings": 16}, None, "in the 16 of the student's max_position_embedd"),
        ({"num_hidden_layers": 6}, None, None),
        ({}, "other", "has another tokenizer than the teacher"),
    ],
)
def test_student_that_cannot_learn_is_told(
    folder: Path, settings: dict[str, Any], tokenizer: str | None, message: str | None
) -> None:
    student = save_model(folder / "small", folder / "teacher", **settings)
    if tokenizer:
        raw = read_json(student / "tokenizer.json")
        raw["model"]["merges"] = raw["model"]["merges"][:-1]
        write_json(student / "tokenizer.json", raw)
    evaluate = {"task_max_tokens": 8, "num_timed_tokens": 8}
    if message is None:
        recipe = load_recipe(write_recipe(folder, student="small", evaluate=evaluate))
        assert check_run(recipe.config).student is not None
    else:
        assert message.replace("\\", "") in refusal(folder, student="small", evaluate=evaluate)


# --- prompts that do not fit


@pytest.mark.parametrize(
    ("row", "sections", "text"),
    [
        (
            {"prompt": LONG, "split": "train"},
            {},
            "with sample.max_tokens 16 that is {total}: more than the 256 of sample.max_model_len",
        ),
        (
            {"prompt": LONG, "split": "test"},
            {"sample": {"max_tokens": 16, "max_model_len": 2048}, "onnx": {"max_model_len": 256}},
            "with sample.max_tokens 16 that is {total}: more than the 256 of onnx.max_model_len",
        ),
        (
            {"prompt": "Say it.", "answer": "it", "split": "test"},
            {"evaluate": {"task_max_tokens": 250}, "onnx": {"max_model_len": 256}},
            "with evaluate.task_max_tokens 250 that is {total}: more than the 256 of onnx.max_mod",
        ),
    ],
)
def test_prompt_that_does_not_fit_is_refused_by_its_line_or_dropped(
    folder: Path, row: dict[str, Any], sections: dict[str, Any], text: str
) -> None:
    write_rows(folder, row)
    told = refusal(folder, **sections)
    assert told.startswith(f"{folder}/rows.jsonl:1: the prompt has ")
    num_tokens = int(told.partition("the prompt has ")[2].split()[0])
    answer = int(text.split()[2])
    assert text.format(total=num_tokens + answer) in told
    tasks = {**SETTINGS["tasks"], "on_bad_row": "drop"}
    recipe = load_recipe(write_recipe(folder, **sections, tasks=tasks))
    checked = check_run(recipe.config, recipe.place)
    assert checked.teacher is not None and len(checked.loaded.tasks) == 12
    assert "tasks.sources: 1 prompts that do not fit are dropped:" in checked.loaded.notes
    pipeline = Pipeline(RunInputs(recipe.config, checked.teacher), QuietReporter())
    assert pipeline.inputs.loaded.tasks == checked.loaded.tasks


def test_long_prompt_that_is_trained_on_alone_may_exceed_the_graph(folder: Path) -> None:
    write_rows(folder, {"prompt": LONG, "split": "train"})
    sample = {"max_tokens": 16, "max_model_len": 2048}
    recipe = load_recipe(write_recipe(folder, sample=sample, onnx={"max_model_len": 256}))
    assert len(check_run(recipe.config).loaded.tasks) == 13


def test_split_of_which_no_prompt_fits_is_refused(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(
        json.dumps({"prompt": LONG, "split": "test"}) + '\n{"prompt": "a", "split": "train"}\n'
    )
    tasks = {"sources": SETTINGS["tasks"]["sources"], "on_bad_row": "drop"}
    assert "every prompt of the test split is too long" in refusal(folder, tasks=tasks)


def test_prompts_without_a_file_are_told_together(folder: Path) -> None:
    told = refusal(
        folder,
        tasks={"max_train": 20, "max_test": 4},
        sample={"max_tokens": 16, "max_model_len": 20},
    )
    (line,) = [line for line in told.splitlines() if "built" not in line]
    assert "tasks.sources: prompt '" in line and "(and 23 others): the prompt has" in line


# --- where it writes


def test_output_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder / "file").touch()
    told = refusal(folder, output_dir="file/run")
    assert told.endswith(f": output_dir '{folder}/file/run': {folder}/file is no folder")


def test_folder_without_permission_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    assert f"{folder} cannot be written" in refusal(folder, output_dir="new/run")


def test_missing_output_folder_is_made_by_run_and_not_by_plan(folder: Path) -> None:
    recipe = load_recipe(write_recipe(folder, output_dir="a/b/run"))
    check_run(recipe.config, recipe.place)
    assert not (folder / "a").exists()


def test_disk_that_is_too_small_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"output_dir '.*/no/such': .* take about 1000000\.0 GB"):
        check_room(tmp_path / "no" / "such", 1e15, str)
    check_room(tmp_path, 1e3, str)
    check_room(tmp_path, float("nan"), str)


def test_package_that_writes_the_graphs_must_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optimum" else 1)
    assert "the package optimum is missing" in refusal(folder)


# --- all together, and by both commands


def test_faults_of_recipe_rows_and_folders_are_told_together_by_plan_and_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    write_rows(folder, {"prompt": "a", "answer": []}, {"prompt": LONG, "split": "train"})
    (folder / "teacher" / "chat_template.jinja").unlink()
    prune = {"num_removed_layers": 4, "num_texts": 2}
    recipe = write_recipe(folder, output_dir="file/run", prune=prune)
    shown = {}
    for command in ("plan", "run", "sample"):
        with pytest.raises(SystemExit) as exited:
            tandem.cli.main(["export", command, str(recipe)])
        assert exited.value.code == 1
        shown[command] = capsys.readouterr().err
    assert shown["plan"] == shown["run"] == shown["sample"]
    told = ("rows.jsonl:1: answer: is", "output_dir '", "no chat template", "num_removed_layers 4")
    assert all(part in shown["plan"] for part in told)
    assert len(shown["plan"].splitlines()) == len(told)
    assert not list(folder.glob("run*"))


def test_run_tells_what_it_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(folder, {"prompt": LONG, "split": "train", "level": 3}, {"prompt": ""})
    monkeypatch.setattr(Pipeline, "package", lambda pipeline: None)
    recipe = write_recipe(folder, tasks={**SETTINGS["tasks"], "on_bad_row": "drop"})
    told = ("not used are level", "1 faulty rows are dropped", "1 prompts that do not fit")
    for command in ("plan", "run"):
        with pytest.raises(SystemExit) as exited:
            tandem.cli.main(["export", command, str(recipe)])
        assert not exited.value.code
        out = " ".join(capsys.readouterr().out.split())
        assert all(part in out for part in told)
