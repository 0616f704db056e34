"""flash-attn 4 with formulas, without a GPU: what is written, operators, formulas on a stand-in for CuTe."""

from __future__ import annotations

import itertools
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.kernels import blocks, cute_mods, flash4_mods
from fusepass.kernels import formula as fm
from fusepass.reports.report import SiteReport
from fusepass.specification.functions import OPERATIONS, Function
from fusepass.specification.samples import Draw
from tests.attention_cases import CASES
from tests.checking import assert_same_accuracy, call
from tests.checking import compiled as compiled_case
from tests.fake_cuda import fake_graph, hopper, targets

INF = math.inf
Q, K = ["index", 0, [[1, "i", 1, 0]]], ["index", 0, [[1, "j", 1, 0]]]
GAP = ["index", 0, [[1, "j", 1, 0], [-1, "i", 1, 0]]]
CAUSAL = ["le", K, Q]
KEEP = ["load", 0, [[0, [[1, "b", 1, 0]]], [0, [[1, "j", 1, 0]]]]]
LABEL_I = ["load", 0, [[0, [[1, "b", 1, 0]]], [0, [[1, "i", 1, 0]]]]]
SLOPE = ["load", 0, [[0, [[1, "h", 1, 0]]]]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)


# ---------------------------------------------------------------------------------------- what is written


def rewritten(
    program: Callable[..., Any], *shapes: tuple[int, ...], masks: Any = ()
) -> tuple[fx.GraphModule, SiteReport]:
    graph = fake_graph(program, *shapes, masks=masks)
    with torch.no_grad():
        sites = rewrite_graph(graph, Options(kernel="flash4")).sites
    assert len(sites) == 1
    return graph, sites[0]


def call_of(graph: fx.GraphModule) -> Any:
    (call,) = [n for n in graph.graph.nodes if "fusepass.flash4" in str(n.target)]
    return call


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * 0.1
    i, j = (torch.arange(q.shape[2], device=q.device) for _ in range(2))
    gap = j - i.unsqueeze(1)
    s = s + slopes.view(-1, 1, 1) * gap
    return (s.masked_fill(gap > 0, -INF).softmax(-1) @ v).transpose(1, 2).flatten(2)


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * 0.1
    i, j = (torch.arange(q.shape[2], device=q.device) for _ in range(2))
    seen = (j <= i.unsqueeze(1)) & keep.view(2, 1, 1, -1)
    return (s.masked_fill(torch.logical_not(seen), -INF).softmax(-1) @ v).transpose(1, 2).flatten(2)


SHAPES = ((2, 4, 256, 64),) * 3


def test_a_bias_with_a_formula_keeps_the_window(gpu: None) -> None:
    graph, site = rewritten(alibi, *SHAPES, (4,))
    assert site.kernel == "flash4", site
    call = call_of(graph)
    assert len(call.args[3]) == 1 and call.args[4:6] == ([], []) and call.args[7:] == (None, 0)
    scale, (step,), visible = fm.read(call.args[6])
    assert scale == pytest.approx(0.1) and step[0] == "add" and visible is None
    assert "contiguous" not in targets(graph)


def test_a_padding_becomes_tables_of_plain_operations(gpu: None) -> None:
    graph, site = rewritten(padded, *SHAPES, masks=((2, 256),))
    assert site.kernel == "flash4", site
    call = call_of(graph)
    assert len(call.args[5]) == 4 and call.args[7:] == (None, None)
    assert fm.read(call.args[6])[2] is not None and call.args[4][0].name == "keep"
    assert [n.target for n in graph.graph.nodes if n.target is blocks.plain_tables]
    shapes = [n.meta["example_value"].shape for n in call.args[5][:2]]
    assert shapes == [(2, 1, 2), (2, 1, 2, 2)]


def test_refusals_of_what_it_cannot_write(gpu: None) -> None:
    wide = rewritten(padded, *[(2, 4, 256, 192)] * 3, masks=((2, 256),))[1]
    assert not wide.fused and "up to head size 128" in str(wide.reason)

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).flatten(2)

    site = rewritten(dense, *SHAPES, (4, 256, 256))[1]
    assert not site.fused and "no tensor over queries and keys" in str(site.reason)

    def every_third(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.1
        i, j = (torch.arange(q.shape[2], device=q.device) for _ in range(2))
        hidden = torch.remainder(j - i.unsqueeze(1), 3) == 1
        return (s.masked_fill(hidden, -INF).softmax(-1) @ v).flatten(2)

    site = rewritten(every_third, *SHAPES)[1]
    assert not site.fused and "its formulas have no" in str(site.reason), site


# ---------------------------------------------------------------------------------------- tables

SIZES = {"b": 2, "h": 1, "i": 300, "j": 420}


def compiled(function: Callable[..., Any], backend: str, count: int, given: Tensor) -> Any:
    """Run a graph that calls ``function``, written as the pass writes it, and compiled by a backend."""
    graph = fx.Graph()
    results = graph.call_function(function, (graph.placeholder("given"),))
    graph.output(tuple(graph.call_function(operator.getitem, (results, n)) for n in range(count)))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        run = lookup_backend(backend)(fx.GraphModule({}, graph), [given])
    return run(given)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(("both", "stored"), [(False, False), (True, False), (False, True)])
def test_traced_tables_are_the_tables(backend: str, both: bool, stored: bool) -> None:
    keep = torch.arange(420) < torch.tensor([[130], [400]])
    near = ["lt", ["abs", GAP], ["const", 70]]
    whole = ["and", CAUSAL, ["or", KEEP, ["and", near, ["const", True]]]]
    given = ([keep], fm.text(whole), *SIZES.values(), torch.device("cpu"), both)
    want = blocks.tables_op(*given)

    def make(keep: Tensor) -> list[Tensor]:
        tables = blocks.plain_tables([keep], *given[1:])  # type: ignore[arg-type]
        return torch.ops.fusepass.stored_tables(tables) if stored else tables

    got = make(keep) if backend == "eager" else compiled(make, backend, len(want), keep)
    assert len(got) == len(want) == (8 if both else 4)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------- operators


class Mathematics:
    """Dense attention by formulas, with the operators' signature."""

    @staticmethod
    def forward(q, k, v, scores, masks, tables, code, left, right):  # type: ignore[no-untyped-def]
        scale, steps, visible = fm.read(code)
        (batch, queries, heads, _), keys = q.shape, k.shape[1]
        letters = dict(zip("bhij", torch.meshgrid(
            *map(torch.arange, (batch, heads, queries, keys)), indexing="ij"), strict=True))  # fmt: skip
        s = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(heads // k.shape[2], 2)) * scale
        for _, formula, factor in steps:
            s = s + fm.evaluate(formula, letters, scores) * factor
        if visible is not None:
            s = s.masked_fill(~fm.evaluate(visible, letters, masks), -INF)
        if right is not None:
            s = s.masked_fill(letters["j"] - letters["i"] > right, -INF)
        lse = s.logsumexp(-1)
        p = s.softmax(-1).nan_to_num(0.0)
        out = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(heads // v.shape[2], 2))
        return out.contiguous(), lse.float()

    @classmethod
    def filled(cls, q, k, v, *more):  # type: ignore[no-untyped-def]
        out, lse = cls.forward(q, k, v, *more)  # type: ignore[no-untyped-call]
        mean = v.mean(1, keepdim=True).repeat_interleave(q.shape[2] // v.shape[2], 2)
        rows = torch.isneginf(lse[:, 0]).sum(1)
        first = torch.arange(q.shape[1]) < rows[:, None]
        return torch.where(first[:, :, None, None], mean, out), lse

    @classmethod
    def backward(cls, grad, q, k, v, scores, masks, tables, code, left, right, out, lse):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            again = cls.forward(q, k, v, scores, masks, tables, code, left, right)[0]  # type: ignore[no-untyped-call]
            return tuple(g.contiguous() for g in torch.autograd.grad(again, (q, k, v), grad))


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with torch.library._scoped_library("fusepass", "FRAGMENT") as scope:
        scope.impl("flash4_mods", Mathematics.forward, "CPU")
        scope.impl("flash4_filled", Mathematics.filled, "CPU")
        scope.impl("flash4_mods_backward", Mathematics.backward, "CPU")
        yield


CODE = fm.text([0.3, [["add", ["mul", SLOPE, GAP], 1.0]], ["and", CAUSAL, KEEP]])


def operator_arguments() -> tuple[Any, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    keep = torch.arange(6) < torch.tensor([[4], [6]])
    return q, k, v, [torch.rand(4, dtype=torch.float64)], [keep], [], CODE, None, None


def test_gradients_through_the_operator(on_cpu: None) -> None:
    q, k, v, *more = operator_arguments()
    assert torch.autograd.gradcheck(lambda *x: torch.ops.fusepass.flash4_mods(*x, *more)[0], (q, k, v))


def test_gradients_of_rows_that_see_no_key(on_cpu: None) -> None:
    q, k, v, *_ = operator_arguments()
    keep = torch.arange(6) >= torch.tensor([[3], [0]])
    more: Any = ([], [keep], [], fm.text([0.3, [], ["and", CAUSAL, KEEP]]), None, None)
    out, lse = torch.ops.fusepass.flash4_filled(q, k, v, *more)
    assert torch.isneginf(lse[0, :, :3]).all()
    assert torch.allclose(out[0, :3], v[0].mean(0).repeat_interleave(2, 0))
    assert torch.autograd.gradcheck(lambda *x: torch.ops.fusepass.flash4_filled(*x, *more)[0], (q, k, v))


@pytest.mark.parametrize("name", ["flash4_mods", "flash4_filled"])
def test_the_operators_are_sound(name: str, on_cpu: None) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fusepass, name).default, operator_arguments(), test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_take_the_operator(backend: str, on_cpu: None) -> None:
    q, k, v, scores, masks, *_ = operator_arguments()

    def program(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, keep: Tensor) -> Tensor:
        out: Tensor = torch.ops.fusepass.flash4_mods(q * 2, k, v, [slopes], [keep], [], CODE, None, None)[0]
        return out.relu()

    arguments = (q, k, v, scores[0], masks[0])
    want = program(*arguments)
    got = torch.compile(program, backend=backend, fullgraph=True)(*arguments)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["alibi, multi-head", "padding", "padding on the left", "documents"])
@pytest.mark.parametrize("grads", [False, True])
def test_whole_sites(name: str, grads: bool, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the operator's mathematics: tables, windows and rows that see no key included."""
    monkeypatch.setattr("fusepass.kernels.flash.gate_refuses", lambda *given: None)
    case = CASES[name]
    inputs = {n: t.bfloat16() if n in "qkv" else t for n, t in case.inputs("cpu").items()}
    got = call(compiled_case(case.program, "flash4", "aot_eager"), inputs, grads=grads)
    assert got.site.kernel == "flash4", got.site
    exact = call(case.program, inputs, torch.float64, grads)
    assert_same_accuracy(got, call(case.program, inputs, grads=grads), exact)


def test_grouped_heads_train_without_scores_by_position(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper, the library's backward pass reads the wrong heads in this case."""
    monkeypatch.setattr("fusepass.kernels.flash.gate_refuses", lambda *given: None)
    case = CASES["alibi"]
    inputs = {n: t.bfloat16() if n in "qkv" else t for n, t in case.inputs("cpu").items()}
    got = call(compiled_case(case.program, "flash4", "aot_eager"), inputs, grads=True)
    assert not got.site.fused and "with grouped heads its backward" in str(got.site.reason), got.site
    assert call(compiled_case(case.program, "flash4", "aot_eager"), inputs).site.kernel == "flash4"


# ---------------------------------------------------------------------------------------- formulas in CuTe


class Kind:
    """A type of CuTe."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.is_float = dtype, dtype.is_floating_point


KINDS = {name: Kind(dtype) for name, dtype in (
    ("Boolean", torch.bool), ("Int32", torch.int32), ("Int64", torch.int64), ("Float32", torch.float32),
)}  # fmt: skip


class Lanes:
    """A stand-in for a value of CuTe: operands of one type only, as strict as the real one may be."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape = data, data.shape
        self.dtype = next(k for k in KINDS.values() if k.dtype is data.dtype)

    def to(self, kind: Kind) -> Lanes:
        return Lanes(self.data.to(kind.dtype))

    def _with(self, function: Any, other: Any) -> Lanes:
        if isinstance(other, Lanes):
            assert other.data.dtype is self.data.dtype, (other.data.dtype, self.data.dtype)
            return Lanes(function(self.data, other.data))
        return Lanes(function(self.data, other).to(self.data.dtype))


def _operator(name: str) -> None:
    function = getattr(operator, name)
    setattr(Lanes, f"__{name.rstrip('_')}__", lambda self, other: self._with(function, other))


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "and_",
    "or_",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    _operator(_name)
Lanes.__rsub__ = lambda self, other: Lanes(other - self.data)  # type: ignore[attr-defined]
Lanes.__rmul__ = lambda self, other: Lanes(other * self.data)  # type: ignore[attr-defined]


class Memory:
    """A stand-in for registers and tensors."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.element_type = next(k for k in KINDS.values() if k.dtype is data.dtype)

    def __getitem__(self, at: Any) -> Any:
        return self.data[at].item()

    def __setitem__(self, at: Any, value: Any) -> None:
        self.data[at] = value

    def store(self, value: Lanes) -> None:
        self.data = value.data.clone()

    def load(self) -> Lanes:
        return Lanes(self.data.clone())


@pytest.fixture
def cute(monkeypatch: pytest.MonkeyPatch) -> None:
    mathematics = types.SimpleNamespace(
        exp=lambda x: Lanes(x.data.exp()), sqrt=lambda x: Lanes(x.data.sqrt()),
        log1p=lambda x: Lanes(x.data.log1p()), expm1=lambda x: Lanes(x.data.expm1()),
        log=lambda x: Lanes(x.data.log()), erf=lambda x: Lanes(x.data.erf()),
        tanh=lambda x, fastmath: Lanes(x.data.tanh()),
    )  # fmt: skip

    def where(condition: Lanes, x: Lanes, y: Lanes) -> Lanes:
        assert x.data.dtype is y.data.dtype and condition.data.dtype is torch.bool
        return Lanes(torch.where(condition.data, x.data, y.data))

    part = types.SimpleNamespace(
        size=math.prod, where=where, math=mathematics,
        full=lambda shape, number, kind: Lanes(torch.full(shape, number, dtype=kind.dtype)),
        make_rmem_tensor=lambda lanes, kind: Memory(torch.zeros(lanes, dtype=kind.dtype)),
    )  # fmt: skip
    module = types.ModuleType("cutlass")
    module.__dict__.update(KINDS, cute=part)
    monkeypatch.setitem(sys.modules, "cutlass", module)


FORMULAS: dict[str, Any] = {
    "causal": CAUSAL,
    "padding": ["and", CAUSAL, KEEP],
    "documents": ["eq", ["cast", LABEL_I, "i64"], ["cast", KEEP, "i64"]],
    "chunks": ["eq", ["index", 0, [[1, "i", 4, 0]]], ["index", 0, [[1, "j", 4, 0]]]],
    "blocks": ["eq", ["floordiv", Q, ["const", 3]], ["mod", K, ["const", 3]]],
    "digits": ["lt", ["index", 1, [[2, "i", 2, 3]]], ["const", 4]],
    "distance": ["mul", ["const", -0.25], ["cast", ["abs", GAP], "f32"]],
    "logic": ["or", ["not", CAUSAL], ["and", ["const", True], ["ne", GAP, ["const", 2]]]],
    "choice": ["where", ["gt", GAP, ["const", 1]], ["const", 1.5], ["div", GAP, ["const", 3]]],
    "extremes": ["max", ["min", GAP, ["const", 3]], ["neg", ["const", 2]]],
    "curves": ["add", ["tanh", ["div", GAP, ["const", 2.0]]], ["exp", ["sqrt", ["cast", K, "f32"]]]],
    "truth": ["and", ["sub", K, Q], KEEP],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_have_the_values_that_pytorch_gives(name: str, cute: None) -> None:
    formula = fm.read(fm.text(FORMULAS[name]))
    assert cute_mods.unwritable(formula) is None
    torch.manual_seed(0)
    keep = torch.rand(2, 12) < 0.6
    at = {
        x: torch.randint(0, n, (2,), dtype=torch.int32) for x, n in zip("bhij", (2, 3, 12, 12), strict=True)
    }
    for _ in range(20):
        at = {x: torch.randint(0, n, (2,), dtype=torch.int32)
              for x, n in zip("bhij", (2, 3, 12, 12), strict=True)}  # fmt: skip
        want = fm.evaluate(formula, at, [keep])
        walk = cute_mods.Walk({x: Lanes(t) for x, t in at.items()}, [Memory(keep)])
        got = walk.value(formula)
        torch.testing.assert_close(got.data.to(want.dtype), want)


def test_divisions_of_what_may_be_negative_are_not_written() -> None:
    reason = cute_mods.unwritable(fm.read(fm.text(["eq", ["floordiv", GAP, ["const", 3]], ["const", 1]])))
    assert reason == "floordiv of a number that may be negative"
    table = ["load", 0, [[0, [[1, "b", 1, 0]]], [4, GAP[2]]]]
    assert "by the distance" in str(cute_mods.unwritable(fm.read(fm.text(table))))
    assert cute_mods.unwritable(("cast", fm.read(fm.text(Q)), "f64")) == "a cast to f64"


def test_neighbouring_digits_are_one() -> None:
    assert fm._joined([[4, "h", 4, 0], [1, "h", 1, 4]]) == [[1, "h", 1, 0]]
    three = [[12, "h", 6, 2], [1, "b", 1, 0], [6, "h", 3, 2], [2, "h", 1, 3]]
    assert sorted(fm._joined(three)) == [[1, "b", 1, 0], [2, "h", 1, 12]]
    for terms in ([[5, "h", 4, 0], [1, "h", 1, 4]], [[4, "h", 4, 0], [1, "b", 1, 4]]):
        assert fm._joined(terms) == terms


def test_biases_that_may_hide() -> None:
    read = [fm.read(fm.text(f)) for f in (["mul", SLOPE, ["cast", GAP, "f32"]], SLOPE, ["const", -3e38], GAP)]
    assert [fm.may_hide(f, cute_mods.LOWEST) for f in read] == [False, True, True, False]


def test_steps_of_a_score_and_their_derivatives(cute: None) -> None:
    steps = fm.read(
        fm.text([["scale", 0.5], ["softcap", 3.0], ["add", ["mul", SLOPE, GAP], 2.0], ["times", SLOPE]])
    )
    forward, backward = cute_mods.score_mods(steps)
    slopes = torch.tensor([0.5, 0.25, 2.0])
    at = {x: torch.tensor([1, 2], dtype=torch.int32) for x in "bhi"} | {
        "j": torch.tensor([7, 3], dtype=torch.int32)
    }
    s = torch.randn(2, requires_grad=True)
    bias = slopes[at["h"]] * (at["j"] - at["i"])
    want = (3 * torch.tanh(s * 0.5 / 3) + 2 * bias) * slopes[at["h"]]
    where = [Lanes(t) for t in at.values()]
    named = dict(
        zip(("q_idx", "kv_idx"), where[2:], strict=True), seqlen_info=None, aux_tensors=[Memory(slopes)]
    )
    got = forward(Lanes(s.detach()), *where[:2], **named)
    torch.testing.assert_close(got.data, want.detach())
    grad = torch.randn(2)
    gradient = backward(Lanes(grad), Lanes(s.detach()), *where[:2], **named)
    torch.testing.assert_close(gradient.data, torch.autograd.grad(want, s, grad)[0])


#: The samples of the modifier.
FUNCTIONS: list[Any] = [mod for mod, _ in Function.samples(Draw())]


@pytest.mark.parametrize(
    ("step", "function"),
    [
        (["clamp", -0.25, 0.5], lambda s: s.clamp(-0.25, 0.5)),
        (["clamp", -INF, 0.5], lambda s: s.clamp(max=0.5)),
        (["leaky_relu", 0.2], lambda s: torch.nn.functional.leaky_relu(s, 0.2)),
        (["leaky_relu", 0.0], torch.relu),
        (["abs"], torch.abs),
    ],
)
def test_functions_of_a_score_and_their_derivatives(
    step: list[Any], function: Callable[[Tensor], Tensor], cute: None
) -> None:
    forward, backward = cute_mods.score_mods(fm.read(fm.text([["scale", 0.5], step])))
    s = torch.tensor([-3.0, -0.4, 0.0, 0.1, 0.8, 4.0, INF, -INF, math.nan], requires_grad=True)
    at = [Lanes(torch.zeros(9, dtype=torch.int32)) for _ in range(4)]
    named: dict[str, Any] = {"q_idx": at[2], "kv_idx": at[3], "seqlen_info": None, "aux_tensors": []}
    want = function(s * 0.5)
    torch.testing.assert_close(
        forward(Lanes(s.detach()), *at[:2], **named).data, want.detach(), equal_nan=True
    )
    grad = torch.randn(9)
    gradient = backward(Lanes(grad), Lanes(s.detach()), *at[:2], **named).data
    torch.testing.assert_close(gradient[:6], torch.autograd.grad(want, s, grad)[0][:6])


@pytest.mark.parametrize("sample", FUNCTIONS, ids=str)
def test_whole_functions_of_a_score_and_their_derivatives(sample: Function, cute: None) -> None:
    """On the samples of the modifier: between them they use every operation."""
    tensor = None if sample.slot is None else SLOPE
    forward, backward = cute_mods.score_mods(fm.read(fm.text([["function", sample.steps, tensor]])))
    s = torch.tensor([-3.0, -0.4, 0.0, 0.1, 0.8, 4.0], requires_grad=True)
    element = torch.tensor(0.1)
    at = [Lanes(torch.zeros(6, dtype=torch.int32)) for _ in range(4)]
    named: dict[str, Any] = {"q_idx": at[2], "kv_idx": at[3], "seqlen_info": None}
    named["aux_tensors"] = [] if tensor is None else [Memory(element[None])]
    want = sample.apply(s, [element])
    torch.testing.assert_close(forward(Lanes(s.detach()), *at[:2], **named).data, want.detach())
    grad = torch.randn(6)
    gradient = backward(Lanes(grad), Lanes(s.detach()), *at[:2], **named).data
    torch.testing.assert_close(gradient, torch.autograd.grad(want, s, grad)[0])


def test_every_operation_of_functions_is_written_and_sampled() -> None:
    assert {step[0] for sample in FUNCTIONS for step in sample.steps} == set(OPERATIONS)


def test_modifiers_are_kept_by_what_they_compute() -> None:
    first, second = (cute_mods.mask_mod(fm.read(fm.text(f)), 0) for f in (CAUSAL, KEEP))
    again = cute_mods.mask_mod(fm.read(fm.text(CAUSAL)), 0)
    hashes = [f.__cute_hash__ for f in (first, second, again)]  # type: ignore[attr-defined]
    assert hashes[0] == hashes[2] != hashes[1]


def test_rows_that_see_no_key_are_filled_by_a_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, ...]:
        calls.append(more | {"q": q})
        lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
        lse[0, :, :3] = -INF
        return q.clone(), lse, q, q, q

    library = types.SimpleNamespace(interface=types.SimpleNamespace(_flash_attn_fwd=forward))
    monkeypatch.setattr("fusepass.kernels.flash_ops.library", lambda name: library)
    q, code = torch.randn(2, 4, 2, 8), fm.text([0.5, [], None])
    out, _ = flash4_mods._run_filled(q, q, q, [], [], [], code, None, 0)
    _, second = calls
    assert second["seqused_q"].tolist() == [3, 0] and second["seqused_q"].dtype is torch.int32
    assert second["out"] is out and second["q"].shape == q.shape and not second["q"].any()


def test_the_library_is_called_as_its_interface_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, ...]:
        seen.update(more)
        return q, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q, q, q

    interface = types.SimpleNamespace(_flash_attn_fwd=forward)
    library = types.SimpleNamespace(interface=interface)
    monkeypatch.setattr("fusepass.kernels.flash_ops.library", lambda name: library)
    q, code = torch.randn(1, 4, 2, 8), fm.text([-0.5, [["add", ["mul", SLOPE, GAP], 1.0]], None])
    flash4_mods._run(q, q, q, [torch.tensor(1.0)], [], [], code, None, 0)
    assert seen["softmax_scale"] == 1.0 and seen["causal"] and seen["window_size_right"] is None
    assert callable(seen["score_mod"]) and "mask_mod" not in seen and "block_sparse_tensors" not in seen
    assert seen["aux_tensors"][0].shape == (1,) and seen["return_lse"]


# ---------------------------------------------------------------------------------------- the library


class CuteInterface:
    """A stand-in for ``flash_attn.cute.interface`` with its arguments, which uses modifiers and tables.

    The mask is not evaluated in full blocks of the tables, and blocks that are in neither list are skipped.
    """

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    @staticmethod
    def _places(batch: int, heads: int, queries: int, keys: int) -> tuple[list[Lanes], tuple[int, ...]]:
        sizes = (batch, heads, queries, keys)
        grid = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in sizes), indexing="ij")
        return [Lanes(g.flatten()) for g in grid], sizes

    def _seen(self, at: Any, mask_mod: Any, aux: Any, tables: Any, by_keys: bool) -> Tensor:
        (where, sizes), told = at, {"seqlen_info": None, "aux_tensors": aux}
        asked = torch.ones(sizes, dtype=torch.bool)
        if mask_mod is not None:
            asked = mask_mod(where[0], where[1], q_idx=where[2], kv_idx=where[3], **told).data.view(sizes)
        if tables is None:
            return asked
        *lists, (rows, columns) = tables
        partial, full = (self._listed(lists[n], lists[n + 1], sizes, by_keys, rows, columns) for n in (0, 2))
        return full | (partial & asked)

    @staticmethod
    def _listed(count: Tensor, index: Tensor, sizes: Any, by_keys: bool, rows: int, columns: int) -> Tensor:
        """The elements of the blocks in a list, ``[B | 1, H | 1, Q, K]``."""
        (*_, queries, keys), (b, h, lines, entries) = sizes, index.shape
        wanted = (-(-queries // rows), -(-keys // columns))
        assert (lines, entries) == (wanted[::-1] if by_keys else wanted) and count.shape == (b, h, lines)
        listed = torch.zeros(b, h, lines, entries, dtype=torch.bool)
        for place in itertools.product(*map(range, (b, h, lines))):
            listed[place][index[place][: int(count[place])].long()] = True
        listed = listed.mT if by_keys else listed
        return listed.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :queries, :keys]

    def _parts(
        self, q: Tensor, k: Tensor, scale: float, window: Any, mods: Any, aux: Any, tables: Any, by_keys: bool
    ) -> tuple[Any, ...]:
        """Raw scores, and their weights and log-sum-exp."""
        at = self._places(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        memory = None if aux is None else [Memory(t) for t in aux]
        s = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
        score_mod, mask_mod = mods
        scores = s
        if score_mod is not None:
            b, h, i, j = at[0]
            told = {"q_idx": i, "kv_idx": j, "seqlen_info": None, "aux_tensors": memory}
            scores = score_mod(Lanes(s.flatten()), b, h, **told).data.view(s.shape)
        gap = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        left, right = window
        scores = scores if left is None else scores.masked_fill(gap < -left, -INF)
        scores = scores if right is None else scores.masked_fill(gap > right, -INF)
        scores = scores.masked_fill(~self._seen(at, mask_mod, memory, tables, by_keys), -INF)
        return at, memory, s, scores.softmax(-1), scores.logsumexp(-1)

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool,
        window_size_left: int | None, window_size_right: int | None, return_lse: bool,
        score_mod: Any = None, mask_mod: Any = None, aux_tensors: Any = None,
        block_sparse_tensors: Any = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert return_lse
        window = (window_size_left, 0 if causal else window_size_right)
        *_, p, lse = self._parts(
            q, k, softmax_scale, window, (score_mod, mask_mod), aux_tensors, block_sparse_tensors, False
        )
        out = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(q.shape[2] // v.shape[2], 2))
        return out, lse, out, lse

    def _flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *,
        softmax_scale: float, causal: bool, window_size_left: int | None, window_size_right: int | None,
        deterministic: bool, dq: Tensor, dk: Tensor, dv: Tensor, score_mod: Any = None,
        score_mod_bwd: Any = None, mask_mod: Any = None, aux_tensors: Any = None,
        block_sparse_tensors: Any = None,
    ) -> None:  # fmt: skip
        self.deterministic.append(deterministic)
        window, group = (window_size_left, 0 if causal else window_size_right), q.shape[2] // k.shape[2]
        at, memory, s, p, again = self._parts(
            q, k, softmax_scale, window, (score_mod, mask_mod), aux_tensors, block_sparse_tensors, True
        )
        torch.testing.assert_close(again, lse)
        wide_k, wide_v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        above = torch.einsum("bqhd,bkhd->bhqk", dout, wide_v)
        ds = p * (above - (out * dout).sum(-1).transpose(1, 2).unsqueeze(-1))
        if score_mod is not None:
            b, h, i, j = at[0]
            told = {"q_idx": i, "kv_idx": j, "seqlen_info": None, "aux_tensors": memory}
            ds = score_mod_bwd(Lanes(ds.flatten()), Lanes(s.flatten()), b, h, **told).data.view(s.shape)
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, wide_k) * softmax_scale)
        for mine, wide in (
            (dk, torch.einsum("bhqk,bqhd->bkhd", ds, q) * softmax_scale),
            (dv, torch.einsum("bhqk,bqhd->bkhd", p, dout)),
        ):
            mine.copy_(wide.unflatten(2, (-1, group)).sum(3))


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch, cute: None) -> Iterator[CuteInterface]:
    """The operator on CPU tensors, over the stand-in of its library."""
    stand_in, sparse = CuteInterface(), types.ModuleType("flash_attn.cute.block_sparsity")
    sparse.__dict__["BlockSparseTensorsTorch"] = lambda *tables, block_size: (*tables, block_size)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, sparse.__name__, sparse)
    library = types.SimpleNamespace(interface=stand_in)
    monkeypatch.setattr("fusepass.kernels.flash_ops.library", lambda name: library)
    with torch.library._scoped_library("fusepass", "FRAGMENT") as scope:
        scope.impl("flash4_mods", flash4_mods._run, "CPU")
        scope.impl("flash4_mods_backward", flash4_mods._run_backward, "CPU")
        yield stand_in


NEAR = ["lt", ["abs", GAP], ["const", 25]]
#: Scale, steps of the scores, visibility, and the window's bounds.
MODS: dict[str, tuple[float, list[Any], Any, int | None, int | None]] = {
    "plain": (0.3, [], None, None, None),
    "causal": (0.3, [], None, None, 0),
    "window": (0.3, [], None, 5, 2),
    "negative scale": (-0.3, [["softcap", 0.7], ["scale", 2.0]], None, None, None),
    "softcap": (0.8, [["softcap", 0.7]], None, None, 0),
    "clamp": (0.8, [["clamp", -0.5, 0.25]], None, None, 0),
    "leaky relu": (0.8, [["leaky_relu", 0.2]], None, 5, None),
    "abs": (0.8, [["abs"], ["scale", -1.0]], KEEP, None, None),
    "bias": (0.3, [["add", ["mul", SLOPE, GAP], 0.5]], None, None, 0),
    "factor": (0.3, [["times", SLOPE]], None, 5, None),
    "function": (
        0.8,
        [["function", [["add", 0, None], ["sigmoid", 1], ["mul", 0, 2]], SLOPE]],
        None,
        None,
        0,
    ),
    "padding": (0.3, [], ["and", NEAR, KEEP], None, None),
    "bias and padding": (0.3, [["softcap", 0.7], ["add", ["mul", SLOPE, GAP], 0.5]], KEEP, None, None),
}


@pytest.mark.parametrize("name", MODS)
def test_the_library_computes_what_the_operator_says(name: str, interface: CuteInterface) -> None:
    """Every argument arrives, forward and backward: modifiers, tensors, both kinds of tables, bounds."""
    scale, steps, visible, left, right = MODS[name]
    code, (queries, keys) = fm.text([scale, steps, visible]), (120, 150)
    q, k, v = (
        torch.randn(2, n, h, d, requires_grad=True)
        for n, h, d in ((queries, 2, 8), (keys, 1, 8), (keys, 1, 4))
    )
    scores = [torch.tensor([0.1, 0.02])] if any("load" in fm.text(s) for s in steps) else []
    masks = [] if visible is None else [(torch.rand(2, keys) < 0.6) | (torch.arange(keys) < 2)]
    tables: list[Tensor] = []
    if visible is not None:
        masks[0][1, 128:] = False  # a block that nobody sees
        tables = blocks.tables_op(masks, fm.text(visible), 2, 1, queries, keys, torch.device("cpu"), True)
    got = torch.ops.fusepass.flash4_mods(q, k, v, scores, masks, tables, code, left, right)[0]
    want = _densely(q, k, v, scores, masks, MODS[name])
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad(x, (q, k, v), weights) for x in (got, want)]
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)
    assert interface.deterministic == [False]


def test_its_backward_pass_is_deterministic_where_that_is_asked_for(interface: CuteInterface) -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        code = fm.text([0.3, [], None])
        torch.ops.fusepass.flash4_mods(q, q, q, [], [], [], code, None, 0)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert interface.deterministic == [True]


def _densely(q: Tensor, k: Tensor, v: Tensor, scores: list[Tensor], masks: list[Tensor], mods: Any) -> Tensor:
    """The same without the operator."""
    scale, steps, visible, left, right = mods
    sizes, group = (2, q.shape[2], q.shape[1], k.shape[1]), q.shape[2] // k.shape[2]
    letters = dict(zip("bhij", torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), strict=True))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * scale
    for kind, given, *factor in ((*step, None) for step in steps):
        if kind == "scale":
            s = s * given
        elif kind == "clamp":
            s = s.clamp(given, factor[0])
        elif kind == "leaky_relu":
            s = torch.nn.functional.leaky_relu(s, given)
        elif kind == "abs":
            s = s.abs()
        elif kind == "softcap":
            s = torch.tanh(s / given) * given
        elif kind == "function":
            s = Function(fm.read(fm.text(given)), 0).apply(
                s, [fm.evaluate(fm.read(fm.text(factor[0])), letters, scores)]
            )
        else:
            value = fm.evaluate(fm.read(fm.text(given)), letters, scores)
            s = s + value * factor[0] if kind == "add" else s * value
    gap = letters["j"] - letters["i"] - (sizes[3] - sizes[2])
    s = s if left is None else s.masked_fill(gap < -left, -INF)
    s = s if right is None else s.masked_fill(gap > right, -INF)
    if visible is not None:
        seen = fm.evaluate(fm.read(fm.text(visible)), letters, masks)
        s = s.masked_fill(~seen, -INF)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v.repeat_interleave(group, 2))
