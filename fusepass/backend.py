"""The backend under the path that the entry point names; it stays the same, whatever moves behind it."""

from fusepass.compilation.backend import fusepass

__all__ = ["fusepass"]
