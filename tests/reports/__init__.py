"""Tests of `fusepass/reports/`."""
