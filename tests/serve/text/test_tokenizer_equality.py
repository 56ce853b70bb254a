import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from serve.text.tokenizer_equality import tokenizer_difference

State = dict[str, Any]


def save(folder: Path, change: Callable[[State], object], config: State) -> Path:
    """Write a tokenizer of bytes with two merges, changed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab", "abc", "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(["<s>", "</s>"])
    state = json.loads(raw.to_str())
    change(state)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reorder(state: State) -> None:
    state["model"]["vocab"] = dict(reversed(state["model"]["vocab"].items()))


def spell_merges_as_texts(state: State) -> None:
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]


def cut(state: State) -> None:
    state["truncation"] = {"max_length": 32, "strategy": "LongestFirst", "stride": 0}
    state["truncation"]["direction"] = "Right"


def pad(state: State) -> None:
    state["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    state["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}


def rename(state: State) -> None:
    state["model"]["vocab"]["zz"] = state["model"]["vocab"].pop("!")


def strip(state: State) -> None:
    state["added_tokens"][0]["rstrip"] = True


@pytest.mark.parametrize(
    "change",
    [
        reorder,
        spell_merges_as_texts,
        cut,
        pad,
        lambda state: state["added_tokens"].reverse(),
        lambda state: state["pre_tokenizer"].update(trim_offsets=False),
        lambda state: state["model"].pop("ignore_merges"),
    ],
)
def test_other_spelling_is_the_same_tokenizer(
    tmp_path: Path, change: Callable[[State], object]
) -> None:
    first = save(tmp_path / "first", lambda _: None, {})
    assert tokenizer_difference(first, save(tmp_path / "second", change, {})) is None


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (rename, "vocabulary ('!' is 0 and missing)"),
        (lambda state: state["model"]["merges"].reverse(), "merges"),
        (lambda state: state["model"].update(ignore_merges=True), "model"),
        (lambda state: state.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda state: state["pre_tokenizer"].update(use_regex=False), "pre tokenizer"),
        (strip, "added tokens"),
    ],
)
def test_difference_is_named(tmp_path: Path, change: Callable[[State], object], part: str) -> None:
    first = save(tmp_path / "first", lambda _: None, {})
    assert tokenizer_difference(first, save(tmp_path / "second", change, {})) == part


def test_token_that_only_the_configuration_adds_makes_no_difference(tmp_path: Path) -> None:
    first = save(tmp_path / "first", lambda _: None, {"pad_token": "[PAD]"})
    assert tokenizer_difference(first, save(tmp_path / "second", lambda _: None, {})) is None


def test_flags_that_the_configuration_states_count(tmp_path: Path) -> None:
    token = {"content": "<s>", "rstrip": True, "normalized": False, "special": True}
    first = save(tmp_path / "first", lambda _: None, {"added_tokens_decoder": {"258": token}})
    assert tokenizer_difference(first, save(tmp_path / "second", strip, {})) is None
