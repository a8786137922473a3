"""The gRPC server of proteus_fast, and its client (which needs no torch)."""
