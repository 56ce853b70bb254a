"""Whether a bundle works: its hashes, one tokenizer throughout, and every graph run once.

The graphs are run in a new interpreter by plain onnxruntime, as any other tool would, so that
nothing loaded here can flatter the result: `python -m export.publish.verify FOLDER...` prints a
line of JSON per graph that ran.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bundle.errors import BundleError
from bundle.manifest import MANIFEST_NAME, Manifest
from bundle.verify import check_models, verify_bundle
from serve.text.tokenizer import Tokenizer

GRAPH_NAME = "model.onnx"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PROMPT = (0, 1, 2, 3)
# onnxruntime has no CPU kernels for it: such a graph is opened, not run.
_NEEDS_GPU = frozenset({"bfloat16"})


def verify_bundle_deep(bundle: Path) -> Manifest:
    """Return the manifest of a bundle that is intact and whose graphs all run.

    BundleError names the file and what is wrong with it: another hash or size, another tokenizer
    than the student's, weights outside the bundle or cut off, a graph that does not open or run,
    or logits that are not finite. ModelFolderError as from `bundle.verify.check_models`; UserError
    when the tokenizer or its chat template cannot be used.
    """
    manifest = verify_bundle(bundle)
    check_models(bundle, manifest)
    _check_tokenizer(bundle, manifest)
    Tokenizer.load(bundle / "student")
    folders = {name: bundle / "onnx" / name for name in manifest.variants}
    for folder in folders.values():
        _check_weights(bundle, folder, manifest)
    _check_graphs_run(
        [f for n, f in folders.items() if manifest.variants[n].precision not in _NEEDS_GPU]
    )
    return manifest


def _check_tokenizer(bundle: Path, manifest: Manifest) -> None:
    """Compare the files that `verify_bundle` hashed: each with what it must be."""
    expected = {
        "student/tokenizer.json": manifest.tokenizer_sha256,
        "student/chat_template.jinja": manifest.chat_template_sha256,
    }
    for name in _TOKENIZER_FILES:
        original = f"student/{name}"
        sha256 = _listed_sha256(bundle, manifest, original)
        if sha256 != expected.get(original, sha256):
            raise BundleError(
                f"{bundle / original} was swapped: its sha256 is {sha256}, the student was made "
                f"with {expected[original]} ({MANIFEST_NAME})"
            )
        for variant in manifest.variants:
            copy = f"onnx/{variant}/{name}"
            if _listed_sha256(bundle, manifest, copy) != sha256:
                raise BundleError(f"{bundle / copy} was swapped: it is not {bundle / original}")


def _listed_sha256(bundle: Path, manifest: Manifest, name: str) -> str:
    if name not in manifest.files:
        raise BundleError(f"{bundle / name} is missing, and {MANIFEST_NAME} does not list it")
    return manifest.files[name].sha256


def _check_weights(bundle: Path, folder: Path, manifest: Manifest) -> None:
    """Refuse weights that no hash of the manifest covers, and files too short for theirs."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    path = folder / GRAPH_NAME
    for tensor in _open_graph(bundle, path, manifest).initializer:
        if not uses_external_data(tensor):
            continue
        info = ExternalDataInfo(tensor)
        name = (folder.relative_to(bundle) / info.location).as_posix()
        if name not in manifest.files:
            raise BundleError(
                f"{path} reads {tensor.name} from {name}, which {MANIFEST_NAME} does not list"
            )
        end = (info.offset or 0) + (info.length or 0)
        if end > manifest.files[name].size_bytes:
            raise BundleError(
                f"{bundle / name} is truncated: {tensor.name} ends at byte {end}, the file has "
                f"{manifest.files[name].size_bytes}"
            )


def _open_graph(bundle: Path, path: Path, manifest: Manifest) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    _listed_sha256(bundle, manifest, path.relative_to(bundle).as_posix())
    try:
        return onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise BundleError(f"{path} is no ONNX graph: {error}") from None


def _check_graphs_run(folders: list[Path]) -> None:
    command = [sys.executable, "-m", "export.publish.verify", *map(str, folders)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for folder, result in zip(folders, results, strict=False):
        if result["num_not_finite"]:
            raise BundleError(
                f"{folder / GRAPH_NAME} runs, but {result['num_not_finite']} of "
                f"{result['num_logits']} logits are not finite"
            )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BundleError(f"{folders[len(results)] / GRAPH_NAME} does not run: {lines[-1]}")


# -- in the new interpreter -----------------------------------------------------------------------


def run_graph(folder: Path) -> dict[str, int]:
    """Run one prefill and one decode step; returns how many logits, and how many not finite."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, too
    session = ort.InferenceSession(folder / GRAPH_NAME, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    prefill = session.run(outputs, _inputs(_PROMPT, len(_PROMPT), _empty_pasts(session)))
    pasts = {
        name.replace("present", "past_key_values"): value
        for name, value in zip(outputs[1:], prefill[1:], strict=True)
    }
    decode = session.run(outputs, _inputs(_PROMPT[:1], len(_PROMPT) + 1, pasts))
    logits = np.concatenate([prefill[0].ravel(), decode[0].ravel()])
    return {"num_logits": logits.size, "num_not_finite": int((~np.isfinite(logits)).sum())}


def _empty_pasts(session: Any) -> dict[str, Any]:
    import numpy as np

    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), types[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }


def _inputs(token_ids: tuple[int, ...], length: int, pasts: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    mask = np.ones((1, length), np.int64)
    return {"input_ids": np.array([token_ids]), "attention_mask": mask, **pasts}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(run_graph(Path(argument))), flush=True)
