"""ONNX models: PyTorch models written out with fused attention operators, and files of any exporter fused."""
