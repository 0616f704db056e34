"""Shared and written memory: no write is lost or moved, no site reads the wrong version of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass.dialects.torch.memory import Memory, written_operands
from fusepass.reports import collector
from tests import checking  # noqa: F401  (faults of the pass are raised)
from tests.attention import cleared
from tests.capture import dynamo_graph

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
NAMES = ("q", "k", "v", "b")
FUSED: list[Any] = []
STAYING: list[Any] = []


def case(fuses: bool, grads: str = "") -> Callable[[Program], Program]:
    """Declare a program; tests run it with gradients for the inputs in ``grads``."""

    def add(program: Program) -> Program:
        (FUSED if fuses else STAYING).append(pytest.param(program, grads, id=program.__name__))
        return program

    return add


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(2, 2, 4, 8, generator=generator) for name in NAMES}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


# ---------------------------------------------------------------------------------------- before the site


@case(True)
def through_a_permuted_view_of_keys_that_are_regrouped(q, k, v, b):  # type: ignore[no-untyped-def]
    q, k = (torch.cat([t, t + b], 1) for t in (q, k))
    k.transpose(0, 1).index_add_(0, torch.tensor([0]), k.transpose(0, 1)[:1] * 0.5)
    return attention(q, k / 2, v[:, :, None].expand(2, 2, 2, 4, 8).reshape(2, 4, 4, 8))


@case(True)
def through_a_permuted_view_of_shared_values(q, k, v, b):  # type: ignore[no-untyped-def]
    values = v * 2
    values.transpose(0, 1).masked_fill_(torch.arange(8) > 2, 0)
    q, k = torch.stack([q, b], 2), torch.stack([k, k + b], 2)
    return attention(q, k, values[:, :, None].expand(2, 2, 2, 4, 8))


# ---------------------------------------------------------------------------------------- after the site


@case(True)
def through_a_view(q, k, v, b):  # type: ignore[no-untyped-def]
    kt = k.mT
    out = (q @ kt).softmax(-1) @ v
    kt.mul_(2)
    return out, k.sum()


@case(True)
def through_a_slice(q, k, v, b):  # type: ignore[no-untyped-def]
    kt = k.mT
    out = (q @ kt).softmax(-1) @ v
    kt[..., 0] = 7
    return out, k + 1


@case(True)
def scattered(q, k, v, b):  # type: ignore[no-untyped-def]
    out = attention(q, k, v)
    k.scatter_(2, torch.zeros(2, 2, 4, 8, dtype=torch.long), 3.0)
    return out


@case(True)
def result_in_a_caller_s_tensor(q, k, v, b):  # type: ignore[no-untyped-def]
    torch.matmul((q @ k.mT).softmax(-1), v, out=b)
    return q + 1


@case(True)
def result_in_a_tensor_that_is_read(q, k, v, b):  # type: ignore[no-untyped-def]
    torch.matmul((q @ k.mT).softmax(-1), v, out=b)
    return b * 2


@case(True)
def result_copied(q, k, v, b):  # type: ignore[no-untyped-def]
    b.copy_(attention(q, k, v))
    return q * 2


@case(True)
def result_written_through_data(q, k, v, b):  # type: ignore[no-untyped-def]
    out = attention(q, k, v)
    out.data.mul_(2)
    return out


@case(True)
def scores_kept_by_the_caller(q, k, v, b):  # type: ignore[no-untyped-def]
    bt = b[..., :4].mT
    bt.copy_(q @ k.mT)
    return bt.softmax(-1) @ v


@case(True)
def statistics(q, k, v, b):  # type: ignore[no-untyped-def]
    mean = b[0, 0, 0]
    out = attention(q + mean, k, v)
    F.batch_norm(torch.linspace(0, 1, 32).view(4, 8), mean, torch.ones(8), training=True)
    return out, mean


# ---------------------------------------------------------------------------------------- before and between


@case(True)
def foreach_before(q, k, v, b):  # type: ignore[no-untyped-def]
    torch._foreach_mul_([k, v], 2.0)
    return attention(q, k, v), k


@case(True)
def values_indexed_between(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k.mT
    v[:, :, torch.tensor([0, 2])] = 1.0
    return scores.softmax(-1) @ v


@case(False)
def foreach_between(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k.mT
    torch._foreach_mul_([k, v], 2.0)
    return scores.softmax(-1) @ v, k


@case(False)
def activation_in_place_by_position(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k.mT
    F.relu(q, True)
    return scores.softmax(-1) @ v, q


@case(False)
def through_data(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k.mT
    q.data.mul_(3)
    return scores.softmax(-1) @ v


@case(False)
def through_detach_and_a_view(q, k, v, b):  # type: ignore[no-untyped-def]
    weights = (q @ k.mT).softmax(-1)
    k.detach().add_(1)
    v.detach().unsqueeze(0).mul_(2)
    return weights @ v, k * 2


@case(False)
def expanded_slice(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k[:, :1].expand(2, 2, 4, 8).mT
    k[:, :1].zero_()
    return scores.softmax(-1) @ v


@case(False)
def operator_of_a_user(q, k, v, b):  # type: ignore[no-untyped-def]
    weights = (q @ k.mT).softmax(-1)
    torch.ops.fusepass_tests.bump(k)
    return weights @ v, k


@torch.library.custom_op("fusepass_tests::bump", mutates_args=("x",))
def bump(x: Tensor) -> None:
    x.add_(1)


# ---------------------------------------------------------------------------------------- gradients


@case(False, "qkv")
def scores_written_without_gradients(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k.mT
    with torch.no_grad():
        scores.mul_(3)
    return scores.softmax(-1) @ v


@case(False, "qkv")
def scores_written_through_data(q, k, v, b):  # type: ignore[no-untyped-def]
    scores = q @ k.mT
    scores.data.mul_(3)
    return scores.softmax(-1) @ v


@case(True, "qkv")
def result_written(q, k, v, b):  # type: ignore[no-untyped-def]
    out = attention(q, k, v)
    out.mul_(2)
    return out


@case(True, "v")
def keys_overwritten_where_only_values_learn(q, k, v, b):  # type: ignore[no-untyped-def]
    keys = k * 1
    out = attention(q, keys, v)
    keys.zero_()
    q.zero_()
    return out, keys


@case(True, "v")
def bias_overwritten_where_only_values_learn(q, k, v, b):  # type: ignore[no-untyped-def]
    bias = b[..., :4] * 1
    out = (q @ k.mT + bias).softmax(-1) @ v
    bias.zero_()
    return out, bias


@case(True, "b")
def bias_of_rows_learns(q, k, v, b):  # type: ignore[no-untyped-def]
    return (q @ k.mT + (b * 0.5)[..., :1]).softmax(-1) @ v


@case(True, "qb")
def everything_cancels_over_one_key(q, k, v, b):  # type: ignore[no-untyped-def]
    return (q @ k[:, :, :1].mT + b[..., :1]).softmax(-1) @ v[:, :, :1]


@case(True)
def zeros_that_are_written_after_a_sink_of_zero(q, k, v, b):  # type: ignore[no-untyped-def]
    total = b.sum()
    scores = torch.nn.functional.pad(q @ k.mT, (0, 1))
    out = scores.softmax(-1)[..., :-1] @ v
    total.copy_(torch.zeros(()))
    return out, total


@case(True)
def a_number_that_is_filled_in_after_a_sink_of_it(q, k, v, b):  # type: ignore[no-untyped-def]
    total = b.sum()
    scores = torch.nn.functional.pad(q @ k.mT, (0, 1), value=1.5)
    out = scores.softmax(-1)[..., :-1] @ v
    total.fill_(1.5)
    return out, total


def run(program: Any, grads: str) -> list[Tensor]:
    """Results, gradients (NaN for None) and the inputs afterwards."""
    given = inputs()
    for name in grads:
        given[name].requires_grad_()
    out = program(**given)
    outs = out if isinstance(out, tuple) else (out,)
    results = [t.detach().clone() for t in outs]
    if grads:
        learning = [t for t in outs if t.requires_grad]
        torch.autograd.backward(
            [(t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in learning]
        )
        results += [torch.full((), torch.nan) if (g := given[n].grad) is None else g for n in grads]
    return results + [t.detach() for t in given.values()]


def agrees(program: Program, grads: str, inner: str, kernel: str) -> collector.Collector:
    expected = run(program, grads)
    torch._dynamo.reset()
    with collector.collect() as seen:
        got = run(
            torch.compile(program, backend="fusepass", options={"inner": inner, "kernel": kernel}), grads
        )
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not seen.notes
    return seen


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(("program", "grads"), FUSED)
def test_no_write_is_lost_where_a_site_is_fused(
    program: Program, grads: str, inner: str, kernel: str
) -> None:
    seen = agrees(program, grads, inner, kernel)
    assert [s.fused for s in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(("program", "grads"), STAYING)
def test_a_value_that_was_overwritten_is_not_read_again(program: Program, grads: str, inner: str) -> None:
    seen = agrees(program, grads, inner, "reference")
    assert not any(s.fused for s in seen.sites)


def test_a_dropout_that_drops_nothing_gives_its_operand() -> None:
    """Its recorded value is another tensor: with AOTAutograd, PyTorch itself loses the write."""

    def program(q, k, v, b):  # type: ignore[no-untyped-def]
        weights = (q @ k.mT).softmax(-1)
        dropped = F.dropout(weights, 0.5, training=False)
        weights.tanh_()
        return dropped @ v

    seen = agrees(program, "", "eager", "reference")
    assert not any(s.fused for s in seen.sites)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("read", [Tensor.flatten, lambda x: x.transpose(1, 2).reshape(2, 4, 16)])
def test_a_view_without_gradients_is_no_copy(read: Callable[[Tensor], Tensor], transposed: bool) -> None:
    """In a ``no_grad`` region, a view of a tensor with gradients has them too, but a copy does not."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        out = (v.mT @ weights.mT).mT if transposed else weights @ v
        with torch.no_grad():
            return read(out)

    given = {n: t.requires_grad_() for n, t in inputs().items() if n != "b"}
    expected = program(**given)
    for kernel in ("reference", "sdpa"):
        torch._dynamo.reset()
        options: Any = {"inner": "eager", "kernel": kernel}
        got = torch.compile(program, backend="fusepass", options=options)(**given)
        assert got.requires_grad == expected.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_for_the_backward_pass_survives_inductor() -> None:
    agrees(keys_overwritten_where_only_values_learn, "v", "inductor", "auto")


# ---------------------------------------------------------------------------------------- overlap


def test_arguments_of_one_storage_are_one_memory() -> None:
    given = inputs()
    expected = cleared(given["q"], given["k"], given["v"], torch.zeros(1))
    store = torch.cat([given["k"], given["b"]], 2)
    torch._dynamo.reset()
    call = torch.compile(cleared, backend="fusepass", options={"inner": "aot_eager"})
    torch.testing.assert_close(call(given["q"], store[:, :, :4], given["v"], store), expected)
    assert not store.any()


def test_arguments_that_overlap_in_a_later_call_alone() -> None:
    given = inputs()
    q, k, v = (given[n] for n in "qkv")
    expected = cleared(q, k, v, torch.zeros(1))
    torch._dynamo.reset()
    call = torch.compile(cleared, backend="fusepass", options={"inner": "aot_eager"})
    with collector.collect() as seen:
        apart = torch.ones(2, 2, 8, 8)
        torch.testing.assert_close(call(q, k[:, :, :4], v, apart), expected)
    assert [s.fused for s in seen.sites] == [True]
    joint = torch.empty(2 * 2 * 4 * 8 + 2 * 2 * 8 * 8)
    mine = joint[: k.numel()].view_as(k).copy_(k)
    other = joint[k.numel() :].view(2, 2, 8, 8)
    overlapping = joint.as_strided((2, 2, 8, 8), (128, 64, 8, 1), 0)
    torch.testing.assert_close(call(q, mine, v, other.fill_(1)), expected)
    torch.testing.assert_close(call(q, mine, v, overlapping), expected)
    assert not mine.any()


# ---------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("program", "shared"),
    [
        (lambda q, k, v, b: q.transpose(0, 1)[1:], True),
        (lambda q, k, v, b: q.data[0], True),
        (lambda q, k, v, b: q.detach().unsqueeze(0), True),
        (lambda q, k, v, b: q.expand(2, 2, 2, 4, 8), True),
        (lambda q, k, v, b: q.reshape(-1), True),
        (lambda q, k, v, b: q.mT.reshape(-1), False),
        (lambda q, k, v, b: q + 1, False),
    ],
)
def test_who_shares_memory_is_seen(program: Program, shared: bool) -> None:
    def whole(q, k, v, b):  # type: ignore[no-untyped-def]
        return program(q, k, v, b), b.exp()

    graph = dynamo_graph(whole, *inputs().values()).graph
    memory = Memory(graph)
    given, _ = sorted(graph.find_nodes(op="placeholder"), key=lambda n: str(n.name), reverse=True)
    result, _ = graph.output_node().all_input_nodes
    assert bool(memory.of(result) & memory.of(given)) is shared


@pytest.mark.parametrize(
    ("program", "written"),
    [
        (lambda q, k, v, b: F.relu(q, True), "q"),
        (lambda q, k, v, b: F.relu(q, False), ""),
        (lambda q, k, v, b: torch.add(q, k, out=b), "b"),
        (lambda q, k, v, b: torch._foreach_add_([k, v], [q, b]), "kv"),
        (lambda q, k, v, b: q.addcmul_(k, v), "q"),
        (lambda q, k, v, b: torch.ops.fusepass_tests.bump(k), "k"),
        (lambda q, k, v, b: torch.ops.aten.mul_.Tensor(v, q), "v"),
        (lambda q, k, v, b: F.embedding(torch.tensor([1]), b[0, 0], max_norm=1.0), "b"),
        (lambda q, k, v, b: F.softmax(q, -1) + torch.where(k > 0, v, b), ""),
    ],
)
def test_which_operands_are_written(program: Program, written: str) -> None:
    def whole(q, k, v, b):  # type: ignore[no-untyped-def]
        program(q, k, v, b)
        return q + k + v + b

    graph = dynamo_graph(whole, *inputs().values()).graph
    memory = Memory(graph)
    places = dict(
        zip(
            NAMES,
            sorted(graph.find_nodes(op="placeholder"), key=lambda n: NAMES.index(n.name[2])),
            strict=True,
        )
    )
    touched = set().union(*(memory.of(t) for n in graph.nodes for t in written_operands(n)))
    assert "".join(n for n in NAMES if memory.of(places[n]) & touched) == written
