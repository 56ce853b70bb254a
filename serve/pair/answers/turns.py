"""A lock that tenants take in turns."""

from __future__ import annotations

import asyncio
from collections import deque


class FairLock:
    """A lock that goes from tenant to tenant, and within a tenant to the longest wait.

    So a tenant waits for one holder of each other tenant, however many of theirs wait. Lives on one
    asyncio loop.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._holder = ""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next tenant first

    def num_waiting(self, tenant: str) -> int:
        return len(self._waiting.get(tenant, ()))

    async def acquire(self, tenant: str) -> None:
        """Wait for the turn; a caller that is cancelled has none."""
        if not self._is_taken:
            self._is_taken, self._holder = True, tenant
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant, turn)
            else:  # the turn came in the same moment
                self.release()
            raise

    def release(self) -> None:
        """Let the next one have it, of the holder's tenant only when no other tenant waits."""
        if self._holder in self._waiting:
            self._waiting[self._holder] = self._waiting.pop(self._holder)
        while self._waiting:
            self._holder = next(iter(self._waiting))
            turn = self._waiting[self._holder].popleft()
            if not self._waiting[self._holder]:
                del self._waiting[self._holder]
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(tenant, deque())
        if turn in turns:  # unless `release` has passed over it already
            turns.remove(turn)
            if not turns:
                del self._waiting[tenant]
