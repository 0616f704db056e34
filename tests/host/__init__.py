"""Tests of `fusepass/host/`."""
