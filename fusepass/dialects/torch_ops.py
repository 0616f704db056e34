"""The operation table of PyTorch: one handler per operation, whatever its spelling.

``torch.softmax``, ``x.softmax`` and ``aten.softmax.int`` share the name ``softmax`` and one handler.  All are
in the modules that this one imports, by what they do.  Nothing in them knows attention.
"""

from __future__ import annotations

from fusepass.dialects import (
    joins,
    torch_creation,
    torch_pointwise,
    torch_products,
    torch_reductions,
    torch_softmax,
    torch_views,
)
from fusepass.dialects.handlers import HANDLERS

TABLES = (
    joins,
    torch_creation,
    torch_pointwise,
    torch_products,
    torch_reductions,
    torch_softmax,
    torch_views,
)

__all__ = ["HANDLERS", "TABLES"]
