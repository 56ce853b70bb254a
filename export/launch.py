"""`accelerate launch` with exit codes, and on several machines none that waits for a lost one.

    python -m export.launch ARGUMENTS OF accelerate launch -m tandem export run RECIPE

accelerate's own launcher exits with 1 whatever happened, and torch waits for a machine that
vanished until its timeout ends, after days. Here the exit code is that of the process that failed
first, 128 + n after signal n, and 5 when the run was told to stop or another machine was lost:
started again on all machines, it goes on from what is there. The launchers watch each other
(`export.run.peers`) on the port after `--main_process_port`. torchrun's own rendezvous does not
replace that: it drops a lost node from its table, but the other agents ask it for nodes that wait
(`num_nodes_waiting`) alone, and so go on waiting.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from export.run.peers import INTERRUPTED, MachinesMissingError, Node, Peers

# For the other machines to come: one that waits keeps its machine from whoever could use it.
MAX_WAIT_S = 900.0


def launch(arguments: argparse.Namespace) -> int:
    """Run this machine's processes and return the exit code of the first that failed, or 0."""
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
        return exit_code if exit_code > 0 else 128 - exit_code
    return 0


def main(words: Sequence[str]) -> int:
    """Launch, together with the other machines if there are any, and return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    parser = launch_command_parser()
    arguments = parser.parse_args(words)
    try:
        if arguments.num_machines in (None, 1):
            return launch(arguments)
        with Peers.meet(_machine(parser, arguments), _end, MAX_WAIT_S) as peers:
            return peers.agree(launch(arguments))
    except MachinesMissingError as error:
        _say(f"{error}; started again, the run goes on from what is there")
    except SignalException as error:
        _say(f"ended by {error.sigval.name}")
    return INTERRUPTED


def _machine(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Node:
    needed = ("machine_rank", "main_process_ip", "main_process_port")
    missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
    if missing:
        parser.error(f"several machines need {', '.join(missing)}")
    return Node(
        arguments.machine_rank,
        arguments.num_machines,
        arguments.main_process_ip,
        arguments.main_process_port + 1,
    )


def _end_children() -> None:
    """Kill what still runs: torch's launcher forgets the processes that a signal finds starting."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Until torch's launcher has its own handlers, which raise this as well.
    raise SignalException(f"signal {number}", signal.Signals(number))


def _end(loss: str) -> None:
    _say(f"{loss}: this machine ends too; started again, the run goes on from what is there")
    os.kill(os.getpid(), signal.SIGTERM)


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    _end_children()
    sys.exit(exit_code)
