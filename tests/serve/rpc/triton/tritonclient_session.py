"""What a user of tritonclient does, run by test_tritonclient.py in an environment that has it.

Prints a JSON object of what came back. Imports are inside, since pytest imports this file as well.
"""

from __future__ import annotations

import base64
import json
import queue
import sys
from typing import Any

SETTINGS = {"max_tokens": 8, "seed": 7, "temperature": 0.5, "ignore_eos": True}


def main(address: str, text: str, token_ids: list[int]) -> None:
    import tritonclient.grpc as triton
    from tritonclient.grpc import model_config_pb2, service_pb2

    with triton.InferenceServerClient(address) as client:
        seen = {
            "is_live": client.is_server_live(),
            "is_ready": client.is_server_ready(),
            "are_models_ready": [client.is_model_ready(m, "1") for m in ("student", "teacher")],
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata("student", as_json=True),
            "config": client.get_model_config("student", as_json=True)["config"],
            "index": client.get_model_repository_index(as_json=True)["models"],
            "text": {m: infer(client, m, text_tensor(text)) for m in ("student", "teacher")},
            "ids": {m: infer(client, m, ids_tensor(token_ids)) for m in ("student", "teacher")},
            "async": infer_async(client, text),
            "stream": stream(client, text),
            "errors": errors(client, text),
        }
    files = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)
    seen["descriptors"] = [base64.b64encode(file.serialized_pb).decode() for file in files]
    print(json.dumps(seen))


def text_tensor(text: str) -> Any:
    import numpy as np
    import tritonclient.grpc as triton

    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def ids_tensor(token_ids: list[int]) -> Any:
    import numpy as np
    import tritonclient.grpc as triton

    tensor = triton.InferInput("input_ids", [1, len(token_ids)], "INT64")
    tensor.set_data_from_numpy(np.array([token_ids], dtype=np.int64))
    return tensor


def arrays(result: Any) -> dict[str, Any]:
    """The outputs of a result as lists; bytes as text."""
    found = {}
    for output in result.get_response().outputs:
        array = result.as_numpy(output.name)
        assert list(array.shape) == list(output.shape)
        is_text = output.datatype == "BYTES"
        found[output.name] = array[0].decode() if is_text else array[0].tolist()
    return found


def infer(client: Any, model: str, tensor: Any) -> dict[str, Any]:
    import tritonclient.grpc as triton

    names = ("output_ids", "text_output", "logprobs", "k3")
    outputs = [triton.InferRequestedOutput(name) for name in names]
    return arrays(client.infer(model, [tensor], outputs=outputs, parameters=SETTINGS))


def infer_async(client: Any, text: str) -> dict[str, Any]:
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.async_infer(
        "student",
        [text_tensor(text)],
        callback=lambda result, error: results.put((result, error)),
        parameters=SETTINGS,
        client_timeout=30,
    )
    result, error = results.get(timeout=30)
    assert error is None, error
    return arrays(result)


def stream(client: Any, text: str) -> dict[str, Any]:
    """Two requests side by side on one stream; the parts by request id."""
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: results.put((result, error)))
    for model in ("student", "teacher"):
        client.async_stream_infer(
            model,
            [text_tensor(text)],
            request_id=model,
            parameters=SETTINGS,
            enable_empty_final_response=model == "teacher",
        )
    parts: dict[str, list[dict[str, Any]]] = {"student": [], "teacher": []}
    num_running = 2
    while num_running:
        result, error = results.get(timeout=30)
        assert error is None, error
        response = result.get_response()
        parts[response.id].append(arrays(result))
        num_running -= response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    return parts


def errors(client: Any, text: str) -> dict[str, Any]:
    """What a refused request says, alone and on a stream that goes on."""
    from tritonclient.utils import InferenceServerException

    found = {}
    try:
        client.infer("student", [text_tensor(text)], parameters={"beams": 2})
    except InferenceServerException as error:
        found["unary"] = [error.status(), error.message()]
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: results.put((result, error)))
    client.async_stream_infer("student", [text_tensor(text)], parameters={"beams": 2})
    found["stream"] = results.get(timeout=30)[1].message()
    client.async_stream_infer("student", [text_tensor(text)], parameters={"stream": False})
    found["next_text"] = arrays(results.get(timeout=30)[0])["text_output"]
    client.stop_stream()
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
