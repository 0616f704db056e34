"""A hand-written attention layer, compiled with `backend="fusepass"` and compared with itself.

python examples/backend.py
python examples/backend.py --inner inductor --kernel reference
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusepass import collect


class Attention(nn.Module):
    """Causal attention with grouped heads, as many models write it."""

    def __init__(self, width: int = 64, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, kv_heads * self.head) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.head).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.head).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / self.head**0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, report, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--inner", default="aot_eager", help="what compiles the rewritten graph (%(default)s)"
    )
    parser.add_argument("--kernel", default="auto", help="(%(default)s)")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 128, 64)
    fast = torch.compile(model, backend="fusepass", options=vars(options))
    with torch.no_grad(), collect() as seen:
        difference = (fast(x) - model(x)).abs().max().item()
    print(seen)
    print(f"largest difference from eager: {difference:.1e}")


if __name__ == "__main__":
    main()
