"""Tests of `fusepass/compilation/`."""
