"""Tests of `fusepass/selection/`."""
