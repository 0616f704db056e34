"""A small character-level GPT with hand-written attention and dropout, trained eagerly and fused.

    python examples/train_char_gpt.py                           under a minute on two CPU cores
    python examples/train_char_gpt.py --dropout 0 --kernel auto

The text is the documentation that ships with Python. With dropout a fused kernel draws its random numbers in
its own way, so losses agree within noise, not digit by digit. On a CPU no fused kernel has dropout. The
default there is therefore `--kernel reference`, plain mathematics as one operator, which shows that
recognition, gradients and dropout are correct, but is not fast.
"""

import argparse
import inspect
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fusepass import collect

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 64, 16


class Block(nn.Module):
    """Attention and an MLP, in the style of the usual teaching code."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(dropout)
        self.tril: Tensor
        self.register_buffer("tril", torch.tril(torch.ones(LENGTH, LENGTH)))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5
        weights = weights.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        weights = self.drop(F.softmax(weights, dim=-1))
        mixed: Tensor = self.project((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first(x))
        out: Tensor = x + self.drop(self.mlp(self.second(x)))
        return out


class CharGPT(nn.Module):
    """A decoder over characters."""

    def __init__(self, characters: int, dropout: float) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def text() -> Tensor:
    """Python's own documentation, as a tensor of character numbers."""
    source = inspect.getsource(pydoc_data.topics)
    number = {character: n for n, character in enumerate(sorted(set(source)))}
    return torch.tensor([number[character] for character in source])


def batch(data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces of the text, and the same pieces shifted by one character."""
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator).tolist()
    piece = torch.stack([data[s : s + LENGTH + 1] for s in starts])
    return piece[:, :-1], piece[:, 1:]


def train(data: Tensor, options: argparse.Namespace, seed: int, fused: bool) -> tuple[float, float, str]:
    """The mean loss of the last quarter of the steps, milliseconds per step, and what the pass did."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    model = CharGPT(int(data.max()) + 1, options.dropout)
    step: Callable[[Tensor], Tensor] = model
    if fused:
        settings = {"inner": options.inner, "kernel": options.kernel}
        step = torch.compile(model, backend="fusepass", options=settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.to(options.device)
    batches = torch.Generator().manual_seed(0)  # every run sees the same text
    losses, times = [], []
    with collect() as seen:
        for _ in range(options.steps):
            x, y = (part.to(options.device) for part in batch(data, batches))
            start = time.perf_counter()
            loss = F.cross_entropy(step(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            losses.append(loss.item())
    tail = losses[-max(1, options.steps // 4) :]
    return statistics.mean(tail), 1e3 * statistics.median(times), seen.summary() if fused else ""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="(%(default)s)")
    parser.add_argument(
        "--inner", default="aot_eager", help="what compiles the rewritten graph (%(default)s)"
    )
    kernel = "auto" if gpu else "reference"
    parser.add_argument("--kernel", default=kernel, help="the backend's option (%(default)s)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads on a CPU; the tensors are small (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train both ways; 1 if the losses differ by more than noise."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    data = text()
    table = Table(title=f"{options.steps} steps, dropout {options.dropout}, kernel {options.kernel}")
    for head in ("run", "loss of the last quarter", "median step"):
        table.add_column(head, justify="left" if head == "run" else "right")
    losses: dict[bool, list[float]] = {False: [], True: []}
    did = ""
    for seed in range(options.seeds):
        for fused in (False, True):
            loss, milliseconds, note = train(data, options, seed, fused)
            did = note or did
            losses[fused].append(loss)
            table.add_row(
                f"{'fused' if fused else 'eager'}, seed {seed}", f"{loss:.3f}", f"{milliseconds:.1f} ms"
            )
    eager, fusion = (statistics.mean(losses[fused]) for fused in (False, True))
    Console().print(table)
    print(did)
    print(f"mean loss: eager {eager:.3f}, fused {fusion:.3f}, difference {fusion - eager:+.3f}")
    return 0 if abs(fusion - eager) < 0.05 * eager else 1


if __name__ == "__main__":
    sys.exit(main())
