"""What files beside tokenizer.json say of a tokenizer: as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from bundle.errors import UserError
from serve.text import tokenizer as tokenization
from serve.text.tokenizer_files import open_tokenizer, read_tokenizer

Json = dict[str, Any]
SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<|im_end|>", "<pad>", "<bos>", "<eos>"]
RAW_TEXTS = ["Hi", " a <s>b</s> <|im_end|>", "<new> </think><more>", ""]
# What the template of the tests tells about the names that it may use.
TEMPLATE = (
    "{% for token in [bos_token, eos_token, unk_token, sep_token, pad_token, image_token] %}"
    "{{ token if token is defined else '-' }} {% endfor %}"
    "{{ additional_special_tokens | tojson if additional_special_tokens is defined }}"
)


def save(folder: Path, config: Json, others: dict[str, Json]) -> Path:
    """Write a tokenizer of bytes with special tokens, and the files beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens([t for t in SPECIAL if t != "<eos>"])
    raw.add_tokens([AddedToken("</think>", normalized=False)])
    raw.post_processor = processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 5)])
    raw.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_config.json": {"chat_template": TEMPLATE} | config} | others
    for name, value in ({"config.json": {"model_type": "smollm3"}} | named).items():
        (folder / name).write_text(json.dumps(value))
    return folder


def added(content: str, **flags: bool) -> Json:
    known = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **known, **flags}


@pytest.mark.parametrize(
    ("config", "others"),
    [
        ({}, {}),
        ({"bos_token": added("<s>"), "eos_token": added("</s>", normalized=True)}, {}),
        ({"bos_token": added("<s>", rstrip=True), "pad_token": None, "eos_token": "</s>"}, {}),
        ({"bos_token": "<new>", "sep_token": added("<more>", lstrip=True)}, {}),
        ({"eos_token": "</think>", "bos_token": "<eos>"}, {}),
        ({"additional_special_tokens": ["<new>", added("</think>")], "pad_token": "<s>"}, {}),
        ({"additional_special_tokens": None, "extra_special_tokens": {"image_token": "<s>"}}, {}),
        ({"split_special_tokens": True}, {}),
        ({"add_prefix_space": True}, {}),
        (
            {
                "eos_token": "</s>",
                "added_tokens_decoder": {
                    "2": added("</s>", normalized=True, special=True),
                    "9": added("<new>"),
                    "264": added("</think>", lstrip=True),
                },
            },
            {"special_tokens_map.json": {"eos_token": "<s>"}},
        ),
        (
            {"eos_token": "</s>", "additional_special_tokens": ["<s>"]},
            {
                "special_tokens_map.json": {
                    "eos_token": {"content": "<s>", "rstrip": True, "normalized": False},
                    "additional_special_tokens": ["<|im_end|>", "<s>"],
                },
                "added_tokens.json": {"<new>": 265, "<|im_end|>": 266, "</think>": 264},
            },
        ),
        ({}, {"config.json": {"model_type": "llama"}}),
        ({"eos_token": None}, {"config.json": {"model_type": "mistral"}}),
        ({}, {"config.json": {"model_type": "qwen2"}}),
        ({}, {"config.json": {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}}),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": added("<bos>")}, {}),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}, {}),
        ({"tokenizer_class": "GemmaTokenizer"}, {}),
        ({"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}, {}),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, {}),
    ],
)
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, config: Json, others: dict[str, Json]
) -> None:
    save(tmp_path, config, others)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenization.Tokenizer.load(tmp_path)
    turn = [{"role": "user", "content": ""}]
    assert ours.render_chat([("user", "")]) == reference.apply_chat_template(turn, tokenize=False)
    tokens = read_tokenizer(tmp_path).tokenizer.get_added_tokens_decoder()
    assert {i: repr(t) for i, t in tokens.items()} == {
        i: repr(t) for i, t in reference.added_tokens_decoder.items()
    }
    for text in RAW_TEXTS:
        assert ours.encode(text) == tuple(reference(text).input_ids), text


def test_prompt_keeps_a_bos_that_is_an_object(tmp_path: Path) -> None:
    """As in DeepSeek-R1's distilled models: without it every prompt lacks the first token."""
    save(tmp_path, {"bos_token": added("<s>"), "chat_template": "{{ bos_token }}x"}, {})
    ids = tokenization.Tokenizer.load(tmp_path).encode_chat([("user", "")])
    assert (ids[0], len(ids)) == (SPECIAL.index("<s>"), 2)


@pytest.mark.parametrize(
    ("version_5", "version_4"),
    [
        ({"extra_special_tokens": ["<new>"]}, {"additional_special_tokens": ["<new>"]}),
        (
            {"model_specific_special_tokens": {"image_token": "<s>"}},
            {"extra_special_tokens": {"image_token": "<s>"}},
        ),
        (
            {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
    ],
)
def test_spelling_of_transformers_5_is_read(
    tmp_path: Path, version_5: Json, version_4: Json
) -> None:
    folders = [tmp_path / "5", tmp_path / "4"]
    for folder, config in zip(folders, (version_5, version_4), strict=True):
        folder.mkdir()
        save(folder, config | {"eos_token": "</s>"}, {})
    ours, theirs = map(tokenization.Tokenizer.load, folders)
    reference = AutoTokenizer.from_pretrained(folders[1])
    turn = [{"role": "user", "content": ""}]
    text = reference.apply_chat_template(turn, tokenize=False)
    assert ours.render_chat([("user", "")]) == theirs.render_chat([("user", "")]) == text
    assert ours.hash == theirs.hash


def test_defaults_that_the_vocabulary_lacks_are_no_tokens(tmp_path: Path) -> None:
    """transformers appends them; a model has no row for them."""
    save(tmp_path, {"tokenizer_class": "CohereTokenizer"}, {})
    files = read_tokenizer(tmp_path)
    assert files.special_tokens == {}
    assert files.tokenizer.get_vocab() == open_tokenizer(tmp_path / "tokenizer.json").get_vocab()


# --- truncation and padding


@pytest.mark.parametrize("setting", ["truncation", "padding", "both"])
def test_texts_are_neither_cut_nor_padded(tmp_path: Path, setting: str) -> None:
    """A trainer saves its own: prompts were cut to 32 tokens, or got 256 pads in front."""
    path = save(tmp_path, {}, {}) / "tokenizer.json"
    text = "x" * 40
    expected = tokenization.Tokenizer.load(tmp_path).encode(text)
    raw = Tokenizer.from_file(str(path))
    if setting != "padding":
        raw.enable_truncation(32)
    if setting != "truncation":
        raw.enable_padding(direction="left", length=256, pad_token="<pad>", pad_id=5)
    raw.save(str(path))
    assert tokenization.Tokenizer.load(tmp_path).encode(text) == expected
    assert len(expected) == 41
    assert len(open_tokenizer(path).encode(text).ids) == 41


# --- chat templates


def render(folder: Path, **variables: Any) -> str:
    return tokenization.Tokenizer.load(folder).render_chat([("user", "")], variables)


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]


def test_default_of_a_list_is_rendered_and_tools_by_their_own(tmp_path: Path) -> None:
    save(tmp_path, {"chat_template": NAMED}, {})
    assert (render(tmp_path), render(tmp_path, tools=[])) == ("listed", "tools")


def test_template_files_come_before_the_configuration(tmp_path: Path) -> None:
    save(tmp_path, {"chat_template": None}, {"chat_template.json": {"chat_template": "json"}})
    assert render(tmp_path) == "json"
    save(tmp_path, {"chat_template": NAMED}, {})
    assert render(tmp_path) == "listed"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert (render(tmp_path), render(tmp_path, tools=[])) == ("file", "file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert (render(tmp_path), render(tmp_path, tools=[])) == ("file", "more")


# --- faults


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is damaged: EOF"),
        ("tokenizer.json", "\udcff", "tokenizer.json cannot be read: 'utf-8'"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("config.json", "[" * 10**5, "config.json is nested too deeply"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token must be a text, or an object .*: 5"),
        ("tokenizer_config.json", {"eos_token": {"lstrip": True}}, "eos_token must be a text, or"),
        ("tokenizer_config.json", {"eos_token": added("a", lstrip=1)}, "eos_token must be a text"),  # type: ignore[arg-type]
        ("tokenizer_config.json", {"extra_special_tokens": 1}, "extra special tokens must be"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added tokens must be an"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 7}}, "1 must be a text, or an"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template must be a text, or a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "chat_template must be a te"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizer", "bos_token": None},
            "add_bos_token without a bos_token",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": [], "template": ""}]},
            "chat_template must be a text, or a list",
        ),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizer", "bos_token": "a:b"},
            r"\['a:b', '\$A'\] cannot be put around a text",
        ),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": ["a" * i for i in range(1, 2000)]},
            "maximum recursion depth",
        ),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": [chr(0x4E00 + i) for i in range(6000)]},
            "special tokens begin with 60.. different characters",
        ),
        ("chat_template.jinja", "a\n{% if %}", "does not compile in line 2: Expected an expr"),
        ("chat_template.jinja", "{{ 1 | no_filter }}", "does not compile in line 1: No filter"),
    ],
)
def test_fault_of_a_file_is_told_in_one_line(
    tmp_path: Path, name: str, text: str | Json, message: str
) -> None:
    save(tmp_path, {}, {})
    text = text if isinstance(text, str) else json.dumps(text)
    (tmp_path / name).write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(UserError, match=message) as caught:
        tokenization.Tokenizer.load(tmp_path)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


def test_panic_of_the_library_is_told(tmp_path: Path) -> None:
    path = save(tmp_path, {}, {}) / "tokenizer.json"
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: Precompiled"):
        tokenization.Tokenizer.load(tmp_path)


def test_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        tokenization.Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja"]
)
def test_link_out_of_the_folder_is_not_read(tmp_path: Path, name: str) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    (folder / "additional_chat_templates").mkdir(parents=True)
    save(folder, {}, {})
    (folder / name).unlink(missing_ok=True)
    secret.touch()
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match="is a link that leads out of the model's folder"):
        tokenization.Tokenizer.load(folder)
