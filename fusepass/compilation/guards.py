"""Compiled graphs that check what they rely on at every call, in this process and after PyTorch stores them.

A :class:`Guarded` is one callable that holds the check, the fused graph and the original.  The fused graph
runs as long as everything it relies on holds; otherwise the original runs.  If buffers have changed, the
original is compiled, with nothing assumed about them, unless compiling is forbidden.  If arguments overlap,
the original runs uncompiled: what AOTAutograd generates for one overlap is wrong for another.

PyTorch stores what a backend returns in two ways, and both include the guards: ``aot_compile`` asks the
callable for its bytes (``SerializableCallable``), and ``caching_precompile`` keeps an artifact for every
graph (:class:`GuardedArtifact`), which Dynamo loads in the next process instead of tracing.  The other caches
are looked up after the pass has run, by the fused graph, so the guards of this process apply.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext as _nothing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from fusepass.compilation.assumptions import Place, note_changing, note_place, place_of
from fusepass.expressions.contents import Snapshot
from fusepass.host.surroundings import clean_context, will_be_stored
from fusepass.reports.report import GraphReport

try:
    from torch._dynamo.aot_compile_types import (
        BundledAOTAutogradSerializableCallable,
        GraphModuleSerializableCallable,
        SerializableCallable,
    )
    from torch._dynamo.precompile_context import BackendCacheArtifact, PrecompileContext
except ImportError:  # this PyTorch cannot store what a backend returns: guards stay in this process
    GraphModuleSerializableCallable = None  # type: ignore[assignment, misc]
    SerializableCallable = object  # type: ignore[assignment, misc]
    BackendCacheArtifact = dict  # type: ignore[assignment, misc]

log = logging.getLogger("fusepass")

Compiled = Callable[..., Any]
Recompile = Callable[[Any], Compiled]
"""Makes the backend that compiles the original, given the tensors whose elements it may rely on."""


@dataclass(frozen=True)
class Guards:
    """What a fused graph relies on, by the positions of its arguments.

    Attributes:
        snapshots: the elements that arguments must have.
        apart: a group for each argument that must not share memory with an argument of another group.
    """

    snapshots: tuple[tuple[int, Snapshot], ...]
    apart: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any], report: GraphReport) -> Guards:
        """The guards for the arguments that ``report`` names in ``assumed`` and ``apart``."""
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        at = [names.index(name) for name in report.assumed]
        groups = ((names.index(n), group) for group, listed in enumerate(report.apart) for n in listed)
        with clean_context():
            snapshots = tuple((i, Snapshot(example_inputs[i])) for i in at)
        return cls(snapshots, tuple(groups))

    def changed(self, args: Sequence[Any]) -> list[int]:
        """The arguments whose elements have changed."""
        with clean_context(draws=False):
            return [at for at, snapshot in self.snapshots if not snapshot.holds(args[at])]

    def overlap(self, args: Sequence[Any]) -> bool:
        """Do tensors of different groups share a storage?  Tensors that own no memory do not."""
        groups: dict[int, int] = {}
        for at, group in self.apart:
            value = args[at]
            if (
                isinstance(value, Tensor)
                and not isinstance(value, FakeTensor)
                and value.layout is torch.strided
            ):
                address = value.untyped_storage().data_ptr()
                if address and groups.setdefault(address, group) != group:
                    return True
        return False


class Guarded(SerializableCallable):
    """Runs a fused graph as long as what it relies on holds, and the original graph otherwise.

    Args:
        guards: what must hold.
        fused: the compiled fused graph.
        original: makes the graph as it was before the pass.  It is called only when the graph is needed,
            because Dynamo does not trace code that is generated while it compiles.
        recompile: makes the backend that compiles the original when that is needed; None: the original runs
            uncompiled.
        places: where the guarded buffers were found, by position.
    """

    def __init__(
        self,
        guards: Guards,
        fused: Compiled,
        original: Callable[[], fx.GraphModule],
        recompile: Recompile | None,
        places: dict[int, Place] | None = None,
    ) -> None:
        self._guards, self._fused, self._make_original = guards, fused, original
        self._recompile, self._places = recompile, places or {}
        self._compiled: Compiled | None = None
        self._warned = False

    @functools.cached_property
    def _original(self) -> fx.GraphModule:
        return self._make_original()

    def __call__(self, *args: Any) -> Any:
        if self._guards.overlap(args):
            return self._original(*args)
        changed = self._guards.changed(args)
        if not changed:
            return self._fused(*args)
        self._learn(args, changed)
        return self._original_callable(args, changed)(*args)

    def _learn(self, args: Sequence[Any], changed: list[int]) -> None:
        for at, snapshot in self._guards.snapshots:
            if at in changed:
                if snapshot.has_held(args[at]):
                    note_changing([args[at]])
                if at in self._places:
                    note_place(self._places[at])

    def _original_callable(self, args: Sequence[Any], changed: list[int]) -> Compiled:
        """The callable that runs the original graph, if no arguments overlap."""
        if self._recompile is None or _has_regions(self._original):
            self._warn("the original graph runs, uncompiled")
            return self._original
        if _may_not_compile():
            self._warn("the original graph runs, compiled only if it already is")
            cached: Compiled = torch._dynamo.run(self._original)
            return cached
        if self._compiled is None:
            self._warn("compiling again without relying on it")
            kept = WeakIdKeyDictionary(
                {args[at]: True for at, _ in self._guards.snapshots if at not in changed}
            )
            with _not_stored():
                self._compiled = torch.compile(self._original, backend=self._recompile(kept))
        return self._compiled

    def _warn(self, consequence: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("fusepass: a buffer that a fused graph relied on has changed; %s", consequence)

    # -- stored ------------------------------------------------------------------------------

    def stored(self, recompile: Recompile | None) -> bytes:
        """The whole as bytes, for ``from_stored``; ``recompile`` must be picklable.

        Raises:
            TypeError: the inner compiler returned something that cannot be stored.
        """
        original = _stored(GraphModuleSerializableCallable(self._make_original()))
        return pickle.dumps((self._guards, _stored(self._fused), original, recompile))

    @classmethod
    def from_stored(cls, data: bytes) -> Guarded:
        """What ``stored`` wrote."""
        guards, fused, original, recompile = pickle.loads(data)
        return cls(guards, _loaded(fused), functools.partial(_loaded_graph, original), recompile)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Guarded) -> bytes:
        """For ``aot_compile``: a graph that is compiled ahead of time compiles nothing later."""
        return fn.stored(None)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Guarded:
        """What ``serialize_compile_artifacts`` wrote."""
        return cls.from_stored(data)

    def store_as(self, gm: fx.GraphModule) -> None:
        """Make PyTorch store this object, not its parts, for the graph that Dynamo knows as ``gm``.

        If it cannot be stored, nothing is: Dynamo then leaves the function out of its cache.
        """
        key = getattr(gm, "_backend_id", None)
        if key is None:
            return
        try:
            recompile = _picklable(self._recompile)
            PrecompileContext.record_artifact(GuardedArtifact(key, self.stored(recompile)))
        except Exception as error:
            log.info("fusepass: a guarded graph cannot be stored: %s", error)


class GuardedArtifact(BackendCacheArtifact[Any]):
    """A guarded graph in Dynamo's cache."""

    def after_deserialization(self) -> Guarded:
        """The callable that Dynamo calls."""
        return Guarded.from_stored(self.content)


def places(gm: fx.GraphModule, guards: Guards) -> dict[int, Place]:
    """Where the guarded buffers of ``gm`` were found, by position, as far as it is known."""
    nodes = gm.graph.find_nodes(op="placeholder")
    placed = ((at, place_of(nodes[at])) for at, _ in guards.snapshots)
    return {at: place for at, place in placed if place is not None}


def can_be_stored(module: fx.GraphModule) -> bool:
    """Can the original graph be stored with the fused one?"""
    if GraphModuleSerializableCallable is None:
        return False
    try:
        _stored(GraphModuleSerializableCallable(module))
    except Exception as error:
        log.info("fusepass: a graph cannot be stored, so nothing is assumed in it: %s", error)
        return False
    return True


@contextlib.contextmanager
def stored_by_us(gm: fx.GraphModule) -> Iterator[None]:
    """Inside, PyTorch stores nothing under the graph's name, and compiles the backward immediately."""
    key = getattr(gm, "_backend_id", None)
    config = torch._functorch.config
    at_once = hasattr(config, "force_non_lazy_backward_lowering")
    with config.patch(force_non_lazy_backward_lowering=True) if at_once else _nothing():
        try:
            gm._backend_id = None  # type: ignore[assignment]
            yield
        finally:
            gm._backend_id = key  # type: ignore[assignment]


def _stored(fn: Compiled) -> tuple[Callable[[bytes], Any], bytes]:
    """A function that loads a compiled function, and what it loads from."""
    if not isinstance(fn, SerializableCallable):
        if getattr(fn, "serialize", None) is None:
            raise TypeError(
                f"the inner compiler returned a {type(fn).__name__}, which PyTorch cannot store; "
                "use inner='inductor' or another backend that AOTAutograd makes"
            )
        fn = BundledAOTAutogradSerializableCallable(fn)
    return type(fn).deserialize_compile_artifacts, type(fn).serialize_compile_artifacts(fn)


def _loaded(stored: tuple[Callable[[bytes], Any], bytes]) -> Any:
    load, data = stored
    return load(data)


@contextlib.contextmanager
def _not_stored() -> Iterator[None]:
    """Inside, ``torch.compile`` makes functions that stay in this process."""
    config = torch._dynamo.config
    with config.patch(caching_precompile=False) if hasattr(config, "caching_precompile") else _nothing():
        yield


def _loaded_graph(stored: tuple[Callable[[bytes], Any], bytes]) -> fx.GraphModule:
    graph: fx.GraphModule = _loaded(stored).graph_module
    return graph


def _picklable(value: Any) -> Any:
    try:
        pickle.dumps(value)
    except Exception:
        return None
    return value


def _has_regions(module: fx.GraphModule) -> bool:
    """Does the graph call higher-order operators, whose bodies are separate graph modules?"""
    return any(isinstance(m, fx.GraphModule) for m in module.children())


def _may_not_compile() -> bool:
    """Is compiling forbidden from now on (``torch.compiler.set_stance("fail_on_recompile")``)?"""
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)
    return getattr(stance, "stance", "default") == "fail_on_recompile"


__all__ = [
    "Guarded",
    "GuardedArtifact",
    "Guards",
    "can_be_stored",
    "places",
    "stored_by_us",
    "will_be_stored",
]
