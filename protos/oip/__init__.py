"""The Open Inference Protocol: `grpc_service.proto` and its stubs (see `serve.open_inference`)."""
