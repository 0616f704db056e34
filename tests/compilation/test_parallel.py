"""DTensors in a graph, and training distributed over two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from fusepass.compilation.backend import run_pass
from fusepass.host.config import Options
from fusepass.reports.report import GraphReport
from fusepass.writing.sharding import check_placements, has_strategy, is_sharded
from tests.capture import dynamo_graph

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed"),
    pytest.mark.filterwarnings("ignore"),
]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1) * 0.3
    s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    return s.softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q @ k.transpose(-2, -1)).softmax(-1) @ v


def spread(mesh: Any, *dims: int | None, heads: int = 4, learns: bool = False) -> list[Any]:
    """Queries, keys and values as DTensors of two ranks, each split by its dimension (None: copied)."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    tensors = []
    for n, dim in enumerate(dims if len(dims) == 3 else dims * 3):
        shape = [4, heads if n else 4, 8, 16]
        if dim is not None:
            shape[dim] //= 2
        kind = Replicate() if dim is None else Shard(dim)
        part = torch.randn(shape)
        tensors.append(DTensor.from_local(part, mesh, (kind,), run_check=False).requires_grad_(learns))
    return tensors


@pytest.fixture
def strategies(mesh: Any) -> Iterator[None]:
    """SDPA's CPU operators get strategies, as its GPU operators have."""
    from torch.distributed.tensor import DTensor

    from tests.parallel_programs import shard_attention_on_cpu

    operators = shard_attention_on_cpu()
    yield
    propagator = DTensor._op_dispatcher.sharding_propagator
    for operator in operators:
        propagator.op_strategy_funcs.pop(operator)


def rewritten(program: Any, given: list[Any], **options: Any) -> tuple[GraphReport, Any]:
    gm = dynamo_graph(program, *given)
    began = time.perf_counter()
    report = run_pass(gm, given, Options(**options))
    assert time.perf_counter() - began < 1.0
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    return report, gm(*(dict(zip(("L_q_", "L_k_", "L_v_"), given, strict=True))[n] for n in names))[0]


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("program", [attention, grouped])
def test_what_is_split_by_batch_or_heads_is_fused(
    program: Any, dim: int | None, learns: bool, strategies: None, mesh: Any
) -> None:
    given = spread(mesh, dim, heads=2 if program is grouped else 4, learns=learns)
    report, out = rewritten(program, given)
    assert [s.kernel for s in report.sites] == ["sdpa"], report.sites
    assert out.placements == given[0].placements
    torch.testing.assert_close(out.to_local(), program(*(t.to_local() for t in given)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [(2,), (2, None, None), (0, None, None), (3,), (1, 0, 0)])
def test_what_is_split_otherwise_stays_as_it_is(dims: Any, strategies: None, mesh: Any) -> None:
    """A call that would gather shards, or place the result elsewhere, is not a replacement."""
    gm = dynamo_graph(attention, *(given := spread(mesh, *dims)))
    before = {n.name: n.meta["example_value"].placements for n in gm.graph.nodes if "matmul" in n.name}
    report = run_pass(gm, given, Options())
    (site,) = report.sites
    last = gm.graph.output_node().all_input_nodes[0].meta["example_value"]
    assert last.placements == before["matmul_1"]
    assert site.fused or "placed" in str(site.reason) or "strategy" in str(site.reason), site


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex", "reference"])
@pytest.mark.parametrize("learns", [False, True])
def test_operators_without_a_strategy_are_refused_at_once(kernel: str, learns: bool, mesh: Any) -> None:
    for program in (attention, softcapped):
        report, out = rewritten(program, spread(mesh, 1, learns=learns), kernel=kernel)
        (site,) = report.sites
        assert not site.fused and is_sharded(out)
        assert kernel == "flex" or program is softcapped or "no sharding strategy" in str(site.reason)


def test_a_backward_needs_a_strategy_as_well(strategies: None, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor

    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    functions = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    assert has_strategy(backward)
    kept = functions.pop(backward)
    try:
        report, _ = rewritten(attention, spread(mesh, 1))
    finally:
        functions[backward] = kept
    assert not report.sites[0].fused and "_backward" in str(report.sites[0].reason)


def test_placements_are_compared(mesh: Any) -> None:
    from fusepass.writing.emit import CannotEmit

    by_heads, by_batch, plain = spread(mesh, 1)[0], spread(mesh, 0)[0], torch.ones(2)
    check_placements(by_heads, by_heads)
    check_placements(plain, plain)
    for pair in ((by_heads, by_batch), (by_heads, plain), (plain, by_heads)):
        with pytest.raises(CannotEmit):
            check_placements(*pair)


# ---------------------------------------------------------------------------------- two processes

NAMES = (
    "ddp", "ddp_with_checkpoints", "fsdp_of_layers", "fsdp_of_the_whole", "fsdp_checkpoints_inside",
    "fsdp_checkpoints_outside", "tensor_parallel", "tensor_parallel_in_dtensors", "sequence_parallel",
    "tensor_parallel_with_strategies",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes, by the names of the programs."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "tests.parallel_programs", str(folder)]
    runs = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1", "FUSEPASS_STRICT": "1"}
        runs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [run.communicate(timeout=300)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert not any(run.returncode for run in runs), errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(name: str, trained: list[dict[str, Any]]) -> None:
    for outcome in (results[name] for results in trained):
        assert "error" not in outcome, outcome["error"]
        assert outcome["loss"] < 1e-5 and outcome["gradient"] < 1e-5 and outcome["parameters"]
        assert outcome["sites"] and outcome["seconds"] < 5
        if name == "tensor_parallel_in_dtensors":
            assert all(not fused and "strategy" in reason for fused, reason in outcome["sites"])
        else:
            assert all(fused for fused, _ in outcome["sites"])


def test_every_program_is_run() -> None:
    from tests.parallel_programs import PROGRAMS

    assert set(PROGRAMS) == set(NAMES)
