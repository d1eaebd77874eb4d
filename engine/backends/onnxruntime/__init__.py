"""ONNX Runtime, on the CPU and on a GPU."""
