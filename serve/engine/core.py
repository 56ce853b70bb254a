"""One model's work, step by step: schedule, run, sample, tell. One thread at a time; no locks."""

from __future__ import annotations

from serve.engine.mail import Inbox, Outbox
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Decode, FinishReason, Score
from serve.engine.stats import StepStats

# So many failed steps in a row end an engine: what a device has lost, no later step finds again.
MAX_FAILED_STEPS = 3
FAILED = "the engine failed; see the server's log"


class EngineCore:
    """Takes commands from `inbox`, and has `runner` do what `scheduler` decides."""

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        scheduler: Scheduler,
        runner: ModelRunner,
        stats: StepStats,
    ) -> None:
        self.inbox = inbox
        self.scheduler = scheduler
        self.runner = runner
        self.num_unaccounted = 0
        self._outbox = outbox
        self.stats = stats
        self._num_failed_steps = 0

    def step(self) -> None:
        """Decode, then run one prefill or scoring pass; take commands before, between and behind.

        The tokens of the decode step are on their way before the pass begins.
        """
        with self.runner.watchdog.step():
            self._settle()
            for work in self.scheduler.schedule():
                result = self.runner.run(work)
                self.scheduler.update(work, result)
                self.runner.move_rows(self.scheduler.take_moves())
                self.stats.on_step(work, result, self.runner.clock())
                if isinstance(work, (Decode, Score)) and result.out_of_memory is None:
                    self._num_failed_steps = 0
                self._settle()
            self._balance()
            if not self.scheduler.has_work:
                self.runner.sampler.forget()

    def _settle(self) -> None:
        """Take commands, end what is cancelled or expired, and tell of all that happened.

        Who came during a pass need not wait for another one, and what expired in it must not reach
        the model.
        """
        self.inbox.run()
        self.scheduler.end_due()
        self.runner.move_rows(self.scheduler.take_moves())
        self._outbox.flush(self.inbox)

    def recover(self) -> bool:
        """After a failed step end everything in flight; say whether new work may succeed."""
        self._num_failed_steps += 1
        self.runner.distrust_rows()
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            return False
        self.end_all(FinishReason.ERROR, FAILED)
        return True

    def end_all(self, reason: FinishReason, error: str) -> None:
        """End everything in flight."""
        self.scheduler.end_all(reason, error)
        self._outbox.flush(self.inbox)
        self._balance()

    def _balance(self) -> None:
        """Compare the ledger with what is there."""
        self.num_unaccounted = self.inbox.num_inside - self.scheduler.num_here
