"""The public front: REST to gRPC and back, byte for byte; it has no business rule and judges no credential or limit."""
