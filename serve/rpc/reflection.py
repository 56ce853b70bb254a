"""gRPC server reflection: v1, which tools ask for first, and v1alpha, which older ones know.

grpcio-reflection 1.75 has v1alpha alone. The two differ in their names only (gRPC's
doc/server-reflection.md), so its servicer answers both.
"""

from __future__ import annotations

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection,
    reflection_pb2,
    reflection_pb2_grpc,
)

_V1ALPHA = reflection.SERVICE_NAME
_V1 = _V1ALPHA.replace("v1alpha", "v1")
REFLECTION_NAMES = (_V1, _V1ALPHA)


def reflect(server: grpc.aio.Server, *services: str) -> None:
    """Let clients list these services of a listener, those of reflection, and their messages."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION_NAMES))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_V1, {"ServerReflectionInfo": handler}),)
    )


def _describe_v1() -> None:
    """Have the descriptors of v1, for tools that want those of every service that is listed."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(_V1)
    except KeyError:
        alpha = FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
        pool.Add(text_format.Parse(text, FileDescriptorProto()))
