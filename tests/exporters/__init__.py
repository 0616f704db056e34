"""Tests of `exporters/`."""
