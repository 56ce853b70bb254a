"""The journal of a load test whose client is killed, and that is begun again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from loadtest.ledger.ledger import main
from tests.support.polling import wait_until

ROOT = Path(__file__).parents[2]


def load(target: str, folder: Path, name: str, *words: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "tandem", "loadtest", "run", "--target", target, "--arms", "student",
        "--dataset", "synthetic:3x8", "--arrival", "constant", "--rates", "20", "--warmup", "0",
        "--divergence", "none", "--out", str(folder / name), "--journal", str(folder / "journal"),
    ]  # fmt: skip
    return subprocess.Popen([*command, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def num_ended(journal: Path) -> int:
    return sum(path.read_text().count('"event": "end"') for path in journal.glob("*.jsonl"))


def test_journal_of_killed_client_balances_and_so_it_does_with_another_run_behind(
    serving: Any, make_pair: Any, tmp_path: Path, capsys: Any
) -> None:
    journal = tmp_path / "journal"
    with serving(make_pair(max_model_len=512)) as live:
        killed = load(
            live.server.address, tmp_path, "killed", "--processes", "2", "--duration", "60"
        )
        wait_until(lambda: num_ended(journal) >= 10)
        children = psutil.Process(killed.pid).children()
        next(p for p in children if "spawn_main" in " ".join(p.cmdline())).send_signal(
            signal.SIGKILL
        )
        _, complaint = killed.communicate(timeout=120)
        assert killed.returncode in (3, 4) and "ended with exit code -9" in complaint
        assert main([str(journal), "--may-be-open"]) == 0
        again = load(live.server.address, tmp_path, "again", "--duration", "1")
        again.communicate(timeout=120)
    torn = min(journal.iterdir())
    with torn.open("a") as file:
        file.write('{"id": "x", "event": "se')
    assert len(list(journal.iterdir())) == 3
    assert main([str(journal), "--may-be-open"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": balanced")


def test_journal_that_cannot_be_written_ends_the_run_in_one_line(
    serving: Any, make_pair: Any, tmp_path: Path
) -> None:
    (tmp_path / "journal").write_text("a file")
    with serving(make_pair(max_model_len=512)) as live:
        run = load(live.server.address, tmp_path, "run", "--duration", "1")
        _, complaint = run.communicate(timeout=120)
    assert run.returncode == 1
    assert complaint.splitlines()[-1].endswith("journal: File exists")
