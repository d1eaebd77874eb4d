"""INT8 on a GPU by cuDNN's fused convolutions and our kernels."""
