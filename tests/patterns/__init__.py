"""Tests of `patterns/`."""
