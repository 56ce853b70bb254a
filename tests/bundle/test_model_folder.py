"""The door for model folders: which files are read, and which folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundle.errors import ModelFolderError
from bundle.hashing import hash_file, hash_json, hash_weights
from bundle.model_folder import ModelFolder, open_model_folder
from bundle.token_ids import TokenIds
from tests.support.models.model_folders import TINY, shard, tiny_weights, write_model_folder

NUM_PARAMETERS = 760


def test_folder_says_what_its_files_say(tmp_path: Path) -> None:
    folder = open_model_folder(write_model_folder(tmp_path))
    assert (folder.config.model_type, folder.config.architecture) == ("llama", "LlamaForCausalLM")
    assert folder.token_ids == TokenIds((2,), None, None)
    assert (folder.num_parameters, folder.dtype) == (NUM_PARAMETERS, "F32")
    assert [path.name for path in folder.weights] == ["model.safetensors"]


def test_graph_needs_no_weights_and_its_configuration_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(TINY)))
    folder = open_model_folder(tmp_path, has_weights=False, has_tokenizer=False)
    assert (folder.weights, folder.tensors) == ((), {})


# --- weights


def hash_of(paths: tuple[Path, ...]) -> str:
    return hash_json({path.name: hash_file(path) for path in paths})


def test_shards_are_those_of_the_index_whatever_lies_beside_them(tmp_path: Path) -> None:
    """Mistral's folders hold the same weights again in `consolidated.safetensors`."""
    paths = shard(write_model_folder(tmp_path))
    save_file(tiny_weights(), tmp_path / "consolidated.safetensors")
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")
    folder = open_model_folder(tmp_path)
    assert (folder.weights, folder.num_parameters) == (paths, NUM_PARAMETERS)
    assert hash_weights(tmp_path) == hash_of(paths)


def test_single_file_is_hashed_alone_whatever_lies_beside_it(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    save_file(tiny_weights(), tmp_path / "model.fp16.safetensors")
    assert open_model_folder(tmp_path).num_parameters == NUM_PARAMETERS
    assert hash_weights(tmp_path) == hash_file(tmp_path / "model.safetensors")


def test_folder_without_weights_has_no_hash(tmp_path: Path) -> None:
    save_file(tiny_weights(), tmp_path / "adapter_model.safetensors")
    assert hash_weights(tmp_path) is None


def test_tied_head_and_old_buffers_are_not_counted(tmp_path: Path) -> None:
    config = {**TINY, "tie_word_embeddings": True}
    write_model_folder(tmp_path, config)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    save_file(tiny_weights() | buffer, tmp_path / "model.safetensors")
    assert open_model_folder(tmp_path).num_parameters == NUM_PARAMETERS - 16 * 8


def keep_single(folder: Path) -> None:
    shutil.copy(shard(folder)[0], folder / "model.safetensors")


def index(**weight_map: object) -> Callable[[Path], object]:
    text = json.dumps({"weight_map": weight_map})
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def weights(**changes: np.ndarray | None) -> Callable[[Path], None]:
    """Return what replaces, adds and (None) removes tensors; "__" stands for "."."""

    def change(folder: Path) -> None:
        tensors: dict[str, np.ndarray | None] = dict(load_file(folder / "model.safetensors"))
        tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    return change


def header(text: str, num_data_bytes: int = 4, num_bytes: int | None = None) -> Callable[..., None]:
    """Return what writes a safetensors file of a header, which may be said to be longer."""

    def write(folder: Path) -> None:
        size = len(text) if num_bytes is None else num_bytes
        data = size.to_bytes(8, "little") + text.encode() + bytes(num_data_bytes)
        (folder / "model.safetensors").write_bytes(data)

    return write


def tensor(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0, 4]") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


UP = "model__layers__0__mlp__up_proj__weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shard(f)[1].unlink(), "lacks model-00002-of-00002.safetensors, which .* names"),
        (keep_single, "holds model.safetensors beside the shards"),
        (lambda f: (f / "model.safetensors").rename(f / "w.safetensors"), "lacks model.safeten"),
        (index(), "index.json has no weight_map"),
        (index(a="../outside.safetensors"), "names weights elsewhere: '../outside.safetensors'"),
        (index(a="/outside.safetensors"), "names weights elsewhere: '/outside.safetensors'"),
        (index(a="sub/x.safetensors"), "names weights elsewhere: 'sub/x.safetensors'"),
        (index(a=3), "names weights elsewhere: 3"),
        (index(a="pytorch_model.zip"), "'pytorch_model.zip', which is no safetensors file"),
        (weights(**{UP: None}), "lacks weights, model.layers.0.mlp.up_proj.weight first: they wou"),
        (weights(**{UP: np.zeros((3, 8), np.float32)}), r"has shape \[3, 8\], .* says \[12, 8\]"),
        (weights(**{UP: np.zeros((12, 8), np.int8)}), "is of type I8, allowed are F64, F32"),
        (
            weights(model__layers__0__mlp__up_proj__bias=np.zeros(12, np.float32)),
            "holds model.layers.0.mlp.up_proj.bias, which a llama of this configuration does not",
        ),
        (header("", 0, 0), "cannot be read as safetensors: is not JSON"),
        (header("{}", 0, 1 << 40), "its header of 1099511627776 bytes exceeds the file"),
        (header("[]", 0), "holds no JSON object"),
        (header('{"a": 1}'), "'a' has no type, shape and place"),
        (header(f'{{"a": {tensor(dtype="X")}}}'), "'a' has no type, shape and place"),
        (header(f'{{"a": {tensor(shape="[-1]")}}}'), "'a' has no type, shape and place"),
        (header(f'{{"a": {tensor(shape="[2]")}}}'), r"'a' is F32 of shape \(2,\) in 4 bytes"),
        (header(f'{{"a": {tensor(offsets="[4, 8]")}}}', 8), "leave a gap at byte 0"),
        (header(f'{{"a": {tensor()}}}', 3), "its data has 3 bytes, its header 4"),
        (header(f'{{"a": {tensor()}, "b": {tensor()}}}'), "tensors overlap"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_model_folder(tmp_path))
    with pytest.raises(ModelFolderError, match=message) as caught:
        open_model_folder(tmp_path)
    assert str(caught.value).isprintable()


# --- other files


def write(name: str, text: str = "{}") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (write("config.json", "{"), "config.json is not JSON: .* line 1 column 2"),
        (write("pytorch_model.bin"), "holds pickles, which can run code: remove"),
        (write("training_args.PT"), "holds pickles"),
        (write("modeling_llama.py"), r"holds code, which is not run: remove \['modeling_llama.py'"),
        (write("kernel.so"), "holds code"),
        (write("adapter_config.json"), "adapter_config.json is an adapter: merge it"),
        (lambda f: (f / "custom_generate").mkdir(), "custom_generate holds code"),
        (write("generation_config.json", '{"auto_map": {}}'), "generation_config.json has 'auto_m"),
        (write("tokenizer_config.json", '{"x": [{"auto_map": {}}]}'), "tokenizer_config.json has"),
        (write("preprocessor_config.json", "[]"), "preprocessor_config.json holds no JSON object"),
        (lambda f: (f / "chat_template.jinja").symlink_to("/etc/passwd"), "leads out of the model"),
        (lambda f: shutil.rmtree(f), "cannot be read: No such file"),
    ],
)
def test_folder_that_is_not_safe_or_whole_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = write_model_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelFolderError, match=message):
        open_model_folder(folder)


def test_files_that_nothing_reads_are_not_judged(tmp_path: Path) -> None:
    write_model_folder(tmp_path, **{"train_config.json": "[NaN]"})
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").touch()
    assert open_model_folder(tmp_path).num_parameters == NUM_PARAMETERS


def test_keys_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model_folder(tmp_path, {**TINY, "use_mrope": False})
    with caplog.at_level("INFO"):
        folder: ModelFolder = open_model_folder(tmp_path)
    assert folder.config.ignored_keys == ("use_mrope",)
    assert "config.json: not read: use_mrope" in caplog.text
