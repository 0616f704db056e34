"""The backend, at the path that the entry point names; this path is stable."""

from fusepass.compilation.backend import fusepass

__all__ = ["fusepass"]
