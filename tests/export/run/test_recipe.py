from __future__ import annotations

from pathlib import Path

import pytest

from export.run.errors import ConfigError
from export.run.recipe import load_config, load_recipe
from export.run.settings import JsonlSource

PATHS = "teacher: models/mine\noutput_dir: out\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; recipes lie in `recipes` below it."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(here: Path, text: str | bytes) -> Path:
    path = here / "recipes" / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- all faults at once, each with its line


def test_recipe_with_faults_is_refused_with_a_line_for_each(here: Path) -> None:
    path = write(
        here,
        "teacher: org/model\noutput_dir: out\nprune:\n  num_texts: 0\nsample:\n  seed: x\n"
        "variants:\n  int4:\n    bits: 5\n    block_size: 32\n",
    )
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert [line.split(", got")[0] for line in str(refused.value).splitlines()] == [
        f"{path}:6: sample.seed: Input should be a valid integer, unable to parse string as an "
        "integer",
        f"{path}:4: prune.num_texts: Input should be greater than 0",
        f"{path}:9: variants.int4.bits: Input should be 4 or 8",
    ]


def test_recipe_with_contradictions_is_refused_with_a_line_for_each(here: Path) -> None:
    path = write(
        here,
        "teacher: org/model\noutput_dir: out\nstudent: org/small\n"
        "distill:\n  freeze_shared_layers: true\n  phases:\n    - {}\n"
        "    - teacher_logits: cache\nprune: {num_texts: 64}\ntasks: {max_train: 4}\n",
    )
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    places = [line.split()[:2] for line in str(refused.value).splitlines()]
    assert places == [
        [f"{path}:9:", "prune.num_texts"],
        [f"{path}:8:", "distill.phases.1.teacher_logits"],
        [f"{path}:5:", "distill.freeze_shared_layers"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PATHS + "teacher: org/other\n",
            r":3: not YAML: 'teacher' is given twice, first on line 1",
        ),
        (
            PATHS + "prune:\n  num_texts: 2\n  num_texts: 4\ncache_dir: a\ncache_dir: b\n",
            r":5: .*'num_texts' is given twice, first on line 4\n.*:7: .*'cache_dir'",
        ),
        (PATHS + "prune:\n\tnum_texts: 2\n", r":4: not YAML: .*indent with spaces"),
        (PATHS + "---\nteacher: x\n", r":3: not YAML: a second document begins"),
        (PATHS + "tasks: {seed: 010}\n", r":3: not YAML: 010 is an octal number"),
        ("\n# nothing\n", r": the file is empty: a recipe has at least teacher and output_dir"),
        ("- teacher", r": the file holds no sections"),
        ("a: 1\nteacher: [", r":2: not YAML: "),
        ("output_dir: x", r":1: teacher: Field required"),
        (b"teacher: a\noutput_dir: caf\xe9\n", ":2: not YAML: not UTF-8"),
        (
            "teacher: org/model\noutput_dir: out\ntasks:\n  sources:\n"
            "    - {kind: builtin, families: [no]}\n",
            r":5: tasks\.sources\.0\.families\.0: .* got False: YAML reads no as False, put it in",
        ),
        (
            "teacher: 2026-11-30\noutput_dir: out\n",
            r":1: teacher: .*YAML reads 2026-11-30 as .*put it in quotes",
        ),
    ],
)
def test_recipe_that_is_no_yaml_or_means_something_else_is_refused(
    here: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml{message}") as refused:
        load_config(write(here, text))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffteacher: org/model\r\noutput_dir: out\r\n"
        "distill: {phases: [{learning_rate: 1e-4}]}\r\n",
        "teacher: org/model\noutput_dir: out\n"
        "distill:\n  phases: [&first {learning_rate: 1e-4}, {<<: *first, seed: 1}]\n",
    ],
    ids=["mark-and-crlf", "merge-key"],
)
def test_recipe_as_editors_and_people_write_it_is_read(here: Path, text: str) -> None:
    config = load_config(write(here, text))
    assert config.teacher == "org/model"
    assert {phase.learning_rate for phase in config.distill.phases} == {1e-4}


def test_recipe_that_is_missing_or_a_folder_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml cannot be read: No such file"):
        load_config(here / "recipes" / "recipe.yaml")
    with pytest.raises(ConfigError, match="recipes cannot be read: Is a directory"):
        load_config(here / "recipes")


# --- what relative paths mean


def recipe_with_data(here: Path) -> Path:
    sources = "tasks:\n  sources: [{kind: jsonl, path: rows.jsonl}]\n"
    return write(here, f"{PATHS}student: small\n{sources}")


def make(folder: Path) -> None:
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "small").mkdir()
    (folder / "rows.jsonl").touch()


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_recipe_paths_are_relative_to_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, is_elsewhere: bool
) -> None:
    make(here / "recipes")
    path = recipe_with_data(here)
    if is_elsewhere:
        monkeypatch.chdir("/")
    recipe = load_recipe(path)
    config, beside = recipe.config, here / "recipes"
    assert config.teacher == str(beside / "models/mine")
    assert config.student == str(beside / "small")
    assert config.tasks.sources == (JsonlSource(kind="jsonl", path=beside / "rows.jsonl"),)
    assert (config.output_dir, recipe.notes) == (Path("out"), ())


def test_recipe_path_in_the_working_directory_alone_is_used_and_said(here: Path) -> None:
    make(here)
    recipe = load_recipe(recipe_with_data(here))
    assert recipe.config.teacher == str(here / "models/mine")
    assert [note.partition(", ")[0] for note in recipe.notes] == [
        f"tasks.sources.0.path: {here / 'rows.jsonl'}",
        f"teacher: {here / 'models/mine'}",
        f"student: {here / 'small'}",
    ]
    assert all("in the working directory; beside the recipe is no" in n for n in recipe.notes)


def test_recipe_path_in_both_places_is_the_one_beside_it_and_said(here: Path) -> None:
    make(here)
    make(here / "recipes")
    recipe = load_recipe(recipe_with_data(here))
    assert recipe.config.teacher == str(here / "recipes/models/mine")
    assert len(recipe.notes) == 3
    assert f"{here / 'models/mine'} is not used" in recipe.notes[1]


def test_recipe_paths_that_are_nowhere_are_refused_with_both_places(here: Path) -> None:
    (here / "models").mkdir()
    path = recipe_with_data(here)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    rows, teacher, student = str(refused.value).splitlines()
    assert rows.startswith(
        f"{path}:5: tasks.sources.0.path 'rows.jsonl': neither {here / 'recipes/rows.jsonl'} nor "
        f"{here / 'rows.jsonl'} is there"
    )
    assert f"{path}:1: teacher 'models/mine': neither " in teacher
    assert "if Hugging Face's model is meant" in teacher and "models/mine@main" in teacher
    assert f"{path}:3: student 'small': neither " in student and "Hugging Face id" in student


def test_recipe_id_of_hugging_face_stays_one(here: Path) -> None:
    config = load_config(write(here, PATHS))
    assert config.teacher == "models/mine"
    (here / "models").mkdir()
    assert load_config(write(here, PATHS.replace("mine", "mine@main"))).teacher.endswith("@main")
