"""Graphs of ONNX: their operators, named sizes and tables of constants."""
