"""`fusepass.export_onnx`: hand-written attention as ONNX's Attention operator, checked by running the file.

python examples/export_onnx.py
"""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import fusepass


class Attention(nn.Module):
    """Causal attention with two key/value heads for four query heads, over `[batch, length, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.kv(x).chunk(2, dim=-1))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / 4
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


def main() -> None:
    """Export with a dynamic length, and show the report."""
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 16, 64)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.onnx"
        report = fusepass.export_onnx(model, (x,), path, dynamic_shapes=shapes)
    Console(width=120).print(report)


if __name__ == "__main__":
    main()
