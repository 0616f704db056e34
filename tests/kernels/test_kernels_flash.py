"""flash-attn and cuDNN without a GPU: what they refuse, what is written for CUDA tensors, their operators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host import libraries
from fusepass.host.config import Options
from fusepass.kernels import BY_NAME, Kernel, Target, flash, flash_ops, fp8, gates
from fusepass.kernels.cudnn import CUDNN
from fusepass.kernels.flash import FLASH2, FLASH3, FLASH4
from fusepass.reports.report import SiteReport
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dropout,
    Floor,
    KeyPadding,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    Sink,
    SoftCap,
    reference,
)
from fusepass.specification.derivative import gradients
from fusepass.tools import doctor
from tests.attention import flattened
from tests.attention_cases import INF
from tests.fake_cuda import fake_graph, hopper, targets
from tests.specs import specification as spec

CUDA = Target("cuda", False, False)
CAUSAL = Mask(0, -INF, atoms=(Band(None, 0),))
FLASHES = (FLASH2, FLASH3, FLASH4)


#: What float32 makes of 0.1.
TENTH = torch.tensor(0.1).item()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU with every library."""
    monkeypatch.setattr(gates, "capability", lambda: (9, 0))
    monkeypatch.setattr(gates, "installed", lambda package: True)


# ---------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Attention, Target, str]] = {
    "float32": (spec(dtype=torch.float32), CUDA, "float16 and bfloat16, and this is float32"),
    "float64": (spec(dtype=torch.float64, softmax_dtype=torch.float64), CUDA, "this is float64"),
    "cpu": (spec(), replace(CUDA, device="cpu"), "NVIDIA GPUs, and this is cpu"),
    "odd head size": (
        spec(head_dim=60, value_dim=60),
        CUDA,
        "multiples of 8 from 8 up to 256, and this is 60",
    ),
    "wide heads": (spec(head_dim=512, value_dim=512), CUDA, "up to 256, and this is 512"),
    "bias": (spec(Bias(0, "hij")), CUDA, "it has no 'bias[hij]'"),
    "floor": (spec(Floor(-1e4)), CUDA, "it has no 'floor"),
    "padding": (
        spec(Mask(0, -INF, atoms=(KeyPadding(),))),
        CUDA,
        "its masks are bands, and this is 'key padding'",
    ),
    "fill": (spec(replace(CAUSAL, fill=-1e4)), CUDA, "within reach of real scores"),
    "scale over keys": (spec(ScaleBy(0, "bj")), CUDA, "varies over the keys"),
    "scale after a softcap": (spec(SoftCap(5.0), Scale(2.0)), CUDA, "'scale 2' comes after 'softcap 5'"),
    "unseen rows": (spec(CAUSAL, rows_seen=False), CUDA, "a query may see no key"),
    "off the end": (spec(CAUSAL, queries=32), CUDA, "contain the diagonal that ends at the last key"),
}


#: What flash-attn 4 may compute by formulas, as the graph will show.
BY_FORMULA = ("bias", "padding", "scale over keys", "scale after a softcap", "unseen rows", "off the end")


@pytest.mark.parametrize("kernel", FLASHES, ids=lambda k: k.name)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(kernel: Kernel, name: str, everything: None) -> None:
    given, target, words = REFUSED[name]
    assert words in str(kernel.refuse(given, target)) or (kernel is FLASH4 and name in BY_FORMULA)


def test_what_one_library_has_alone(everything: None) -> None:
    dropped, sunk = spec(weights=(Dropout(0.1),)), spec(CAUSAL, sink=Sink(1, "h"))
    assert FLASH2.refuse(dropped, CUDA) is None and FLASH4.refuse(sunk, CUDA) is None
    assert FLASH3.refuse(dropped, CUDA) == FLASH4.refuse(dropped, CUDA) == "it has no dropout"
    assert FLASH2.refuse(sunk, CUDA) == FLASH3.refuse(sunk, CUDA) == "it has no sink"
    assert "one number per head" in str(FLASH4.refuse(replace(sunk, sink=Sink(1, "bh")), CUDA))
    wide = spec(head_dim=128, value_dim=64)
    assert FLASH4.refuse(wide, CUDA) is None and "the same head size" in str(FLASH2.refuse(wide, CUDA))


@pytest.mark.parametrize(
    ("capability", "refuses"),
    [
        ((7, 0), "flash2 flash3 flash4 cudnn"),
        ((7, 5), "flash2 flash3 flash4 cudnn"),
        ((8, 0), "flash3 flash4"),
        ((8, 9), "flash3 flash4"),
        ((9, 0), ""),
        ((10, 0), "flash3"),
        ((12, 0), "flash3 flash4"),
    ],
)
def test_gpus(
    capability: tuple[int, int], refuses: str, everything: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "capability", lambda: capability)
    for name in ("flash2", "flash3", "flash4", "cudnn"):
        reason = BY_NAME[name].refuse(spec(), CUDA)
        assert (name in refuses.split()) is (reason is not None), (name, reason)
        assert reason is None or f"this GPU has {capability[0]}.{capability[1]}" in reason


def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "capability", lambda: (9, 0))
    monkeypatch.setattr(gates, "installed", lambda package: False)
    assert FLASH4.refuse(spec(), CUDA) == "flash-attn-4 is not installed: pip install --pre flash-attn-4"


# ---------------------------------------------------------------------------------------- windows


def window(*bands: Band, queries: Any = 64, keys: Any = 64) -> Any:
    masks = tuple(Mask(0, -INF, atoms=(b,)) for b in bands)
    return flash.bottom_right(spec(*masks, queries=queries, keys=keys))


def test_bands_become_windows() -> None:
    assert window() == (None, None)
    assert window(Band(None, 0)) == (None, 0)
    assert window(Band(15, 0)) == (15, 0)
    assert window(Band(15, 3)) == (15, 3)
    assert window(Band(None, 0), Band(15, None)) == (15, 0)


def test_windows_are_aligned_at_the_last_query_and_key() -> None:
    """Of 64 queries and 100 keys, `j <= i + 36` ends at the last key."""
    assert window(Band(None, 36), queries=64, keys=100) == (None, 0)
    assert window(Band(10, 40), queries=64, keys=100) == (46, 4)
    assert "diagonal" in window(Band(None, 0), queries=64, keys=100)


def test_windows_of_unknown_lengths() -> None:
    import sympy

    n, m = sympy.symbols("n m", positive=True, integer=True)
    assert window(Band(None, 0), queries=n, keys=n) == (None, 0)
    assert window(Band(None, m - n), queries=n, keys=m) == (None, 0)
    assert "not known when it is compiled" in window(Band(None, 0), queries=n, keys=m)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
@pytest.mark.parametrize("left", [None, 0, 2])
@pytest.mark.parametrize("right", [None, 0, 1])
def test_the_window_is_the_band(queries: int, keys: int, left: int | None, right: int | None) -> None:
    """By the definition in flash-attention's README, element by element."""
    offset = keys - queries
    band = Band(None if left is None else left - offset, None if right is None else right + offset)
    sides = window(band, queries=queries, keys=keys)
    for i in range(queries):
        for j in range(keys):
            mine = (band.left is None or j >= i - band.left) and (band.right is None or j <= i + band.right)
            a, b = sides
            theirs = (a is None or j >= i + offset - a) and (b is None or j <= i + offset + b)
            assert mine is theirs


def test_a_library_that_lacks_a_part_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: None
) -> None:
    """It is installed, but imports something that is not: the site stays, and `doctor` says so."""
    (tmp_path / "half_there.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    half = libraries.Package("half-there", "half_there", "", "")
    assert half.installed() and half.path() == "half_there"
    assert libraries.FLASH4.path() == "flash_attn.cute.interface" and libraries.FRONTEND.path() == "cudnn"
    monkeypatch.setitem(libraries.GATES, "flash4", replace(libraries.GATES["flash4"], package=half))
    words = "half-there is installed but cannot be imported (ModuleNotFoundError: No module named"
    site = rewritten(lambda q, k, v: (q @ k.mT * 0.125).softmax(-1) @ v, "flash4", *[(2, 4, 64, 64)] * 3)[1]
    assert not site.fused and words in str(site.reason)
    assert gates.library_refuses("sdpa") is None and gates.library_refuses("flash3") is None
    absent = libraries.Package("absent", "no_such_package", "", "")
    fp8 = replace(libraries.GATES["fp8"], package=absent, substitute=half)
    monkeypatch.setitem(libraries.GATES, "fp8", fp8)
    assert words in str(gates.library_refuses("fp8"))
    runs, why = doctor._ANSWERS["flash4"](doctor.Machine((9, 0), "1 × GPU", {}))
    assert not runs and words in why


@pytest.fixture
def forward_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A build of flash-attn 3 without gradients, softcaps, FP8, and kernels for the largest heads."""
    parts = dict.fromkeys(("BACKWARD", "SOFTCAP", "FP8", "HDIM256", "SM8x"), True) | {"LOCAL": False}
    flags = {f"FLASHATTENTION_DISABLE_{part}": missing for part, missing in parts.items()}
    (tmp_path / "built_so.py").write_text(f"CONFIG = {{'build_flags': {flags}}}\n")
    (tmp_path / "flash_3_of_a_test.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    package = replace(libraries.FLASH3, module="flash_3_of_a_test", config="built_so")
    monkeypatch.setitem(libraries.GATES, "flash3", replace(libraries.GATES["flash3"], package=package))
    monkeypatch.setattr(fp8, "FLASH3", package)
    yield
    sys.modules.pop("built_so", None)


def test_what_a_build_lacks_is_refused(everything: None, forward_only: None) -> None:
    training = replace(CUDA, training=True)
    window, capped = spec(Mask(0, -INF, atoms=(Band(9, 0),))), spec(SoftCap(3.0))
    assert FLASH3.refuse(window, CUDA) is None
    assert FLASH3.refuse(spec(head_dim=192, value_dim=192), CUDA) is None
    assert "built without a backward pass" in str(FLASH3.refuse(window, training))
    assert "built without softcaps" in str(FLASH3.refuse(capped, CUDA))
    assert "head sizes up to 192" in str(FLASH3.refuse(spec(head_dim=256, value_dim=256), CUDA))
    assert FLASH4.refuse(window, training) is None and FLASH4.refuse(capped, CUDA) is None
    assert fp8.library() == "cudnn"
    runs, why = doctor._ANSWERS["flash3"](doctor.Machine((9, 0), "1 × GPU", {}))
    assert runs and why.endswith("built without a backward pass, softcaps, FP8, head size 256")


# ---------------------------------------------------------------------------------------- what is written


def rewritten(
    program: Callable[..., Any], kernel: str, *shapes: tuple[int, ...]
) -> tuple[fx.GraphModule, SiteReport]:
    graph = fake_graph(program, *shapes)
    with torch.no_grad():
        sites = rewrite_graph(graph, Options(kernel=kernel)).sites
    assert len(sites) == 1
    return graph, sites[0]


def arguments(graph: fx.GraphModule, name: str) -> Any:
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and name in str(n.target)]
    assert len(calls) == 1
    return calls[0]


SHAPES = ((2, 320, 8, 64), (2, 320, 2, 64), (2, 320, 2, 64))


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "sdpa"])
def test_a_windowed_call(name: str, everything: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        s = q @ k.repeat_interleave(4, 1).transpose(-1, -2) * 0.1
        i, j = (torch.arange(320, device=q.device) for _ in range(2))
        gap = j - i.unsqueeze(1)
        w = s.masked_fill((gap > 0) | (gap < -63), -INF).softmax(-1)
        return (w @ v.repeat_interleave(4, 1)).transpose(1, 2).flatten(2)

    graph, site = rewritten(program, name, *SHAPES)
    assert site.kernel == name, site
    if name == "sdpa":
        call = arguments(graph, "_flash_attention_forward")
        assert call.args[3:] == (None, None, 320, 320, 0.0, False, False)
        assert call.kwargs == {"scale": TENTH, "window_size_left": 63, "window_size_right": 0}
    else:
        call = arguments(graph, f"fusepass.{name}")
        assert call.args[3:] == (None, TENTH, 63, 0, 0.0, 0.0)
    q, k, v = (n.meta["example_value"] for n in call.args[:3])
    assert (q.shape, k.shape, v.shape) == SHAPES and q.is_contiguous() and k.is_contiguous()
    assert "contiguous" not in targets(graph), "memory order is kept: no copy on the way out"


def test_a_sink_becomes_one_number_a_head(everything: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.1
        column = sinks.view(1, -1, 1, 1).expand(2, 4, 64, 1)
        weights = torch.narrow(torch.cat([s, column], -1).softmax(-1), -1, 0, 64)
        return (weights @ v).flatten(2)

    graph, site = rewritten(program, "flash4", *[(2, 4, 64, 64)] * 3, (4,))
    assert site.kernel == "flash4", site
    extra = arguments(graph, "fusepass.flash4").args[3].meta["example_value"]
    assert extra.shape == (4,) and extra.dtype is torch.float32


def test_alibi_becomes_slopes(everything: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.1
        i, j = (torch.arange(64, device=q.device) for _ in range(2))
        gap = j - i.unsqueeze(1)
        s = s - slopes.view(-1, 1, 1) * (gap * -2)
        return (s.masked_fill(gap > 0, -INF).softmax(-1) @ v).flatten(2)

    shapes = (*[(2, 4, 64, 64)] * 3, (4,))
    graph, site = rewritten(program, "flash2", *shapes)
    assert site.kernel == "flash2", site
    extra = arguments(graph, "fusepass.flash2").args[3]
    assert extra.meta["example_value"].shape == (4,) and extra.meta["example_value"].dtype is torch.float32
    assert extra.args[1] == 2.0, "minus slope times minus twice the distance"
    assert rewritten(program, "flash4", *shapes)[1].kernel == "flash4"


def test_a_bias_that_is_no_alibi(everything: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.1 + bias
        hidden = torch.ones(64, 64, dtype=torch.bool, device=q.device).triu(1)
        return (s.masked_fill(hidden, -INF).softmax(-1) @ v).flatten(2)

    site = rewritten(program, "flash2", *[(2, 4, 64, 64)] * 3, (4, 64, 64))[1]
    assert not site.fused and "only bias is ALiBi" in str(site.reason)


def test_cudnn_is_called_by_name(everything: None) -> None:
    graph, site = rewritten(flattened, "cudnn", *[(2, 4, 64, 64)] * 3)
    assert site.kernel == "cudnn"
    call = arguments(graph, "_scaled_dot_product_cudnn_attention")
    assert call.args[3:] == (None, False, 0.0, False, False) and call.kwargs == {"scale": TENTH}
    assert "a query may see no key" in str(CUDNN.refuse(spec(CAUSAL, rows_seen=False), CUDA))


def test_a_negative_scale_goes_into_the_queries(everything: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2) * -0.1).softmax(-1) @ v).flatten(2)

    graph, site = rewritten(program, "flash4", *[(2, 4, 64, 64)] * 3)
    assert site.fused and arguments(graph, "fusepass.flash4").args[4] == 1.0
    assert "mul" in targets(graph)


def test_without_a_profile_the_old_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    assert rewritten(flattened, "auto", *[(2, 4, 64, 64)] * 3)[1].kernel == "sdpa"


# ---------------------------------------------------------------------------------------- operators


class Mathematics:
    """A library that computes with the reference, for the operators' own machinery."""

    def specification(
        self, q: Tensor, k: Tensor, extra: Tensor | None, scale: float, window: Any, softcap: float
    ) -> tuple[Attention, list[Tensor]]:
        left, right = window
        gap = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        seen = torch.ones_like(gap, dtype=torch.bool)
        seen = seen if left is None else seen & (gap >= -left)
        seen = seen if right is None else seen & (gap <= right)
        scores: list[ScoreModifier] = [Scale(scale), Mask(0, -INF)]
        if softcap:
            scores.insert(1, SoftCap(softcap))
        spec = Attention(
            q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3], q.shape[3], q.dtype,
            tuple(scores), (), q.dtype, q.dtype, None if extra is None else Sink(1, "h"),
        )  # fmt: skip
        return spec, [seen[None, None], *([] if extra is None else [extra.view(1, -1, 1, 1)])]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, *settings: Any) -> Any:
        spec, tensors = self.specification(q, k, extra, *settings[:3])
        out = reference(spec, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), tensors)
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
        return out.transpose(1, 2).contiguous(), lse, None

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, *settings: Any
    ) -> Any:
        spec, tensors = self.specification(q, k, extra, *settings[:3])
        given = [t.transpose(1, 2) for t in (grad, q, k, v)]
        computed = gradients(spec, given[0], given[1], given[2], given[3], tensors)
        grads = [g.transpose(1, 2).contiguous() for g in computed[:3]]
        return (*grads, None if extra is None else computed[4].reshape(extra.shape).contiguous())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The three operators on CPU tensors, computed by the reference."""
    monkeypatch.setattr(flash_ops, "library", lambda name: Mathematics())
    with torch.library._scoped_library("fusepass", "FRAGMENT") as scope:
        for name in flash_ops.NAMES:
            scope.impl(name, flash_ops._forward(name), "CPU")
            scope.impl(f"{name}_backward", flash_ops._backward(name), "CPU")
        yield


@pytest.mark.parametrize("extra", [False, True])
def test_gradients_through_the_operator(extra: bool, on_cpu: None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True) if extra else None

    def call(*given: Tensor) -> Tensor:
        more = given[3] if extra else None
        out: Tensor = torch.ops.fusepass.flash4(*given[:3], more, 0.3, 2, 0, 5.0, 0.0)[0]
        return out

    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_operators_are_sound(name: str, on_cpu: None) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    operator = getattr(torch.ops.fusepass, name).default
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(operator, (q, k, v, None, 0.3, None, 0, 0.0, 0.0), test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_take_the_operator(backend: str, on_cpu: None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 16, 2, 8, requires_grad=True) for _ in range(3))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.fusepass.flash4(q * 2, k, v, None, 0.3, None, 0, 0.0, 0.0)[0]
        return out.relu()

    want = program(q, k, v)
    wanted = torch.autograd.grad(want.sum(), (q, k, v))
    got = torch.compile(program, backend=backend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_export_takes_the_operator(on_cpu: None) -> None:
    class Program(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            out: Tensor = torch.ops.fusepass.flash4(q, q, q, None, 0.3, None, 0, 0.0, 0.0)[0]
            return out

    q = torch.randn(2, 16, 2, 8)
    program = torch.export.export(Program(), (q,))
    torch.testing.assert_close(program.module()(q), Program()(q))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 2])
def test_tensors_split_by_batch_and_heads(dim: int | None, extra: bool, on_cpu: None, mesh: Any) -> None:
    """DTensor runs the operator on the parts, forward and backward, and knows how the results are split."""
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    flash._shard_once()
    torch.manual_seed(0)

    def spread(part: Tensor, *placements: Placement) -> Tensor:
        return DTensor.from_local(part, mesh, placements, run_check=False).requires_grad_()

    kind = Replicate() if dim is None else Shard(dim)
    parts = [torch.randn(2, 6, 2, 8, requires_grad=True) for _ in range(3)]
    given = [spread(t.detach(), kind) for t in parts]
    sink = torch.randn(2, requires_grad=True) if extra else None
    sinks = None if sink is None else spread(sink.detach(), Shard(0) if dim == 2 else Replicate())
    out, lse, _ = torch.ops.fusepass.flash4(*given, sinks, 0.3, None, 0, 0.0, 0.0)
    want = torch.ops.fusepass.flash4(*parts, sink, 0.3, None, 0, 0.0, 0.0)[0]
    assert out.placements == (kind,) and lse.placements == (Shard(1) if dim == 2 else kind,)
    torch.testing.assert_close(out.to_local(), want)
    weights = torch.randn_like(want)
    inputs = [*given, *([] if sinks is None else [sinks])]
    got = torch.autograd.grad(out, inputs, spread(weights, kind).detach())
    true = torch.autograd.grad(want, [*parts, *([] if sink is None else [sink])], weights)
    for mine, exact in zip(got, true, strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.to_local(), exact)
    if extra and dim == 0:
        last = got[-1]
        assert isinstance(last, DTensor) and isinstance(last.placements[0], Partial)


# ---------------------------------------------------------------------------------------- libraries


class Recorder:
    """A library's module that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.results = 5

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return tuple(torch.zeros(1) for _ in range(self.results))

        return call


def recorded(kind: Any) -> tuple[Any, Recorder]:
    library = kind.__new__(kind)
    library.interface = Recorder()
    return library, library.interface


TENSOR = torch.zeros(1, 4, 2, 8)


def test_flash3_is_called_as_its_operators_have_it() -> None:
    """The names of ``TORCH_LIBRARY(flash_attn_3)`` (hopper/flash_api.cpp and flash_api_stable.cpp)."""
    library, seen = recorded(flash_ops.Flash3)
    strided = TENSOR.transpose(2, 3).contiguous().transpose(2, 3)
    library.forward(strided, TENSOR, TENSOR, None, 0.5, (None, 0), 2.0, 0.0)
    library.backward(TENSOR, TENSOR, TENSOR, TENSOR, None, 0.5, (7, 0), 2.0, 0.0, TENSOR, TENSOR, TENSOR)
    library.rounded(TENSOR, TENSOR, TENSOR, (TENSOR[0], TENSOR[1:], TENSOR), 0.5, True)
    (forward, args, causal), (backward, back, windowed), (_, _, rounded) = seen.calls
    assert (forward, backward) == ("fwd", "bwd") and len(args) == 3 and len(back) == 9
    assert all(a.stride(-1) == 1 for a in (*args, *back))
    common = {"softmax_scale": 0.5, "is_causal": True, "window_size_left": -1, "window_size_right": 0}
    assert causal == common | {"softcap": 2.0, "num_splits": 1}
    sides = {"is_causal": False, "window_size_left": 7}
    assert windowed == common | sides | {"softcap": 2.0, "deterministic": False}
    assert {k: v for k, v in rounded.items() if "descale" not in k} == common | {"num_splits": 1}
    assert rounded["q_descale"].shape == (4, 2, 8) and rounded["k_descale"].shape == (0, 4, 2, 8)


def test_flash2_is_called_as_its_interface_has_it() -> None:
    library, seen = recorded(flash_ops.Flash2)
    slopes = torch.ones(2)
    seen.results = 4
    library.forward(TENSOR, TENSOR, TENSOR, slopes, 0.5, (7, None), 2.0, 0.1)
    assert seen.calls[0][1][3:] == (0.1, 0.5, False, 7, -1, 2.0, slopes, False)


def test_flash4_is_called_as_its_interface_has_it() -> None:
    library, seen = recorded(flash_ops.Flash4)
    library.forward(TENSOR, TENSOR, TENSOR, None, 0.5, (None, 0), 0.0, 0.0)
    library.forward(TENSOR, TENSOR, TENSOR, None, 0.5, (7, 0), 2.0, 0.0)
    causal, windowed = (kwargs for _, _, kwargs in seen.calls)
    assert causal["causal"] and causal["window_size_right"] is None and causal["softcap"] is None
    assert (windowed["causal"], windowed["window_size_left"], windowed["window_size_right"]) == (False, 7, 0)
    assert windowed["softcap"] == 2.0 and windowed["return_lse"]
