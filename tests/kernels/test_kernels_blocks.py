"""Block tables: what they say about a block holds for its elements; and FlexAttention on the CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass.compilation import rewrite
from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.kernels import BY_NAME, Target, flex, formula
from fusepass.kernels.blocks import BLOCK, block_visibility, tables
from fusepass.kernels.flex_operators import block_attention
from fusepass.specification.attention import Attention
from tests.attention_cases import CASES, INF, heads, merge
from tests.checking import assert_same_accuracy, call, compiled
from tests.fake_cuda import fake_graph, hopper

AT, J = ["index", 0, [[1, "i", 1, 0]]], ["index", 0, [[1, "j", 1, 0]]]
AT_B, AT_I, AT_J = [0, [[1, "b", 1, 0]]], [0, [[1, "i", 1, 0]]], [0, [[1, "j", 1, 0]]]


def apart(n: int) -> list[Any]:
    """``j - i + n`` as an index."""
    return ["index", n, [[1, "j", 1, 0], [-1, "i", 1, 0]]]


ZERO = ["const", 0]
CAUSAL = ["le", apart(0), ZERO]
FORMULAS: dict[str, Any] = {
    "causal": CAUSAL,
    "window": ["and", CAUSAL, ["ge", apart(200), ZERO]],
    "either": ["or", ["lt", apart(0), ["const", -150]], ["gt", apart(0), ["const", 90]]],
    "diagonal": ["eq", apart(0), ZERO],
    "off the diagonal": ["not", ["eq", apart(0), ZERO]],
    "padding": ["load", 0, [AT_B, AT_J]],
    "padding of ones and zeros": ["cast", ["load", 1, [AT_B, AT_J]], "b8"],
    "causal and padding": ["and", CAUSAL, ["load", 0, [AT_B, AT_J]]],
    "documents": ["eq", ["load", 2, [AT_B, AT_I]], ["load", 2, [AT_B, AT_J]]],
    "lengths": ["lt", J, ["load", 3, [AT_B]]],
    "chunks": ["eq", ["floordiv", AT, ["const", 96]], ["floordiv", J, ["const", 96]]],
    "every third": ["eq", ["mod", J, ["const", 3]], ZERO],
    "prefix": ["or", CAUSAL, ["lt", J, ["load", 3, [AT_B]]]],
    "dense": ["load", 4, [AT_I, AT_J]],
    "near": ["le", ["abs", apart(0)], ["const", 130]],
    "bytes that wrap": ["gt", ["cast", apart(0), "u8"], ["const", 200]],
    "bytes that wrap below": ["lt", ["cast", apart(0), "i8"], ["const", -100]],
    "words that do not wrap": ["le", ["cast", apart(0), "i32"], ZERO],
    "xor": ["xor", CAUSAL, ["load", 0, [AT_B, AT_J]]],
    "where": ["where", ["load", 0, [AT_B, AT_J]], CAUSAL, ["ge", apart(0), ["const", 3]]],
    "scaled": ["le", ["mul", apart(0), ["const", -2]], ["sub", ["min", AT, J], ["neg", ["max", AT, J]]]],
    "threshold": ["gt", ["load", 5, [AT_J]], ["const", 0.5]],
    "far element": ["load", 0, [AT_B, [-1, [[1, "j", 1, 0]]]]],
    "unheard of": ["le", ["tanh", ["cast", J, "f32"]], ["const", 0.5]],
    "nothing": ["const", False],
}


def operands(batch: int, queries: int, keys: int) -> list[Tensor]:
    keep = torch.rand(batch, keys) < 0.5
    keep[0], keep[-1, : keys // 2] = True, False
    labels = torch.randint(0, 4, (batch, max(queries, keys))).sort(-1).values
    numbers = torch.linspace(-1, 1, keys)
    numbers[3] = math.nan
    return [
        keep, keep.long(), labels, torch.tensor([keys, keys // 3])[:batch],
        torch.rand(queries, keys) < 0.3, numbers,
    ]  # fmt: skip


def dense(visible: Any, tensors: list[Tensor], batch: int, queries: int, keys: int) -> Tensor:
    """The formula at every element, ``[B, 1, Q, K]``."""
    grid = torch.meshgrid(*(torch.arange(n) for n in (batch, 1, queries, keys)), indexing="ij")
    value = formula.evaluate(visible, dict(zip("bhij", grid, strict=True)), tensors)
    return value.expand(batch, 1, queries, keys).bool()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("queries", "keys"), [(384, 384), (300, 513), (1, 700)])
def test_what_is_said_of_a_block_is_true(name: str, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    tensors, visible = operands(2, queries, keys), formula.read(formula.text(FORMULAS[name]))
    sizes = {"b": 2, "h": 1, "i": queries, "j": keys}
    every, some = block_visibility(visible, sizes, tensors, torch.device("cpu"))
    true = dense(visible, tensors, 2, queries, keys)
    for b, i, j in itertools.product(*(range(n) for n in (2, every.shape[2], every.shape[3]))):
        part = true[b, 0, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        assert not every[b, 0, i, j] or (bool(part.all()) and part.numel() == BLOCK**2)
        assert bool(some[b, 0, i, j]) or not part.any(), (b, i, j)


NUMBER, OTHER = ["load", 0, [AT_J]], ["load", 1, [AT_I]]
LOW, HALF, HIGH = (["const", x] for x in (-math.inf, 0.5, math.inf))
HIDDEN = ["where", ["lt", J, ["const", 200]], LOW, ["const", 0.0]]
BOUNDS = (LOW, ZERO, HALF, ["const", 0.75], HIGH, OTHER)
COMPARED = ("le", "lt", "ge", "gt", "eq", "ne")
#: Operations on NaN and infinity, before they are compared.
ODD: dict[str, Any] = {
    "itself": NUMBER,
    "sum": ["add", NUMBER, OTHER],
    "difference": ["sub", NUMBER, OTHER],
    "sum with what is hidden": ["add", NUMBER, HIDDEN],
    "difference to what is hidden": ["sub", HIDDEN, NUMBER],
    "product": ["mul", NUMBER, OTHER],
    "times zero": ["mul", NUMBER, ["const", 0.0]],
    "negated": ["neg", NUMBER],
    "distance": ["abs", NUMBER],
    "clamped": ["min", ["max", NUMBER, ["const", 0.0]], ["const", 1.0]],
    "clamped from below": ["max", ["min", NUMBER, ["const", 1.0]], ["const", 0.0]],
    "an integer": ["cast", NUMBER, "i64"],
    "clamped distance": ["min", ["abs", NUMBER], ["const", 1.0]],
    "larger": ["max", NUMBER, OTHER],
    "chosen": ["where", ["lt", J, ["const", 200]], NUMBER, OTHER],
    "rounded": ["cast", NUMBER, "f16"],
    "whole": ["cast", ["cast", NUMBER, "b8"], "f32"],
    "exponential": ["exp", NUMBER],
    "written down": ["where", ["lt", J, ["const", 20]], ["const", math.nan], NUMBER],
    "written down as hidden": ["add", ["const", -math.inf], NUMBER],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("traced", [False, True])
def test_nothing_is_concluded_from_what_is_no_number(name: str, traced: bool) -> None:
    """One NaN or infinity among 128 keys does not affect the others."""
    numbers, others = torch.full((512,), 0.75), torch.linspace(0.25, 1.0, 256)
    numbers[3], numbers[300], numbers[400] = math.nan, math.inf, -math.inf
    others[5] = math.nan
    sizes, tensors = {"b": 1, "h": 1, "i": 256, "j": 512}, [numbers, others]
    grid = dict(zip("bhij", torch.meshgrid(*map(torch.arange, sizes.values()), indexing="ij"), strict=True))
    value, *bounds = (
        formula.evaluate(formula.read(formula.text(f)), grid, tensors).expand(1, 1, 256, 512)
        for f in (ODD[name], *BOUNDS)
    )
    for operation, n, opposite in itertools.product(COMPARED, range(len(BOUNDS)), (False, True)):
        written: Any = [operation, ODD[name], BOUNDS[n]]
        visible = formula.read(formula.text(["not", written] if opposite else written))
        every, some = block_visibility(visible, sizes, tensors, torch.device("cpu"), traced)
        true = (getattr(torch, operation)(value, bounds[n]) ^ opposite).unflatten(2, (-1, BLOCK))
        true = true.unflatten(4, (-1, BLOCK)).transpose(3, 4).flatten(4)
        assert not (every & ~true.all(4)).any(), (visible, "all")
        assert not (true.any(4) & ~some).any(), (visible, "any")


@pytest.mark.parametrize("operation", ["lt", "le", "gt", "ge"])
def test_a_block_with_one_nan_keeps_its_other_keys(operation: str) -> None:
    numbers = torch.zeros(256)
    numbers[3] = math.nan
    bound = ["const", 1.0 if operation in ("lt", "le") else -1.0]
    visible = formula.read(formula.text([operation, NUMBER, bound]))
    sizes = {"b": 1, "h": 1, "i": 128, "j": 256}
    every, some = block_visibility(visible, sizes, [numbers], torch.device("cpu"))
    assert every.flatten().tolist() == [False, True] and some.all()


EXACT = ["causal", "window", "padding", "causal and padding", "lengths", "chunks", "near", "nothing"]


@pytest.mark.parametrize("name", EXACT)
def test_whole_blocks_are_found(name: str) -> None:
    """Not only sound but complete: every block that is entirely visible or hidden is recognised."""
    torch.manual_seed(0)
    tensors, visible = operands(2, 768, 768), formula.read(formula.text(FORMULAS[name]))
    sizes = {"b": 2, "h": 1, "i": 768, "j": 768}
    every, some = block_visibility(visible, sizes, tensors, torch.device("cpu"))
    true = dense(visible, tensors, 2, 768, 768).unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK))
    assert torch.equal(every, true.all(5).all(3)) and torch.equal(some, true.any(5).any(3))


@pytest.mark.parametrize("operation", ["le", "lt", "ge", "gt", "eq", "ne"])
@pytest.mark.parametrize("bound", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("constant", [-1, 0, 1])
@pytest.mark.parametrize("opposites", [0, 1, 2])
def test_indices_are_compared_as_written(operation: str, bound: int, constant: int, opposites: int) -> None:
    """Simplified comparisons give the same values."""
    terms = [[2, "j", 1, 0], [-1, "i", 1, 0], [1, "h", 2, 2], [-3, "b", 1, 0]]
    grid = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 7, 9)), indexing="ij")
    b, h, i, j = grid
    index = constant + 2 * j - i + h // 2 % 2 - 3 * b
    for written, value in (
        (terms, index), (terms[1::2], constant - i - 3 * b), (terms[::2], constant + 2 * j + h // 2 % 2),
    ):  # fmt: skip
        comparison: Any = [operation, ["index", constant, written], ["const", bound]]
        want = getattr(torch, operation)(value, bound)
        for _ in range(opposites):
            comparison, want = ["not", comparison], ~want
        read = formula.read(formula.text(comparison))
        assert torch.equal(formula.evaluate(read, dict(zip("bhij", grid, strict=True)), []), want)


def test_tables_list_partial_and_full_blocks() -> None:
    every = torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3)
    some = torch.ones(3, 3, dtype=torch.bool).tril().view(1, 1, 3, 3)
    counts, indices, full_counts, full_indices, by_key, _, full_by_key, _ = tables(every, some)
    assert counts.tolist() == [[[0, 1, 2]]] and full_counts.tolist() == [[[1, 1, 1]]]
    assert indices[0, 0, 2, :2].tolist() == [0, 1] and full_indices[0, 0, :, 0].tolist() == [0, 1, 2]
    assert by_key.tolist() == [[[2, 1, 0]]] and full_by_key.tolist() == [[[1, 1, 1]]]
    assert all(t.dtype is torch.int32 and t.is_contiguous() for t in tables(every, some))


def test_the_operator_is_sound() -> None:
    written = formula.text(FORMULAS["causal and padding"])
    arguments = ([torch.ones(2, 300, dtype=torch.bool)], written, 2, 1, 300, 300, torch.device("cpu"), True)
    torch.library.opcheck(torch.ops.fusepass.block_tables.default, arguments)


def test_stored_tables_are_copies() -> None:
    computed = tables(
        torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    )
    torch.library.opcheck(torch.ops.fusepass.stored_tables.default, (computed,))
    kept = torch.ops.fusepass.stored_tables(computed)
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(kept, computed, strict=True)
    )


def test_fixed_tables_are_kept_and_copied() -> None:
    written, device = formula.text(FORMULAS["window"]), torch.device("cpu")
    call = torch.ops.fusepass.block_tables
    first, second = (call([], written, 1, 1, 700, 700, device, True) for _ in range(2))
    sizes = {"b": 1, "h": 1, "i": 700, "j": 700}
    want = tables(*block_visibility(formula.read(written), sizes, [], device))
    for a, b, c in zip(first, second, want, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c) and a.data_ptr() != b.data_ptr()


# ---------------------------------------------------------------------------------------- FlexAttention


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables on the CPU too: FlexAttention's own plain mathematics takes them, gradients included."""

    def more(spec: Attention, target: Target) -> str | None:
        return flex.FLEX.more(spec, replace(target, training=False))

    monkeypatch.setattr(flex, "takes_tables", lambda device: True)
    monkeypatch.setitem(BY_NAME, "flex", replace(flex.FLEX, more=more))


# Uncompiled, FlexAttention drops the gradients of what it captures: those are tested on a GPU.
TAKEN = {n: c for n, c in CASES.items() if "flex" in c.kernels.split() and not n.startswith("learned")}
NAMES = [n for n, c in TAKEN.items() if c.head_dim <= 64 and c.dtype is torch.bfloat16]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grads", [False, True])
def test_attention_with_tables(name: str, grads: bool, everywhere: None) -> None:
    case = replace(CASES[name], dtype=torch.float32)
    inputs = case.inputs("cpu")
    got = call(compiled(case.program, "flex", "aot_eager"), inputs, grads=grads)
    assert got.site.kernel == "flex", got.site
    exact = call(case.program, inputs, torch.float64, grads)
    assert_same_accuracy(got, call(case.program, inputs, grads=grads), exact)


def added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.1 + bias).softmax(-1) @ v


def hiding_rows(device: str = "cpu") -> dict[str, Tensor]:
    """Queries, keys, values, and a bias under which rows see no key, or only the highest of several fills."""
    low = torch.finfo(torch.float32).min
    bias = torch.zeros(64, 64)
    bias[3] = low
    bias[5], bias[5, 2], bias[5, 9] = -INF, low, low
    bias[7] = torch.tensor([low, low / 4]).repeat(32)
    bias[9, :40] = low
    tensors = {name: torch.randn(2, 2, 64, 16) for name in "qkv"} | {"bias": bias}
    return {name: t.to(device) for name, t in tensors.items()}


def assert_gradients_agree(given: dict[str, Tensor], kernel: str, inner: str) -> None:
    runs = []
    programs: tuple[Callable[..., Tensor], ...] = (added, compiled(added, kernel, inner))
    for program in programs:
        learned = [given[name].clone().requires_grad_() for name in "qkv"]
        out = program(*learned, given["bias"])
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        runs.append([out.detach(), *torch.autograd.grad(out, learned, weights)])
    for theirs, mine in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_rows_that_a_bias_hides(everywhere: None) -> None:
    """A log-sum-exp does not tell how many keys such a row weighs, so tables are not enough."""
    assert_gradients_agree(hiding_rows(), "flex", "aot_eager")


def graph_of(program: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[str]:
    """The targets of the rewritten graph's calls."""
    seen: list[str] = []

    def keep(gm: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes)
        return gm.forward

    torch.compile(program, backend="fusepass", fullgraph=True, options={"inner": keep, "kernel": "flex"})(
        **inputs
    )
    return seen


def test_layers_share_their_tables(everywhere: None) -> None:
    case = CASES["padding"]

    def layers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        out = q
        for _ in range(3):
            out = case.program(out, k, v, keep).view(q.shape)
        return out

    seen = graph_of(layers, replace(case, dtype=torch.float32).inputs("cpu"))
    assert seen.count("plain_tables") == seen.count("stored_tables.default") == 1
    assert seen.count("block_attention") == 3


@pytest.mark.parametrize(("name", "read"), [("padding on the left", True), ("causal", False)])
def test_a_log_sum_exp_that_is_read_is_asked_for(name: str, read: bool, everywhere: None) -> None:
    """Without gradients, FlexAttention's kernel writes no log-sum-exp by itself."""
    asked: list[bool] = []

    def keep(gm: torch.fx.GraphModule, example: Any) -> Any:
        calls = [n for n in gm.graph.nodes if n.target is block_attention]
        asked.extend(dict(formula.read(n.args[-1])).get("OUTPUT_LOGSUMEXP", False) for n in calls)
        return gm.forward

    case = replace(CASES[name], dtype=torch.float32)
    with torch.no_grad():
        torch.compile(case.program, backend="fusepass", options={"inner": keep, "kernel": "flex"})(
            **case.inputs("cpu")
        )
    assert asked == [read]


@pytest.mark.parametrize(
    ("head_dim", "queries", "bias", "small"),
    [(64, 256, True, True), (64, 256, False, False), (128, 256, True, False), (64, 64, True, False)],
)
def test_tiles_of_a_dense_bias_on_hopper(
    head_dim: int, queries: int, bias: bool, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small heads with a bias tensor; few queries use the decoding kernel, which has other tiles."""
    hopper(monkeypatch)

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.125
        return (s + b if bias else s).softmax(-1) @ v

    graph = fake_graph(program, *[(2, 4, queries, head_dim)] * 3, (1, 4, queries, queries))
    with torch.no_grad():
        assert rewrite_graph(graph, Options(kernel="flex")).sites[0].kernel == "flex"
    (call_,) = (n for n in graph.graph.nodes if n.target is block_attention)
    options = dict(formula.read(call_.args[-1]))
    assert options == ({"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64} if small else {})


def test_other_masks_have_other_tables(everywhere: None) -> None:
    def two(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        first = CASES["padding"].program(q, k, v, keep).view(q.shape)
        return CASES["window"].program(first, k, v)

    seen = graph_of(two, replace(CASES["padding"], dtype=torch.float32).inputs("cpu"))
    assert seen.count("plain_tables") == 1 and seen.count("block_tables.default") == 1


def test_slopes_of_alibi_make_no_tensor_over_queries_and_keys(everywhere: None) -> None:
    case = replace(CASES["alibi"], dtype=torch.float32)
    inputs = case.inputs("cpu")
    largest = 0

    def keep(gm: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal largest
        sizes = [
            n.meta["example_value"].numel()
            for n in gm.graph.nodes
            if isinstance(n.meta.get("example_value"), Tensor)
        ]
        largest = max(sizes)
        return gm.forward

    torch.compile(case.program, backend="fusepass", options={"inner": keep, "kernel": "flex"})(**inputs)
    assert largest <= max(t.numel() for t in inputs.values()) * 4  # repeated heads of keys and values


def neighbours(x: Tensor) -> Tensor:
    """Seven keys around every one of a sequence."""
    return F.pad(x, (0, 0, 3, 3)).unfold(2, 7, 1).mT


TABLE = torch.nn.Parameter(torch.randn(3, 7))


def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])[:, None] + torch.arange(-3, 4)
    s = torch.einsum("bhsd,bhswd->bhsw", q, neighbours(k)) + TABLE.to(q.dtype)[:, None]
    w = s.masked_fill((at < 0) | (at >= q.shape[2]), -INF).softmax(-1)
    return torch.einsum("bhsw,bhswd->bhsd", w, neighbours(v))


def test_biases_of_windows_are_read_at_distances(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a distance outside the window is outside the tensor: the pair is hidden."""
    monkeypatch.setattr(rewrite, "skips_copies", lambda kernel, site, target: True)
    given = {name: torch.randn(2, 3, 150, 8) for name in "qkv"}
    got = call(compiled(around, "flex", "aot_eager"), given)
    assert got.site.kernel == "flex" and got.site.kind == "window(3, 3), bias[hij]", got.site
    assert got.site.reason is None, "not over copies"
    assert_same_accuracy(got, call(around, given), call(around, given, torch.float64))


def test_a_mask_under_a_softcap_stays_in_the_scores(everywhere: None) -> None:
    """``cap * tanh(-inf / cap)`` is visible again: no block may be skipped."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        s = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(320, 320, dtype=torch.bool).triu(1), -INF)
        return merge((5.0 * torch.tanh(s / 5.0)).softmax(-1) @ v)

    inputs = replace(CASES["full"], dtype=torch.float32).inputs("cpu")
    assert "block_attention" not in graph_of(program, inputs)


# ---------------------------------------------------------------------------------------- 32 bits


@pytest.mark.parametrize(("length", "fused"), [(8192, True), (16384, False)])
def test_what_is_counted_in_32_bits_stays_below_that(
    length: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels compute the place of an element of a captured tensor in 32 bits."""

    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 0.1 + bias).softmax(-1) @ v

    hopper(monkeypatch)
    graph = fake_graph(program, *[(1, 16, length, 128)] * 3, (1, 16, length, length))
    with torch.no_grad():
        site = rewrite_graph(graph, Options(kernel="flex")).sites[0]
    assert site.fused is fused
    assert fused or "it counts in 32 bits, and a tensor has 4294967296 elements" in str(site.reason)
