"""Tests of `fusepass/expressions/`."""
