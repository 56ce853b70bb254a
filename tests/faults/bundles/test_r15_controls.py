"""R15 fails where the check of a bundle is broken."""

from __future__ import annotations

import pytest

from bundle.manifest import NUM_SEAL_BYTES, load_manifest
from tests.faults.bundles import r15_corrupted
from tests.faults.result import RowResult, Size


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No commands: they would be processes of their own, with the check as it should be."""
    monkeypatch.setattr(r15_corrupted, "NUM_COMMANDS", {Size.CI: 0})
    monkeypatch.setattr(r15_corrupted, "NUM_BUNDLES", {Size.CI: 23})


def served(result: RowResult) -> set[str]:
    return {problem.split()[1] for problem in result.problems if problem.startswith("served")}


def test_bundle_that_is_not_compared_with_its_manifest_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.app.loading.verify_bundle", load_manifest)
    assert {"say_another_hash", "list_one_more"} <= served(r15_corrupted.run(Size.CI))


def test_seal_that_is_not_compared_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    flip = r15_corrupted.flip_a_bit_of_the_manifest
    monkeypatch.setattr(r15_corrupted, "DAMAGES", (flip,) * 20)
    # Most bits of a manifest are a hash's or a key's, and are missed without the seal, too.
    monkeypatch.setitem(r15_corrupted.NUM_BUNDLES, Size.CI, 80)
    monkeypatch.setattr(
        "bundle.manifest.unseal", lambda path, data: data[:-NUM_SEAL_BYTES] + b"\n}"
    )
    assert served(r15_corrupted.run(Size.CI)) == {flip.__name__}


def test_intact_bundle_that_is_refused_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bundle.verify.hash_file", lambda path: "0" * 64)
    assert r15_corrupted.run(Size.CI).problems[0].startswith("the intact bundle was refused")
