"""Tests of `fusepass/specification/`."""
