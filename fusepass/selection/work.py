"""A site as the cost model sees it: its kind of attention and the amount of work."""

from __future__ import annotations

from dataclasses import dataclass

from fusepass.expressions.index import Size
from fusepass.kernels import flex_blocks
from fusepass.rules.site import Site
from fusepass.selection import costs
from fusepass.specification.attention import Attention, Band, Bias, Function, Keep, KeyPadding, SoftCap

LEARNED, FIXED = "learned bias", "bias"
UNFUSED = "unfused"


@dataclass(frozen=True)
class Work:
    """A site in the terms of the cost model."""

    kind: str
    head_dim: int
    mode: str
    size: float
    """Number of elements in queries and results."""
    keys: float
    """How many keys a query sees, on average."""
    all_keys: float
    """How many keys there are, hidden ones included."""
    tokens: float
    """Number of queries of one head, over the whole batch."""
    width: float
    """Number of elements in one query, over all heads."""


def kind_of(
    spec: Attention, thin: frozenset[int] = frozenset(), learned: frozenset[int] = frozenset()
) -> str:
    """The kind of attention, as profiles name it: the properties that change a kernel's speed.

    Args:
        thin: the slots of biases that have a formula (:func:`flex_blocks.thin_biases`).
        learned: the slots of biases whose gradients are wanted.
    """
    words = [_visibility(spec)]
    words += ["softcap" for m in spec.scores if isinstance(m, SoftCap)]
    words += ["function" for m in spec.scores if isinstance(m, Function)]
    for mod in spec.scores:
        if isinstance(mod, Bias):
            dense = {"i", "j"} <= set(mod.axes) and mod.slot not in thin
            whole = LEARNED if mod.slot in learned else FIXED
            words.append(whole if dense else "thin bias")
    if spec.sink is not None:
        words.append("sink")
    if spec.dropout:
        words.append("dropout")
    if any(isinstance(w, Keep) and not w.implied for w in spec.weights):
        words.append("kept")
    return "+".join(dict.fromkeys(words))


def _visibility(spec: Attention) -> str:
    """The part of the kind's name that describes visibility."""
    if not spec.masks:
        return "one query" if spec.queries == 1 else "full"
    if not all(map(spec.hides, spec.masks)):
        return "mask"
    atoms = spec.atoms
    bands = [a for a in atoms if isinstance(a, Band)]
    if len(bands) < len(atoms):
        return "padding" if all(isinstance(a, (Band, KeyPadding)) for a in atoms) else "mask"
    return "window" if any(b.left is not None for b in bands) else "causal"


def sizes_of(site: Site) -> dict[str, float]:
    """The sizes of a site; symbolic ones as in the traced example, which is enough to choose a kernel."""
    spec = site.spec
    named = {
        "b": spec.batch, "h": spec.heads, "g": spec.kv_heads, "i": spec.queries, "j": spec.keys,
        "d": spec.head_dim, "e": spec.value_dim,
    }  # fmt: skip
    return {name: float(hint(size, site)) for name, size in named.items()}


def hint(size: Size, site: Site) -> int:
    """The value of a size in the example that was traced; 1024 if it has none."""
    known = site.space.facts.example(size)
    return 1024 if known is None else known


def work_of(site: Site, training: bool, learned: frozenset[int] = frozenset()) -> Work:
    """A site as the cost model sees it."""
    spec, sizes = site.spec, sizes_of(site)
    mode = costs.TRAINING if training else costs.FORWARD
    size = sizes["b"] * sizes["h"] * sizes["i"] * (sizes["d"] + sizes["e"])
    keys = pairs_of(spec, sizes["i"], sizes["j"]) / max(sizes["i"], 1.0)
    kind = kind_of(spec, flex_blocks.thin_biases(site), learned)
    tokens, width = sizes["b"] * sizes["i"], sizes["h"] * sizes["d"]
    return Work(kind, int(sizes["d"]), mode, size, keys, sizes["j"], tokens, width)


def pairs_of(spec: Attention, queries: float, keys: float) -> float:
    """The number of query–key pairs that the bands of a site leave visible; other masks hide nothing here."""
    left: float | None = None
    right: float | None = None
    for atom in spec.atoms:
        if isinstance(atom, Band):
            if isinstance(atom.left, int):
                left = atom.left if left is None else min(left, atom.left)
            if isinstance(atom.right, int):
                right = atom.right if right is None else min(right, atom.right)
    total = queries * keys
    if right is not None:
        total -= _beyond(queries, keys, right)
    if left is not None:
        total -= _beyond(keys, queries, left)
    return max(total, 1.0)


def _beyond(rows: float, columns: float, bound: float) -> float:
    """Pairs with ``column - row > bound``."""
    first = max(0.0, columns - 1 - bound)  # in row 0; one fewer in each row after it
    last = max(0.0, first - rows)
    return (first * (first + 1) - last * (last + 1)) / 2


__all__ = ["FIXED", "LEARNED", "UNFUSED", "Work", "kind_of", "pairs_of", "sizes_of", "work_of"]
