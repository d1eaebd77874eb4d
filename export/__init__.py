"""Detectors in PyTorch and their export to ONNX. The only room that imports torch."""
