"""What a fused graph relies on is checked wherever PyTorch stores the code; changes are remembered."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

import fusepass
from fusepass.expressions import contents
from fusepass.reports import collector
from fusepass.reports.collector import Collector
from tests import checking  # noqa: F401  (faults of the pass are raised)
from tests.attention import cleared, random_heads

B, H, N, D = 2, 2, 8, 8
INF = float("inf")

Change = Callable[[Any], Any]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    hidden = mask[: q.shape[2], : k.shape[2]] == 0
    out: Tensor = (q @ k.transpose(-2, -1) / D**0.5).masked_fill(hidden, -INF).softmax(-1) @ v
    return out


class Persistent(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(2 * N, 2 * N).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.mask)


class Transient(Persistent):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", self.mask.bool(), persistent=False)


class Plain(nn.Module):
    """The mask is an attribute, not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(2 * N, 2 * N, dtype=torch.long).tril()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.mask)


class Biased(nn.Module):
    """The mask is added, and belongs to a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("mask", torch.full((N, N), -INF).triu(1))

    @property
    def mask(self) -> Any:
        return self.inner.mask

    @mask.setter
    def mask(self, value: Tensor) -> None:
        self.inner.mask = value

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = (q @ k.transpose(-2, -1) + self.mask).softmax(-1) @ v
        return out


class Layers(nn.Module):
    """Two sites, which need a buffer each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Persistent(), Persistent()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.second(self.first(q, k, v), k, v)  # type: ignore[no-any-return]


MODELS = (Persistent, Transient, Plain, Biased)


def write(model: Any) -> None:
    """Another mask, in which every query sees a key."""
    model.mask[-1, 0] = model.mask[0, -1]
    model.mask[1, 0] = model.mask[0, -1]


def write_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        write(model)


def write_through_data(model: Any) -> None:
    model.mask.data[1, 0] = model.mask[0, -1]


def replace(model: Any) -> None:
    changed = model.mask.clone()
    changed[1, 0] = changed[0, -1]
    model.mask = changed


def load(model: Any) -> None:
    changed = {n: t.clone() for n, t in model.state_dict().items()} or {}
    for tensor in changed.values():
        tensor[1, 0] = tensor[0, -1]
    model.load_state_dict(changed)


def move(model: Any) -> None:
    """Changed and changed back: other tensors with the same elements."""
    model.to(torch.float64).to(torch.float32)
    write(model)


CHANGES = (write, write_in_inference_mode, write_through_data, replace, load, move)


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings of the pass so far."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener(logging.WARNING)
    log = logging.getLogger("fusepass")
    log.addHandler(listener)
    yield heard
    log.removeHandler(listener)


def compiled(fn: Any, **kwargs: Any) -> Any:
    return torch.compile(fn, backend="fusepass", options={"inner": "aot_eager"}, **kwargs)


def agree(fn: Any, model: Any, args: list[Tensor] | None = None) -> Collector:
    """Call both once, with equal results; returns what was compiled for it."""
    args = random_heads() if args is None else args
    with collector.collect() as seen, torch.no_grad():
        got = fn(*args)
        want = model(*args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    return seen


def kinds(seen: Collector) -> list[str]:
    return [s.kind for s in seen.sites if s.fused]


# ---------------------------------------------------------------------------------------- stored code


class Store:
    """Dynamo's cache of compiled code in a folder; ``start`` acts like a new process."""

    def start(self) -> None:
        from torch._dynamo.precompile_context import PrecompileContext

        torch._dynamo.reset()
        for fn in (*(kind.forward for kind in MODELS), cleared):
            torch._C._dynamo.eval_frame._reset_precompile_entries(fn.__code__)
        PrecompileContext.clear()
        torch._dynamo.utils.counters.clear()

    def save(self) -> None:
        torch.compiler.save_cache_artifacts()

    @property
    def hits(self) -> int:
        return int(torch._dynamo.utils.counters["dynamo_cache"]["dynamo_cache_hit"])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    functorch = torch._functorch.config.patch(force_autograd_cache=True, bundled_autograd_cache=True)
    with torch._dynamo.config.patch(caching_precompile=True), functorch:
        new_store = Store()
        new_store.start()
        yield new_store
        new_store.start()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_stored_code_checks_its_buffers(kind: Any, change: Change, store: Store) -> None:
    model = kind()
    assert kinds(agree(compiled(model), model)) == ["causal"]
    store.save()
    store.start()
    fn = compiled(model)
    assert not agree(fn, model).graphs and store.hits
    with torch.no_grad():
        change(model)
    for _ in range(2):
        agree(fn, model)
    store.start()
    for _ in range(2):
        agree(compiled(model), model)


def test_stored_code_that_is_trained(store: Store) -> None:
    model = Persistent()
    for hits, edit in ((False, False), (True, False), (True, True)):
        store.start()
        fn = compiled(model)
        if edit:
            write(model)
        args = [t.requires_grad_() for t in random_heads()]
        got = torch.autograd.grad(fn(*args).sum(), args)
        torch.testing.assert_close(got, torch.autograd.grad(model(*args).sum(), args))
        assert bool(store.hits) is hits
        store.save()


def test_stored_code_of_any_length(store: Store) -> None:
    model = Persistent()
    for _ in range(2):
        store.start()
        fn = compiled(model, dynamic=True)
        for n in (N, N + 1, N + 3):
            agree(fn, model, random_heads(n))
        store.save()
    assert store.hits
    write(model)
    for n in (N, N + 2):
        agree(fn, model, random_heads(n))


def overlapping() -> list[Tensor]:
    """Keys that share memory with the tensor that is written to, without being a view of it."""
    q, k, v = random_heads()
    joint = torch.empty(8 * k.numel())
    keys = joint[: k.numel()].view_as(k).copy_(k)
    return [q, keys, v, joint.as_strided((B, H, N, D), (1024, 256, 8, 1), 0)]


def apart() -> list[Tensor]:
    """The same, in separate memory."""
    q, k, v, cache = overlapping()
    return [q, k.clone(), v, torch.empty_strided(cache.shape, cache.stride()).fill_(1)]


def check_overlap(fn: Any) -> None:
    """Call with arguments that overlap: the keys must be read before the write overwrites them."""
    args = overlapping()
    expected = (args[0] @ args[1].mT).softmax(-1) @ args[2]
    with torch.no_grad():
        torch.testing.assert_close(fn(*args), expected)
    assert not args[3].any()


def test_stored_code_checks_for_overlap(store: Store) -> None:
    for _ in range(2):
        store.start()
        fn = compiled(cleared)
        agree(fn, lambda q, k, v, c: (q @ k.mT).softmax(-1) @ v, apart())
        store.save()
    assert store.hits
    check_overlap(fn)


def test_models_that_share_stored_code(store: Store) -> None:
    model, other = Persistent(), Persistent()
    write(other)
    agree(compiled(model), model)
    store.save()
    store.start()
    for _ in range(2):
        agree(compiled(other), other)
        agree(compiled(model), model)
    assert store.hits


def test_what_cannot_be_stored_is_not(store: Store) -> None:
    """An inner compiler that PyTorch cannot store: guards hold here, and the next process compiles again."""
    model = Persistent()
    for _ in range(2):
        store.start()
        fn = torch.compile(model, backend="fusepass", options={"inner": lambda gm, _: gm.forward})
        assert kinds(agree(fn, model)) == ["causal"]
        store.save()
        write(model)
        agree(fn, model)
        model = Persistent()


def test_no_part_of_what_cannot_be_stored_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> bytes:
        raise TypeError("this cannot be stored")

    monkeypatch.setattr("fusepass.compilation.guards.Guarded.stored", fails)
    for _ in range(2):
        store.start()
        model = Persistent()
        assert kinds(agree(compiled(model), model)) == ["causal"]
        store.save()


_PROCESS = """
import sys, torch
from tests.compilation.test_guards import Persistent, agree, compiled, write
model = Persistent()
if sys.argv[1] == "changed":
    write(model)
with torch._dynamo.config.patch(caching_precompile=True):
    fn = torch.compile(model, backend="fusepass")
    seen = agree(fn, model)
    torch.compiler.save_cache_artifacts()
print(torch._dynamo.utils.counters["dynamo_cache"]["dynamo_cache_hit"], len(seen.graphs))
"""


def test_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    program = tmp_path / "program.py"
    program.write_text(_PROCESS)
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    answers = []
    for which in ("causal", "changed"):
        ran = subprocess.run(
            [sys.executable, str(program), which], capture_output=True, text=True, timeout=120, check=False
        )
        assert not ran.returncode, ran.stderr
        answers.append(ran.stdout.split())
    assert answers[0] == ["0", "1"]
    assert answers[1][0] == "1", "the code was traced again"


# ---------------------------------------------------------------------------------------- ahead of time


def ahead(model: Any, path: Path, args: list[Tensor] | None = None, **kwargs: Any) -> Any:
    """The compiled function, saved and loaded."""
    fn = compiled(model, fullgraph=True, **kwargs)
    target = fn.forward if isinstance(model, nn.Module) else fn
    with torch.no_grad():
        function = target.aot_compile((tuple(random_heads() if args is None else args), {}))
    function.save_compiled_function(str(path))
    torch._dynamo.reset()
    with path.open("rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    return (lambda *a: loaded(model, *a)) if isinstance(model, nn.Module) else loaded


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_code_compiled_ahead_checks_its_buffers(
    kind: Any, change: Change, tmp_path: Path, warned: list[str]
) -> None:
    model = kind()
    fn = ahead(model, tmp_path / "saved")
    agree(fn, model)
    assert not warned
    with torch.no_grad():
        change(model)
    for _ in range(2):
        assert not agree(fn, model).graphs, "it is compiled again"


def test_code_compiled_ahead_checks_for_overlap(tmp_path: Path) -> None:
    check_overlap(ahead(cleared, tmp_path / "saved", apart()))


def test_loaded_code_is_saved_again(tmp_path: Path) -> None:
    model = Persistent()
    ahead(model, tmp_path / "first")
    for before, after in (("first", "second"), ("second", "third")):
        with (tmp_path / before).open("rb") as file:
            fn: Any = torch.compiler.load_compiled_function(file)
        write(model)
        agree(lambda *a, fn=fn: fn(model, *a), model)
        fn.save_compiled_function(str(tmp_path / after))


def test_code_compiled_ahead_relies_on_buffers(tmp_path: Path) -> None:
    with collector.collect() as seen:
        ahead(Persistent(), tmp_path / "saved")
    assert kinds(seen) == ["causal"]


def test_code_compiled_ahead_while_enabled(tmp_path: Path) -> None:
    """If guards cannot be stored, nothing is relied on."""
    model = Persistent()
    with fusepass.enabled(), collector.collect() as seen, torch.no_grad():
        whole: Any = torch.compile(model, fullgraph=True)
        fn = whole.forward.aot_compile((tuple(random_heads()), {}))
    (site,) = seen.sites
    assert site.fused and site.kind != "causal"
    write(model)
    agree(lambda *a: fn(model, *a), model)


# ---------------------------------------------------------------------------------------- stances


@pytest.mark.parametrize("before", [False, True], ids=["", "compiled before"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("stance", ["fail_on_recompile", "eager_on_recompile"])
def test_nothing_is_compiled_where_nothing_may_be(stance: str, change: Change, before: bool) -> None:
    model = Persistent()
    fn = compiled(model)
    agree(fn, model)
    if before:
        write(model)
        agree(fn, model)
    with torch.no_grad():
        change(model)
    with torch.compiler.set_stance(stance):
        for _ in range(2):
            assert not agree(fn, model).graphs
    agree(fn, model)


def test_code_that_was_compiled_before_runs_compiled() -> None:
    model, calls = Persistent(), []

    def inner(gm: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(gm)
            return gm.forward(*args)

        return run

    fn = torch.compile(model, backend="fusepass", options={"inner": inner})
    agree(fn, model)
    write(model)
    agree(fn, model)
    with torch.compiler.set_stance("fail_on_recompile"):
        agree(fn, model)
    assert len(calls) == 3 and calls[1] is calls[2] is not calls[0]


def test_overlap_where_nothing_may_be_compiled() -> None:
    fn = compiled(cleared)
    with torch.no_grad():
        fn(*apart())
    with torch.compiler.set_stance("fail_on_recompile"):
        check_overlap(fn)


class WritesElsewhere(Persistent):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        other.fill_(1)
        return super().forward(q, k, v)


def test_a_buffer_that_lies_in_what_the_graph_writes_to() -> None:
    model, eager = WritesElsewhere(), WritesElsewhere()
    fn, args = compiled(model), random_heads()
    with collector.collect() as seen, torch.no_grad():
        fn(*args, torch.zeros(2, 2 * N))
        assert kinds(seen) == ["causal"]
        for rows in (slice(2, 4), slice(4, 6)):
            torch.testing.assert_close(fn(*args, model.mask[rows]), eager(*args, eager.mask[rows]))


# ---------------------------------------------------------------------------------------- counters


class Counting(nn.Module):
    """A cache that counts its tokens, in a buffer of ``shape``."""

    def __init__(self, shape: tuple[int, ...], inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.count: Tensor
        self.keys: Tensor
        self.register_buffer("count", torch.full(shape, 3, dtype=torch.long))
        self.register_buffer("keys", torch.randn(B, H, 4 * N, D))

    def forward(self, q: Tensor) -> Tensor:
        keys = torch.arange(4 * N)
        seen = keys <= self.count.reshape(-1, 1, 1, 1)
        scores = (q @ self.keys.transpose(-2, -1)).masked_fill(~seen, -INF)
        out: Tensor = scores.softmax(-1) @ self.keys
        if self.inside:
            self.count.add_(1)
        return out

    def step(self) -> None:
        self.count += 1


COUNTERS = [(shape, inside) for shape in ((), (1,), (B,)) for inside in (True, False)]


@pytest.mark.parametrize(("shape", "inside"), [*COUNTERS, ((B, 1), True)], ids=str)
def test_counters_are_no_constants(shape: tuple[int, ...], inside: bool, warned: list[str]) -> None:
    model, other = Counting(shape, inside), Counting(shape, inside)
    other.load_state_dict(model.state_dict())
    fn = compiled(model)
    graphs = 0
    for _ in range(4):
        q = torch.randn(B, H, 1, D)
        with collector.collect() as seen:
            torch.testing.assert_close(fn(q), other(q))
        graphs += len(seen.graphs)
        if not inside:
            model.step()
            other.step()
    assert graphs == 1 and not warned


class Broken(Counting):
    """The graph that reads the counter is not the one that writes to it."""

    def __init__(self) -> None:
        super().__init__((B, 1), inside=False)

    def forward(self, q: Tensor) -> Tensor:
        self.count.add_(1)
        torch._dynamo.graph_break()
        return super().forward(q)


def test_counters_that_another_graph_writes_to(warned: list[str]) -> None:
    model, other = Broken(), Broken()
    other.load_state_dict(model.state_dict())
    fn = compiled(model)
    for _ in range(3):
        q = torch.randn(B, H, 1, D)
        torch.testing.assert_close(fn(q), other(q))
    assert not warned


# ---------------------------------------------------------------------------------------- what is learned


def edited(model: Any, mask: Tensor) -> None:
    model.mask.copy_(mask)


def replaced(model: Any, mask: Tensor) -> None:
    model.mask = mask


def loaded(model: Any, mask: Tensor) -> None:
    model.load_state_dict({"mask": mask})


@pytest.mark.parametrize("change", [edited, replaced, loaded], ids=lambda f: f.__name__)
def test_a_buffer_that_changed_is_no_constant_later(
    change: Callable[[Any, Tensor], None], warned: list[str]
) -> None:
    """Changed in place or replaced: one warning, however many lengths follow."""
    model = Persistent()
    fn = compiled(model, dynamic=False)
    assert kinds(agree(fn, model)) == ["causal"]
    for wide, n in enumerate((N, N + 1, N + 2), start=1):
        change(model, torch.ones(2 * N, 2 * N).tril(wide))
        (kind,) = kinds(agree(fn, model, random_heads(n)))
        assert "mask" in kind, kind
    assert len(warned) == 1


def test_what_was_learned_of_a_place_is_forgotten_with_the_code() -> None:
    model = Persistent()
    fn = compiled(model)
    agree(fn, model)
    replace(model)
    agree(fn, model)
    torch._dynamo.reset()
    model = Persistent()
    assert kinds(agree(compiled(model), model)) == ["causal"]


def test_sites_rely_on_their_own_buffers() -> None:
    """One of two buffers changes; the other one is still what it holds, and is guarded."""
    model = Layers()
    fn = compiled(model)
    assert kinds(agree(fn, model)) == ["causal", "causal"]
    write(model.first)
    first, second = kinds(agree(fn, model))
    assert first != "causal" and second == "causal"
    assert not agree(fn, model).graphs
    write(model.second)
    assert "causal" not in kinds(agree(fn, model))
    assert not agree(fn, model).graphs


class Aside(Persistent):
    """One buffer belongs to unfused attention, another one to fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.other: Tensor
        self.register_buffer("other", torch.ones(N, N).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        weights = (q @ k.transpose(-2, -1)).masked_fill(self.other == 0, -INF).softmax(-1)
        return weights @ v + super().forward(q, k, v), weights


def test_buffers_of_what_stays_are_not_relied_on(warned: list[str]) -> None:
    model = Aside()
    fn = compiled(model)
    with collector.collect() as seen:
        fn(*random_heads())
    (graph,) = seen.graphs
    assert len(graph.assumed) == 1 and "other" not in graph.assumed[0]
    model.other.fill_(1)
    args = random_heads()
    torch.testing.assert_close(fn(*args), model(*args))
    assert not warned


def test_tensors_are_compared_again_only_if_they_were_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked as for tensors on a GPU, where a comparison would wait for the device."""
    monkeypatch.setattr(contents, "_ALWAYS_COMPARED", frozenset())
    compared: list[Tensor] = []
    equals = contents.Snapshot._equals
    monkeypatch.setattr(
        contents.Snapshot,
        "_equals",
        lambda self, t: (compared.append(t), equals(self, t))[1],  # type: ignore[func-returns-value]
    )
    tensor = torch.ones(3)
    snapshot = contents.Snapshot(tensor)
    assert snapshot.holds(tensor) and not compared
    with torch.inference_mode():
        tensor.zero_()
    assert not snapshot.holds(tensor) and not snapshot.holds(tensor) and len(compared) == 1
    tensor.fill_(1)
    assert snapshot.holds(tensor) and snapshot.holds(tensor) and len(compared) == 2
    for _ in range(2):
        other = torch.ones(3)
        assert snapshot.holds(other) and not snapshot.holds(other.mul_(2)) and snapshot.has_held(other)
        assert not snapshot.has_held(torch.ones(3))
    with torch.inference_mode():
        uncounted = torch.ones(3)
        assert snapshot.holds(uncounted)
        uncounted.zero_()
        assert not snapshot.holds(uncounted)


def test_snapshots_are_small_where_they_are_stored() -> None:
    mask = torch.ones(1024, 1024).tril()
    stored = pickle.dumps(contents.Snapshot(mask))
    assert len(stored) < mask.numel() / 8
    snapshot = pickle.loads(stored)
    assert snapshot.holds(mask.clone()) and not snapshot.holds(mask.triu()) and not snapshot.holds(mask[0])


@pytest.mark.parametrize("around", [nullcontext, torch.inference_mode])
def test_a_mask_with_nan(around: Any, warned: list[str]) -> None:
    """NaN equals itself where elements are compared."""
    model = Biased()
    model.mask[0, 0] = float("nan")
    fn = compiled(model)
    with around():
        for _ in range(2):
            agree(fn, model)
    assert not warned
