"""Which axis is which: batch, key/value head, group, query, key, head sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fusepass.expressions.index import Affine, Size
from fusepass.rules.engine import Refuse, Scope, Term
from fusepass.rules.site import Roles


def ordered(scope: Scope, indices: tuple[Affine, ...] | list[Affine]) -> list[str]:
    """The axes of some indices, outermost first."""
    out: list[str] = []
    for index in indices:
        terms = scope.space.resolve(index).terms
        for axis, _ in sorted(terms, key=lambda t: _weight(t[1]), reverse=True):
            if axis not in out:
                out.append(axis)
    return out


def _weight(coefficient: Size) -> float:
    if isinstance(coefficient, int):
        return float(coefficient)
    return float(coefficient.subs(dict.fromkeys(coefficient.free_symbols, 1009)))


def assign(
    scope: Scope,
    scores: Term,
    dim: int,
    query: Term,
    keys: Term,
    values: Term,
    contracted: tuple[Affine, ...],
    value_axes: list[str],
) -> Roles:
    """Give every axis its role from what depends on it.

    Raises:
        Refuse: the operands do not fit attention, with the reason.
    """
    operand_axes = [scope.axes(t) for t in (query, keys, values)]
    # Looking into the operands may split axes, so every list is made after that.
    in_q, in_k, in_v = (scope.finest(axes) for axes in operand_axes)
    value_axes = ordered(scope, [Affine(((a, 1),)) for a in value_axes])
    roles = Roles(value_dim=value_axes)
    roles.head_dim = ordered(scope, contracted)
    roles.key = ordered(scope, [scope.keys])
    if not set(roles.head_dim) <= in_q & in_k:
        raise Refuse("queries and keys are not contracted with each other over a head dimension")
    if not set(roles.key) <= in_v:
        raise Refuse("the values do not vary over the keys: the same value for every position")
    outer = [
        a for a in ordered(scope, [i for d, i in enumerate(scores.index) if d != dim]) if a not in roles.key
    ]
    outer += [
        a
        for a in sorted((in_q | in_k | in_v) - set(outer))
        if a not in (*roles.key, *roles.head_dim, *value_axes)
    ]
    free = [a for a in outer if a not in in_k and a not in in_v]
    shared = [a for a in outer if a not in free]
    roles.query = _query_axes(scope, scores, dim, free)
    if not roles.query and {a for a in shared if a in in_k} != {a for a in shared if a in in_v}:
        raise Refuse(
            "no axis is left for the queries: "
            "keys or values differ for every one of them (mixed heads, routing)"
        )
    roles.group = [a for a in free if a not in roles.query]
    # Of several shared axes, over which keys or values vary, the innermost one is the head.
    alone = bool(shared) and len(scores.index) >= 4
    several = len(shared) > 1 or (alone and (not roles.group or _behind_batch(scope, scores, shared[0])))
    roles.kv_heads = shared[-1:] if several else []
    roles.batch = [a for a in shared if a not in roles.kv_heads]
    return roles


def alternatives(scope: Scope, roles: Roles, scores: Term) -> Iterator[Roles]:
    """The roles that the same operands allow, the given ones first: masks decide which are right.

    Axes that neither keys nor values vary over may be queries or groups of heads, and any one of the others
    may be the head: only their places in the scores make some likelier than others.
    """
    roles = replace(roles, **{name: _finest(scope, getattr(roles, name)) for name in _NAMES})
    free = ordered(scope, scores.index)
    free = [a for a in free if a in (*roles.query, *roles.group)]
    queries = [roles.query]
    if roles.query and len(free) > 1:
        places = [[a for a in ordered(scope, [i]) if a in free] for i in scores.index]
        queries += [q for q in (*places, *([a] for a in free)) if q]
    heads = [roles.kv_heads]
    shared = [a for a in ordered(scope, scores.index) if a in (*roles.batch, *roles.kv_heads)]
    heads += [[a] for a in shared] if roles.kv_heads else []
    for query in _different(queries):
        for head in _different(heads):
            yield replace(
                roles,
                query=query,
                group=[a for a in free if a not in query],
                kv_heads=head,
                batch=[a for a in (*roles.batch, *roles.kv_heads) if a not in head],
            )


_NAMES = ("batch", "kv_heads", "group", "query", "key", "head_dim", "value_dim")


def _finest(scope: Scope, axes: list[str]) -> list[str]:
    return ordered(scope, [Affine(((a, 1),)) for a in axes])


def _different(choices: list[list[str]]) -> list[list[str]]:
    return [c for n, c in enumerate(choices) if all(set(c) != set(d) for d in choices[:n])]


def _behind_batch(scope: Scope, scores: Term, axis: str) -> bool:
    """Is an axis outside the first dimension of the scores?  Then the batch is a single sequence."""
    return axis not in scope.space.resolve(scores.index[0]).axes


def _query_axes(scope: Scope, scores: Term, dim: int, free: list[str]) -> list[str]:
    """The axes of the query position: where possible, those next to the softmax's dimension."""
    others = [d for d in range(len(scores.index)) if d != dim]
    if not others:
        return []
    # Scores are laid out [..., i, j] or [..., j, i].
    last = len(scores.index) - 1
    beside = scope.space.resolve(scores.index[last if dim == last - 1 else dim - 1 if dim else others[-1]])
    if beside.is_const:
        return []
    here = [a for a in ordered(scope, [beside]) if a in free]
    if here:
        return here
    return free[-1:]
