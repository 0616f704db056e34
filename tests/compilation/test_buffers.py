"""Masks and biases in buffers: their elements are relied on, but only as long as they do not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.reports import collector
from fusepass.reports.report import SiteReport
from tests import checking
from tests.attention import random_heads as given

B, H, N, D = 2, 2, 8, 8
INF = float("inf")


class Masked(nn.Module):
    """Attention with a mask of ones and zeros, stored for longer sequences than it gets."""

    def __init__(self, rows: int = 2 * N) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(rows, rows).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-2, -1) / D**0.5
        hidden = self.mask[: q.shape[2], : k.shape[2]] == 0
        out: Tensor = s.masked_fill(hidden, -INF).softmax(-1) @ v
        return out


class Added(nn.Module):
    """The same as an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", torch.full((N, N), -INF).triu(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) + self.mask).softmax(-1) @ v


class WrittenInside(Masked):
    """The graph writes into the buffer before it reads it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.mask[:, 1] = 0
        return super().forward(q, k, v)


class WrittenAfterwards(Masked):
    """The graph reads the buffer, and changes it for the next call."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().forward(q, k, v)
        self.mask.copy_(self.mask.tril(-1) + torch.eye(self.mask.shape[0]))
        self.mask[2:, 0] = 0
        return out


class WrittenThroughAView(Masked):
    """The write goes to other rows at every call, through a flat view."""

    def __init__(self) -> None:
        super().__init__()
        self.step: Tensor
        self.register_buffer("step", torch.tensor([1]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.mask.view(-1).index_fill_(0, self.step * (2 * N + 1), 0.0)
        self.step += 1
        return super().forward(q, k, v)


class WrittenBetween(Masked):
    """The mask is read, then written; the elements before the write count."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = self.mask[: q.shape[2], : k.shape[2]] == 0
        self.mask.zero_()
        s = (q @ k.transpose(-2, -1)).masked_fill(hidden, -1e30)
        return s.softmax(-1) @ v


class Two(nn.Module):
    """Two layers of one class, whose code is compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Masked(), Masked()
        self.second.mask = self.second.mask.t().contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.second(self.first(q, k, v), k, v)  # type: ignore[no-any-return]


class Pair:
    """A compiled module, and its copy in eager mode; both are changed and called in the same way."""

    def __init__(self, module: Any, kernel: str = "auto", **kwargs: Any) -> None:
        self.eager = copy.deepcopy(module)
        self.module = module
        self.fn = checking.compiled(module, kernel, **kwargs)

    def agree(self, args: list[Tensor] | None = None) -> list[SiteReport]:
        """Call both once; results and buffers must be equal."""
        args = given() if args is None else args
        with collector.collect() as seen, torch.no_grad():
            got = self.fn(*args)
            want = self.eager(*args)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(dict(self.module.named_buffers()), dict(self.eager.named_buffers()))
        return seen.sites

    def change(self, how: Callable[[Any], Any]) -> None:
        with torch.no_grad():
            how(self.module)
            how(self.eager)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("kind", [Masked, Added])
def test_a_buffer_is_what_it_holds(kind: Any, kernel: str) -> None:
    (site,) = Pair(kind(), kernel).agree()
    assert site.fused and site.kind == "causal", site


def write(module: Any) -> None:
    module.mask[..., 0] = 0


def write_data(module: Any) -> None:
    module.mask.data[..., 1] = 0


def write_by_numpy(module: Any) -> None:
    module.mask.numpy()[..., 1] = 0


def replace(module: Any) -> None:
    module.mask = torch.ones_like(module.mask)


def load(module: Any) -> None:
    module.load_state_dict({"mask": torch.ones_like(module.mask).triu()})


def undo(module: Any) -> None:
    """Changed and changed back: the version differs, the elements do not."""
    module.mask.add_(1).sub_(1)


CHANGES = (write, write_data, write_by_numpy, replace, load)
CHANGED = [(kind, change) for kind in (Masked, Added) for change in CHANGES] + [(Masked, undo)]


@pytest.mark.parametrize(("kind", "change"), CHANGED, ids=lambda f: f.__name__)
def test_a_buffer_that_changes_between_calls(kind: Any, change: Callable[[Any], Any]) -> None:
    pair = Pair(kind())
    pair.agree()
    pair.change(change)
    for _ in range(2):
        pair.agree()
    pair.change(write)
    pair.agree()


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("kind", [WrittenInside, WrittenAfterwards, WrittenThroughAView, WrittenBetween])
def test_a_buffer_that_the_graph_writes_into(kind: Any, kernel: str) -> None:
    pair = Pair(kind(), kernel)
    for _ in range(3):
        pair.agree()


def test_layers_that_share_code_have_buffers_of_their_own() -> None:
    """Compiled one by one, the second layer finds the first one's graph, but has another mask."""
    model = Two()
    pair = Pair(model)
    assert [s.kind for s in pair.agree()] != ["causal", "causal"]
    torch._dynamo.reset()
    first, second = Pair(model.first), Pair(model.second)
    for _ in range(2):
        first.agree()
        second.agree()


@pytest.mark.parametrize("dynamic", [None, True])
def test_sequences_of_several_lengths(dynamic: bool | None) -> None:
    pair = Pair(Masked(), dynamic=dynamic)
    for n in (N, N + 2, N - 3, 2 * N):
        pair.agree(given(n))
    pair.change(write)
    for n in (N, N + 1):
        pair.agree(given(n))


def test_buffers_made_in_inference_mode() -> None:
    """Their tensors have no version counter."""
    with torch.inference_mode():
        module, args = Masked(), given()
        fn = checking.compiled(module)
        torch.testing.assert_close(fn(*args), module(*args))
        module.mask[:, 0] = 0
        torch.testing.assert_close(fn(*args), module(*args), equal_nan=True)


def test_training_with_a_buffer_that_changes() -> None:
    module, inputs = Masked(), dict(zip("qkv", given(), strict=True))
    fn = checking.compiled(module)
    for _ in range(2):
        got = checking.call(fn, inputs, grads=True)
        eager = checking.call(module, inputs, grads=True)
        exact = checking.call(module, inputs, torch.float64, grads=True)
        checking.assert_same_accuracy(got, eager, exact)
        module.mask[2:, 1] = 0


def test_a_buffer_moved_to_another_dtype() -> None:
    pair = Pair(Masked())
    pair.agree()
    pair.change(lambda module: module.double())
    pair.agree()
    pair.agree([t.double() for t in given()])
