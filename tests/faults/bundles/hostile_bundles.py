"""Bundles that would lead a server out of their folder: names, links, devices, graphs, weights.

Every attack gets a copy of an intact bundle, beside which lies a folder `outside` with the very
files that the bundle has: what is led there would find what it looks for.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bundle.hashing import hash_file
from bundle.manifest import MANIFEST_NAME
from tests.faults.bundles.damage import edit_manifest, relist

OUTSIDE = "outside"
GRAPH, WEIGHTS = "onnx/fp32/model.onnx", "onnx/fp32/model.onnx.data"
STUDENT, INDEX = "student/model.safetensors", "student/model.safetensors.index.json"

Change = Callable[[Path], object]
Location = Callable[[Path], str]
Named = Iterator[tuple[str, Change]]


@dataclass(frozen=True, slots=True)
class Attack:
    """What is done to a bundle; `backend` is the only one that reads it, None: it is refused."""

    name: str
    apply: Change
    backend: str | None


def attacks() -> Iterator[Attack]:
    """Yield each attack."""
    groups = {
        None: (_names, _links, _special_files, _indices, _configurations),
        "onnx": (_graphs,),
        "torch": (_weights,),
    }
    for backend, members in groups.items():
        for group in members:
            for name, apply in group():
                yield Attack(name, apply, backend)


def _outside(bundle: Path) -> Path:
    return bundle.parent / OUTSIDE


# -- names ----------------------------------------------------------------------------------------


def _names() -> Named:
    for name in (
        "../outside/secret", "student/../../outside/secret", "student/../../../outside/secret",
        "./../outside/secret", "student//../../outside/secret", "..", ".", "",
        "..\\outside\\secret", "C:/secret", "file:///secret", "~/secret", "$HOME/secret",
        "%2e%2e/outside/secret", "\uff0e\uff0e/outside/secret", "\u2025/outside/secret",
        "..\0/outside/secret", "student/secret\0", "secret\n", "\u202etercesb", "a" * 256,
        "/".join(["a" * 100] * 50), "student/CONFIG.JSON", "STUDENT/config.json",
        "student/config.json ", "cafe\u0301", "manifest.json", "manifest.json/x",
    ):  # fmt: skip
        yield f"listed name {name[:40]!a}", partial(_list, name=name)
    yield "absolute name", lambda bundle: _list(bundle, str(_outside(bundle) / "secret"))
    for name in ("../../outside", "..", "/", "fp32\n", "fp32/../../..", ".", "FP32"):
        yield f"variant {name!a}", partial(_name_variant, name=name)


def _list(bundle: Path, name: str) -> None:
    """List the file outside under a name that may lead there, with its size and hash."""
    secret = _outside(bundle) / "secret"
    entry = {"sha256": hash_file(secret), "size_bytes": secret.stat().st_size}
    edit_manifest(bundle, lambda raw: raw["files"].update({name: entry}))


def _name_variant(bundle: Path, name: str) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["variants"][name] = raw["variants"]["fp32"]
        raw["default_variant"] = name
        raw["files"][f"onnx/{name}/model.onnx"] = raw["files"][GRAPH]

    edit_manifest(bundle, change)


# -- links and what is no file --------------------------------------------------------------------


def _links() -> Named:
    for name in (GRAPH, WEIGHTS, STUDENT, "student/tokenizer.json", MANIFEST_NAME, "student",
                 "onnx", "onnx/fp32"):  # fmt: skip
        yield f"{name} is a link out", partial(_link_out, name=name)
        yield f"{name} is a relative link out", partial(_link_out, name=name, is_relative=True)
        yield f"{name} is a link to itself", partial(_link_loop, name=name)
    yield "link within", lambda bundle: _replace(bundle, GRAPH, bundle / WEIGHTS)
    yield "unlisted link out", lambda bundle: (bundle / "x").symlink_to(_outside(bundle))
    yield "dangling link", lambda bundle: _replace(bundle, GRAPH, bundle.parent / "nowhere")
    yield "hard link to another file", _hard_link


def _link_out(bundle: Path, name: str, is_relative: bool = False) -> None:
    target = _outside(bundle) / name
    path = bundle / name
    _replace(bundle, name, Path(os.path.relpath(target, path.parent)) if is_relative else target)


def _link_loop(bundle: Path, name: str) -> None:
    _replace(bundle, name, Path((bundle / name).name))


def _replace(bundle: Path, name: str, target: Path) -> None:
    path = bundle / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def _hard_link(bundle: Path) -> None:
    (bundle / GRAPH).unlink()
    os.link(_outside(bundle) / "secret", bundle / GRAPH)


def _special_files() -> Named:
    kinds: dict[str, Change] = {"fifo": os.mkfifo, "socket": _bind, "folder": os.mkdir}
    if os.geteuid() == 0:
        kinds["device"] = lambda path: os.mknod(path, 0o20666, os.makedev(1, 5))
    for kind, make in kinds.items():
        for name in (GRAPH, WEIGHTS, STUDENT, MANIFEST_NAME, "student/config.json"):
            yield f"{kind} {name}", partial(_put, name=name, make=make)
        if kind != "folder":  # an empty folder holds nothing that could be read
            yield f"unlisted {kind}", partial(_put, name="student/x", make=make)


def _put(bundle: Path, name: str, make: Change) -> None:
    (bundle / name).unlink(missing_ok=True)
    make(bundle / name)


def _bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is at most 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


# -- graphs ---------------------------------------------------------------------------------------


def _graphs() -> Named:
    relative = f"../../../{OUTSIDE}/{WEIGHTS}"
    locations: dict[str, Location] = {
        "relative": lambda bundle: relative,
        "relative behind a folder": lambda bundle: f"x/../{relative}",
        "absolute": lambda bundle: str(_outside(bundle) / WEIGHTS),
        "another folder of the bundle": lambda bundle: f"../../{STUDENT}",
        "device": lambda bundle: "/dev/zero",
        "process": lambda bundle: "/proc/self/environ",
        "memory": lambda bundle: "*/_ORT_MEM_ADDR_/*",
        "URL": lambda bundle: "file:///dev/zero",
    }
    for name, location in locations.items():
        yield (
            f"weights of the graph: {name}",
            partial(_locate, location=location),
        )
        yield (
            f"constant of the graph: {name}",
            partial(_add_constant, location=location),
        )
    for place in ({"offset": 2**62}, {"offset": -4096}, {"length": 2**62}, {"length": 4}):
        yield f"weights of the graph at {place}", partial(_place, place=place)


def _edit_graph(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    change(model)
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    relist(bundle, GRAPH)


def _locate(bundle: Path, location: Location) -> None:
    where = location(bundle)

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = where if entry.key == "location" else entry.value

    _edit_graph(bundle, change)


def _place(bundle: Path, place: dict[str, int]) -> None:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = str(place.get(entry.key, entry.value))

    _edit_graph(bundle, change)


def _add_constant(bundle: Path, location: Location) -> None:
    """Add a constant to the logits that lies elsewhere."""
    where = location(bundle)

    def change(model: onnx.ModelProto) -> None:
        value = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1])
        value.data_location = TensorProto.EXTERNAL
        for key, text in (("location", where), ("offset", "0"), ("length", "4")):
            value.external_data.add(key=key, value=text)
        node = next(node for node in model.graph.node if "logits" in node.output)
        node.output[list(node.output).index("logits")] = "logits.before"
        model.graph.node.append(helper.make_node("Constant", [], ["x"], value=value))
        model.graph.node.append(helper.make_node("Add", ["logits.before", "x"], ["logits"]))

    _edit_graph(bundle, change)


# -- what torch reads -----------------------------------------------------------------------------


def _indices() -> Named:
    for name in (f"../../{OUTSIDE}/{STUDENT}", "../student/../../outside/student/x", "/dev/zero"):
        yield f"index of weights {name}", partial(_index, name=name)
    yield (
        "index of weights, absolute",
        lambda bundle: _index(bundle, str(_outside(bundle) / STUDENT)),
    )


def _weights() -> Named:
    headers = {
        "too long": (2**62).to_bytes(8, "little") + b"{}",
        "longer than the file": (1000).to_bytes(8, "little") + b"{}",
        "none": b"",
        "no JSON": (2).to_bytes(8, "little") + b"[[",
        "deep": (100_005).to_bytes(8, "little") + b'{"x":' + b"[" * 100_000,
        "beyond the end": _header({"x": ["F32", [4], [0, 16]]}),
        "backwards": _header({"x": ["F32", [4], [16, 0]]}),
        "negative shape": _header({"x": ["F32", [-4], [0, 16]]}),
        "huge shape": _header({"x": ["F32", [2**62, 2**62], [0, 16]]}),
        "unknown type": _header({"x": ["F3", [4], [0, 16]]}),
    }
    for name, data in headers.items():
        yield f"header of weights: {name}", partial(_write, name=STUDENT, data=data)
    yield "weights that are not all there", _drop_a_tensor
    yield "weights of another shape", _reshape_a_tensor


def _header(tensors: dict[str, list[Any]]) -> bytes:
    described = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in tensors.items()
    }
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text


def _write(bundle: Path, name: str, data: bytes) -> None:
    (bundle / name).write_bytes(data)
    relist(bundle, name)


def _index(bundle: Path, name: str) -> None:
    with safe_open(bundle / STUDENT, "pt") as weights:
        named = dict.fromkeys(weights.keys(), name)
    (bundle / STUDENT).unlink()
    _write(bundle, INDEX, json.dumps({"metadata": {}, "weight_map": named}).encode())
    relist(bundle, STUDENT)


def _drop_a_tensor(bundle: Path) -> None:
    weights = load_file(bundle / STUDENT)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, bundle / STUDENT, metadata={"format": "pt"})
    relist(bundle, STUDENT)


def _reshape_a_tensor(bundle: Path) -> None:
    weights = load_file(bundle / STUDENT)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].T.contiguous()
    save_file(weights, bundle / STUDENT, metadata={"format": "pt"})
    relist(bundle, STUDENT)


def _configurations() -> Named:
    for key, value in (
        ("transformers_weights", f"../../{OUTSIDE}/{STUDENT}"),
        ("auto_map", {"AutoModel": f"../../{OUTSIDE}/modeling.Model"}),
        ("base_model_name_or_path", f"../../{OUTSIDE}/student"),
    ):
        yield key, partial(_configure, fields={key: value})
    yield (
        "PEFT",
        lambda bundle: _write(
            bundle,
            "student/adapter_config.json",
            json.dumps({"base_model_name_or_path": str(_outside(bundle) / "student")}).encode(),
        ),
    )
    for suffix in ("bin", "pt", "PTH", "pkl", "pickle", "ckpt", "py"):
        name = f"student/pytorch_model.{suffix}"
        yield f"pickle {name}", partial(_write, name=name, data=b"cos\nsystem\n.")


def _configure(bundle: Path, fields: dict[str, Any]) -> None:
    name = "student/config.json"
    _write(bundle, name, json.dumps(json.loads((bundle / name).read_text()) | fields).encode())
