"""The pass in somebody else's `torch.compile(...)`, without editing their code.

    python examples/enable.py

The same without a line of code is `python -m fusepass run their_script.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import fusepass


def their_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written long ago, by somebody else."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def their_program(q: Tensor) -> Tensor:
    """A program that calls `torch.compile` itself."""
    fast: Callable[..., Tensor] = torch.compile(their_attention, dynamic=False)
    return fast(q, q, q)


def main() -> None:
    """Run the program with the pass, and then without it."""
    q = torch.randn(2, 4, 64, 32)
    with fusepass.enabled(), fusepass.collect() as seen:
        fused = their_program(q)
    print(f"with the pass:    {seen.summary()}")

    torch.compiler.reset()
    with fusepass.collect() as seen:
        plain = their_program(q)
    print(f"without the pass: {len(seen.graphs)} graphs seen")
    print(f"largest difference: {(fused - plain).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
