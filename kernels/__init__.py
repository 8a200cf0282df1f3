"""The operators and their Triton kernels."""
