"""Fused sites are named ranges in profiler traces and in generated code, at almost no cost."""

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import fusepass
from fusepass.compilation import inner as inner_compilers
from fusepass.compilation import marks
from fusepass.compilation import profiler_ranges as ranges
from fusepass.compilation.backend import fusepass as backend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MARK = re.compile(r"\b_fusepass_\d|^ *except NameError: pass$|^ *#")


@pytest.fixture(scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where C++ compilers leave what several tests need."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def caches(compiled_code: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs are generated again in each test; equal C++ is compiled only once."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    generated_again = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch._inductor.config.patch(fx_graph_cache=False), generated_again:
        yield


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.25).masked_fill(future, -torch.inf).softmax(-1) @ v


class Layer(torch.nn.Module):
    """Attention among operations that are fused with each other, and might be fused with it."""

    def __init__(self, rotate: bool = False) -> None:
        super().__init__()
        self.project, self.rotate = torch.nn.Linear(64, 192), rotate

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.tanh()).reshape(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        if self.rotate:
            angle = torch.arange(x.shape[1])[:, None] * torch.ones(16)
            q, k = q * angle.cos() + q.flip(-1) * angle.sin(), k * angle.cos() + k.flip(-1) * angle.sin()
        mixed: Tensor = x + causal(q, k, v).transpose(1, 2).flatten(2).relu()
        return mixed


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "two layers": lambda: torch.nn.Sequential(Layer(), Layer()),
    "rotary": lambda: torch.nn.Sequential(Layer(rotate=True), Layer(rotate=True)),
}
X = torch.randn(2, 32, 64)


def step(compiled: Callable[..., Tensor], training: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.set_grad_enabled(training):
            out = compiled(X)
            if training:
                out.sum().backward()
            return out.detach()

    return run


def generated(model: torch.nn.Module, training: bool, **options: Any) -> tuple[Tensor, list[str]]:
    """The result and the programs that Inductor writes."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options=options)
    return run_and_get_code(step(compiled, training))


def trace(run: Callable[[], object]) -> list[Any]:
    """The ranges of fused sites that a profiler sees."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return [event for event in seen.events() or [] if event.name.startswith("fusepass ")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_every_site_is_a_range_around_its_kernel(inner: str, training: bool) -> None:
    model = MODELS["two layers"]()
    torch._dynamo.reset()
    run = step(torch.compile(model, backend=backend, options={"inner": inner}), training)
    with fusepass.collect() as seen:
        torch.testing.assert_close(run(), model(X).detach())
    labels = [site.label for site in seen.sites]
    place = Path(__file__).name
    assert [re.sub(r":\d+$", "", str(label)) for label in labels] == [
        f"fusepass {n}: causal, sdpa, {place}" for n in range(2)
    ]
    ranges = {event.name: [child.name for child in event.cpu_children] for event in trace(run)}
    backward = [f"{label}, backward" for label in labels] if training and inner != "eager" else []
    assert set(ranges) == {*labels, *backward}
    for label, inside in ranges.items():
        kernels = [name for name in inside if "scaled_dot_product" in name]
        assert len(kernels) == 1 and ("backward" in kernels[0]) == label.endswith(", backward")
        assert not [name for name in inside if "mm" in name], "the products around attention are outside"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_generated_code_names_sites_and_is_otherwise_the_same(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    got, named = generated(model, training)
    for site in range(2):
        assert re.search(rf"Source Nodes: \[.*fusepass_{site}_scaled_dot_product_attention", named[0])
    assert named[0].count("_RecordFunctionFast('fusepass ") == 2
    assert not training or named[1].count(", backward')") == 2
    monkeypatch.setattr(inner_compilers, "marked", lambda inductor, gm: inductor)
    want, plain = generated(model, training)
    assert torch.equal(got, want)
    assert [without_marks(code) for code in named] == [without_marks(code) for code in plain]


def without_marks(code: str) -> list[str]:
    """The lines that are neither marks nor comments."""
    return [line for line in code.splitlines() if not MARK.search(line)]


@pytest.mark.parametrize("kernel", ["reference", "flex", "sdpa"])
def test_other_kernels_and_lengths(kernel: str) -> None:
    """Plain mathematics that Inductor fuses with its surroundings, templates, and dynamic sizes."""
    model = MODELS["two layers" if kernel == "flex" else "rotary"]().eval()
    torch._dynamo.reset()
    sizes = {"flex": (32,), "reference": (16, 24), "sdpa": (16, 24)}[kernel]
    compiled = torch.compile(model, backend=backend, dynamic=len(sizes) > 1, options={"kernel": kernel})
    with torch.no_grad():
        for length in sizes:
            x = torch.randn(2, length, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        ranges = sorted((e.time_range.start, e.time_range.end, e.name) for e in trace(lambda: compiled(x)))
    assert [name[:10] for _, _, name in ranges] == ["fusepass 0", "fusepass 1"]
    assert ranges[0][1] <= ranges[1][0], "one after the other"


def test_a_pass_of_the_user_runs_too() -> None:
    seen: list[bool] = []

    def theirs(graph: torch.fx.Graph) -> None:
        seen.append(any("range_enter" in str(n.target) for n in graph.nodes))

    with torch._inductor.config.patch(post_grad_custom_post_pass=theirs):
        _, (code,) = generated(MODELS["two layers"](), training=False)
    assert seen == [False] and "_fusepass_0" in code
    assert marks.Marking(("a",), (theirs,)).uuid() is None, "nobody knows what it depends on"
    assert marks.Marking(("a",), ()).uuid() != marks.Marking(("b",), ()).uuid()


def test_programs_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = MODELS["two layers"]()
    hits = []
    kept = torch._functorch.config.patch(enable_autograd_cache=True)
    with torch._inductor.config.patch(fx_graph_cache=True), kept:
        for _ in range(2):
            counters.clear()
            generated(model, training=False)
            hits.append(
                counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
            )
    assert hits[0] == 0 and hits[1] > 0


def test_an_inductor_that_has_other_parts_writes_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def register(*operators: Any) -> None:
        raise AttributeError("module 'torch._inductor.ir' has no attribute 'ExternKernel'")

    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    monkeypatch.setattr(marks, "register", register)
    inner_compilers._marks.cache_clear()
    try:
        model = MODELS["two layers"]()
        got, (code,) = generated(model, training=False)
    finally:
        inner_compilers._marks.cache_clear()
    torch.testing.assert_close(got, model(X).detach())
    assert "_fusepass_0" not in code and "fusepass_0_scaled_dot_product_attention" in code


def test_a_range_costs_next_to_nothing_where_no_profiler_runs() -> None:
    def one() -> None:
        ranges.close_record(ranges.open_record("fusepass 0: causal, sdpa, model.py:12"))

    one()
    best = min(timed(one, 1000) for _ in range(5))
    assert best < 20e-6, f"{best * 1e6:.1f} µs"


def timed(run: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def test_exported_graphs_hold_no_ranges() -> None:
    q = torch.randn(2, 4, 8, 16)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal(q, k, v)

    fused = fusepass.fuse(torch.export.export(Model(), (q, q, q)))
    names = [n.name for n in fused.graph.nodes if n.op == "call_function"]
    assert [n for n in names if n.startswith("fusepass_0_")] and not [n for n in names if "range" in n]
    torch.export.save(fused, file := io.BytesIO())
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(q, q, q), causal(q, q, q))
