from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.run.usage import PeakMemory, folder_size_bytes, resident_bytes

SIZE_BYTES = 200_000_000


def test_peak_memory_holds_an_allocation_that_is_gone() -> None:
    memory, before_bytes = PeakMemory(), resident_bytes()
    np.ones(SIZE_BYTES, dtype=np.uint8).sum()
    assert resident_bytes() < before_bytes + SIZE_BYTES / 2
    assert memory.read_bytes() > before_bytes + 0.9 * SIZE_BYTES


def test_peak_memory_holds_what_a_child_used() -> None:
    memory = PeakMemory()
    # More than any child of the tests before: the system keeps the largest one's alone.
    others_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    size_bytes = max(memory.read_bytes(), others_bytes) + SIZE_BYTES
    subprocess.run([sys.executable, "-c", f"b'x' * {size_bytes}"], check=True)
    assert memory.read_bytes() >= 0.9 * size_bytes


@pytest.mark.parametrize("name", ["clear_refs", "nothing"])
def test_peak_memory_that_cannot_be_reset_is_that_of_the_process(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()  # a folder cannot be written
    assert PeakMemory(tmp_path).read_bytes() > 2**20


def test_folder_size_counts_files_of_all_depths(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"x" * 3)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 4)
    assert folder_size_bytes(tmp_path) == 7
