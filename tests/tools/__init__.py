"""Tests of `fusepass/tools/`."""
