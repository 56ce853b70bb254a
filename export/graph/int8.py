"""int8 weights and activations in all matrix products; attention, norms and cache stay float32.

Ranges of activations are found at run time (`quantize_dynamic`) or beforehand on calibration text
(`quantize_static`). onnxruntime's quantizers do the work; here they are given what they need and
kept quiet.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from export.graph.surgery import LOGIT_ROWS, load_untied, save_onnx
from export.run.variants import DynamicVariant, StaticVariant
from export.teacher.examples import Example


def quantize_dynamic(source: Path, target: Path, config: DynamicVariant) -> onnx.ModelProto:
    """Return the graph in `source` quantized by optimum, int8; scratch files go below `target`."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    from transformers import PretrainedConfig

    recipe = AutoQuantizationConfig.avx512_vnni(
        is_static=False, per_channel=config.per_channel, operators_to_quantize=["MatMul"]
    )
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        path = save_onnx(_prepared(source), Path(scratch))
        # It writes a configuration beside the graph; ours is written elsewhere.
        quantizer = ORTQuantizer(path, config=PretrainedConfig())
        with quiet():
            quantizer.quantize(
                recipe,
                save_dir=Path(scratch) / "quantized",
                file_suffix=None,
                use_external_data_format=True,
            )
        return onnx.load(Path(scratch) / "quantized" / "model.onnx")


def quantize_static(
    source: Path, target: Path, config: StaticVariant, texts: Sequence[Example]
) -> onnx.ModelProto:
    """Return the graph in `source` quantized by onnxruntime; scratch files go below `target`.

    optimum refuses a static graph that has an If. Products take uint8 activations and return
    float32, so nothing else changes its type.
    """
    from onnxruntime import quantization as ort

    from export.graph.calibration import TextReader, calibration_texts

    methods = {
        "minmax": ort.CalibrationMethod.MinMax,
        "entropy": ort.CalibrationMethod.Entropy,
        "percentile": ort.CalibrationMethod.Percentile,
    }
    model = _prepared(source)
    # A default that may be fed has onnxruntime warn in each of its sessions.
    (logit_rows,) = [value for value in model.graph.input if value.name == LOGIT_ROWS]
    model.graph.input.remove(logit_rows)
    reader = TextReader(model, calibration_texts(config, texts))
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        path, quantized = save_onnx(model, Path(scratch)), Path(scratch) / "quantized.onnx"
        with quiet():
            ort.quantize_static(
                path,
                quantized,
                reader,
                op_types_to_quantize=["MatMul"],
                per_channel=config.per_channel,
                activation_type=ort.QuantType.QUInt8,
                weight_type=ort.QuantType.QInt8,
                use_external_data_format=True,
                calibrate_method=methods[config.calibration],
                extra_options={
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                    "MatMulConstBOnly": True,
                    # One text after the other: lengths differ, and memory stays small.
                    "CalibStridedMinMax": 1,
                },
            )
        model = onnx.load(quantized)
    model.graph.input.append(logit_rows)
    return model


def _prepared(source: Path) -> onnx.ModelProto:
    """Load the graph with the types that onnxruntime's quantizers look for.

    Their shape inference stops at onnxruntime's own operators; a product of unknown type is an
    error for dynamic quantization, and left out by the static one.
    """
    model = load_untied(source)
    graph = model.graph
    known = {v.name for v in (*graph.value_info, *graph.output)}
    matmuls = [node for node in graph.node if node.op_type == "MatMul"]
    names = dict.fromkeys(name for node in matmuls for name in (node.input[0], node.output[0]))
    graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name not in known
    )
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep onnxruntime's quantizers from printing, logging lines per node, and torch's warning
    about the read-only arrays that they make tensors of."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            yield
    finally:
        logging.disable(previous)
