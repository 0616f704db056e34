"""ONNX: exports PyTorch models with fused attention operators, and fuses attention in existing files."""
