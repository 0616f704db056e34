"""Tests of `fusepass/kernels/`."""
