"""Model folders that would have a loader fetch, run or follow something; and a child that tries.

`python -m tests.support.models.hostile_folders FOLDER` gives each to every command that takes a
folder, in one process in which the package `kernels` is a stand-in that records what is called, and
an audit hook records what is opened outside, run, connected or started. It prints JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

OUTSIDE = "outside"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Where each is tried: as a teacher, and as the student in a bundle.
COMMANDS = ("plan", "run", "serve", "doctor", "serve bundle", "verify", "doctor bundle")

Damage = Callable[[Path], object]


def _edit(name: str, **fields: Any) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | fields))

    return edit


def _text(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def _bytes(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def _code(name: str) -> Damage:
    """Return what writes code that leaves a mark when it is run."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import pathlib; pathlib.Path(__file__ + '.ran').touch()\n")

    return write


def _replace(name: str, make: Damage) -> Damage:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def _outside(folder: Path) -> Path:
    return next(p for p in folder.parents if (p / OUTSIDE).is_dir()) / OUTSIDE


def _index(name: str) -> Damage:
    """Return what names the weights outside, relative (`..`) or absolute, in an index."""

    def write(folder: Path) -> None:
        where = _outside(folder) / WEIGHTS
        target = str(where) if name == "/" else os.path.relpath(where, folder)
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))

    return write


def _missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {"model.norm.weight": names[0], "model.embed_tokens.weight": names[1]}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _long_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((1 << 50).to_bytes(8, "little"))


def _twice(folder: Path) -> None:
    text = (folder / "config.json").read_text().lstrip().removeprefix("{")
    (folder / "config.json").write_text('{"hidden_size": 1000000, ' + text)


HUB = "kernels-community/evil"
CODE = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "evil/model--modeling.Evil"}
KINDS: Mapping[str, tuple[Damage, str]] = {
    "attention of a hub": (
        _edit("config.json", _attn_implementation=HUB), "'_attn_implementation'"),
    "attention of a hub, internal": (
        _edit("config.json", _attn_implementation_internal=HUB), "'_attn_implementation_internal'"),
    "attention of a hub, public": (
        _edit("config.json", attn_implementation=f"paged|{HUB}"), "'attn_implementation'"),
    "attention of a hub, nested": (
        _edit("config.json", text_config={"_attn_implementation": HUB}), "'_attn_implementation'"),
    "kernels of a hub": (_edit("config.json", kernel_config={"RMSNorm": HUB}), "'kernel_config'"),
    "code of the folder": (_edit("config.json", auto_map=CODE), "'auto_map'"),
    "code, nested": (_edit("config.json", x=[{"y": {"auto_map": CODE}}]), "'auto_map'"),
    "code of the tokenizer": (_edit("tokenizer_config.json", auto_map=CODE), "'auto_map'"),
    "code to generate": (_edit("generation_config.json", custom_generate="a/b"), "'custom_gen"),
    "code beside": (_code("modeling_evil.py"), r"modeling_evil\.py"),
    "folder of code": (_code("custom_generate/generate.py"), r"generate"),
    "compiled code": (_bytes("kernel.so", b"\x7fELF"), r"kernel\.so"),
    "pickle": (_bytes("pytorch_model.bin", b"cos\nsystem\n(S'true'\ntR."), r"pytorch_model\.bin"),
    "adapter": (
        _edit("adapter_config.json", base_model_name_or_path="evil/model"), "adapter_config.json"),
    "other weights": (_edit("config.json", transformers_weights="../w"), "'transformers_weights'"),
    "index, relative": (_index(".."), "names weights elsewhere: '../"),
    "index, absolute": (_index("/"), "names weights elsewhere: '/"),
    "shard that is missing": (_missing_shard, "lacks model-00002-of-00002.safetensors"),
    "weights are a link out": (
        _replace(WEIGHTS, lambda p: p.symlink_to(_outside(p) / WEIGHTS)), f"{WEIGHTS} .*leads out"),
    "configuration is a link out": (
        _replace("config.json", lambda p: p.symlink_to(_outside(p) / "config.json")),
        "config.json .*leads out"),
    "template is a link out": (
        _replace("chat_template.jinja", lambda p: p.symlink_to("/etc/passwd")), "leads out"),
    "configuration is a pipe": (
        _replace("config.json", os.mkfifo), "config.json is not (a plain|listed)"),
    "weights are a pipe": (_replace(WEIGHTS, os.mkfifo), f"{WEIGHTS} is not (a plain|listed)"),
    "configuration is a folder": (
        _replace("config.json", os.mkdir), "config.json is (not a plain file|missing)"),
    "16 MiB of JSON": (_text("config.json", " " * (16 << 20) + "{}"), "has more than 16777216 by"),
    "depth": (_text("config.json", '{"a":' * 9999 + "1" + "}" * 9999), "nested too deeply"),
    "depth of the tokenizer": (_text("tokenizer_config.json", "[" * 99999), "nested too deeply"),
    "a key twice": (_twice, "the key 'hidden_size' is there twice"),
    "no number": (_text("config.json", '{"rms_norm_eps": NaN}'), "NaN is no JSON number"),
    "no UTF-8": (_bytes("config.json", b'{"model_type": "\xff"}'), "byte 16 is no UTF-8"),
    "no object": (_text("config.json", '["llama"]'), "holds no JSON object"),
    "text as a size": (_edit("config.json", hidden_size="64"), "hidden_size is '64', allowed is"),
    "negative size": (_edit("config.json", num_hidden_layers=-1), "num_hidden_layers is -1"),
    "huge size": (_edit("config.json", num_hidden_layers=10**15), "num_hidden_layers is 1000000"),
    "type as an attribute of torch": (_edit("config.json", dtype="os"), "dtype is 'os', allowed"),
    "several models in one": (
        _edit("config.json", model_type="llava", text_config={}), "model type 'llava' .*not supp"),
    "quantized": (
        _edit("config.json", quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "header that lies": (_long_header, "its header of 1125899906842624 bytes exceeds the file"),
    "rope in two spellings": (
        _edit("config.json", rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "rope_theta is"),
    "EOS that is no token": (_edit("generation_config.json", eos_token_id="</s>"), "eos_token_id"),
}  # fmt: skip


def write_kernels(folder: Path) -> None:
    """Write a stand-in for the package `kernels`, whose `get_kernel` records and fails."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels/__init__.py").write_text(
        "import enum\n"
        "CALLS = []\n"
        "def get_kernel(*args, **kwargs):\n"
        "    CALLS.append(args)\n"
        "    raise RuntimeError('a kernel was asked for')\n"
        "class Device: ...\n"
        "class LayerRepository:\n"
        "    def __init__(self, *args, **kwargs): ...\n"
        "class Mode(enum.Flag):\n"
        "    TRAINING = 1\n    INFERENCE = 2\n    TORCH_COMPILE = 4\n"
        "def register_kernel_mapping(*args, **kwargs): ...\n"
        "def replace_kernel_forward_from_hub(*args, **kwargs): ...\n"
        "def use_kernel_forward_from_hub(*args, **kwargs):\n    return lambda cls: cls\n"
    )
    metadata = folder / "kernels-0.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")


# --- in the child --------------------------------------------------------------------------------


class Watch:
    """What this process did that it must not: fills `seen` while `is_on`."""

    def __init__(self, hostile: Path) -> None:
        self.is_on = False
        self.seen: list[str] = []
        self._hostile = str(hostile)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        is_foreign = event == "socket.getaddrinfo" and args[0] != "127.0.0.1"
        if is_foreign or event in ("socket.connect", "pickle.find_class", "os.system"):
            self.seen.append(f"{event} {args!r}")
        elif event == "subprocess.Popen":
            self.seen.append(f"{event} {args[1]!r}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            suffixes = (".py", ".pyc", ".so", ".bin")
            if path.startswith(self._hostile) and path.endswith(suffixes):
                self.seen.append(f"open {path}")
            if f"/{OUTSIDE}/" in path or path == "/etc/passwd":
                self.seen.append(f"open {path}")
        elif event == "exec" and getattr(args[0], "co_filename", "").startswith(self._hostile):
            self.seen.append(f"exec {args[0].co_filename}")


def _run(words: list[str]) -> tuple[int, str]:
    """Run the command line; return its exit code and what it wrote to stderr."""
    import tandem.cli

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            tandem.cli.main(words)
        except SystemExit as end:
            return int(end.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def _commands(folder: Path, bundle: Path, intact: Path) -> Iterator[tuple[str, list[str]]]:
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(
        f"teacher: {folder}\noutput_dir: {folder.parent / 'out'}\n"
        f"cache_dir: {folder.parent / 'cache'}\n"
        "prune: {num_removed_layers: 1, first_candidate: 0, num_candidates: 1}\n"
        "sample: {max_model_len: 256, max_tokens: 64}\nonnx: {max_model_len: 256}\n"
    )
    ports = [f"--{name}port=0" for name in ("", "control-", "metrics-")]
    serve = ["serve", "--device", "cpu", "--max-model-len", "64", *ports]
    yield "plan", ["export", "plan", str(recipe)]
    yield "run", ["export", "run", str(recipe)]
    yield "serve", [*serve, "--bundle", str(intact), "--teacher", str(folder)]
    yield "doctor", ["doctor", "--json", str(folder)]
    yield "serve bundle", [*serve, "--bundle", str(bundle), "--no-teacher"]
    yield "verify", ["export", "verify", str(bundle)]
    yield "doctor bundle", ["doctor", "--json", str(bundle)]


def _doctor_line(folder: Path) -> tuple[int, str]:
    """Return what `tandem doctor` says of a folder, without looking at the machine each time."""
    from tandem.doctor import examine

    finding = examine(folder)
    return int(finding.level == "problem"), f"tandem: {finding.message}\n"


def try_all(root: Path) -> dict[str, dict[str, Any]]:
    """Return for each kind and command the exit code, the text, and what it did meanwhile."""
    from tests.faults.bundles.damage import relist
    from tests.support.tiny_bundle import make_tiny_bundle

    intact = make_tiny_bundle(root / "intact")
    shutil.copytree(intact.parent / "teacher", root / OUTSIDE)
    hostile = root / "hostile"
    watch = Watch(hostile)
    results: dict[str, dict[str, Any]] = {}
    for number, (kind, (damage, _)) in enumerate([("intact", (len, "")), *KINDS.items()]):
        folder, bundle = hostile / str(number) / "model", hostile / str(number) / "bundle"
        shutil.copytree(intact.parent / "teacher", folder)
        shutil.copytree(intact, bundle)
        if kind != "intact":
            damage(folder)
            damage(bundle / "student")
            names = sorted(p.relative_to(bundle).as_posix() for p in (bundle / "student").iterdir())
            relist(bundle, *{*names, "student/config.json", f"student/{WEIGHTS}"})
        results[kind] = {}
        for command, words in _commands(folder, bundle, intact):
            if kind == "intact" and command in ("run", "serve", "serve bundle"):
                continue  # they would go on
            watch.seen.clear()
            watch.is_on = kind != "intact"
            is_doctor = words[0] == "doctor"
            code, text = _doctor_line(Path(words[-1])) if is_doctor else _run(words)
            watch.is_on = False
            results[kind][command] = {"code": code, "text": text, "seen": list(watch.seen)}
    results["control"] = _control(hostile / "1" / "model")
    results["marks"] = {str(path): {} for path in hostile.rglob("*.ran")}
    return results


def _control(folder: Path) -> dict[str, Any]:
    """Return how often the stand-in was called so far, and once transformers itself had read."""
    import kernels  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoModelForCausalLM

    before = len(kernels.CALLS)
    with contextlib.suppress(Exception):
        AutoModelForCausalLM.from_pretrained(folder)
    return {"calls": before, "calls of transformers": len(kernels.CALLS) - before}


if __name__ == "__main__":
    print(json.dumps(try_all(Path(sys.argv[1]))))
