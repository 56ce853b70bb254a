from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.run.errors import ExportError
from export.run.settings import CacheConfig
from export.student.logits_cache import (
    INDEX_NAME,
    LogitsCache,
    check_top_k,
    decode,
    encode,
    estimate_bytes,
    hash_examples,
    write_logits_cache,
)
from export.student.losses import (
    DistillationLoss,
    RandomTargets,
    SparseTargets,
    Targets,
    forward_kl,
)
from export.teacher.examples import Example, collate
from serve.text.real_tokens import RealTokens
from tests.support.random_models import random_examples, random_model

VOCAB_SIZE = 97
DENSE = CacheConfig(kind="dense")
TOP_K = CacheConfig(kind="top_k", top_k=8)
RANDOM = CacheConfig(kind="random_sampling", num_draws=16)
KINDS = [DENSE, TOP_K, RANDOM]
LENGTHS = [(4, 6), (5, 9), (3, 1), (8, 4), (2, 12)]
EXAMPLES = random_examples(LENGTHS)
REVERSED = EXAMPLES[::-1]
HASHES = [hash_examples(EXAMPLES), hash_examples(REVERSED)]
TEACHER = random_model("llama", num_layers=2)
STUDENT = random_model("llama", num_layers=1, seed=1)


def write(
    folder: Path, teacher: Any, examples: list[Example], config: CacheConfig, **changes: Any
) -> LogitsCache:
    """Two examples fit a shard, or one long one."""
    max_shard_bytes = estimate_bytes(15, VOCAB_SIZE, config)
    settings = {"teacher_sha256": "t" * 64, "max_shard_bytes": max_shard_bytes} | changes
    return write_logits_cache(folder, teacher, examples, config, **settings)


def completion_logits(model: Any, batch: list[Example]) -> torch.Tensor:
    input_ids, positions, _ = collate(batch)
    logits: torch.Tensor = model(input_ids).logits.flatten(0, 1)[positions]
    return logits


def soft_kl(student_logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    loss = DistillationLoss(alpha=1.0, temperature=1.0)
    labels = torch.zeros(len(student_logits), dtype=torch.long)
    return loss(student_logits, targets, labels).soft


def file_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what comes back


def test_dense_cache_holds_the_teachers_logits(tmp_path: Path) -> None:
    """To float16: 2⁻¹¹ of the distance to the largest logit, which is up to 30 here."""
    cache = write(tmp_path, TEACHER, EXAMPLES, DENSE)
    batch = [EXAMPLES[3], EXAMPLES[0], EXAMPLES[4]]
    targets = cache.targets(batch)
    assert isinstance(targets, torch.Tensor)
    with torch.inference_mode():
        live = completion_logits(TEACHER, batch)
    live = live - live.amax(-1, keepdim=True)
    torch.testing.assert_close(targets.float(), live, rtol=2**-11, atol=1e-4)


def test_top_k_cache_gives_a_kl_between_0_and_the_full_one(tmp_path: Path) -> None:
    targets = write(tmp_path, TEACHER, EXAMPLES, TOP_K).targets(EXAMPLES)
    assert isinstance(targets, SparseTargets)
    with torch.inference_mode():
        ours, live = completion_logits(STUDENT, EXAMPLES), completion_logits(TEACHER, EXAMPLES)
    bucketed = torch.stack(
        [soft_kl(o, t) for o, t in zip(ours.split(1), targets.split(1), strict=True)]
    )
    full = forward_kl(ours, live)
    assert bucketed.min() >= 0
    assert (bucketed <= full * 1.001 + 1e-3).all()  # float16 log-probabilities
    assert bucketed.sum() > 0.5 * full.sum()
    listed, token_ids = live.log_softmax(-1).topk(8)
    assert targets.token_ids.equal(token_ids)
    torch.testing.assert_close(targets.logprobs, listed, rtol=1e-3, atol=2e-3)


def test_decoded_top_k_is_a_distribution_again() -> None:
    logits = 5 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    targets = decode(encode(logits, TOP_K, torch.Generator()))
    assert isinstance(targets, SparseTargets) and targets.tail_logprob is not None
    mass = targets.logprobs.exp().sum(-1) + targets.tail_logprob.exp()
    torch.testing.assert_close(mass, torch.ones(50), rtol=1e-6, atol=0)
    assert soft_kl(logits, targets) >= 0


def test_encoded_draws_follow_the_teacher_and_their_loss_is_the_full_kl() -> None:
    """20,000 draws: shares within 5 standard errors, the KL within 5 of the estimate's."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 12, generator=generator).mul(2)
    config = CacheConfig(kind="random_sampling", num_draws=20_000)
    targets = decode(encode(teacher, config, generator))
    assert isinstance(targets, RandomTargets)
    p, log_q = teacher.softmax(-1)[0], student.log_softmax(-1)[0]
    shares = targets.token_ids[0].bincount(minlength=12) / 20_000
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-6).all()
    spread = float(((p * log_q**2).sum() - (p * log_q).sum() ** 2).sqrt())
    expected = float(forward_kl(student, teacher))
    assert float(soft_kl(student, targets)) == pytest.approx(expected, abs=5 * spread / 20_000**0.5)


def test_cached_draws_repeat_for_a_seed_and_differ_by_it(tmp_path: Path) -> None:
    def draws(name: str, **changes: Any) -> torch.Tensor:
        config = RANDOM.model_copy(update=changes)
        targets = write(tmp_path / name, TEACHER, EXAMPLES, config).targets([EXAMPLES[1]])
        assert isinstance(targets, RandomTargets)
        return targets.token_ids

    assert draws("one").equal(draws("same"))
    assert not draws("one").equal(draws("other", seed=1))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_targets_of_a_batch_are_those_of_its_examples(tmp_path: Path, config: CacheConfig) -> None:
    cache = write(tmp_path, TEACHER, EXAMPLES, config)
    batch = [EXAMPLES[4], EXAMPLES[2], EXAMPLES[0]]
    with torch.inference_mode():
        whole = soft_kl(completion_logits(STUDENT, batch), cache.targets(batch))
        parts = [soft_kl(completion_logits(STUDENT, [e]), cache.targets([e])) for e in batch]
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_cache_keeps_no_rows_without_tokens(tmp_path: Path, config: CacheConfig) -> None:
    real_tokens = RealTokens(50, missing_ids=(7, 30))
    loud = copy.deepcopy(TEACHER)
    with torch.no_grad():
        loud.lm_head.weight[[7, 30, *range(50, VOCAB_SIZE)]] *= 20
    cache = write(tmp_path, loud, EXAMPLES, config, real_tokens=real_tokens)
    targets = cache.targets(EXAMPLES)
    if isinstance(targets, torch.Tensor):
        assert targets.shape[1] == 50
    else:
        assert targets.token_ids.max() < 50 and not {7, 30} & set(targets.token_ids.unique())
    with torch.inference_mode():
        live = completion_logits(loud, EXAMPLES)
    loss = DistillationLoss(1.0, 1.0, real_tokens=real_tokens)
    kl = loss(live, targets, torch.zeros(len(live), dtype=torch.long)).soft / len(live)
    assert abs(float(kl)) < (1.0 if config is RANDOM else 1e-4)


# --- shards


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_estimated_bytes_are_the_size_of_all_tensors(tmp_path: Path, config: CacheConfig) -> None:
    cache = write(tmp_path, TEACHER, EXAMPLES, config)
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert len(shards) == len(cache.index.shard_starts) == 3
    num_tokens = sum(len(example.completion_token_ids) for example in EXAMPLES)
    size = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
    assert size == estimate_bytes(num_tokens, VOCAB_SIZE, config)
    assert size < cache.size_bytes < size + 4096


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_cache_killed_while_written_keeps_its_shards_and_ends_in_the_same_bytes(
    tmp_path: Path, config: CacheConfig
) -> None:
    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        raise KilledError

    write(tmp_path / "whole", TEACHER, EXAMPLES, config)
    killed = tmp_path / "killed"
    with pytest.raises(KilledError):
        write(killed, TEACHER, EXAMPLES, config, progress=kill)
    (killed / "shard-00001.safetensors.partial").write_bytes(b"half a shard")
    (finished,) = killed.glob("*.safetensors")
    inode = finished.stat().st_ino
    # A later version may cut shards elsewhere: the begun cache goes on as it began.
    write(killed, TEACHER, EXAMPLES, config, max_shard_bytes=1)
    assert finished.stat().st_ino == inode
    assert file_contents(killed) == file_contents(tmp_path / "whole")


def test_cache_that_is_finished_is_opened_without_the_teacher(tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    written = write(
        tmp_path, TEACHER, EXAMPLES, TOP_K, progress=lambda *counts: shown.append(counts)
    )
    opened = LogitsCache.open(tmp_path, EXAMPLES, "t" * 64)
    assert opened.index == written.index
    assert shown == [(2, 5), (4, 5), (5, 5)]


def test_shard_overfilled_by_one_example_is_written_all_the_same(tmp_path: Path) -> None:
    cache = write(tmp_path, TEACHER, EXAMPLES, DENSE, max_shard_bytes=1)
    assert cache.index.shard_starts == (0, 1, 2, 3, 4)
    assert [len(cache.targets([e])) for e in EXAMPLES] == [c for _, c in LENGTHS]  # type: ignore[arg-type]


# --- what is refused


@pytest.mark.parametrize(
    ("examples", "teacher_sha256", "expected"),
    [
        (REVERSED, "t" * 64, "examples: sha256 {}, not {}".format(*HASHES)),
        (EXAMPLES, "u" * 64, f"teacher: sha256 {'t' * 64}, not {'u' * 64}"),
    ],
)
def test_cache_of_other_examples_or_teacher_is_refused_with_both_hashes(
    tmp_path: Path, examples: list[Example], teacher_sha256: str, expected: str
) -> None:
    write(tmp_path, TEACHER, EXAMPLES, TOP_K)
    with pytest.raises(ExportError, match=f"other {expected}"):
        LogitsCache.open(tmp_path, examples, teacher_sha256)
    with pytest.raises(ExportError, match=f"other {expected}"):
        write(tmp_path, TEACHER, examples, TOP_K, teacher_sha256=teacher_sha256)


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (TOP_K.model_copy(update={"top_k": 9}), {}, r"top_k=8.* than .*top_k=9"),
        (TOP_K, {"real_tokens": RealTokens(50)}, r"over 97 tokens, than .* over 50 tokens"),
    ],
)
def test_cache_of_other_settings_is_refused_with_both(
    tmp_path: Path, config: CacheConfig, changes: dict[str, Any], expected: str
) -> None:
    write(tmp_path, TEACHER, EXAMPLES, TOP_K)
    with pytest.raises(ExportError, match=expected):
        write(tmp_path, TEACHER, EXAMPLES, config, **changes)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "shard-00001.safetensors").unlink(), "lacks 1 of 3 shards"),
        (lambda folder: (folder / INDEX_NAME).unlink(), f"no logits cache: {INDEX_NAME} is missi"),
        (lambda folder: (folder / INDEX_NAME).write_text('{"version": 2}'), "another version or d"),
        (lambda folder: (folder / INDEX_NAME).write_text("{"), "another version or damaged"),
    ],
)
def test_cache_that_is_damaged_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    write(tmp_path, TEACHER, EXAMPLES, TOP_K)
    damage(tmp_path)
    with pytest.raises(ExportError, match=expected):
        LogitsCache.open(tmp_path, EXAMPLES, "t" * 64)


def test_targets_of_an_example_that_was_not_cached_are_refused(tmp_path: Path) -> None:
    cache = write(tmp_path, TEACHER, EXAMPLES[:2], TOP_K)
    with pytest.raises(ExportError, match=r"example of 12 tokens is not in the cache"):
        cache.targets([EXAMPLES[3]])


@pytest.mark.parametrize("top_k", [97, 98])
def test_top_k_that_leaves_no_tail_is_refused(tmp_path: Path, top_k: int) -> None:
    with pytest.raises(ExportError, match=rf"cache.top_k {top_k} is not less than the 97 tokens"):
        write(tmp_path / "new", TEACHER, EXAMPLES, TOP_K.model_copy(update={"top_k": top_k}))
    assert not (tmp_path / "new").exists()
    check_top_k(TOP_K.model_copy(update={"top_k": 96}), 97)
