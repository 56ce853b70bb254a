"""Blocks of earlier prompts: what is found, what is forgotten, what is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve.engine.prefix_cache import BLOCK_TOKENS, PrefixCache, TokenizedPrompt, chunk_size
from serve.engine.runner import Prefiller

FULL = 2 * BLOCK_TOKENS


def prompt(length: int, *, salt: str | None = "", first: int = 0) -> TokenizedPrompt:
    return TokenizedPrompt.of((first, *(i % 30 for i in range(1, length))), salt)


@pytest.fixture
def backend(make_backend: Any) -> Any:
    return make_backend(max_model_len=8 * BLOCK_TOKENS)


def fill(backend: Any, cache: PrefixCache, tokens: TokenizedPrompt) -> torch.Tensor:
    [entry] = Prefiller(backend, cache).run_batch(0, [tokens])
    assert entry.logits is not None
    return entry.logits


@pytest.mark.parametrize(
    ("length", "num_blocks"),
    [(1, 0), (BLOCK_TOKENS, 0), (BLOCK_TOKENS + 1, 0), (BLOCK_TOKENS + 2, 1), (FULL + 2, 2)],
)
def test_two_tokens_at_least_stay_behind_the_last_reusable_block(
    length: int, num_blocks: int
) -> None:
    assert len(prompt(length).block_names) == num_blocks


def test_names_depend_on_every_token_before_and_on_the_salt() -> None:
    a, b, c = prompt(300), prompt(300, first=9), prompt(300, salt="other")
    names = [{*tokens.block_names, tokens.whole_name} for tokens in (a, b, c)]
    assert [len(of_one) for of_one in names] == [5, 5, 5]
    assert not names[0] & names[1] and not names[0] & names[2]
    assert prompt(200).block_names[:2] == a.block_names[:2]


def test_whole_prompt_comes_back_with_its_logits(backend: Any) -> None:
    cache = PrefixCache(backend, 1 << 20)
    tokens = prompt(FULL + 9)
    logits = fill(backend, cache, tokens)
    assert cache.count_cached(tokens) == FULL + 9
    num_cached, restored = cache.restore(tokens, 3)
    assert num_cached == FULL + 9 and backend.rows[3] == list(tokens.token_ids)
    assert restored is not None and torch.equal(restored, logits)


def test_prompt_that_begins_alike_gets_the_common_blocks(backend: Any) -> None:
    cache = PrefixCache(backend, 1 << 20)
    fill(backend, cache, prompt(FULL + 9))
    longer = prompt(FULL + 40)
    assert cache.restore(longer, 3) == (FULL, None)
    assert backend.rows[3] == list(longer.token_ids[:FULL])
    assert cache.restore(prompt(FULL, first=9), 3) == (0, None)


@pytest.mark.parametrize("salt", [None, "other"])
def test_other_salts_find_nothing(backend: Any, salt: str | None) -> None:
    cache = PrefixCache(backend, 1 << 20)
    fill(backend, cache, prompt(FULL))
    assert cache.count_cached(prompt(FULL, salt=salt)) == 0


def test_prompt_without_a_salt_is_not_kept(backend: Any) -> None:
    cache = PrefixCache(backend, 1 << 20)
    fill(backend, cache, prompt(FULL, salt=None))
    assert cache.size_bytes == 0


def test_least_recently_used_blocks_go_first_and_ends_before_beginnings(backend: Any) -> None:
    old, used, new = (prompt(FULL + 5, first=first) for first in (1, 2, 3))
    probe = PrefixCache(backend, 1 << 20)
    fill(backend, probe, old)
    cache = PrefixCache(backend, 5 * probe.size_bytes // 2)
    fill(backend, cache, old)
    fill(backend, cache, used)
    cache.restore(old, 3)
    cache.restore(used, 3)
    fill(backend, cache, new)
    assert cache.size_bytes <= 5 * probe.size_bytes // 2
    assert [cache.count_cached(p) for p in (used, new)] == [FULL + 5, FULL + 5]
    assert 0 <= cache.count_cached(old) < FULL + 5


def test_size_is_that_of_what_is_kept_and_never_beyond_the_bound(backend: Any) -> None:
    cache, twice = PrefixCache(backend, 3000), PrefixCache(backend, 1 << 20)
    sizes = []
    for first in range(20):
        fill(backend, cache, prompt(FULL + 5, first=first))
        assert 0 < cache.size_bytes <= 3000
        fill(backend, twice, prompt(FULL + 5, first=first % 2))
        sizes.append(twice.size_bytes)
    assert sizes[2:] == [2 * sizes[0]] * 18
    twice.clear()
    assert twice.size_bytes == twice.count_cached(prompt(FULL + 5)) == 0


def test_nothing_is_kept_without_room(backend: Any) -> None:
    cache = PrefixCache(backend, 0)
    fill(backend, cache, prompt(FULL))
    assert cache.size_bytes == cache.count_cached(prompt(FULL)) == 0


@pytest.mark.parametrize("num_tokens", range(1, 40))
@pytest.mark.parametrize("max_tokens", [3, 4, 16])
def test_chunks_take_all_and_leave_no_lone_token(num_tokens: int, max_tokens: int) -> None:
    sizes, left = [], num_tokens
    while left:
        sizes.append(chunk_size(left, max_tokens))
        left -= sizes[-1]
    assert max(sizes) <= max_tokens and (sizes[-1] > 1 or num_tokens == 1)
