"""Concatenation, padding, and tensors that are written into a part of another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass.dialects.torch.graph import Reader
from tests.capture import agrees, close, meaning, qkv
from tests.evaluate import Evaluator, Grid
from tests.patterns.test_masks import read, text

N = 6
INF = math.inf
CAUSAL = torch.ones(N, N).tril().bool()
Make = Callable[[], Tensor]


def hides() -> Tensor:
    return torch.full((N, N), -INF).triu(1)


def sees() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


# ---------------------------------------------------------------------------------------- what is read

READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda x, y: torch.cat([x, y], -1),
    "cat of an empty part": lambda x, y: torch.cat([x, y[:, :0]], 1),
    "cat of a list's empty start": lambda x, y: torch.cat([torch.empty(0), x, y]),
    "cat of two types": lambda x, y: torch.cat([x, torch.arange(24).reshape(4, 6)]),
    "stack": lambda x, y: torch.stack([x, y], -1),
    "hstack": lambda x, y: torch.hstack([x, y]),
    "hstack of vectors": lambda x, y: torch.hstack([x[0], y[1]]),
    "vstack": lambda x, y: torch.vstack([x, y]),
    "vstack of vectors": lambda x, y: torch.vstack([x[0], y[1]]),
    "dstack": lambda x, y: torch.dstack([x, y]),
    "dstack of vectors": lambda x, y: torch.dstack([x[0], y[1]]),
    "column_stack": lambda x, y: torch.column_stack([x, y]),
    "column_stack of vectors": lambda x, y: torch.column_stack([x[0], y[1]]),
    "pad left": lambda x, y: F.pad(x, (2, 0)),
    "pad right, a value": lambda x, y: F.pad(x, (0, 3), value=-1.5),
    "pad both ways": lambda x, y: F.pad(x, (1, 2, 0, 3), "constant", 2.0),
    "pad rows": lambda x, y: F.pad(x, (0, 0, 1, 1)),
    "pad by negative numbers": lambda x, y: F.pad(x, (-1, 2, -2, -1)),
    "pad by nothing": lambda x, y: F.pad(x, (0, 0)),
    "pad in aten": lambda x, y: torch.ops.aten.constant_pad_nd(x, [1, -2], 0.5),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_what_is_computed(name: str) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    node, _ = meaning(READ[name], x, y)
    assert node.op != "input" or name in ("cat of an empty part", "pad by nothing")
    leaves = [str(n.attrs[0]) for n in _leaves(node)]
    given = {name: (x, y)["y" in name] for name in leaves}
    close(Evaluator(given)(node).float(), READ[name](x, y))


def _leaves(node: Any) -> list[Any]:
    own = [node] if node.op == "input" else []
    return own + [leaf for a in node.args for leaf in _leaves(a)]


def test_other_paddings_are_not_looked_into() -> None:
    node, _ = meaning(lambda x: F.pad(x, (1, 1), mode="reflect"), torch.randn(2, 3, 4))
    assert node.op == "input"


# ---------------------------------------------------------------------------------------- masks

MASKS: dict[str, tuple[str, Make]] = {
    "pad with visible keys": ("causal+2", lambda: F.pad(sees(), (2, 0), value=True)),
    "pad hidden ones with False": ("causal+2", lambda: ~F.pad(~sees(), (2, 0), value=False)),
    "cat of ones": ("causal+2", lambda: torch.cat([torch.ones(N, 2), torch.ones(N, N).tril()], 1).bool()),
    "hstack": ("causal+3", lambda: torch.hstack([torch.ones(N, 3, dtype=torch.bool), sees()])),
    "hstack of nothing": ("causal", lambda: torch.hstack([torch.zeros(N, 0, dtype=torch.bool), sees()])),
    "cat of nothing behind": ("causal", lambda: torch.cat([sees(), sees()[:, :0]], 1)),
    "pad by nothing": ("causal", lambda: F.pad(sees(), (0, 0), value=False)),
    "pad and cut": ("causal", lambda: F.pad(F.pad(sees(), (3, 0), value=True), (-3, 0))),
    "rows above": ("causal+-2", lambda: F.pad(sees(), (0, 0, 2, 0))),
    "hidden keys in front": ("causal+2 & mask[j]", lambda: F.pad(sees(), (2, 0), value=False)),
    "keys hidden behind": ("causal", lambda: F.pad(sees(), (0, 2, 0, 2), value=False)[:N]),
}


@pytest.mark.parametrize("name", MASKS)
def test_padded_masks(name: str) -> None:
    expected, make = MASKS[name]
    assert set(text(make).split(" & ")) == set(expected.split(" & "))
    formula, _, scope, term = read(make)
    grid = Grid(scope.space, Evaluator({}))
    assert torch.equal(grid.formula(formula), grid.term(term))


ADDED: dict[str, tuple[str, Make]] = {
    "hstack": ("causal+2", lambda: torch.hstack([torch.zeros(N, 2), hides()])),
    "hstack of nothing": ("causal)", lambda: torch.hstack([torch.zeros((N, 0)), hides()])),
    "cat": ("causal+2", lambda: torch.cat([torch.zeros(N, 2), hides()], dim=1)),
    "pad": ("causal+2", lambda: F.pad(hides(), (2, 0))),
    "column_stack": ("causal+2", lambda: torch.column_stack([torch.zeros(N), torch.zeros(N), hides()])),
    "pad in aten": ("causal+2", lambda: torch.ops.aten.constant_pad_nd(hides(), [2, 0], 0.0)),
}


@pytest.mark.parametrize("name", ADDED)
def test_masks_that_are_added(name: str) -> None:
    expected, make = ADDED[name]

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + make()).softmax(-1) @ v

    for kernel in ("reference", "auto"):
        seen = agrees(program, *qkv(K=make().shape[1]), kernel=kernel)
        assert [site.fused and expected in site.spec for site in seen.sites] == [True], seen.sites


def test_a_bias_in_front_is_no_mask() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + torch.hstack([torch.full((N, 2), 3.0), hides()])).softmax(-1) @ v

    seen = agrees(program, *qkv(K=N + 2), kernel="auto")
    assert [("bias" in site.spec, "causal" in site.spec) for site in seen.sites] == [(True, False)]


def test_masks_padded_by_symbolic_numbers() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, past = q.shape[2], k.shape[2] - q.shape[2]
        mask = F.pad(torch.ones(n, n, dtype=torch.bool).tril(), (past, 0), value=True)
        return (q @ k.mT).masked_fill(~mask, -INF).softmax(-1) @ v

    for queries, keys in ((6, 9), (5, 11)):
        agrees(program, *qkv(Q=queries, K=keys), dynamic=True)


# ---------------------------------------------------------------------------------------- sinks

SINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "left": lambda s: F.pad(s, (1, 0)).softmax(-1)[..., 1:],
    "right": lambda s: F.pad(s, (0, 1)).softmax(-1)[..., :-1],
    "a number": lambda s: F.pad(s, (1, 0), value=1.5).softmax(-1)[..., 1:],
    "hstack": lambda s: torch.cat([torch.zeros_like(s[..., :1]), s], -1).softmax(-1)[..., 1:],
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks_by_padding(name: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SINKS[name](q @ k.mT * 0.25) @ v

    seen = agrees(program, *qkv())
    assert [site.fused and "sink" in site.spec for site in seen.sites] == [True], seen.sites


def test_two_padded_columns_are_no_sink() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.pad(q @ k.mT, (2, 0)).softmax(-1)[..., 2:] @ v

    seen = agrees(program, *qkv())
    assert not any(site.fused for site in seen.sites)


def test_softmin() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmin(q @ k.mT * 0.25, dim=-1) @ v

    seen = agrees(program, *qkv())
    assert [site.fused and "scale -0.25" in site.spec for site in seen.sites] == [True], seen.sites


# ---------------------------------------------------------------------------------------- written parts


def added(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] = s[:, :, 1:, 1:] + b


def added_in_place(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] += b


def added_to_a_view(s: Tensor, b: Tensor) -> None:
    s[..., 1:, 1:].add_(b)


def added_twice(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] += b
    s[:, :, 1:, 1:] -= 2 * b


def added_reshaped(s: Tensor, b: Tensor) -> None:
    part = s[:, :, 1:, 1:]
    wide = part.reshape(2, 2, 5, 5, 1) + b.unsqueeze(-1)
    s[:, :, 1:, 1:] = wide.reshape(2, 2, 5, 5)


def scaled_and_added(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] = b + 2 * s[:, :, 1:, 1:]


def added_through_narrow(s: Tensor, b: Tensor) -> None:
    s.narrow(2, 1, 5).narrow(3, 1, 5).add_(b)


CHANGED = [
    added, added_in_place, added_to_a_view, added_twice, added_reshaped, scaled_and_added,
    added_through_narrow,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGED, ids=lambda f: str(f.__name__))
@pytest.mark.parametrize("rows", [5, 1])
def test_a_bias_written_into_a_part_of_the_scores(change: Callable[..., None], rows: int) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        change(s, b)
        return s.softmax(-1) @ v

    for kernel in ("reference", "auto"):
        seen = agrees(program, *qkv(), torch.randn(2, 2, rows, 5), kernel=kernel)
        assert [site.fused and "bias[" in site.spec for site in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("change", CHANGED, ids=lambda f: str(f.__name__))
def test_what_a_write_means_is_what_it_does(change: Callable[..., None]) -> None:
    def program(s: Tensor, b: Tensor) -> Tensor:
        s = s * 1.0
        change(s, b)
        return s * 1.0

    s, b = torch.randn(2, 2, N, N), torch.randn(2, 2, 5, 5)
    node, _ = meaning(program, s, b)
    leaves = {str(n.attrs[0]) for n in _leaves(node)}
    assert leaves == {"l_s_", "l_b_"}
    close(Evaluator({"l_s_": s, "l_b_": b})(node).float(), program(s, b))


def replaced(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] = b


def one_column(s: Tensor, b: Tensor) -> None:
    s[..., 0] = b[:, :, :1, 0]


def one_row_copied(s: Tensor, b: Tensor) -> None:
    s[:, 1].copy_(b[:, 0, :1, :1])


def negative(s: Tensor, b: Tensor) -> None:
    s[..., -5:] = b[:, :, :1]


def rounded(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] = (s[:, :, 1:, 1:].half() + b).float()


def elsewhere(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:] = s[:, :, :5, :5] + b


def of_a_copy(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:].contiguous().add_(b)


def of_a_reshaped_copy(s: Tensor, b: Tensor) -> None:
    s[:, :, 1:, 1:].reshape(2, 2, 25).zero_()


def every_second(s: Tensor, b: Tensor) -> None:
    s[..., ::2] += b[..., :1, :1]


OTHERS = [
    replaced, one_column, one_row_copied, negative, rounded, elsewhere, of_a_copy, of_a_reshaped_copy,
    every_second,
]  # fmt: skip


@pytest.mark.parametrize("change", OTHERS, ids=lambda f: str(f.__name__))
def test_other_writes_leave_eagers_numbers(change: Callable[..., None]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        change(s, b)
        return s.softmax(-1) @ v

    for kernel in ("reference", "auto"):
        agrees(program, *qkv(), torch.randn(2, 2, 5, 5), kernel=kernel)


def test_a_replaced_part_of_the_scores_is_reported() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        replaced(s, b)
        return s.softmax(-1) @ v

    seen = agrees(program, *qkv(), torch.randn(2, 2, 5, 5))
    assert [not site.fused and "another tensor" in str(site.reason) for site in seen.sites] == [True]


def test_a_mask_of_written_parts() -> None:
    def make() -> Tensor:
        mask = torch.zeros(N, N + 2, dtype=torch.bool)
        mask[:, :2] = True
        mask[:, 2:] = torch.ones(N, N, dtype=torch.bool).tril()
        return mask

    assert text(make) == "causal+2"


def test_a_cache_written_before_it_is_read() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        cache = cache * 1.0
        cache[:, :, 3:9] = k
        return (q @ cache.mT).softmax(-1) @ F.pad(v, (0, 0, 3, 3)), cache

    for kernel in ("reference", "auto"):
        seen = agrees(program, *qkv(), torch.randn(2, 2, 12, 8), kernel=kernel)
        assert [site.fused for site in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("first", [0, 1])
def test_a_relative_position_written_over_every_key_of_a_grid(first: int) -> None:
    """Rows and keys from `first` on; from 0 on, the slice is read as the product itself, not as a part."""

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT
        part = s[:, :, first:, first:].view(2, 2, 6, 2, 3)
        s[:, :, first:, first:] = (part + b[..., None]).view(2, 2, 6, 6)
        return s.softmax(-1) @ v

    seen = agrees(program, *qkv(Q=6 + first), torch.randn(2, 2, 6, 2), kernel="auto")
    assert [site.fused and site.spec.count("bias[") for site in seen.sites] == [1], seen.sites


@pytest.mark.parametrize("alias", [lambda s: s[:], lambda s: s.view(s.shape)[:]], ids=["slice", "view"])
def test_scores_that_are_returned_stay_whatever_alias_is_used(alias: Callable[[Tensor], Tensor]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.mT
        return alias(s).softmax(-1) @ v, s

    seen = agrees(program, *qkv())
    assert [(site.fused, "returned" in str(site.reason)) for site in seen.sites] == [(False, True)]


def test_gradients_through_a_written_part() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        s[:, :, 1:, 1:] += b
        return s.softmax(-1) @ v

    args = (*qkv(), torch.randn(2, 2, 5, 5))
    mine, theirs = ([t.clone().requires_grad_() for t in args] for _ in range(2))
    torch._dynamo.reset()
    fused = torch.compile(program, backend="fusepass", options={"inner": "eager"})
    fused(*mine).square().sum().backward()
    program(*theirs).square().sum().backward()
    close([t.grad for t in mine], [t.grad for t in theirs], 1e-4)


@pytest.mark.parametrize("change", CHANGED[:4], ids=lambda f: str(f.__name__))
def test_writes_into_scores_of_symbolic_sizes(change: Callable[..., None]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        change(s, b)
        return s.softmax(-1) @ v

    for size in (6, 7):
        b = torch.randn(2, 2, size - 1, size - 1)
        seen = agrees(program, *qkv(Q=size), b, dynamic=True, kernel="auto")
        assert [site.fused and "bias[" in site.spec for site in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("change", [added, added_in_place, added_to_a_view], ids=lambda f: str(f.__name__))
def test_exported_writes_are_read_alike(change: Callable[..., None], decomposed: bool) -> None:
    class Program(torch.nn.Module):
        def forward(self, s: Tensor, b: Tensor) -> Tensor:
            s = s * 2.0
            change(s, b)
            return s.exp()

    s, b = torch.randn(2, 2, N, N), torch.randn(2, 2, 5, 5)
    exported = torch.export.export(Program(), (s, b))
    graph = (exported.run_decompositions() if decomposed else exported).graph_module.graph
    reader = Reader(graph)
    output = next(n for n in graph.nodes if n.op == "output")
    node = reader.meaning[output.args[0][0]]
    assert node.args[0].op == "add" and node.args[0].args[0].op == "mul"
    close(Evaluator({"s": s, "b": b})(node).float(), Program()(s, b))
