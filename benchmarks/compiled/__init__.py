"""What the compiler says about Triton kernels without a GPU: compiled, never run."""
