"""`fusepass.fuse` on graphs: an exported program, saved and loaded again, and a `symbolic_trace`.

python examples/exported.py
"""

import io

import torch
from torch import Tensor, nn

import fusepass


class Attention(nn.Module):
    """Causal attention over `[batch, length, width]`."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.inner, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.inner(x).chunk(3, dim=-1))
        scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        future = torch.full(scores.shape[-2:], float("-inf")).triu(1)
        mixed = torch.matmul(torch.softmax(scores + future, dim=-1), v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Plain(nn.Module):
    """A module that `symbolic_trace` can follow: no sizes in Python."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) / 8, dim=-1) @ v


def calls(graph: torch.fx.Graph) -> list[str]:
    """The operations of a graph."""
    return [
        getattr(n.target, "__name__", str(n.target))
        for n in graph.nodes
        if n.op in ("call_function", "call_method")
    ]


def main() -> None:
    """Fuse, save, load, compare."""
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 16, 64)

    program = torch.export.export(model, (x,))
    fused = fusepass.fuse(program)
    print("exported:", *calls(program.graph))
    print("fused:   ", *calls(fused.graph))

    file = io.BytesIO()
    torch.export.save(fused, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    print(f"saved and loaded, difference {(loaded(x) - model(x)).abs().max().item():.1e}")

    traced = torch.fx.symbolic_trace(Plain())
    inputs = torch.randn(3, 2, 4, 16, 64).unbind()
    graph = fusepass.fuse(traced, *inputs)
    print("traced:  ", *calls(traced.graph))
    print("fused:   ", *calls(graph.graph))
    print(f"difference {(graph(*inputs) - traced(*inputs)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
