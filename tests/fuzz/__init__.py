"""A fuzzer: random attention programs, compiled and compared with eager PyTorch."""
