"""A recipe's file: its settings, the line of each, and the files that its relative paths mean.

What a run reads (teacher, student, data) lies relative to the recipe's folder. A path that is only
in the working directory is taken from there, and that is said. What a run writes (`output_dir`,
`cache_dir`) lies relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bundle.yaml_file import YamlDocument, YamlError, parse_yaml
from export.run.errors import ConfigError, ContradictionError, Fault
from export.run.model_specs import ALLOWED_SPECS, is_hub_id, is_wheel
from export.run.settings import ExportConfig, JsonlSource


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a file. `notes` are lines for people: what was taken from where."""

    path: Path
    config: ExportConfig
    notes: tuple[str, ...] = ()
    _document: YamlDocument | None = field(default=None, repr=False)

    def place(self, key: str) -> str:
        """Return file, line and the dotted key: "recipe.yaml:12: onnx.max_model_len"."""
        assert self._document is not None
        return f"{self.path}:{self._document.line_of(_keys(key))}: {key}"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. ConfigError has a line for each fault, with the number of the recipe's."""
    document = _read(path)
    try:
        config = ExportConfig.model_validate(document.value)
    except ValidationError as error:
        found = _without_echoes(error.errors(include_url=False))
        lines = [line for each in found for line in _explain(each, document, path)]
        raise ConfigError("\n".join(lines)) from None
    folder = path.absolute().parent
    located = _Locator(folder)
    config = located.locate(config)
    recipe = Recipe(path, config, tuple(located.notes), document)
    if located.faults:
        raise ConfigError("\n".join(f"{recipe.place(key)} {text}" for key, text in located.faults))
    return recipe


def load_config(path: Path) -> ExportConfig:
    """Return the settings of a recipe; see `load_recipe`."""
    return load_recipe(path).config


def _read(path: Path) -> YamlDocument:
    try:
        document = parse_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except YamlError as error:
        lines = [f"{path}:{line}: not YAML: {text}" for line, text in error.faults]
        raise ConfigError("\n".join(lines)) from None
    if not isinstance(document.value, dict):
        held = "is empty" if document.value is None else "holds no sections by their names"
        raise ConfigError(f"{path}: the file {held}: a recipe has at least teacher and output_dir")
    return document


def _without_echoes(errors: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Leave out that a list is too short where what it lacks are items that are wrong."""
    places = [error["loc"] for error in errors]
    for error in errors:
        size = len(error["loc"])
        is_echo = any(len(p) > size and p[:size] == error["loc"] for p in places)
        if not (error["type"] == "too_short" and is_echo):
            yield error


def _explain(error: ErrorDetails, document: YamlDocument, path: Path) -> Iterator[str]:
    """Yield a line for each fault that pydantic found at one place."""
    contradiction = error.get("ctx", {}).get("error")
    if isinstance(contradiction, ContradictionError):
        for key, text in contradiction.faults:
            yield f"{path}:{document.line_of(_keys(key))}: {key} {text}"
        return
    keys = document.path_of(error["loc"])
    if error["type"] == "missing":
        keys.append(str(error["loc"][-1]))
    place = f"{path}:{document.line_of(error['loc'])}: {'.'.join(keys)}"
    source, hint = document.source_of(error["loc"]), ""
    if error["type"] == "string_type" and source is not None:
        hint = f": YAML reads {source} as {error['input']!r}, put it in quotes"
    yield f"{place}: {error['msg']}, got {error['input']!r}{hint}"


def _keys(dotted: str) -> Sequence[str | int]:
    return [int(part) if part.isdecimal() else part for part in dotted.split(".")]


class _Locator:
    """Finds what the relative paths of a recipe in `folder` mean."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []
        self.faults: list[Fault] = []

    def locate(self, config: ExportConfig) -> ExportConfig:
        """Return the settings with absolute paths where files are there."""
        sources = tuple(
            source.model_copy(update={"path": self._data(f"tasks.sources.{index}.path", source)})
            if isinstance(source, JsonlSource)
            else source
            for index, source in enumerate(config.tasks.sources)
        )
        changes = {
            "teacher": self._model("teacher", config.teacher),
            "student": self._model("student", config.student) if config.student else None,
            "tasks": config.tasks.model_copy(update={"sources": sources}),
        }
        return config.model_copy(update=changes)

    def _data(self, key: str, source: JsonlSource) -> Path:
        path = _expanded(str(source.path))
        found = self._find(key, path)
        if found is None and not path.is_absolute():
            self._fault(key, path, "")
        return path if found is None else found

    def _model(self, key: str, spec: str) -> str:
        path = _expanded(spec)
        if is_wheel(spec) or path.is_absolute():
            return spec
        found = self._find(key, path)
        if found is not None:
            return str(found)
        if not is_hub_id(spec):
            self._fault(key, path, f": {ALLOWED_SPECS}")
        elif any((folder / path.parts[0]).is_dir() for folder in self._folders):
            name = path.parts[0]
            meant = f"; if Hugging Face's model is meant, beside a folder {name}, give {spec}@main"
            if "@" not in spec:
                self._fault(key, path, meant)
        return spec

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self._folder, Path.cwd()

    def _find(self, key: str, path: Path) -> Path | None:
        """Return the file or folder that a relative path means, None for an absolute path."""
        beside, here = (folder / path for folder in self._folders)
        if path.is_absolute() or not (beside.exists() or here.exists()):
            return None
        if beside.exists():
            if here.exists() and not here.samefile(beside):
                self.notes.append(f"{key}: {beside}, beside the recipe; {here} is not used")
            return beside
        self.notes.append(
            f"{key}: {here}, in the working directory; beside the recipe is no {path}"
        )
        return here

    def _fault(self, key: str, path: Path, more: str) -> None:
        beside, here = (folder / path for folder in self._folders)
        places = f"neither {beside} nor {here} is" if beside != here else f"{here} is not"
        self.faults.append((key, f"{str(path)!r}: {places} there{more}"))


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no home
        return Path(path)
