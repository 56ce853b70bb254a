"""The Open Inference Protocol: `grpc_service.proto` and its stubs (see `serve.rpc.triton`)."""
