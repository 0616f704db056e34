"""The ONNX dialect reads what the dialects of PyTorch read: the same program gives the same specification."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import InlinePass

import fusepass
from fusepass.compilation.rewrite import _LOST
from fusepass.dialects.onnx.constants import closed_form
from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.dialects.onnx.sizes import DimFacts, parse_dim, symbol
from fusepass.exporters.onnx.opsets import infer
from fusepass.expressions.ir import expr
from fusepass.recognition.recognize import recognise
from fusepass.reports.collector import collect
from fusepass.rules.site import Site
from tests import evaluate, programs
from tests.recognition.test_frontends import PROGRAMS, module

#: What PyTorch's exporter changes before the dialect sees it: constants of other dtypes are rounded, a
#: constant divisor becomes a number, `//` becomes several operators (a chunk is then a dense mask), and a
#: write by index becomes a scatter.
_CHANGED = ("constant tensor", "chunk", "setitem", "index_put", "indices")
#: Programs that combine every pair of choices.
DRAWN = [
    p
    for p in programs.pairwise({**programs.AXES, "dtype": ("float32",), "dropout": ("none",)}, seed=1)
    if not any(word in str(p) for word in _CHANGED)
]
#: The exporter leaves the dtype out of a softmax, and writes an assignment as a scatter.
UNFAITHFUL = {"upcast", "item_set"}


def onnx_specs(model: ir.Model) -> list[str]:
    """What every product of a model is recognised as."""
    InlinePass()(model)
    reader = OnnxReader(model.graph, model.opset_imports, infer(model))
    specs = []
    for node in model.graph:
        meaning = reader.meaning.get(node.outputs[0])
        if meaning is not None and meaning.op == "dot" and reader.home[meaning] is node.outputs[0]:
            site = recognise(meaning, reader.facts_of(meaning))
            specs += [] if site is None else [str(site.spec) if isinstance(site, Site) else site.reason]
    return specs


def exported(program: Any, args: tuple[Any, ...]) -> ir.Model:
    """The plain export, before any optimisation folds constants."""
    program_in_onnx = torch.onnx.export(
        program, args, dynamo=True, opset_version=20, optimize=False, verbose=False
    )
    assert program_in_onnx is not None
    return program_in_onnx.model


def torch_specs(program: Any, args: tuple[Any, ...]) -> list[str]:
    """The same for PyTorch; ONNX has no writes, so sites whose scores a write loses are left out."""
    with collect() as seen:
        fusepass.fuse(torch.export.export(program, args), kernel="reference")
    specs = [site.spec if site.fused else str(site.reason) for site in seen.sites]
    return [text for text in specs if text != _LOST]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in UNFAITHFUL])
def test_hand_written_programs(name: str) -> None:
    program, args = PROGRAMS[name]
    assert onnx_specs(exported(module(program).eval(), args)) == torch_specs(module(program).eval(), args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", DRAWN[:12], ids=str)
def test_drawn_programs(program: programs.Program) -> None:
    call = module(programs.function(program)).eval()
    args = tuple(programs.inputs(program).values())
    assert onnx_specs(exported(call, args)) == torch_specs(call, args)


# ---------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "table",
    [
        torch.ones(4, 5, dtype=torch.bool).tril(),
        torch.ones(2, 3, 6, 6, dtype=torch.bool).tril(1).triu(-2),
        torch.full((1, 1, 5, 5), -3e38).triu(1),
        torch.arange(6)[None, :] - 2 * torch.arange(4)[:, None] + 3,
        torch.full((3, 4), 7.0),
        torch.arange(5) * 3 - 4,
    ],
)
def test_constants_with_a_closed_form(table: torch.Tensor) -> None:
    form = closed_form(table.numpy(), table.dtype)
    assert form is not None and form.op != "input"
    assert torch.equal(evaluate.Evaluator({})(form), table)


def test_one_other_element_is_no_closed_form() -> None:
    table = torch.ones(6, 6, dtype=torch.bool).tril()
    table[2, 5] = True
    assert closed_form(table.numpy(), table.dtype) is None
    ramp = torch.arange(6)
    ramp[4] = 0
    assert closed_form(ramp.numpy(), ramp.dtype) is None


def test_names_of_dimensions_are_sizes() -> None:
    past, seq = symbol("past"), symbol("seq")
    assert parse_dim("past + seq") == past + seq and parse_dim("2*seq") == 2 * seq
    assert parse_dim("__import__('os')").is_Symbol and parse_dim("a.b").is_Symbol  # type: ignore[union-attr]


def test_facts_of_named_dimensions() -> None:
    past, seq = symbol("past"), symbol("seq")
    facts = DimFacts()
    assert facts.at_most(seq, past + seq) and not facts.at_most(past + seq, seq)
    assert not facts.at_most(1, seq) and DimFacts([seq]).at_most(1, seq)
    assert facts.equal(past + seq, seq + past) and not facts.equal(past, seq)


def test_dimensions_that_may_differ_are_not_broadcast() -> None:
    """Sizes with different names may be equal, or 1: nothing can be concluded."""
    from onnx import TensorProto, helper

    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 4])
    b = helper.make_tensor_value_info("b", TensorProto.FLOAT, ["m", 4])
    c = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "g", [a, b], [c])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    reader = OnnxReader(model.graph, model.opset_imports)
    assert reader.expr_of(model.graph.outputs[0]) is None
    assert expr("input", (), ("a",), (symbol("n"), 4)) is reader.expr_of(model.graph.inputs[0])
