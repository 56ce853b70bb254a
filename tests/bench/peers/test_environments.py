"""Which sides there are, and environments of peers that can be had, or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers.environments import (
    ENVIRONMENTS,
    EnvironmentMissingError,
    PeerEnvironment,
    fingerprint,
    last_words,
    prepare,
    worker_variables,
)
from bench.peers.sides import FAMILIES, make_sides
from bundle.errors import UserError
from bundle.manifest import FileEntry, Manifest


def make_manifest() -> Manifest:
    """Only what the sides are made from."""
    weights = FileEntry(sha256="a" * 64, size_bytes=1)
    return Manifest.model_construct(
        files={"student/model.safetensors": weights},
        variants={"int8": None, "int4": None},
        default_variant="int8",
    )


def test_sides_share_the_default_graph(tmp_path: Path) -> None:
    sides = make_sides(tmp_path, make_manifest(), ["int8", "int4"], FAMILIES, tmp_path)
    names = [side.name for side in sides]
    assert names == [
        *("tandem-int8", "tandem-int4", "tandem-torch", "transformers"),
        *("ortmodel-int8", "genai-int8", "vllm", "llamacpp"),
    ]
    paths = {side.options["path"] for side in sides if side.name.endswith("-int8")}
    assert len(paths) == 1


def test_peers_can_be_chosen_and_unknown_names_are_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    sides = make_sides(tmp_path, manifest, ["int8"], ["vllm"], tmp_path)
    assert [side.name for side in sides] == ["tandem-int8", "tandem-torch", "vllm"]
    with pytest.raises(UserError, match="'int3' is none of int8, int4"):
        make_sides(tmp_path, manifest, ["int3"], [], tmp_path)
    with pytest.raises(UserError, match="'vlm' is none of transformers"):
        make_sides(tmp_path, manifest, ["int8"], ["vlm"], tmp_path)


def test_an_environment_that_cannot_be_installed_says_why(tmp_path: Path) -> None:
    environment = PeerEnvironment("none", ("./no-such-folder",))
    with pytest.raises(EnvironmentMissingError, match=r"none: ERROR: .*no-such-folder"):
        prepare(environment, tmp_path)
    assert not (tmp_path / "none" / "installed.json").exists()


def test_an_installation_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.environments.INSTALL_TIMEOUT_S", 0.0)
    with pytest.raises(EnvironmentMissingError, match="not installed within 0 s"):
        prepare(PeerEnvironment("none", ("x",)), tmp_path)


def test_an_installed_environment_is_used_as_it_is(tmp_path: Path) -> None:
    environment = PeerEnvironment("empty", ())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "installed.json").write_text(fingerprint(environment))
    assert prepare(environment, tmp_path) == tmp_path / "empty" / "bin" / "python"


def test_a_preloaded_library_is_the_environments_own(tmp_path: Path) -> None:
    preload = worker_variables(ENVIRONMENTS["vllm"], tmp_path)["LD_PRELOAD"]
    assert preload == str(tmp_path / "vllm" / "lib" / "libiomp5.so")
    assert worker_variables(ENVIRONMENTS["genai"], tmp_path) == {}


@pytest.mark.parametrize(
    ("log", "words"),
    [("\n\n", "a.log is empty"), ("one\ntwo\n", "two"), ("ERROR: one\nHint\n", "ERROR: one")],
)
def test_last_words_of_a_log(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / "a.log").write_text(log)
    assert last_words(tmp_path / "a.log") == words
