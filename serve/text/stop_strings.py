"""The text of growing completions: released in pieces, and searched for stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from serve.text.tokenizer import Tokenizer

StopCheck = Callable[[list[int]], bool]
"""Says whether the completion so far ends at a stop string (sees all completion token ids)."""

_REPLACEMENT = "\ufffd"


class CompletionText:
    """The text of a growing completion, released in pieces that never have to be taken back.

    Held back are bytes that do not make a character yet, and what may be the beginning of a stop
    string. A stop string counts where it ends within the text that the newest token added.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._max_stop_chars = max(map(len, self._stop), default=0)
        self._token_ids: list[int] = []
        self._window_start = 0  # tokens from here on are decoded together, as context
        self._num_decoded = 0  # tokens before here have their text in _held or were released
        self._held = ""
        self._num_released = 0
        self._stop_start: int | None = None  # in _held

    @property
    def num_chars(self) -> int:
        """Length of the text known so far, what is held back included."""
        return self._num_released + len(self._held)

    @property
    def is_stopped(self) -> bool:
        """Whether the newest token completed a stop string."""
        return self._stop_start is not None

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens and return the text that became certain."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """Return the rest of the text, cut before a stop string that the last token completed."""
        text = self._held
        if self._stop_start is not None:
            text = text[: self._stop_start]
        elif self._num_decoded < len(self._token_ids):
            text += self._window_text(self._num_decoded)
        self._held = ""
        return text

    def _push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        self._stop_start = None
        delta = self._decode_delta()
        text = self._hold_back(delta) if delta and self._stop else delta
        self._num_released += len(text)
        return text

    def _hold_back(self, delta: str) -> str:
        """Return the text up to a stop string, or to what may become one; the rest is held."""
        num_known = len(self._held)
        self._held += delta
        stop_start = self._find_stop(num_known)
        release = self._safe_length() if stop_start is None else stop_start
        text, self._held = self._held[:release], self._held[release:]
        self._stop_start = None if stop_start is None else 0
        return text

    def _decode_delta(self) -> str:
        """Return the text that the tokens since the last call made, '' inside a character.

        The `DecodeStream` of tokenizers is faster by a microsecond per token, but raises where
        byte tokens that make no character change the text of those before them.
        """
        delta = self._window_text(self._num_decoded)
        if delta.endswith(_REPLACEMENT):
            return ""
        if delta:
            self._window_start, self._num_decoded = self._num_decoded, len(self._token_ids)
        return delta

    def _window_text(self, start: int) -> str:
        """Return the text of the tokens from `start` on, decoded behind those of the window."""
        before = self._tokenizer.decode(self._token_ids[self._window_start : start])
        return self._tokenizer.decode(self._token_ids[self._window_start :])[len(before) :]

    def _find_stop(self, num_known: int) -> int | None:
        """Return where the first stop string begins that ends behind `num_known` characters."""
        starts = []
        for stop in self._stop:
            start = self._held.find(stop, max(num_known - len(stop) + 1, 0))
            if start >= 0:
                starts.append(start)
        return min(starts, default=None)

    def _safe_length(self) -> int:
        """Return how much of the held text cannot be part of a stop string that is still coming."""
        for start in range(max(len(self._held) - self._max_stop_chars + 1, 0), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)


class StopChecker:
    """Builds the `StopCheck`s of one request: each follows the text of one completion."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)

    def __call__(self) -> StopCheck:
        text = CompletionText(self._tokenizer, self._stop)
        num_seen = 0

        def ends_at_stop_string(token_ids: list[int]) -> bool:
            nonlocal num_seen
            text.push(token_ids[num_seen:])
            num_seen = len(token_ids)
            return text.is_stopped

        return ends_at_stop_string
