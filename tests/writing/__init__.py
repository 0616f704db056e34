"""Tests of `fusepass/writing/`."""
