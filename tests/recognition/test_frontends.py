"""Front ends agree: one program gives one specification, whoever captured it, and the right numbers."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fusepass
from fusepass.reports.collector import Collector, collect
from tests.capture import Wrapped, close, compiled, copies, qkv

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
Program = Callable[..., Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q * 0.25, k.transpose(2, 3)), dim=-1), v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    seen = torch.ones_like(s, dtype=torch.bool).tril()
    return s.masked_fill(~seen, -INF).softmax(-1) @ v


def added_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * 0.5
    return (s + torch.full_like(s, -INF).triu(1)).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    return torch.where(p[:, None, None, :], s, LOWEST).softmax(-1) @ v


def added_padding(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    hidden = (1.0 - p[:, None, None, :].to(s.dtype)) * LOWEST
    return F.softmax(s * 0.125 + hidden, dim=-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (30.0 * torch.tanh(q @ k.transpose(-1, -2) / 30.0)).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.5 + b).softmax(-1) @ v


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def expanded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8) for t in (k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bihd", w, v)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, t.shape[2], t.shape[3]) for t in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, dim=-1), v)


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    return F.softmax(q @ k.transpose(-1, -2), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s.mul_(0.5)
    s.masked_fill_(torch.ones_like(s, dtype=torch.bool).triu(1), -INF)
    return s.softmax(-1) @ v


def rows_added(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s += b
    s /= 2.0
    return s.softmax(-1) @ v


def item_set(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s[..., 4:] = -INF
    return s.softmax(-1) @ v


class Block(nn.Module):
    """A packed projection and the usual modules."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.soft, self.drop, self.same = nn.Softmax(dim=-1), nn.Dropout(0.1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        w = self.drop(self.same(self.soft(q @ k.transpose(-1, -2) * 8**-0.5)))
        out: Tensor = self.out((w @ v).transpose(1, 2).reshape(2, 6, 16))
        return out


PAD = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], dtype=torch.bool)
GROUPED = (repeated_heads, expanded_heads)
PROGRAMS: dict[str, tuple[Program, tuple[Tensor, ...]]] = {
    **{f.__name__: (f, qkv()) for f in (plain, scaled_query, causal, added_causal, softcap, einsum, folded)},
    **{f.__name__: (f, qkv()) for f in (upcast, written_out, in_place, item_set)},
    **{f.__name__: (f, qkv(H=4, G=2)) for f in GROUPED},
    **{f.__name__: (f, (*qkv(), PAD)) for f in (padded, added_padding)},
    **{f.__name__: (f, (*qkv(), torch.randn(2, 1, 6))) for f in (biased, rows_added)},
    "cross": (plain, (*qkv(Q=3, K=7)[:2], torch.randn(2, 2, 7, 5))),
    "one kv head": (plain, qkv(H=4, G=1)),
    "block": (Block().eval(), (torch.randn(2, 6, 16),)),
}
#: torch.fx cannot trace an assignment to an item.
UNTRACEABLE = {"item_set"}


def module(program: Program) -> nn.Module:
    return program if isinstance(program, nn.Module) else Wrapped(program)


def traced(program: Program, args: tuple[Tensor, ...], **options: Any) -> tuple[fx.GraphModule, Collector]:
    graph = fx.symbolic_trace(program)
    with collect() as seen:
        return fusepass.fuse(graph, *args, **options), seen


def exported(
    program: Program, args: tuple[Tensor, ...], decomposed: bool, **options: Any
) -> tuple[torch.export.ExportedProgram, Collector]:
    with collect() as seen:
        return fusepass.fuse(export(program, args, decomposed), **options), seen


@functools.cache
def export(program: Program, args: tuple[Tensor, ...], decomposed: bool) -> torch.export.ExportedProgram:
    if decomposed:
        graph: torch.export.ExportedProgram = export(program, args, False).run_decompositions()
        return graph
    return torch.export.export(module(program), args)


def specs(seen: Collector) -> list[str]:
    assert all(site.fused for site in seen.sites), [site.reason for site in seen.sites]
    return [site.spec for site in seen.sites]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_front_end_gives_the_same_specification(name: str) -> None:
    program, args = PROGRAMS[name]
    expected = specs(compiled(program, *copies(args))[1])
    assert len(expected) == 1
    for decomposed in (False, True):
        assert specs(exported(program, args, decomposed, kernel="reference")[1]) == expected
    if name not in UNTRACEABLE:
        assert specs(traced(program, args, kernel="reference")[1]) == expected


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in UNTRACEABLE])
def test_a_fused_graph_module_gives_the_right_numbers(name: str, kernel: str) -> None:
    program, args = PROGRAMS[name]
    graph, seen = traced(program, args, kernel=kernel)
    assert [site.fused for site in seen.sites] == [True], [site.reason for site in seen.sites]
    tolerance = 2e-2 if name == "upcast" else 1e-5
    close(graph(*copies(args)), program(*copies(args)), tolerance)
    assert fused_nodes(graph) == 1 and not named(graph, "softmax")


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fused_exported_program_gives_the_right_numbers(name: str, decomposed: bool, kernel: str) -> None:
    program, args = PROGRAMS[name]
    graph, seen = exported(program, args, decomposed, kernel=kernel)
    if kernel == "reference" or name not in ("softcap",):  # no exportable kernel has a softcap
        assert [site.fused for site in seen.sites] == [True], [site.reason for site in seen.sites]
        assert fused_nodes(graph.graph_module) == 1 and not named(graph.graph_module, "_softmax.default")
    tolerance = 2e-2 if name == "upcast" else 1e-5
    close(graph.module()(*copies(args)), program(*copies(args)), tolerance)


def named(graph: fx.GraphModule, word: str) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op.startswith("call") and word in str(n.target)]


def fused_nodes(graph: fx.GraphModule) -> int:
    """How many kernels are called."""
    words = ("fusepass.attention", "scaled_dot_product_attention", "flex_attention")
    return sum(any(w in str(n.target) for w in words) for n in graph.graph.nodes if n.op == "call_function")


# ---------------------------------------------------------------------------------------- fuse()


def test_fuse_leaves_its_argument_alone() -> None:
    graph = fx.symbolic_trace(plain)
    before = graph.code
    fused = fusepass.fuse(graph, *qkv())
    assert graph.code == before and fused is not graph and "softmax" not in fused.code
    program = torch.export.export(Wrapped(plain), qkv())
    text = str(program.graph)
    fusepass.fuse(program)
    assert str(program.graph) == text


@pytest.mark.parametrize("change", ["shape", "dtype", "rank"])
def test_a_fused_graph_module_refuses_other_inputs(change: str) -> None:
    q, k, v = qkv()
    fused = fusepass.fuse(fx.symbolic_trace(plain), q, k, v)
    other = {"shape": q[:, :, :3], "dtype": q.double(), "rank": q[0]}[change]
    with pytest.raises(
        ValueError, match=r"input 0 is .*, but the graph was fused for \(2, 2, 6, 8\) torch.float32; call"
    ):
        fused(other, k, v)
    with pytest.raises(ValueError, match=r"input 1 is \(2, 2, 9, 8\)"):
        fused(q, torch.randn(2, 2, 9, 8), v)
    close(fused(q, k, v), plain(q, k, v))


def test_fuse_asks_for_example_inputs() -> None:
    with pytest.raises(TypeError, match=r"without shapes needs example inputs: fuse\(graph, \*inputs\)"):
        fusepass.fuse(fx.symbolic_trace(plain))


@pytest.mark.parametrize("graph", [Block(), plain, "graph", None])
def test_fuse_says_what_it_takes(graph: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"GraphModule or an ExportedProgram, got {type(graph).__name__}; .*torch.compile"
    ):
        fusepass.fuse(graph)


def test_fuse_checks_its_options() -> None:
    with pytest.raises(ValueError, match=r"'sdap' is unknown; accepted are .*did you mean 'sdpa'"):
        fusepass.fuse(fx.symbolic_trace(plain), *qkv(), kernel="sdap")
    with pytest.raises(ValueError, match="unknown fusepass option 'kernal'"):
        fusepass.fuse(fx.symbolic_trace(plain), *qkv(), kernal="sdpa")  # type: ignore[call-overload]


def test_a_graph_module_with_shapes_needs_no_inputs() -> None:
    from tests.capture import dynamo_graph

    args = qkv()
    graph = dynamo_graph(plain, *args)
    fused = fusepass.fuse(graph)
    assert "softmax" not in fused.code
    close(fused(*args), graph(*args))


def test_a_graph_without_attention_is_copied() -> None:
    def other(x: Tensor) -> Tensor:
        return torch.relu(x).softmax(-1)

    x = torch.randn(3, 4)
    close(fusepass.fuse(fx.symbolic_trace(other), x)(x), other(x))


@pytest.mark.parametrize("training", [False, True])
def test_modules_softmax_dropout_identity(training: bool) -> None:
    block = Block().train(training)
    graph, seen = traced(block, (torch.randn(2, 6, 16),), kernel="reference")
    spec = specs(seen)[0]
    assert ("dropout 0.1" in spec) is training
    x = torch.randn(2, 6, 16)
    if training:
        torch.manual_seed(1)
        first = graph(x)
        assert not torch.equal(first, graph(x)), "dropout draws anew"
    else:
        close(graph(x), block(x))


def test_gradients_flow_through_a_fused_graph_module() -> None:
    block = Block().eval()
    other = copy.deepcopy(block)
    graph, _ = traced(block, (torch.randn(2, 6, 16),))
    x = torch.randn(2, 6, 16)
    graph(x).square().sum().backward()
    other(x).square().sum().backward()
    mine, theirs = dict(graph.named_parameters()), dict(other.named_parameters())
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("program", [plain, causal, added_causal])
def test_exported_programs_with_dynamic_sizes(program: Program, decomposed: bool, kernel: str) -> None:
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    shapes = ({0: batch, 2: length},) * 3
    graph = torch.export.export(Wrapped(program), qkv(), dynamic_shapes=(shapes,))
    if decomposed:
        graph = graph.run_decompositions()
    with collect() as seen:
        fused = fusepass.fuse(graph, kernel=kernel)
    assert [site.fused for site in seen.sites] == [True], [site.reason for site in seen.sites]
    assert ("causal" in seen.sites[0].spec) is (program is not plain)
    for size in ((2, 2, 6, 8), (5, 2, 11, 8)):
        args = [torch.randn(size) for _ in range(3)]
        close(fused.module()(*args), program(*args))


def test_a_fused_exported_program_can_be_saved_and_decomposed() -> None:
    args = qkv()
    for kernel in ("auto", "reference"):
        fused = fusepass.fuse(torch.export.export(Wrapped(causal), args), kernel=kernel)
        buffer = io.BytesIO()
        torch.export.save(fused, buffer)
        buffer.seek(0)
        close(torch.export.load(buffer).module()(*args), causal(*args))
        close(fused.run_decompositions().module()(*args), causal(*args))
