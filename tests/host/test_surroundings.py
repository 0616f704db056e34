"""The user's hooks, modes and settings see nothing of the pass, and do not change what it does."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fusepass
from fusepass.compilation.backend import compile_fused, run_pass
from fusepass.host.config import Options
from fusepass.host.surroundings import clean_context, graph_context, is_clean, settings
from fusepass.reports.collector import collect
from tests.capture import dynamo_graph, qkv

ROOT = Path(fusepass.__file__).parent


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.arange(k.shape[-2])[None, :] > torch.arange(q.shape[-2])[:, None]
    s = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
    return s.softmax(-1) @ v


class Masked(nn.Module):
    """A mask in a buffer, and a softcap that SDPA does not have."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(8, 8).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.tanh(q @ k.mT / 20) * 20
        return s.masked_fill(self.mask[: q.shape[-2], : q.shape[-2]] == 0, -torch.inf).softmax(-1) @ v


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.dropout((q @ k.mT + q.sum(-1, True)).softmax(-1), 0.5) @ v


# ---------------------------------------------------------------------------------- who sees tensors

Seen = list[str]


class Functions(TorchFunctionMode):
    """Records every function of PyTorch."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Records every operator."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def saved(seen: Seen) -> Iterator[None]:
    """Records what is saved for a backward pass, with gradients on."""

    def note(t: Tensor) -> Tensor:
        seen.append(f"saved {type(t).__name__} {tuple(t.shape)}")
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield


HOOKS: list[Callable[[Seen], Any]] = [Functions, Operators, saved]


def passed(gm: fx.GraphModule, given: list[Tensor]) -> object:
    return run_pass(gm, given, Options())


def validated(gm: fx.GraphModule, given: list[Tensor]) -> object:
    return run_pass(gm, given, Options(kernel="sdpa", validate=True))


def flex(gm: fx.GraphModule, given: list[Tensor]) -> object:
    return run_pass(gm, list(given), Options(kernel="flex"))


def reference(gm: fx.GraphModule, given: list[Tensor]) -> object:
    return run_pass(gm, given, Options(kernel="reference"))


def copied(gm: fx.GraphModule, given: list[Tensor]) -> object:
    return fusepass.fuse(gm, *given)


WAYS: list[Callable[[fx.GraphModule, list[Tensor]], object]] = [passed, validated, flex, reference, copied]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("learns", [False, True])
def test_no_tensor_of_the_pass_reaches_a_hook(hook: Any, way: Any, learns: bool) -> None:
    for program in (attention, Masked(), with_dropout):
        given = [t.requires_grad_(learns) for t in qkv()]
        gm = dynamo_graph(program, *given)
        inputs = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        seen: Seen = []
        with collect() as sites, hook(seen):
            way(gm, inputs)
        assert not seen
        assert len(sites.sites) == 1


def test_the_hooks_of_these_tests_see_something() -> None:
    for hook in HOOKS:
        seen: Seen = []
        with hook(seen):
            attention(*(t.requires_grad_() for t in qkv()))
        assert seen


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_guards_are_asked_unseen(hook: Any) -> None:
    """The comparison of a call's inputs with those it was compiled for is hidden too."""
    model, given = Masked(), [t.requires_grad_() for t in qkv()]
    ran: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        ran.extend([compile_fused(gm, inputs, Options(), lambda *_: lambda *_: "fused"), inputs])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*given)
    run, inputs = ran
    seen: Seen = []
    with hook(seen):
        assert run(*inputs) == "fused"
    assert not seen


# ---------------------------------------------------------------------------------- what changes nothing


@contextlib.contextmanager
def restored(change: Callable[[], object], undo: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        undo()


SETTINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "default device": lambda: restored(
        lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)
    ),
    "float64": lambda: restored(
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "deterministic": lambda: restored(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "vmap": lambda: restored(
        lambda: torch._C._functorch._vmap_increment_nesting(3, "error"),
        lambda: torch._C._functorch._vmap_decrement_nesting(),
    ),
}


def state() -> tuple[Any, ...]:
    """All that a call could leave changed."""
    return (
        settings(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_cache_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack() is None,
        torch.get_rng_state().tolist(),
    )


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_nothing_and_stays(setting: str) -> None:
    for program in (attention, Masked()):
        given, texts = qkv(), []
        for around in (contextlib.nullcontext, SETTINGS[setting]):
            gm = dynamo_graph(program, *given)
            with around():
                before = state()
                report = run_pass(gm, list(given), Options(kernel="flex", validate=True))
                assert state() == before
            texts.append((gm.code, [(s.fused, s.reason, s.spec) for s in report.sites]))
        assert texts[0][1] == texts[1][1]
        assert setting == "autocast" or texts[0][0] == texts[1][0]


def test_random_numbers_go_on_where_they_were() -> None:
    gm = dynamo_graph(attention, *qkv())
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    with clean_context():
        torch.rand(5)
        run_pass(gm, qkv(), Options(validate=True))
    assert torch.equal(torch.rand(3), want)


def test_a_new_operation_is_tried_under_what_the_graph_runs_under() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with clean_context():
            assert is_clean() and not (x @ x).requires_grad and (x @ x).dtype is torch.float32
            with graph_context():
                assert not is_clean() and (x @ x).requires_grad and (x @ x).dtype is torch.bfloat16
                with clean_context():
                    assert (x @ x).dtype is torch.float32 and settings().autocast
            assert is_clean()
        assert torch.is_autocast_cache_enabled() and (x @ x).dtype is torch.bfloat16


def test_an_error_leaves_everything_as_it_was() -> None:
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        before = state()[:-1]
        with pytest.raises(KeyError), clean_context():
            raise KeyError
        with clean_context():
            assert is_clean() and torch.ones(1).device.type == "cpu" and not torch.ones(1).is_inference()
        assert state()[:-1] == before


def test_there_is_one_way_into_a_clean_context() -> None:
    """No other code of the package suspends modes or hooks, so none can suspend only some of them."""
    private = re.compile(
        r"_disable_current_modes|unset_fake_temporarily|DisableTorchFunction|_set_tracing|_pop_mode"
    )
    files = [*ROOT.rglob("*.py"), *(ROOT / "patterns").rglob("*.py"), *(ROOT / "exporters").rglob("*.py")]
    names = {f.name for f in files if private.search(f.read_text(encoding="utf-8"))}
    assert names == {"surroundings.py"}


# ---------------------------------------------------------------------------------- checkpoints around


class Block(nn.Module):
    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.masked = Masked() if mask else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (2, 12)).transpose(-3, -2).chunk(3, dim=-1)
        out = attention(q, k, v) if self.masked is None else self.masked(q, k, v)
        return x + out.transpose(-3, -2).flatten(-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_checkpoint_around_compiled_code(mask: bool, early: bool, whole: bool) -> None:
    """The first step compiles the block, and saves the same tensors as when it is run again for gradients."""
    torch._dynamo.reset()
    model = nn.Sequential(Block(mask), Block(mask))
    options: dict[str, Any] = {"inner": "aot_eager"}
    if whole:
        fused: Any = torch.compile(model, backend="fusepass", options=options)
    else:
        layers: list[Any] = [torch.compile(b, backend="fusepass", options=options) for b in model]
        fused = nn.Sequential(*layers)
    with collect() as seen, set_checkpoint_early_stop(early):
        for length in (4, 4, 6, 6, 8):
            x = torch.randn(2, length, 8)
            grads = []
            for run in (model, fused):
                out = checkpoint(run, x.requires_grad_(), use_reentrant=False)
                grads.append(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
            torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    assert seen.sites and all(s.fused for s in seen.sites)
