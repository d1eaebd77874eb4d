"""SSD-ResNet34 in PyTorch and its export to ONNX. The only room that imports torch."""
