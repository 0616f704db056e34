"""Files that are written completely or not at all, in any format.

A model is written to a folder next to its target, and moved into place with ``os.replace`` once complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelError(ValueError):
    """A model that cannot be read or written; the message says what is wrong, and what to do."""


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write a model to; if the block ends without error, the files move to their target.

    Raises:
        ModelError: the target's folder does not exist or cannot be written to, or the target is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {str(path)!r}: there is no folder {str(target.parent)!r}")
    if target.is_dir():
        raise ModelError(f"cannot write {str(path)!r}: it is a folder")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    try:
        yield folder / target.name
        files = sorted(folder.iterdir(), key=lambda f: f.name == target.name)
        for file in files:  # the model comes last, because it names the other files
            os.replace(file, target.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["ModelError", "staged"]
