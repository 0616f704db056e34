"""Tests of `fusepass/dialects/`."""
