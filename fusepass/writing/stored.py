"""An operator whose result a compiler must keep in memory."""

import torch
from torch import Tensor


@torch.library.custom_op("fusepass::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """A copy of ``x``, of any shape, that a compiler must keep in memory.

    Inductor's FlexAttention reads its buffers from memory, in a layout that must be known beforehand.  It
    fails, or reads memory that was never written, if a buffer is computed in the same graph.
    """
    return x.contiguous().clone()


@stored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


stored.register_autograd(lambda ctx, grad: grad)

stored_op = torch.ops.fusepass.stored.default


__all__ = ["stored", "stored_op"]
