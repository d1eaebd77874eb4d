"""TensorRT and TensorRT-RTX: building an engine file and running it."""
