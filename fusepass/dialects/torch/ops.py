"""The operation table of PyTorch: one handler per operation, whatever its spelling.

``torch.softmax``, ``x.softmax`` and ``aten.softmax.int`` share the name ``softmax`` and one handler.  The
handlers are in the modules that this one imports, by topic.  Nothing in them knows about attention.
"""

from __future__ import annotations

from fusepass.dialects.handlers import HANDLERS
from fusepass.dialects.torch import activations, joins
from fusepass.dialects.torch import creation as torch_creation
from fusepass.dialects.torch import pointwise as torch_pointwise
from fusepass.dialects.torch import products as torch_products
from fusepass.dialects.torch import reductions as torch_reductions
from fusepass.dialects.torch import softmax as torch_softmax
from fusepass.dialects.torch import views as torch_views
from fusepass.dialects.torch import windows as torch_windows
from fusepass.dialects.torch import writes as torch_writes

TABLES = (
    activations,
    joins,
    torch_creation,
    torch_pointwise,
    torch_products,
    torch_reductions,
    torch_softmax,
    torch_views,
    torch_windows,
    torch_writes,
)

__all__ = ["HANDLERS", "TABLES"]
