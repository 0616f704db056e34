"""What surrounds attention: graph breaks, checkpointing, autocast, no_grad regions, torch's own modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusepass.reports import collector
from tests import checking

B, S, H, D = 2, 6, 2, 8
WIDTH = H * D
KERNELS = ("reference", "auto")


class Block(nn.Module):
    """One layer of hand-written causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        s = q @ k.transpose(-2, -1) / D**0.5
        seen = torch.ones(S, S, dtype=torch.bool).tril()
        w = torch.softmax(s.masked_fill(~seen, float("-inf")), -1)
        out: Tensor = w @ v
        return out.transpose(1, 2).reshape(B, S, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attend(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Layers, called in the way that a subclass defines."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x)
        return x

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]


class Checkpointed(Model):
    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]


class Broken(Model):
    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return layer(x)  # type: ignore[no-any-return]


class BrokenInside(Model):
    """The graph breaks between the scores and the softmax: nothing can be fused; results must be right."""

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        s = x @ x.transpose(-2, -1)
        torch._dynamo.graph_break()
        return torch.softmax(s, -1) @ x


class WithoutGradient(Model):
    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = layer(x)
        return x + frozen  # type: ignore[no-any-return]


class Autocast(Model):
    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        return y.float()  # type: ignore[no-any-return]


class Conditional(Model):
    """`torch.cond` has two inner graphs."""

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, layer, lambda y: y * 2, (x,))  # type: ignore[no-any-return]


class OwnSoftmax(torch.autograd.Function):
    """A masked softmax that defines its own gradient; rows that see no key have none."""

    @staticmethod
    def forward(ctx, scores, hidden):  # type: ignore[no-untyped-def]
        w = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        ctx.save_for_backward(w)
        return w

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (w,) = ctx.saved_tensors
        return w * (grad - (grad * w).sum(-1, keepdim=True)), None


class OwnAttention(torch.autograd.Function):
    """Complete attention that recomputes its weights in its own backward."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v)
        return torch.softmax(q @ k.mT / D**0.5, -1) @ v

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v = ctx.saved_tensors
        w = torch.softmax(q @ k.mT / D**0.5, -1)
        given = grad @ v.mT
        scores = w * (given - (given * w).sum(-1, keepdim=True)) / D**0.5
        return scores @ k, scores.mT @ q, w.mT @ grad


class WithOwnGradient(Model):
    """Layers whose attention is, or contains, a `torch.autograd.Function`."""

    def __init__(self, whole: bool) -> None:
        super().__init__(1)
        self.whole = whole

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in layer.project(x).chunk(3, -1))  # type: ignore[operator]
        if self.whole:
            out: Tensor = OwnAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        else:
            hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
            out = OwnSoftmax.apply(q @ k.mT / D**0.5, hidden) @ v  # type: ignore[no-untyped-call]
        return out.transpose(1, 2).reshape(B, S, WIDTH)


def run(model: nn.Module, call: Callable[..., Tensor], x: Tensor, train: bool) -> checking.Run:
    """Output, and gradients of the parameters and of the input."""
    model.zero_grad()
    leaf = x.clone().requires_grad_(train)
    with collector.collect() as seen, torch.set_grad_enabled(train):
        out = call(leaf)
        if train:
            out.square().sum().backward()
    named = {"input": leaf, **dict(model.named_parameters())}
    grads = {name: t.grad.clone() for name, t in named.items() if t.grad is not None}
    return checking.Run(seen.sites, out.detach(), grads)


def compare(model: nn.Module, kernel: str, train: bool, **kwargs: bool) -> checking.Run:
    """Compare a compiled model with itself in eager mode and in float64."""
    x = torch.randn(B, S, WIDTH, generator=torch.Generator().manual_seed(1))
    fn = checking.compiled(model, kernel, "aot_eager", **{"fullgraph": True, **kwargs})
    got, eager = run(model, fn, x, train), run(model, model, x, train)
    exact = run(model.double(), model, x.double(), train)
    checking.assert_same_accuracy(got, eager, exact)
    return got


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model", [Model, Checkpointed, WithoutGradient], ids=lambda m: m.__name__)
def test_one_graph(model: type[Model], kernel: str, train: bool) -> None:
    got = compare(model(), kernel, train)
    assert len(got.sites) == 2
    assert all(s.fused and "causal" in s.spec for s in got.sites), got.sites


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_graph_breaks_between_layers(kernel: str, train: bool) -> None:
    got = compare(Broken(), kernel, train, fullgraph=False)
    assert got.sites
    assert all(s.fused and "causal" in s.spec for s in got.sites), got.sites


@pytest.mark.parametrize("kernel", KERNELS)
def test_graph_break_inside_an_attention(kernel: str) -> None:
    got = compare(BrokenInside(), kernel, train=True, fullgraph=False)
    assert not any(s.fused for s in got.sites)


@pytest.mark.parametrize("kernel", KERNELS)
def test_branches_of_a_conditional_are_entered(kernel: str) -> None:
    got = compare(Conditional(), kernel, train=False)
    assert len(got.sites) == 2
    assert all(s.fused and "causal" in s.spec for s in got.sites), got.sites


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_softmax_with_its_own_gradient_stays_in_training(kernel: str) -> None:
    got = compare(WithOwnGradient(whole=False), kernel, train=True)
    assert [s.fused for s in got.sites] == [False]
    assert "autograd.Function" in (got.site.reason or "")


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_attention_with_its_own_gradient(kernel: str, train: bool) -> None:
    """The forward is fused; the backward, which is not attention, remains the function's own."""
    got = compare(WithOwnGradient(whole=True), kernel, train)
    assert [s.fused for s in got.sites][:1] == [True], got.sites
    assert sum(s.fused for s in got.sites) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_softmax_with_its_own_gradient_is_read_without_gradients(kernel: str) -> None:
    got = compare(WithOwnGradient(whole=False), kernel, train=False)
    assert [(s.fused, "causal" in s.spec) for s in got.sites] == [(True, True)]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_autocast(kernel: str, train: bool, outside: bool) -> None:
    """Inside the model or around the call: eager's dtypes, and no more than twice its error."""
    model = Model() if outside else Autocast()
    x = torch.randn(B, S, WIDTH, generator=torch.Generator().manual_seed(1))
    fn = checking.compiled(model, kernel, "aot_eager")

    def under_autocast(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(t: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
                return call(t)

        return wrapped

    got, eager = (run(model, under_autocast(f), x, train) for f in (fn, model))
    plain = Model().double()
    exact = run(plain, plain, x.double(), train)
    assert len(got.sites) == 2
    assert all(s.fused for s in got.sites), got.sites
    coarse = torch.finfo(torch.bfloat16).eps
    assert got.out.dtype is eager.out.dtype
    for name in ("output", *eager.grads):
        mine, theirs, true = (r.out if name == "output" else r.grads[name] for r in (got, eager, exact))
        error, usual = ((t.double() - true).abs().max().item() for t in (mine, theirs))
        assert error <= 2 * usual + coarse * true.abs().max().item(), name


def test_the_mode_outside_decides() -> None:
    """The same compiled function with and without gradients."""
    model = Model(1)
    fn = checking.compiled(model, "auto", "aot_eager")
    x = torch.randn(B, S, WIDTH)
    for train in (True, False, True):
        got, eager = run(model, fn, x, train), run(model, model, x, train)
        torch.testing.assert_close(got.out, eager.out)
        assert set(got.grads) == set(eager.grads)


# ------------------------------------------------------------------------------- torch's own modules


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` called as most models call it."""

    def __init__(self, weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = weights
        self.attention = nn.MultiheadAttention(WIDTH, H, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=hidden, need_weights=self.weights)[0]  # type: ignore[no-any-return]


class Functional(SelfAttention):
    """`F.multi_head_attention_forward`; its averaged weights are not read."""

    def forward(self, x: Tensor) -> Tensor:
        m = self.attention
        t = x.transpose(0, 1)
        results = F.multi_head_attention_forward(
            t, t, t, WIDTH, H, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0,
            m.out_proj.weight, m.out_proj.bias, training=self.training, need_weights=self.weights,
        )  # fmt: skip
        return results[0].transpose(0, 1)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", [False, True], ids=["without weights", "weights unread"])
@pytest.mark.parametrize("kind", [SelfAttention, Functional], ids=lambda k: k.__name__)
def test_multi_head_attention(kind: type[SelfAttention], weights: bool, kernel: str, train: bool) -> None:
    got = compare(kind(weights), kernel, train)
    assert len(got.sites) == 1
    assert got.site.fused, got.site.reason
    assert kind is Functional or "causal" in got.site.spec, got.site.spec


def test_weights_that_are_read_keep_their_attention() -> None:
    class Reads(SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            out, weights = self.attention(x, x, x, need_weights=True)
            return torch.cat([out, weights @ x], -1)

    got = compare(Reads(True), "reference", train=False)
    assert all(not s.fused or s.reason for s in got.sites), got.sites


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grouped", [False, True], ids=["equal", "grouped"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_sdpa_that_is_there_already(kernel: str, grouped: bool, causal: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    kv = 1 if grouped else H
    given = {name: torch.randn(B, heads, S, D) for name, heads in (("q", H), ("k", kv), ("v", kv))}
    eager, exact = (checking.call(attention, given, dtype, True) for dtype in (None, torch.float64))
    got = checking.call(checking.compiled(attention, kernel), given, grads=True)
    checking.assert_same_accuracy(got, eager, exact)
