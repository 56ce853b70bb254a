"""The graph that the server runs: the file's, rewritten in memory.

The file's graph is made for any tool; this one is fed lengths instead of a mask, and `logit_rows`
always. What is left has no shape arithmetic and no control flow, which CUDA graphs forbid.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

LOGIT_ROWS = "logit_rows"
LAST_POSITIONS = "tandem.last_positions"
TOTAL_LENGTH = "tandem.total_length"


def serving_graph(path: Path) -> onnx.ModelProto:
    """Return the graph that `export.graph.trace` wrote: without weights, with other inputs.

    `tandem.last_positions`, int32 `(B,)`, and `tandem.total_length`, int32 `()` in host memory,
    stand in for `attention_mask`; `logit_rows` must be fed, and `logits` is `(1, N, V)`.

    Raises:
        ValueError: the graph has no GroupQueryAttention, or no `logit_rows`.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions or LOGIT_ROWS not in {i.name for i in graph.input}:
        raise ValueError(
            f"{path} cannot be served: it has no GroupQueryAttention or no input {LOGIT_ROWS}; "
            "export it with `tandem export`"
        )
    for node in attentions:
        node.input[5:7] = [LAST_POSITIONS, TOTAL_LENGTH]
    for name, shape in ((LAST_POSITIONS, ["batch_size"]), (TOTAL_LENGTH, [])):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
    _pick_logit_rows(graph)
    _drop_unused(graph)
    return model


def check_cuda_types(model: onnx.ModelProto, path: Path) -> None:
    """Raise ValueError when onnxruntime's attention has no CUDA kernel for the cache's type.

    Its float32 and weight-only graphs have one on the CPU only (`group_query_attention.cc`).
    """
    (past, *_) = [i for i in model.graph.input if i.name.startswith("past_key_values.")]
    element_type = past.type.tensor_type.elem_type
    if element_type not in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        raise ValueError(
            f"{path.parent}: its cache is {TensorProto.DataType.Name(element_type)}, and on CUDA "
            "onnxruntime attends in FLOAT16 and BFLOAT16 only; use a variant of method float16 or "
            "bfloat16, or the backend torch"
        )


def _pick_logit_rows(graph: onnx.GraphProto) -> None:
    """Put the branch that gathers `logit_rows` in the place of the choice between it and all."""
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    (branch,) = [a.g for a in choice.attribute if a.name == "then_branch"]
    nodes = list(branch.node)
    nodes[-1].output[0] = choice.output[0]
    position = list(graph.node).index(choice)
    for node in reversed(nodes):
        graph.node.insert(position, node)
    graph.node.remove(choice)
    (default,) = [i for i in graph.initializer if i.name == LOGIT_ROWS]
    graph.initializer.remove(default)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drop the nodes, weights and inputs that no output depends on; nodes come in any order."""
    producers = {name: node for node in graph.node for name in node.output if name}
    needed: set[str] = set()
    unvisited = [output.name for output in graph.output]
    while unvisited:
        name = unvisited.pop()
        if name not in needed:
            needed.add(name)
            unvisited += producers[name].input if name in producers else ()
    for node in [n for n in graph.node if needed.isdisjoint(n.output)]:
        graph.node.remove(node)
    for values in (graph.input, graph.initializer):
        for value in [v for v in values if v.name not in needed]:
            values.remove(value)
