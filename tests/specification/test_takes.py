"""Kernels compute what they declare to take; a new modifier and a new kernel are safe by default."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.kernels import KERNELS, REFERENCE, SDPA, Kernel, Refused
from fusepass.kernels.base import Target, conjunction, operands, scaled
from fusepass.kernels.flex import FLEX
from fusepass.rules.site import Site
from fusepass.selection import select
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dropout,
    Keep,
    KeyGate,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    Sink,
    SoftCap,
    WeightModifier,
    WeightScale,
    ZeroEmptyRows,
    empty_rows,
    kinds,
    reference,
)
from fusepass.specification.modifiers import Sample
from fusepass.specification.samples import Draw
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder
from tests.attention import plain
from tests.capture import compiled
from tests.capture import qkv as random_qkv
from tests.checking import assert_as_accurate
from tests.specification.test_modifiers import joined
from tests.written import CPU, Q, qkv, spec_of, written

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
CAUSAL = (Band(None, 0),)


# ------------------------------------------------------------ a kernel of a newcomer


def emit_toy(site: Site, build: Builder, target: Target) -> fx.Node:
    """Scales and masks by SDPA, written without a thought for anything else."""
    scale, x = scaled(site, build, operands(site, build))
    mask = conjunction(site, build, site.spec.masks) if site.spec.masks else None
    call = torch.nn.functional.scaled_dot_product_attention
    return build.call(call, x.q, x.k, x.v, attn_mask=mask, scale=scale)


TOY = Kernel("toy", Takes((Scale, ScaleBy, Mask)), emit_toy)
MASK = Mask(0, -INF, atoms=CAUSAL)
DANGEROUS: dict[str, tuple[Attention, str]] = {
    "fill within reach": (spec_of([replace(MASK, fill=-1e4)]), "within reach of real scores"),
    "no number": (spec_of([replace(MASK, fill=math.nan)]), "within reach of real scores"),
    "fill within reach, added": (spec_of([Mask(0, -1e4, additive=True)]), "within reach of real scores"),
    "factor over keys": (spec_of([ScaleBy(0, "hj")]), "varies over the keys"),
    "factor over pairs": (spec_of([ScaleBy(0, "ij")]), "varies over the keys"),
    "factor after a mask": (spec_of([MASK, ScaleBy(1, "h")]), "comes after"),
    "scale after a mask": (spec_of([MASK, Scale(-1.0)]), "comes after"),
    "scale after a factor": (spec_of([ScaleBy(0, "h"), Scale(2.0)]), "comes after"),
    "rows that see nothing": (spec_of([MASK], rows_seen=False), "a query may see no key"),
    "bias": (spec_of([Bias(0, "hij")]), "it has no 'bias[hij]'"),
    "softcap": (spec_of([SoftCap(2.0)]), "it has no 'softcap 2'"),
    "sink": (spec_of([], sink=Sink(0, "h")), "it has no sink"),
    "dropout": (spec_of([], [Dropout(0.1)]), "it has no dropout"),
    "kept weights": (spec_of([], [Keep(0, axes="bij")]), "it has no 'kept where [bij]'"),
    "implied": (spec_of([MASK], [Keep(0, axes="ij", implied=True)]), "it has no 'kept where [ij]'"),
    "factor of weights": (spec_of([], [WeightScale(0.5)]), "it has no 'weights * 0.5'"),
    "gate": (spec_of([], [KeyGate(0, "bj")]), "it has no 'weights * [bj]'"),
    "cleaned": (spec_of([MASK], [ZeroEmptyRows()]), "it has no 'empty rows zero'"),
    "no keys": (spec_of([Scale(0.5)], keys_exist=False), "there may be no keys"),
}


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_new_kernel_refuses_what_it_did_not_think_of(name: str) -> None:
    spec, words = DANGEROUS[name]
    for training in (False, True):
        assert words in str(TOY.refuse(spec, replace(CPU, training=training)))


def test_a_bias_that_hides_is_declared_of_its_own() -> None:
    spec = spec_of([Bias(0, "bj", hides=True)])
    takes = Takes((Bias,))
    assert "may hide all keys" in str(takes.refuse(spec))
    assert replace(takes, hiding_biases=True).refuse(spec) is None


def test_a_new_kernel_serves_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "KERNELS", (TOY, *KERNELS))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * 0.3
        return s.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -INF).softmax(-1) @ v

    args = random_qkv()
    got, seen = compiled(program, *args, kernel="auto")
    assert [site.kernel for site in seen.sites] == ["toy"]
    torch.testing.assert_close(got, program(*args), rtol=1e-5, atol=1e-5)


def test_an_operand_that_learns_is_refused_where_nobody_said_so() -> None:
    spec, tensors = spec_of([ScaleBy(0, "h")]), [Draw().normal("h").float().requires_grad_()]
    with pytest.raises(Refused, match="computes no gradient for"):
        written(spec, tensors, TOY, replace(CPU, training=True))
    learns = replace(TOY, takes=replace(TOY.takes, learned=(ScaleBy,)))
    for kernel, training in ((TOY, False), (learns, True)):
        assert written(spec, tensors, kernel, replace(CPU, training=training)) is not None


def test_a_tensor_of_rows_that_varies_over_the_keys_is_refused_where_it_is_made() -> None:
    """Also where its axes are not named in the specification."""
    with pytest.raises(Refused, match="varies over the keys"):
        written(spec_of([ScaleBy(0)]), [Draw().normal("hj").float()], TOY)


# ------------------------------------------------------------ kernels that take pairs

KERNELS_HERE = (SDPA, FLEX, REFERENCE, TOY)


def drawn(kind: type[Any], seed: int) -> list[Sample]:
    """The samples of a kind, in float32."""
    in_float32: list[Sample] = []
    for mod, tensors in kind.samples(Draw(seed)):
        in_float32.append((mod, tuple(t.float() if t.is_floating_point() else t for t in tensors)))
    return in_float32


def emptied(mod: object, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The operands of a mask; in each batch another query sees no key."""
    if not isinstance(mod, Mask):
        return list(tensors)
    (tensor,) = tensors
    hidden = mod.fill if mod.additive else not mod.attends
    tensor = tensor.clone()
    tensor[0, :, 1], tensor[1, :, Q - 1] = hidden, hidden
    return [tensor]


def check(spec: Attention, tensors: Sequence[Tensor], kernel: Kernel) -> bool:
    """Does a kernel take a specification?  Then it computes what the oracle says."""
    if kernel.refuse(spec, CPU) is not None:
        return False
    with torch.no_grad():
        try:
            graph = written(spec, tensors, kernel)
        except Refused:
            return False
        got = graph(*qkv(), *tensors)
        eager = reference(spec, *qkv(), tensors)
        exact = reference(spec, *qkv(), tensors, torch.float64)
    if not spec.rows_seen:  # in float64 other fills absorb scores
        exact = eager.double()
    assert_as_accurate(got, eager, exact, f"{kernel.name}: {spec}", scale=1.0)
    return True


def combinations(first: type[Any], second: type[Any]) -> Iterator[tuple[Sample, Sample]]:
    """Samples of both kinds, every one of them at least once."""
    a, b = drawn(first, 1), drawn(second, 2)
    for n in range(max(len(a), len(b))):
        yield a[n % len(a)], b[(n + 1) % len(b)]


def names(kernel: Kernel, kind: type[ScoreModifier]) -> bool:
    """Does a kernel's declaration name a kind?"""
    stages = (stage if isinstance(stage, tuple) else (stage,) for stage in kernel.takes.scores)
    return any(issubclass(kind, stage) for stage in stages)


@pytest.mark.parametrize("seen", [True, False], ids=["rows seen", "rows empty"])
@pytest.mark.parametrize("first", kinds(ScoreModifier), ids=lambda k: k.__name__)
def test_kernels_compute_the_pairs_of_score_modifiers_that_they_take(first: type[Any], seen: bool) -> None:
    taken = set()
    for second in kinds(ScoreModifier):
        for pair in combinations(first, second):
            if not seen:
                if not any(isinstance(mod, Mask) for mod, _ in pair):
                    continue
                pair = tuple((mod, tuple(emptied(mod, tensors))) for mod, tensors in pair)  # type: ignore[assignment]
            mods, tensors = joined(*pair)
            spec = spec_of(mods, rows_seen=seen)
            taken |= {kernel.name for kernel in KERNELS_HERE if check(spec, tensors, kernel)}
    assert taken >= {kernel.name for kernel in (FLEX, REFERENCE) if names(kernel, first)}


@pytest.mark.parametrize("seen", [True, False], ids=["rows seen", "rows empty"])
@pytest.mark.parametrize("weight", kinds(WeightModifier), ids=lambda k: k.__name__)
def test_kernels_compute_the_weight_modifiers_that_they_take(weight: type[Any], seen: bool) -> None:
    if weight is Dropout:
        return  # the reference cannot draw
    for before, after in itertools.product(drawn(Mask, 1), drawn(weight, 2)):
        mods, tensors = joined(before if seen else (before[0], tuple(emptied(*before))), after)
        spec = spec_of(mods[:1], mods[1:], rows_seen=seen)
        for kernel in KERNELS_HERE:
            check(spec, tensors, kernel)


# ------------------------------------------------------------ rows that see no key


def test_what_rows_that_see_no_key_give() -> None:
    def gives(scores: list[ScoreModifier], weights: Sequence[WeightModifier] = (), **more: Any) -> str:
        return empty_rows(spec_of(scores, weights, rows_seen=False, **more))

    low, far, pad = Mask(0, LOWEST), Mask(0, -1e9), Mask(1, -1e9)
    assert gives([MASK]) == "nan" and gives([MASK], [ZeroEmptyRows()]) == "zero"
    assert gives([low]) == gives([far]) == gives([far, pad]) == "mean"
    assert gives([Bias(2, "hij"), far]) == "mean", "a bias before a fill is replaced by it"
    assert gives([MASK, Bias(2, "hij")]) == "nan" and gives([low, Bias(2, "hij")]) == "mean"
    assert gives([far, Bias(2, "hi")]) == "mean" and gives([far, Bias(2, "hj")]) == "unknown"
    half = Mask(0, torch.finfo(torch.float16).min)
    assert gives([half], dtype=torch.float16) == "mean"
    assert gives([half, Bias(2, "j")], dtype=torch.float16) == "unknown"
    assert gives([far, SoftCap(30.0)]) == gives([far, ScaleBy(1, "h")]) == "unknown"
    assert gives([MASK], sink=Sink(1, "h")) == "unknown", "the sink may be minus infinity"
    whole, part = (Keep(0, implied=True, covers=covers) for covers in (True, False))
    assert gives([far], [whole]) == "zero" and gives([far], [part]) == "unknown"


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k is not REFERENCE], ids=lambda k: k.name)
def test_rows_that_depend_on_numbers_are_left_to_the_reference(kernel: Kernel) -> None:
    for scores, sink in (([Mask(0, -1e9), Bias(1, "hj")], None), ([MASK], Sink(1, "h"))):
        spec = spec_of(scores, sink=sink, rows_seen=False)
        assert kernel.takes.refuse(spec) is not None and REFERENCE.refuse(spec, CPU) is None
        assert kernel.takes.refuse(replace(spec, rows_seen=True, sink=None)) is None or kernel not in (
            SDPA,
            FLEX,
        )


def test_a_sink_of_unknown_size_does_not_make_rows_seen() -> None:
    """All keys hidden and a sink of minus infinity: NaN in eager, undefined in a kernel."""

    def program(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, keep: Tensor) -> Tensor:
        s = (q @ k.mT).masked_fill(~keep[:, None, None, :], -INF)
        column = sink.reshape(1, -1, 1, 1).expand(2, 2, 6, 1)
        return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v

    keep = torch.arange(6) < torch.tensor([[0], [4]])
    for sink, learned in ((torch.tensor([-INF, 0.5]), False), (torch.tensor([0.25, 0.5]), True)):
        given = torch.nn.Parameter(sink) if learned else sink
        args = (*random_qkv(), given, keep)
        got, seen = compiled(program, *args, kernel="sdpa")
        assert seen.sites[0].fused is learned, seen.sites
        torch.testing.assert_close(got, program(*args), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_weights_kept_by_one_of_two_masks_are_no_zero() -> None:
    """A query that causality and padding hide together gets the result that padding alone would give."""

    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        pad = ~keep[:, None, None, :]
        s = (q @ k.mT).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -1e9).masked_fill(pad, -1e9)
        return s.softmax(-1).masked_fill(pad, 0.0) @ v

    args = (*random_qkv(), torch.arange(6) >= torch.tensor([[2], [0]]))
    for kernel in ("auto", "sdpa", "flex", "reference"):
        got, _ = compiled(program, *args, kernel=kernel)
        torch.testing.assert_close(got, program(*args), rtol=1e-5, atol=1e-5)


def test_a_fill_that_does_not_absorb_scores_is_no_mean_by_adding_it() -> None:
    """Replaced by -1e9, a row is uniform whatever its scores; with -1e9 added, large ones are left."""

    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT * 40).masked_fill(~keep[:, None, None, :], -1e9).softmax(-1) @ v

    args = (*random_qkv(), torch.arange(6) < torch.tensor([[0], [4]]))
    for kernel in ("sdpa", "flex"):
        got, seen = compiled(program, *args, kernel=kernel)
        assert seen.sites[0].fused
        torch.testing.assert_close(got, program(*args), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ no keys


def test_without_keys_the_reference_gives_zeros_and_others_refuse() -> None:
    q, _, _ = random_qkv()
    k, v = torch.randn(2, 2, 0, 8), torch.randn(2, 2, 0, 8)
    for kernel in ("auto", "sdpa", "flex"):
        got, seen = compiled(plain, q, k, v, kernel=kernel)
        assert not any(site.fused for site in seen.sites) and not got.any()
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    got, seen = compiled(plain, *given, kernel="reference")
    assert [site.kernel for site in seen.sites] == ["reference"] and not got.any() and got.shape == q.shape
    got.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in given)


def test_dynamic_sizes_that_pytorch_knows_to_be_two_or_more_have_keys() -> None:
    got, seen = compiled(plain, *random_qkv(Q=7, K=9), kernel="sdpa", dynamic=True)
    assert [site.kernel for site in seen.sites] == ["sdpa"] and got.isfinite().all()
