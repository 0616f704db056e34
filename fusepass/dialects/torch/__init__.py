"""Graphs of PyTorch: their calls, views, storages, writes and inner graphs."""
