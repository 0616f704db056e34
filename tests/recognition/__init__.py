"""Tests of `fusepass/recognition/`."""
