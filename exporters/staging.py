"""Files that are written whole or not at all, whatever their format.

A model is written to a folder beside its target and moved there with ``os.replace`` when it is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelError(ValueError):
    """A model that cannot be read or written: says what is wrong with it, and what to do."""


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a model to, beside its target; when the block ends without error its files move there.

    Raises:
        ModelError: the target's folder does not exist.
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
        for file in files:  # the model last: it names the others
            os.replace(file, target.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["ModelError", "staged"]
