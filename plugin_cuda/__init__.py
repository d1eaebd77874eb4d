"""NMS_OPT_TRT on NVIDIA GPUs: CUDA kernels behind a C ABI, and the TensorRT plugin on top of it."""
