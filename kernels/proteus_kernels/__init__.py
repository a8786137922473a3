"""GPU operations of proteus-fast: plain torch references and, beside each, its Triton kernel."""
