"""Rows of keys and values."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from serve.models.kv_cache import KVCache

SHAPE = (3, 2, 5, 4)


@pytest.fixture
def cache() -> KVCache:
    return KVCache(2, SHAPE, torch.float32, torch.device("cpu"))


def test_cache_starts_zeroed_with_one_pair_per_layer(cache: KVCache) -> None:
    assert [t.shape for t in (*cache.keys, *cache.values)] == [SHAPE] * 4
    assert not any(t.any() for t in (*cache.keys, *cache.values))


def test_size_is_that_of_all_tensors(cache: KVCache) -> None:
    assert cache.size_bytes == 2 * 2 * 3 * 2 * 5 * 4 * 4
    assert cache.max_len == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_have_the_asked_dtype_and_can_be_written(dtype: torch.dtype) -> None:
    cache = KVCache(1, SHAPE, dtype, torch.device("cpu"))
    cache.keys[0].fill_(1.5)
    assert cache.keys[0].dtype is dtype
    assert (cache.keys[0] == 1.5).all() and not cache.values[0].any()


def test_copy_takes_the_first_tokens_of_every_layer_and_leaves_the_rest(cache: KVCache) -> None:
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(SHAPE))
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    cache.copy_row(0, 2, 3)
    for tensor, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(tensor[2, :, :3], old[0, :, :3])
        assert torch.equal(tensor[2, :, 3:], old[2, :, 3:])
        assert torch.equal(tensor[:2], old[:2])


def test_what_is_read_can_be_written_elsewhere(cache: KVCache) -> None:
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(SHAPE))
    kv = cache.read(0, 1, 3)
    assert kv.shape == (4, 2, 2, 4)
    cache.keys[0][0] = 0  # what was read is a copy
    cache.write(2, 2, kv)
    assert torch.equal(torch.stack([t[2, :, 2:4] for t in (*cache.keys, *cache.values)]), kv)


def test_untouched_tokens_take_no_memory() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    cache = KVCache(4, (64, 8, 4096, 64), torch.float32, torch.device("cpu"))
    before = resident_bytes()
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, :4] = 1.0
    num_pages = 8 * 64 * 8  # one for the first tokens of each tensor, row and head
    assert cache.size_bytes == 4 << 30
    assert resident_bytes() - before < 2 * num_pages * resource.getpagesize()
