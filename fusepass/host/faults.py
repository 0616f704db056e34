"""Faults of the pass itself: raised if FUSEPASS_STRICT=1 is set (in tests), only noted otherwise.

After a fault the pass goes on without the call that could not be written out, or the node that could not be
read.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger("fusepass")

_warned: set[str] = set()


def strict() -> bool:
    """Are faults raised?"""
    return os.environ.get("FUSEPASS_STRICT") == "1"


def first_line(error: Exception) -> str:
    """An exception in one line, without the text that Dynamo adds."""
    error = getattr(error, "inner_exception", error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


class Faults:
    """What went wrong while one graph was read.

    Attributes:
        notes: one line for every operation that failed, for the report.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, operation: str, error: Exception) -> None:
        """Note that a handler failed, and warn about it once per process and operation.

        Raises:
            Exception: the fault itself, with the operation's name, where faults are raised.
        """
        if strict():
            error.add_note(f"while fusepass read '{operation}'")
            raise error
        note = f"'{operation}' is not looked into, because reading it failed: {first_line(error)}"
        if note not in self.notes:
            self.notes.append(note)
        if operation not in _warned:
            _warned.add(operation)
            log.warning("fusepass: %s", note, exc_info=error)


__all__ = ["Faults", "first_line", "strict"]
