"""The transforms of ``torch.func`` around attention, and gradients that are recorded inside ``no_grad``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fusepass
from fusepass.dialects.torch.transforms import AGAIN, BATCHED, FOREIGN, FORWARD_MODE, TWICE
from fusepass.reports import collector, report
from tests.checking import assert_as_accurate

Program = Callable[[Tensor, Tensor, Tensor], Any]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    s = (q @ k.transpose(-2, -1) * 0.3).masked_fill(hidden, -torch.inf)
    return s.softmax(-1) @ v


def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v).square().sum()


def drawn(*lead: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, 6, 8, generator=generator) for _ in range(3)]


def checked(program: Program, given: list[Tensor], grad: bool = True) -> list[report.SiteReport]:
    """The sites of a compiled program whose result was compared with eager."""
    with torch.set_grad_enabled(grad), collector.collect() as seen:
        fused = torch.compile(program, backend="fusepass", fullgraph=True, options={"inner": "aot_eager"})
        got = fused(*given)
        eager, exact = program(*given), program(*(t.double() for t in given))
    assert_as_accurate(got.detach(), eager.detach(), exact.detach())
    return seen.sites


def batched(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.vmap(attention)(q, k, v)


def shared_keys(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.vmap(attention, in_dims=(0, None, None))(q, k[0], v[0])


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Any:
    def run(*given: Tensor) -> Tensor:
        out: Tensor = checkpoint(attention, *given, use_reentrant=False)
        return out

    return func.vmap(run)(q, k, v)


def of_each(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.vmap(func.grad(total))(q, k, v)


def jacobian(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.jacrev(attention)(q, k, v)


def tangent(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.jvp(lambda x: attention(x, k, v), (q,), (k,))[1]


def forward_jacobian(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.jacfwd(attention)(q, k, v)


def hessian(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.hessian(total)(q, k, v)


def twice(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.grad(lambda x: func.grad(total)(x, k, v).square().sum())(q)


STAY = [
    (batched, (3, 2, 4), BATCHED),
    (batched, (4,), BATCHED),
    (shared_keys, (3, 2, 4), BATCHED),
    pytest.param(
        *(checkpointed, (3, 2, 4), BATCHED),
        marks=pytest.mark.skipif(
            torch.__version__ < "2.12", reason="eager PyTorch has no checkpoint within vmap"
        ),
    ),
    (of_each, (3, 2, 4), BATCHED),
    (jacobian, (1, 1), BATCHED),
    (tangent, (2, 4), FORWARD_MODE),
    (forward_jacobian, (1, 1), FORWARD_MODE),
    (hessian, (1, 1), FORWARD_MODE),
    (twice, (2, 4), TWICE),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("program", "lead", "reason"), STAY, ids=lambda x: getattr(x, "__name__", ""))
def test_what_fused_kernels_cannot_follow_stays(program: Program, lead: tuple[int, ...], reason: str) -> None:
    (site,) = checked(program, drawn(*lead))
    assert not site.fused and site.reason == reason


def gradient(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return func.grad(total)(q, k, v)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_taken_of_pytorchs_own_kernels(dtype: torch.dtype, grad: bool) -> None:
    """The reference operator, which short sites in bfloat16 would otherwise get, has no such gradient."""
    (site,) = checked(gradient, [t.to(dtype) for t in drawn(2, 4)], grad)
    assert site.fused and site.kernel == "sdpa"


class Projected(nn.Module):
    """Attention in which only the parameters learn."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return total(self.w(q), k, v)


def of_parameters(model: nn.Module, q: Tensor, k: Tensor, v: Tensor, detached: bool) -> Any:
    parameters = {n: p.detach() if detached else p for n, p in model.named_parameters()}
    return func.grad(lambda p: func.functional_call(model, p, (q, k, v)))(parameters)


def weighted(w: Tensor, q: Tensor, k: Tensor, v: Tensor, detached: bool) -> Any:
    """Nothing in the attention learns outside ``grad``, but its input depends on tensors that do."""
    w = w.detach() if detached else w
    return func.grad(lambda x: (attention(x, k, v) * w).square().sum())(q)


def with_values(w: Tensor, q: Tensor, k: Tensor, v: Tensor, detached: bool) -> Any:
    w = w.detach() if detached else w
    return func.vjp(lambda x, y: attention(x, k, y * w), q, v)[1](q)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("program", [of_parameters, weighted, with_values])
def test_a_gradient_that_may_be_differentiated_again(
    program: Callable[..., Any], detached: bool, grad: bool
) -> None:
    """A gradient of parameters is fused if nothing outside needs the gradient of that gradient."""
    torch.manual_seed(0)
    learned = Projected() if program is of_parameters else torch.randn(8, requires_grad=True)
    given = drawn(2, 4)
    torch._dynamo.reset()
    fused = torch.compile(program, backend="fusepass", fullgraph=True, options={"inner": "aot_eager"})
    with torch.set_grad_enabled(grad), collector.collect() as seen:
        got, want = fused(learned, *given, detached), program(learned, *given, detached)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (site,) = seen.sites
    assert site.fused if detached or not grad else site.reason == AGAIN
    leaves = list(learned.parameters()) if isinstance(learned, nn.Module) else [learned]
    if grad and not detached:
        sums = [sum(t.square().sum() for t in pytree.tree_leaves(x)) for x in (got, want)]
        mine, eager = (torch.autograd.grad(s, leaves) for s in sums)
        torch.testing.assert_close(mine, eager, rtol=1e-3, atol=1e-3)


def chained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(attention(q, k, v), k, v)


CHECKPOINTS: list[Program] = [
    lambda q, k, v: checkpoint(chained, q, k, v, use_reentrant=False),
    lambda q, k, v: checkpoint(attention, checkpoint(attention, q, k, v, use_reentrant=False), k, v,
                               use_reentrant=False),
    lambda q, k, v: checkpoint(lambda *t: checkpoint(attention, *t, use_reentrant=False), q, k, v,
                               use_reentrant=False, preserve_rng_state=False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpoint_whether_or_not_gradients_flow(learns: bool, grad: bool, inner: str) -> None:
    """PyTorch rejects SDPA in a checkpoint if a graph has no backward pass, even if nothing is recomputed."""
    for program in CHECKPOINTS:
        torch._dynamo.reset()
        given = [t.requires_grad_(learns) for t in drawn(2, 4)]
        options: dict[str, Any] = {"inner": inner}
        with torch.set_grad_enabled(grad), collector.collect() as seen:
            got = torch.compile(program, backend="fusepass", fullgraph=True, options=options)(*given)
        want = program(*given)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert seen.sites and all(s.fused for s in seen.sites)
        assert not seen.graphs[0].notes
        if learns and grad:
            mine, eager = (torch.autograd.grad(x.square().sum(), given) for x in (got, want))
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_other_kernels_stay_out_of_gradients() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return func.grad(lambda x: (torch.tanh(x @ k.mT).softmax(-1) @ v).square().sum())(q)

    (site,) = checked(program, drawn(2, 4))
    assert not site.fused and FOREIGN in str(site.reason)


@pytest.mark.parametrize("grad", [True, False])
def test_a_detached_query_within_enable_grad(grad: bool) -> None:
    """What ``detach`` cuts off stays cut off if gradients are recorded inside ``no_grad``."""

    class Guided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(8) + 0.1)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.enable_grad():
                x = (q @ self.w).detach() * 2
                return ((x @ k.transpose(-2, -1)).softmax(-1) @ (v @ self.w)).sum()

    torch.manual_seed(0)
    model, given = Guided(), drawn(2, 4)
    gradients = list[Tensor]()
    for run in (model, torch.compile(model, backend="fusepass", options={"inner": "aot_eager"})):
        model.w.grad = None
        with torch.set_grad_enabled(grad):
            out = run(*given)
        out.backward()
        assert model.w.grad is not None
        gradients.append(model.w.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_the_next_compilation_is_not_disturbed() -> None:
    """A refusal leaves no level of differentiation open behind it."""
    checked(tangent, drawn(2, 4))
    (site,) = checked(attention, drawn(2, 4))
    assert site.fused
    assert fusepass.explain(attention, *drawn(2, 4)).sites[0].fused
