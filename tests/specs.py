"""Hand-made specifications, for tests of the code that reads them."""

from dataclasses import replace
from typing import Any

import torch

from fusepass.specification.attention import Attention


def specification(*scores: Any, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Attention:
    """Four heads on two, 64 queries and keys, head size 64, in ``dtype``; ``more`` are other fields."""
    softmax = torch.promote_types(dtype, torch.float32)
    default = Attention(2, 4, 2, 64, 64, 64, 64, dtype, scores, softmax_dtype=softmax, out_dtype=dtype)
    return replace(default, **more)
