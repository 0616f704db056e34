"""Attention as papers and libraries spell it beyond the usual: relative terms, windows, other axes, einops.

Each model fuses at every site, in inference and in training, with eager's accuracy; and so do models
whose layers are hooked, shared, checkpointed or run under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusepass.reports import collector
from tests import checking

B, H, N, D = 2, 4, 12, 8
WIDTH = H * D
SCALE = D**-0.5
INF = float("inf")


def linear(inner: int, outer: int) -> nn.Linear:
    """Weights large enough for attention that is far from uniform."""
    layer = nn.Linear(inner, outer)
    nn.init.normal_(layer.weight, std=1.2 / inner**0.5)
    return layer


def noise(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def future(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def offsets(n: int) -> Tensor:
    """``j - i``."""
    return torch.arange(n)[None, :] - torch.arange(n)[:, None]


class Base(nn.Module):
    """Projections around `attend`, which gets queries, keys and values ``[B, H, N, D]``."""

    shape: tuple[int, ...] = (B, N, WIDTH)
    sites = 1

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.prepare()

    def prepare(self) -> None:
        """Make parameters."""

    def heads(self, x: Tensor) -> list[Tensor]:
        b, n, _ = x.shape
        return list(self.project(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attend(*self.heads(x)).transpose(1, 2).reshape(x.shape))
        return out


# ------------------------------------------------------------------------------- normalised queries and keys


class Temperature(Base):
    """Cosine attention with a temperature for each head."""

    def prepare(self) -> None:
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) * 4 + 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v


class ClampedTemperature(Base):
    """Swin v2: the exponential of a clamped logarithm, and a bias after it (arXiv 2111.09883)."""

    def prepare(self) -> None:
        self.log_scale = nn.Parameter(torch.full((H, 1, 1), math.log(10.0)))
        self.bias = noise(H, N, N)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        s = s * torch.clamp(self.log_scale, max=math.log(100.0)).exp()
        return (s + self.bias.unsqueeze(0)).softmax(-1) @ v


class DividedByTemperature(Base):
    def prepare(self) -> None:
        self.temperature = nn.Parameter(torch.tensor(2.7))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / self.temperature).softmax(-1) @ v


# ------------------------------------------------------------------------------- relative positions


class TransformerXL(Base):
    """Sequence first, scores ``[i, j, b, n]``, a shift by padding and viewing (arXiv 1901.02860)."""

    def prepare(self) -> None:
        self.r, self.u, self.w = noise(N, H, D), noise(H, D), noise(H, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
        content = torch.einsum("ibnd,jbnd->ijbn", q + self.u, k)
        position = torch.einsum("ibnd,jnd->ijbn", q + self.w, self.r)
        padded = torch.cat([position.new_zeros(N, 1, B, H), position], 1)
        position = padded.view(N + 1, N, B, H)[1:].view_as(position)
        s = ((content + position) * SCALE).masked_fill(future(N)[:, :, None, None], -1e30)
        return torch.einsum("ijbn,jbnd->ibnd", F.softmax(s, dim=1), v).permute(1, 2, 0, 3)


class XLNet(Base):
    """Twice as many relative positions, shifted by reshaping and selected (arXiv 1906.08237)."""

    def prepare(self) -> None:
        self.r, self.u, self.w = noise(2 * N, H, D), noise(H, D), noise(H, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
        content = torch.einsum("ibnd,jbnd->bnij", q + self.u, k)
        x = torch.einsum("ibnd,jnd->bnij", q + self.w, self.r)
        x = x.reshape(B, H, 2 * N, N)[:, :, 1:, :].reshape(B, H, N, 2 * N - 1)
        position = torch.index_select(x, 3, torch.arange(N))
        w = F.softmax((content + position) * SCALE, dim=3)
        return torch.einsum("bnij,jbnd->ibnd", w, v).permute(1, 2, 0, 3)


class DeBERTa(Base):
    """Content to position and position to content, gathered by clamped offsets (arXiv 2006.03654)."""

    def prepare(self) -> None:
        self.keys, self.queries = noise(H, 8, D), noise(H, 8, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale, rel = 1 / math.sqrt(3 * D), -offsets(N)
        s = q @ (k.mT * scale)
        forth = (rel + 4).clamp(0, 7).expand(B, H, N, N)
        back = (4 - rel).clamp(0, 7).expand(B, H, N, N)
        s = s + torch.gather(q @ self.keys.mT, -1, forth) * scale
        s = s + torch.gather(k @ self.queries.mT, -1, back).mT * scale
        return s.softmax(-1) @ v


class RelativeKeys(Base):
    """Embeddings of clamped offsets, in a product with the queries (arXiv 1803.02155)."""

    def prepare(self) -> None:
        self.embedding = nn.Embedding(7, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rel = self.embedding(offsets(q.shape[2]).clamp(-3, 3) + 3)
        s = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, rel)
        out: Tensor = (s * SCALE).softmax(-1) @ v
        return out


class Decomposed(Base):
    """Separate rows and columns of an image, on scores viewed as ``[.., h, w, h, w]`` (arXiv 2112.01526)."""

    side = 4
    shape = (B, side * side, WIDTH)

    def prepare(self) -> None:
        self.rows, self.columns = noise(2 * self.side - 1, D), noise(2 * self.side - 1, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.side
        q, k, v = (t.reshape(B * H, n * n, D) for t in (q, k, v))
        at, image = offsets(n) + n - 1, q.reshape(B * H, n, n, D)
        rows = torch.einsum("bhwc,hkc->bhwk", image, self.rows[at])
        columns = torch.einsum("bhwc,wkc->bhwk", image, self.columns[at])
        s = (q * SCALE @ k.mT).view(-1, n, n, n, n)
        s = s + rows[:, :, :, :, None] + columns[:, :, :, None, :]
        out: Tensor = (s.view(-1, n * n, n * n).softmax(-1) @ v).view(B, H, n * n, D)
        return out


class Forgetting(Base):
    """Cumulated gates as a bias that grows with the distance (arXiv 2503.02130)."""

    def prepare(self) -> None:
        self.gate = linear(D, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        f = F.logsigmoid(self.gate(k)).squeeze(-1).cumsum(-1)
        s = q @ k.mT * SCALE + (f[..., :, None] - f[..., None, :])
        out: Tensor = s.masked_fill(future(N), -INF).softmax(-1) @ v
        return out


# ------------------------------------------------------------------------------- windows and blocks


class ShiftedWindows(Base):
    """Swin: windows in the batch, a table of biases, and a mask for each window (arXiv 2103.14030)."""

    shape = (B, 8, 8, WIDTH)

    def prepare(self) -> None:
        self.table = noise(49, H)
        y, x = torch.arange(16) // 4, torch.arange(16) % 4
        self.index: Tensor
        self.register_buffer("index", (y[:, None] - y + 3) * 7 + x[:, None] - x + 3)
        part = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        region = part[:, None] * 3 + part
        region = region.view(2, 4, 2, 4).transpose(1, 2).reshape(4, 16)
        apart = region[:, None] != region[:, :, None]
        self.apart: Tensor
        self.register_buffer("apart", torch.zeros(apart.shape).masked_fill(apart, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x, (-2, -2), (1, 2))
        windows = x.view(B, 2, 4, 2, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        q, k, v = self.heads(windows)
        bias = self.table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1).contiguous()
        s = q * SCALE @ k.mT + bias.unsqueeze(0)
        s = s.view(B, 4, H, 16, 16) + self.apart.unsqueeze(1).unsqueeze(0)
        w = s.view(-1, H, 16, 16).softmax(-1)
        out = self.out((w @ v).transpose(1, 2).reshape(-1, 16, WIDTH))
        out = out.view(B, 2, 2, 4, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return torch.roll(out, (2, 2), (1, 2))


class Blocks(Base):
    """Causal within blocks of four, which are one more batch dimension."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(B, H, N // 4, 4, D) for t in (q, k, v))
        s = torch.einsum("bhwid,bhwjd->bhwij", q, k) * SCALE
        w = s.masked_fill(future(4), -INF).softmax(-1)
        return torch.einsum("bhwij,bhwjd->bhwid", w, v).reshape(B, H, N, D)


class LookBack(Base):
    """Each block also sees the block before it; masks compare positions, and -1 stands for no key."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = N // 4
        at = torch.arange(N).view(blocks, 4)
        q, k, v = (t.reshape(B, H, blocks, 4, D) for t in (q, k, v))
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], 3) for t in (k, v))
        keys = torch.cat([F.pad(at, (0, 0, 1, 0), value=-1)[:-1], at], 1)
        hidden = (keys[:, None, :] == -1) | (keys[:, None, :] > at[:, :, None])
        s = torch.einsum("bhwid,bhwjd->bhwij", q, k) * SCALE
        s = s.masked_fill(hidden, -torch.finfo(torch.float32).max)
        return torch.einsum("bhwij,bhwjd->bhwid", s.softmax(-1), v).reshape(B, H, N, D)


class Strided(Base):
    """Tokens attend to those whose positions differ from theirs by a multiple of three."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b h (n s) d -> b h s n d", s=3) for t in (q, k, v))
        out: Tensor = rearrange((q @ k.mT * SCALE).softmax(-1) @ v, "b h s n d -> b h (n s) d")
        return out


class StridedMask(Base):
    """The same pattern and the neighbours, as a mask (arXiv 1904.10509)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        back = -offsets(N)
        seen = (back >= 0) & ((back % 3 == 0) | (back < 2))
        out: Tensor = (q @ k.mT * SCALE).masked_fill(~seen, -INF).softmax(-1) @ v
        return out


class Neighbourhood(Base):
    """Five neighbours of each query, by `unfold`: one query against its own keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 2, 2)).unfold(2, 5, 1) for t in (k, v))
        w = (torch.einsum("bhnd,bhndw->bhnw", q, k) * SCALE).softmax(-1)
        return torch.einsum("bhnw,bhndw->bhnd", w, v)


# ------------------------------------------------------------------------------- other axes


class Channels(Base):
    """Channels attend to channels, under a temperature (XCiT, arXiv 2106.09681)."""

    def prepare(self) -> None:
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) * 4 + 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out: Tensor = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return out.transpose(-2, -1)


class Axial(Base):
    """Along the rows of an image, and along its columns."""

    shape = (B, 5, 6, WIDTH)
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(B, 5, 6, 3, H, D).unbind(3)
        rows = (torch.einsum("bhwnd,bhvnd->bhnwv", q, k) * SCALE).softmax(-1)
        columns = (torch.einsum("bhwnd,bgwnd->bwnhg", q, k) * SCALE).softmax(-1)
        along = torch.einsum("bhnwv,bhvnd->bhwnd", rows, v)
        across = torch.einsum("bwnhg,bgwnd->bhwnd", columns, v)
        out: Tensor = self.out((along + across).flatten(3))
        return out


class Convolved(nn.Module):
    """SAGAN: softmax over the first axis, values first (arXiv 1805.08318)."""

    shape = (B, WIDTH, 4, 4)
    sites = 1

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Conv2d(WIDTH, c, 1) for c in (D, D, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        f, g, h = (m(x).flatten(2) for m in (self.f, self.g, self.h))
        beta = F.softmax(torch.bmm(f.permute(0, 2, 1).contiguous(), g), dim=1)
        return torch.bmm(h, beta).view_as(x) + x


# ------------------------------------------------------------------------------- einops


class MergedHeads(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=H) for t in self.project(x).chunk(3, -1))
        s = torch.einsum("b i d, b j d -> b i j", q, k) * SCALE
        seen = repeat(torch.arange(N) < N - 3, "j -> (b h) () j", b=B, h=H)
        w = s.masked_fill(~seen, -torch.finfo(torch.float32).max).softmax(-1)
        out: Tensor = self.out(rearrange(w @ v, "(b h) n d -> b n (h d)", h=H))
        return out


class HeadsLast(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.project(x), "b n (t d h) -> t b n h d", t=3, h=H)
        s = torch.einsum("b i h d, b j h d -> b i j h", q, k) * SCALE
        w = s.masked_fill(future(N)[None, :, :, None], -1e30).softmax(2)
        return rearrange(torch.einsum("b i j h, b j h d -> b i h d", w, v), "b n h d -> b n (h d)")


class Grouped(Base):
    """Groups of query heads next to their key heads, filled in place."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split([WIDTH, WIDTH, WIDTH], -1)
        q = rearrange(q, "b n (h g d) -> b g h n d", g=2, h=2)
        k, v = (rearrange(t[..., : WIDTH // 2], "b n (h d) -> b h n d", h=2) for t in (k, v))
        s = einsum(q, k, "b g h n d, b h s d -> b g h n s") * SCALE
        s.masked_fill_(future(N), torch.finfo(torch.float32).min)
        out = einsum(F.softmax(s, -1), v, "b g h n s, b h s d -> b g h n d")
        merged: Tensor = rearrange(out, "b g h n d -> b n (h g d)")
        return merged


class RepeatedHeads(Base):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (repeat(t[:, :2], "b h n d -> b (h r) n d", r=2) for t in (k, v))
        s = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
        return torch.einsum("b h i j, b h j d -> b h i d", s.softmax(-1), v)


class OneKeyHead(Base):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, 0], v[:, 0]
        s = einsum(q * SCALE, k, "b h i d, b j d -> b h i j")
        s = s - s.amax(-1, keepdim=True).detach()
        out: Tensor = einsum(s.softmax(-1), v, "b h i j, b j d -> b h i d")
        return out


# ------------------------------------------------------------------------------- sums of softmaxes


class Differential(Base):
    """The difference of two softmaxes, the second times a factor of exponentials (arXiv 2410.05258)."""

    sites = 2

    def prepare(self) -> None:
        self.lambdas = noise(4, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q1, k1, q2, k2 = self.lambdas.mul(0.3).unbind()
        factor = (q1 * k1).sum(-1).float().exp() - (q2 * k2).sum(-1).float().exp() + 0.8
        s = torch.nan_to_num((q * SCALE) @ k.transpose(-1, -2))
        s += torch.zeros(N, N).masked_fill(future(N), -INF)
        w = F.softmax(s, -1, dtype=torch.float32).type_as(q).view(B, H // 2, 2, N, N)
        w = w[:, :, 0] - factor.type_as(q) * w[:, :, 1]
        v = v.transpose(1, 2).reshape(B, N, H // 2, 2 * D).transpose(1, 2)
        out: Tensor = w @ v
        return out


class GatedSum(Base):
    """Two patterns of attention, mixed in each head by a gate that is itself a softmax."""

    sites = 2

    def prepare(self) -> None:
        self.gate, self.second = noise(H, 2), linear(D, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = self.gate.softmax(-1)[:, :, None, None].unbind(1)
        near = (q @ k.mT * SCALE).masked_fill(offsets(N).abs() > 3, -INF).softmax(-1)
        far = (self.second(q) @ k.mT * SCALE).softmax(-1)
        out: Tensor = (first * near + far * second) @ v
        return out


class GateOfExponentials(Base):
    """One pattern whose heads are scaled by exponentials."""

    def prepare(self) -> None:
        self.gate = noise(H, 1, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = (self.gate.mul(0.5).exp() * (q @ k.mT * SCALE).softmax(-1)) @ v
        return out


MODELS: list[Any] = [
    Differential,
    GatedSum,
    GateOfExponentials,
    Temperature,
    ClampedTemperature,
    DividedByTemperature,
    TransformerXL,
    XLNet,
    DeBERTa,
    RelativeKeys,
    Decomposed,
    Forgetting,
    ShiftedWindows,
    Blocks,
    LookBack,
    Strided,
    StridedMask,
    Neighbourhood,
    Channels,
    Axial,
    Convolved,
    MergedHeads,
    HeadsLast,
    Grouped,
    RepeatedHeads,
    OneKeyHead,
]


def run(model: nn.Module, fn: Callable[..., Tensor], x: Tensor, train: bool) -> checking.Run:
    """Output, and gradients of the parameters and the input."""
    model.zero_grad()
    leaf = x.clone().requires_grad_(train)
    with collector.collect() as seen, torch.set_grad_enabled(train):
        out = fn(leaf)
        if train:
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)).sum().backward()
    named = {"input": leaf, **dict(model.named_parameters())}
    grads = {name: t.grad.clone() for name, t in named.items() if t.grad is not None}
    assert not [note for graph in seen.graphs for note in graph.notes]
    return checking.Run(seen.sites, out.detach(), grads)


def compare(model: Any, kernel: str, train: bool, inner: str = "eager", **kwargs: Any) -> checking.Run:
    """Compiled against eager, and both against float64."""
    x = torch.randn(model.shape, generator=torch.Generator().manual_seed(1))
    got = run(model, checking.compiled(model, kernel, inner, **kwargs), x, train)
    eager = run(model, model, x, train)
    exact = run(model.double(), model, x.double(), train)
    assert got.sites and all(site.fused for site in got.sites), got.sites
    checking.assert_same_accuracy(got, eager, exact)
    return got


@pytest.mark.parametrize(("kernel", "train"), [("auto", False), ("auto", True), ("reference", False)])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_spelling(kind: Any, kernel: str, train: bool) -> None:
    assert len(compare(kind(), kernel, train).sites) == kind.sites


# ------------------------------------------------------------------------------- surroundings


class Stack(nn.Module):
    """Two layers with relative keys, called as a subclass says."""

    shape = (B, N, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RelativeKeys() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.run(layer, x)
        return x

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]


class Checkpointed(Stack):
    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointedReentrant(Stack):
    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=True)  # type: ignore[no-any-return]


class Shared(Stack):
    """One layer, three times."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layers[0](x) * 0.5
        return x


class Hooked(Stack):
    """Hooks of modules, before and after, that change what passes through."""

    def __init__(self) -> None:
        super().__init__()
        first, second = self.layers
        first.register_forward_pre_hook(lambda module, given: (given[0] * 1.5,))
        first.register_forward_hook(lambda module, given, out: out * 0.5)
        second.get_submodule("project").register_forward_hook(lambda module, given, out: out + 0.25)


class TensorHooked(Stack):
    """A hook on a layer's result, which is not a hook on its weights."""

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * 0.5)
        return out


class Autocast(Stack):
    """Projections and products in bfloat16, the softmax in float32."""

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = layer(x)
        return out.float() if x.dtype is torch.float32 else out


class NoAutocast(Stack):
    """A layer that switches autocast off for itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return layer(x)  # type: ignore[no-any-return]


SURROUNDED: dict[Any, int] = {
    Checkpointed: 2,
    CheckpointedReentrant: 2,
    Shared: 3,
    Hooked: 2,
    TensorHooked: 2,
    Autocast: 2,
    NoAutocast: 2,
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", SURROUNDED, ids=lambda kind: kind.__name__)
def test_surroundings(kind: Any, train: bool) -> None:
    whole = kind is not CheckpointedReentrant
    got = compare(kind(), "auto", train, "aot_eager", fullgraph=whole)
    assert len(got.sites) == SURROUNDED[kind]
