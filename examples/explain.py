"""What `explain`, `verify` and `validate=True` say about a model with one layer that fuses and two that stay.

python examples/explain.py
python -m fusepass explain examples/explain.py:model       the same from the command line
python -m fusepass verify examples/explain.py:model
"""

import torch
from rich.console import Console
from torch import Tensor, nn

import fusepass


class Layers(nn.Module):
    """Three ways to use a softmax between two products; only the first is attention."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(heads, heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.windowed(q, k, v)
        x = self.talking_heads(x, k, v)
        return self.over_queries(x, k, v)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, window: int = 16) -> Tensor:
        """Every position sees itself and the 15 before it."""
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        visible = (j <= i) & (j > i - window)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return torch.where(visible, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v

    def talking_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The scores of all heads are mixed before the softmax, which no attention kernel does."""
        scores: Tensor = self.mix((q @ k.transpose(-2, -1)).movedim(1, -1)).movedim(-1, 1)
        return scores.softmax(-1) @ v

    def over_queries(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The softmax runs over the queries instead of the keys."""
        return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model and its arguments, for the command line."""
    torch.manual_seed(0)
    return Layers().eval(), tuple(torch.randn(2, 4, 64, 16) for _ in range(3))


def main() -> None:
    """Print what the commands print."""
    layers, inputs = model()
    console = Console()
    with torch.no_grad():
        console.print(fusepass.explain(layers, *inputs))
        console.print(
            fusepass.verify(layers, *inputs, fusepass_options={"validate": True}, fusepass_repeats=0)
        )


if __name__ == "__main__":
    main()
