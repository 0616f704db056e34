"""The pass over PyTorch's graphs, inner graphs included: it answers what :class:`.site_pass.SitePass` asks.

The graph outside a fused site is not touched.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fusepass.compilation.inner import inner_compiler
from fusepass.compilation.profiler_ranges import ROUNDS, annotate
from fusepass.compilation.site_pass import (
    Rejected,
    Replacement,
    Shared,
    SiteGraph,
    SitePass,
    Summands,
    Withdrawn,
)
from fusepass.compilation.unread import Unread, note_on_break
from fusepass.dialects.torch.composites import expand_all
from fusepass.dialects.torch.graph import Known, Reader
from fusepass.dialects.torch.memory import live_nodes
from fusepass.dialects.torch.nodes import operation, value_of
from fusepass.dialects.torch.subgraphs import graphs_of, recompute_nothing
from fusepass.dialects.torch.transforms import FOREIGN, Transforms, records_gradients
from fusepass.expressions.ir import VIEWS, Expr, walk
from fusepass.host.config import Options
from fusepass.host.surroundings import clean_context
from fusepass.kernels import FP8, KERNELS, Kernel, Refused, Target, named, rounds
from fusepass.kernels.base import may_empty_rows
from fusepass.kernels.gates import library_refuses
from fusepass.kernels.reference import rounds as rounds_scores
from fusepass.recognition.recognize import RULES, Miss, Rules, recognise_sum
from fusepass.recognition.resemblance import (
    are_scores,
    of_activations,
    products_behind,
    unpeeled,
    were_scores,
)
from fusepass.reports.report import GraphReport, SiteReport, label_for, source_of
from fusepass.rules.site import Site
from fusepass.selection import autotune
from fusepass.selection.select import candidates, skips_copies
from fusepass.selection.work import UNFUSED
from fusepass.specification.attention import Bias
from fusepass.writing.emit import Builder, CannotEmit
from fusepass.writing.gradients import keep_for_backward, requires_grad, tensors_read_by, with_zero_gradients
from fusepass.writing.liveness import erase_dead, inner_products, outside_reader
from fusepass.writing.strides import laid_out_as
from fusepass.writing.validate import site_error


@clean_context()
def rewrite_graph(
    gm: fx.GraphModule,
    options: Options,
    example_inputs: Sequence[Any] = (),
    rules: Rules = RULES,
    constants: Mapping[str, torch.Tensor] | None = None,
    static: Mapping[str, torch.Tensor] | None = None,
    compiled: bool = False,
    guarded: bool = False,
) -> GraphReport:
    """Fuse the attention sites of ``gm`` in place, those of its inner graphs included.

    Args:
        gm: a graph whose nodes carry fake values (``meta["example_value"]`` or ``meta["val"]``).
        options: which kernel, which precision, whether to validate.
        example_inputs: the inputs Dynamo compiles for; not used to prove anything.
        rules: the rule lists (for tests of the engine).
        constants: the values of placeholders that are constants of an exported program.
        static: the tensors behind placeholders (buffers) whose elements may be relied on, if the caller
            guards those that ``GraphReport.assumed`` names.
        compiled: whether a compiler follows (kernels are measured with one).
        guarded: whether the caller guards that the arguments in ``GraphReport.apart`` share no memory.
    """
    start = time.perf_counter()
    report = GraphReport(nodes=0)
    passes: dict[fx.GraphModule, _TorchGraph] = {}
    gradients, numbers = records_gradients(gm), itertools.count()
    for graph_module, call in graphs_of(gm):
        report.nodes += len(graph_module.graph.nodes)
        outer = None if call is None else passes[call.outer].reader
        meanings = {} if call is None or outer is None else call.operand_meanings(outer)
        contents = outer.contents if meanings and outer is not None else None
        own_gradient = call is not None and call.own_gradient
        known = Known(constants or {}, static or {}, meanings, contents, own_gradient, gradients)
        around = None if call is None else (passes[call.outer].transforms, call.node)
        one = _TorchGraph(graph_module, options, rules, known, compiled, guarded, around, numbers)
        passes[graph_module] = one
        report.sites.extend(one.fuse())
        report.notes.extend(one.reader.faults.notes)
        report.notes.extend(filter(None, [note_on_break(graph_module, one.reader)]))
        static = None  # those are inputs of the outermost graph
    fused = [module for module, one in passes.items() if one.replaced]
    if fused:
        recompute_nothing(gm, fused)
        report.assumed = passes[gm].assumed()
        report.apart = passes[gm].apart()
    report.written = passes[gm].written()
    report.seconds = time.perf_counter() - start
    return report


_Replacement = Replacement[fx.Node, Builder]


def _any_kernel(_: Kernel) -> bool:
    return True


#: What may lie between a softmax and the product with the values.
_PEELED = VIEWS | {"cast", "dropout", "nan_to_num", "where", "mul", "div"}


class _TorchGraph(SiteGraph[fx.Node, fx.Node, Builder]):
    """One graph."""

    def __init__(
        self, gm: fx.GraphModule, options: Options, rules: Rules, known: Known, compiled: bool,
        guarded: bool, around: tuple[Transforms, fx.Node] | None, numbers: Iterator[int],
    ) -> None:  # fmt: skip
        self.gm, self.options, self.rules, self.known = gm, options, rules, known
        self.compiled, self.guarded, self.numbers = compiled, guarded, numbers
        self.graph = gm.graph
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.shared: dict[Any, Any] = {}
        self.overtaken: set[Any] = set()
        self.expansions, self.unexpanded = expand_all(self.graph)
        self.transforms = Transforms(self.graph, around)
        self.reader = Reader(self.graph, gm, known)
        self.live = live_nodes(self.graph, self.reader.memory)

    def fuse(self) -> list[SiteReport]:
        """Every site's report, in program order."""
        one = SitePass(self)
        reports = [one.report(call, None, reason=reason) for call, reason in self.unexpanded] + one.run()
        for expansion in self.expansions:  # the steps of a call stay where something in them was fused
            if expansion.used_outside() or any(n in self.replaced for n in expansion.steps):
                expansion.accept()
            else:
                expansion.revert()
        if self.replaced:
            erase_dead(self.graph, self.reader.memory, self.live, self.replaced)
            self.graph.lint()
            self.gm.recompile()
        return reports

    def assumed(self) -> list[str]:
        """The placeholders whose elements sites rely on."""
        names = {str(e.attrs[0]) for e in self.reader.contents.used}
        return [n.name for n in self.graph.find_nodes(op="placeholder") if n.name in names]

    def written(self) -> list[str]:
        """The placeholders of buffers that the graph writes to."""
        memory = self.reader.memory
        return [
            n.name
            for n in self.graph.find_nodes(op="placeholder")
            if n.name in self.known.static and memory.of(n) & memory.all_written
        ]

    def apart(self) -> list[list[str]]:
        """For each storage that must stay separate from the others in later calls: the placeholders on it.

        When a site reads a buffer, it holds what it held before the call, unless the graph has written to
        another argument that shares its memory.
        """
        placeholders = self.graph.find_nodes(op="placeholder")
        memory, assumed = self.reader.memory, set(self.assumed())
        storages = set(self.overtaken)
        if assumed and memory.external & memory.all_written:
            storages |= memory.external & memory.all_written
            storages.update(*(memory.of(n) for n in placeholders if n.name in assumed))
        names = ([n.name for n in placeholders if s in memory.of(n)] for s in storages)
        return sorted(filter(None, names))

    # -- what the pass asks -------------------------------------------------------------------

    def read(self) -> Iterator[tuple[fx.Node, Expr]]:
        for node in list(self.graph.nodes):
            meaning = self.reader.defined.get(node)
            if node in self.live and isinstance(meaning, Expr) and self.reader.definer[meaning] is node:
                self.reader.contents.begin()
                yield node, meaning

    def name_and_source(self, node: fx.Node) -> tuple[str, str | None]:
        return node.name, source_of(node)

    def recognised(self, node: fx.Node, product: Expr | None = None) -> Summands | Miss | None:
        meaning, reader = product or self.reader.defined.get(node), self.reader
        if not isinstance(meaning, Expr):
            return None
        readable = functools.partial(reader.readable, until=node)
        return recognise_sum(meaning, reader.facts, self.rules, reader.contents, readable)

    def inner(self, node: fx.Node) -> set[str]:
        return {n.name for n in inner_products(self.reader, node)}

    def settled(
        self, node: fx.Node, sites: Sequence[Site], shared: Shared[fx.Node]
    ) -> tuple[str | None, str] | None:
        if reason := self._refusal(node, sites, shared):
            return None, reason
        native = self.options.precision == "native" and self.options.kernel != "reference"
        if len(sites) == 1 and native and as_good(node, sites[0], self._target(node)):
            return "sdpa", "a call to SDPA already; nothing to improve"
        return None

    def serves(self, node: fx.Node, site: Site) -> bool:
        asked, target = named(self.options.kernel), self._target(node)
        kernels = KERNELS if asked is None else (asked,)
        return any(k.refuse(site.spec, target) is None for k in kernels)

    def write(self, node: fx.Node, site: Site, rejected: Rejected) -> _Replacement | None:
        if site.original is not None:
            skips = functools.partial(skips_copies, site=site, target=self._target(node))
            one = self._write(node, site.original, list(rejected), skips)
            if one is not None:
                return one
        one = self._write(node, site, rejected)
        if one is not None and site.windowed is not None:
            one.note = one.note or _COPIED
        return one

    def _write(
        self, node: fx.Node, site: Site, rejected: Rejected, allowed: Callable[[Kernel], bool] = _any_kernel
    ) -> _Replacement | None:
        """Write the first of the allowed kernels that serves."""
        tried, target = {name for name, _ in rejected}, self._target(node)
        measure = functools.partial(self._fastest, node, site, target)
        learned = self._learned(node, site) if target.training else frozenset()
        if not any(map(allowed, KERNELS)):
            return None
        for kernel in candidates(node, site, target, self.options, learned, measure):
            if kernel is None:
                rejected.append((UNFUSED, "measured faster as it is"))
                return None
            if kernel.name in tried or not allowed(kernel):
                continue
            written = self._try_kernel(node, site, kernel, target)
            if not isinstance(written, str):
                return Replacement(*written, kernel.name, _precision_note(rejected))
            rejected.append((kernel.name, written))
        return None

    def place(
        self, node: fx.Node, sites: Sequence[Site], written: Sequence[_Replacement], out: fx.Node
    ) -> None:
        build, nodes = written[-1].build, [n for one in written for n in one.build.new_nodes]
        overtaken = overtaken_by(nodes, self.reader, node)
        if overtaken and not self.guarded:
            raise Withdrawn(_MAY_OVERLAP)
        if self._target(node).training:
            out = with_zero_gradients(build, out, nodes)
        exact = self.options.validate and not any(rounds(one.kernel) for one in written)
        error = site_error(node, out) if exact else None
        if error is not None and not error <= 1.0:
            raise Withdrawn(f"validation: its error is {error:.3g} times what is allowed", wrong=True)
        out = build.written_where(node, out)
        node.replace_all_uses_with(out, propagate_meta=False)
        self.reader.memory.stand_in(out, node)
        self.replaced[node] = out
        self.reader.contents.keep()
        self.overtaken |= overtaken
        for site, one in zip(sites, written, strict=True):
            one.error, one.label = error, self._label(node, site, one)

    def stays(self, site: Site, rejected: Rejected) -> str | None:
        if rounds_scores(site.spec):
            self.gm.meta[ROUNDS] = True
        return rejected.pop()[1] if rejected and rejected[-1][0] == UNFUSED else None

    def left_over(self, settled: set[Expr]) -> Iterator[tuple[fx.Node, str]]:
        unread = Unread(self.reader, self.live)
        for node, meaning in self.read():
            if meaning.op != "softmax" or meaning in settled:
                continue
            settled.add(meaning)
            if of_activations(meaning.args[0]):
                yield node, self._why_alone(node)
            elif were_scores(meaning, self.reader.before):
                yield node, _LOST
            elif are_scores(meaning.args[0]):
                step = unpeeled(meaning.args[0])
                yield node, f"its scores go through '{step}', which no rule takes from them"
            elif reason := unread.behind_softmax(meaning):
                yield node, reason
        yield from unread.between_products()

    # -- one site ----------------------------------------------------------------------------

    def _refusal(self, node: fx.Node, sites: Sequence[Site], shared: Shared[fx.Node]) -> str | None:
        """Why sites stay, whatever the kernel."""
        scores = [p for site in sites for p in self._scores_of(node, site)]
        if self.known.meanings and not all(p in self.reader.definer for p in scores):
            return "its scores are computed in another graph"
        for site in sites:
            also = (lambda user: ()) if site.spec.dropout else shared  # both see the same weights dropped
            for product in self._scores_of(node, site):
                reader = outside_reader(self.reader, self.live, product, node, also)
                if reader is not None:
                    return _also_read(reader)
        return _REBOUND if self.reader.memory.rebinds else self.transforms.refuse(node)

    def _scores_of(self, node: fx.Node, site: Site) -> Sequence[Expr]:
        """The products of a site that nodes hold; for a product inside a call, the call's result."""
        meaning, held = self.reader.defined[node], self.reader.definer
        if all(p in held for p in site.products) or not isinstance(meaning, Expr):
            return site.products
        inside = {p for p in site.products if p not in held}
        scores = [p for p in site.products if p in held]
        for part in walk(meaning):
            if part not in inside and any(a in inside for a in part.args):
                (scores.append if part in held else inside.add)(part)
        return scores or products_behind(meaning)  # keys that are joined have several products

    def _fastest(self, node: fx.Node, site: Site, target: Target, kernels: Sequence[Kernel]) -> str | None:
        """The name of the kernel that was measured fastest for a site."""

        def write(kernel: Kernel) -> tuple[fx.Node, Callable[[], None]] | None:
            written = self._try_kernel(node, site, kernel, target)
            return None if isinstance(written, str) else (written[0], written[1].discard)

        compiler = inner_compiler(self.options)
        return autotune.fastest(node, site.spec, kernels, write, self.options, target.training, compiler)

    def _learned(self, node: fx.Node, site: Site) -> frozenset[int]:
        """The slots of biases that are made of something that needs a gradient."""
        slots = set()
        for mod in site.spec.scores:
            if isinstance(mod, Bias):
                homes = (self.reader.home(e, node) for e in walk(site.operands[mod.slot].expr))
                if any(requires_grad(home) for home in homes if home is not None):
                    slots.add(mod.slot)
        return frozenset(slots)

    def _try_kernel(
        self, node: fx.Node, site: Site, kernel: Kernel, target: Target
    ) -> tuple[fx.Node, Builder] | str:
        """Write a kernel's nodes, or say why it cannot."""
        if not kernel.of_torch and self.transforms.differentiates(node):
            return FOREIGN
        if reason := kernel.refuse(site.spec, target) or library_refuses(kernel.name):
            return reason
        build = Builder(self.reader, node, self.replaced, site.space, self.shared)
        try:
            out = build.restore(kernel.write(site, build, target), _result_groups(site), site.out)
            out = laid_out_as(build, node, out)
            return (keep_for_backward(build, site.products, out) if target.training else out), build
        except (Refused, CannotEmit) as refusal:
            build.discard()
            return str(refusal)
        except GuardOnDataDependentSymNode as unknown:
            build.discard()
            return (
                f"PyTorch asks whether {unknown.cond} holds, which is not known before the graph runs "
                "(torch._check can promise it)"
            )

    def _target(self, node: fx.Node) -> Target:
        value = value_of(node)
        training = self.known.gradients and bool(getattr(value, "requires_grad", False))
        aten = isinstance(node.target, torch._ops.OpOverload)
        requested = self.options.kernel not in ("auto", "autotune")
        return Target(value.device.type, training, aten, requested, self.options.precision, self.compiled)

    def _label(self, node: fx.Node, site: Site, one: _Replacement) -> str:
        """The label that the nodes of a fused site get."""
        number = next(self.numbers)
        label = label_for(number, site.meaning.kind(), one.kernel, source_of(node))
        annotate(one.build.new_nodes, number, label, self.compiled)
        return label

    def _why_alone(self, node: fx.Node) -> str:
        """Why the weights that a node computes reach no product with values."""
        if self.known.own_gradient:
            return "the softmax is in a torch.autograd.Function, whose own backward a kernel would ignore"
        seen, todo = {node}, [node]
        odd: fx.Node | None = None
        while todo:
            for user in todo.pop().users:
                if user in seen or user not in self.live:
                    continue
                seen.add(user)
                meaning = self.reader.defined.get(user)
                if user.op == "output":
                    return "the weights are returned, and no product with values uses them"
                if isinstance(meaning, Expr) and meaning.op in _PEELED:
                    todo.append(user)
                elif isinstance(value_of(user), torch.Tensor):
                    odd = odd or user
        if odd is None:
            return "nothing uses the weights"
        meaning = self.reader.defined.get(odd)
        return (
            "the product that reads the weights has another form"
            if isinstance(meaning, Expr) and meaning.op == "dot"
            else f"the weights go through '{operation(odd)[0] or odd.name}', which no rule takes from them"
        )


_COPIED = "computed over the unfolded keys and values"
_REBOUND = "the graph puts a tensor on another storage (set_), so that what was read before is not known"
_MAY_OVERLAP = "an argument that the graph writes to earlier may share memory with one that the site reads"
_LOST = "the scores are written to in a way no rule follows"


def _also_read(reader: fx.Node) -> str:
    if reader.op == "output":
        return "its scores or weights are returned, or kept in an attribute"
    return f"its scores or weights are also read by '{operation(reader)[0] or reader.name}'"


def _precision_note(rejected: Sequence[tuple[str, str]]) -> str | None:
    """A note on a fused site: why it does not have the precision that was asked for."""
    return next((f"not in FP8: {reason}" for name, reason in rejected if name == FP8.name), None)


def overtaken_by(new_nodes: Sequence[fx.Node], reader: Reader, anchor: fx.Node) -> set[Any]:
    """Storages of arguments: one is written to, and another is read after that instead of before.

    That these storages are separate is known for this call only.
    """
    memory, end = reader.memory, reader.order[anchor]
    overtaken: set[Any] = set()
    for node in tensors_read_by(new_nodes):
        mine = memory.of(node) & memory.external
        since = reader.order.get(node, end)
        others = (reader.storages_written(since, end) & memory.external) - mine
        if mine and others:
            overtaken |= mine | others
    return overtaken


def as_good(node: fx.Node, site: Site, target: Target) -> bool:
    """Is the node a call to SDPA that a new call would not improve on?

    In training it is as good if a row may see no key: the call itself defines the gradients of such rows.
    """
    if operation(node)[0] != "scaled_dot_product_attention":
        return False
    if target.training and may_empty_rows(site.spec, target):
        return True
    names = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    drops_mask = (
        given.get("attn_mask") is not None
        and site.spec.sink is None
        and (site.spec.is_causal() or not site.spec.added)
    )
    groups = bool(site.roles.group) and not given.get("enable_gqa")
    return not (drops_mask or groups)


def _result_groups(site: Site) -> tuple[list[str], ...]:
    r = site.roles
    return r.batch, r.heads, r.query, r.value_dim


__all__ = ["rewrite_graph"]
