"""The test suite. It is a package so that `mypy` and `pytest` agree on module names."""
