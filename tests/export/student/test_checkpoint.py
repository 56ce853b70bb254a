from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from export.student.checkpoint import Checkpoints

PLACE = {"phase": 1, "round": 0, "step": 2, "done": 5}
LOG = {"steps": [{"total": 0.1}], "probes": []}


def trained(num_steps: int = 3) -> tuple[dict[str, torch.Tensor], torch.optim.AdamW]:
    """Two tensors that an optimizer has moved, one of them without a gradient so far."""
    torch.manual_seed(num_steps)
    tensors = {name: torch.nn.Parameter(torch.randn(3, 4)) for name in ("a/b.c", "late")}
    optimizer = torch.optim.AdamW(tensors.values(), lr=0.1, fused=True)
    for _ in range(num_steps):
        optimizer.zero_grad()
        tensors["a/b.c"].square().sum().backward()
        optimizer.step()
    return dict(tensors), optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_gives_place_log_tensors_and_optimizer_back_bit_for_bit(tmp_path: Path) -> None:
    tensors, optimizer = trained()
    Checkpoints(tmp_path).save(PLACE, LOG, tensors, optimizer)
    fresh, other = trained(0)
    saved = Checkpoints(tmp_path).load()
    assert saved is not None
    assert (saved.place, saved.log) == (PLACE, LOG)
    Checkpoints(tmp_path).restore(saved, fresh, other)
    assert all(fresh[name].equal(tensor) for name, tensor in tensors.items())
    state, expected = (o.state[t["a/b.c"]] for o, t in ((other, fresh), (optimizer, tensors)))
    assert state.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(state[slot].equal(expected[slot]) for slot in expected)
    assert fresh["late"] not in other.state
    for moved, mover in ((tensors, optimizer), (fresh, other)):
        mover.zero_grad()
        moved["a/b.c"].square().sum().backward()
        mover.step()
    assert fresh["a/b.c"].equal(tensors["a/b.c"])


def test_checkpoint_replaces_the_older_ones(tmp_path: Path) -> None:
    for done in range(12):
        Checkpoints(tmp_path).save({**PLACE, "done": done}, LOG, *trained(1))
    saved = Checkpoints(tmp_path).load()
    assert saved is not None and saved.place["done"] == 11
    assert names(tmp_path) == ["checkpoint-000011"]


@pytest.mark.parametrize("killed_in", ["save_file", "rename", "removal"])
def test_checkpoint_killed_while_saved_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    Checkpoints(tmp_path).save(PLACE, LOG, *trained(1))

    def kill(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_in == "save_file":
            patch.setattr("export.student.checkpoint.save_file", kill)
        elif killed_in == "rename":
            patch.setattr(Path, "replace", kill)
        else:  # the older one half removed
            remove = shutil.rmtree
            patch.setattr(
                shutil,
                "rmtree",
                lambda folder, ignore_errors=False: (
                    remove(folder, ignore_errors)
                    if ignore_errors
                    else kill((folder / "tensors.safetensors").unlink())
                ),
            )
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(tmp_path).save({**PLACE, "done": 6}, LOG, *trained(2))
    saved = Checkpoints(tmp_path).load()
    assert saved is not None
    assert saved.place["done"] == (6 if killed_in == "removal" else 5)
    Checkpoints(tmp_path).restore(saved, *trained(0))
    Checkpoints(tmp_path).save({**PLACE, "done": 7}, LOG, *trained(3))
    assert len(names(tmp_path)) == 1


def test_checkpoint_of_other_tensors_is_not_taken(tmp_path: Path) -> None:
    tensors, optimizer = trained()
    Checkpoints(tmp_path).save(PLACE, LOG, tensors, optimizer)
    saved = Checkpoints(tmp_path).load()
    assert saved is not None
    with pytest.raises(AssertionError, match="late"):
        Checkpoints(tmp_path).restore(saved, {"a/b.c": tensors["a/b.c"]}, optimizer)


def test_checkpoint_is_written_by_the_writer_alone(tmp_path: Path) -> None:
    reader = Checkpoints(tmp_path / "c", is_writer=False)
    reader.save(PLACE, LOG, *trained())
    assert not (tmp_path / "c").exists() and reader.load() is None
    Checkpoints(tmp_path / "c").save(PLACE, LOG, *trained())
    saved = reader.load()
    assert saved is not None and saved.place == PLACE
