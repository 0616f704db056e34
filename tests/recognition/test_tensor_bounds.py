"""Comparisons of positions with a tensor: the tensor determines the mask, so it is not a band.

Every static key/value cache does this: `arange(M) <= position`, with the position in a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.capture import agrees, compiled, qkv

M = 8
INF = float("-inf")
Bound = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Hidden where true: queries ``i`` [Q, 1], keys ``j`` [1, M], and a tensor that the graph does not know.
HIDDEN: dict[str, Bound] = {
    "key after a position": lambda i, j, t: j > t,
    "key not before a position": lambda i, j, t: j >= t,
    "position before a key": lambda i, j, t: t < j,
    "negated": lambda i, j, t: ~(j <= t),
    "difference": lambda i, j, t: (j - t) > 0,
    "moved to the other side": lambda i, j, t: (t - j) < 0,
    "diagonal": lambda i, j, t: j != t,
    "diagonal by queries": lambda i, j, t: (j - i) != t,
    "causal with an offset": lambda i, j, t: j - i > t,
    "window": lambda i, j, t: (i - j > t) | (j > i),
    "window on both sides": lambda i, j, t: (i - j).abs() > t,
    "window with a negative bound": lambda i, j, t: (j - i < -t) | (j > i),
    "same block": lambda i, j, t: (j // 2) > t,
    "causal and before a position": lambda i, j, t: (j > i) | (j > t),
    "after a query's own position": lambda i, j, t: j > i + t,
}
#: Those that also compare positions with each other.
WITH_CAUSAL = ("window", "window with a negative bound", "causal and before a position")
FILLS = (INF, torch.finfo(torch.float32).min, -1e4)


def by_tensor(spec: str) -> bool:
    """Is a tensor among the things that hide?"""
    return "mask[" in spec or "key padding" in spec


def attention(name: str, fill: float) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    hidden = HIDDEN[name]

    def program(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        s = q @ k.transpose(-2, -1) * 0.35
        return s.masked_fill(hidden(i, j, t), fill).softmax(-1) @ v

    return program


@pytest.mark.parametrize("kernel", ["auto", "flex", "reference"])
@pytest.mark.parametrize("queries", [1, M])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_bound_in_a_tensor(name: str, queries: int, kernel: str) -> None:
    """The graph is the same whatever the tensor holds, and the results follow the tensor."""
    args = qkv(Q=queries, K=M)
    fill = FILLS[(list(HIDDEN).index(name) + queries) % len(FILLS)]
    (site,) = agrees(attention(name, fill), *args, torch.tensor(3), kernel=kernel).sites
    assert site.fused, site.reason
    assert by_tensor(site.spec), f"the tensor is not in {site.spec}"
    assert "window" not in site.spec and "band" not in site.spec, site.spec
    assert "causal" not in site.spec or name in WITH_CAUSAL, site.spec


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_one_graph_serves_every_position(kernel: str) -> None:
    program, (q, k, v) = attention("key after a position", INF), qkv(Q=1, K=M)
    torch._dynamo.reset()
    fn = torch.compile(program, backend="fusepass", options={"inner": "eager", "kernel": kernel})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for position in range(M):
            at = torch.tensor([position])
            torch.testing.assert_close(fn(q, k, v, at), program(q, k, v, at))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kernel", ["auto", "flex", "reference"])
def test_a_length_for_each_sequence(queries: int, kernel: str) -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2]) <= last[:, None, None, None]
        return (q @ k.transpose(-2, -1)).masked_fill(~seen, INF).softmax(-1) @ v

    (site,) = agrees(padded, *qkv(Q=queries, K=M), torch.tensor([2, 6]), kernel=kernel).sites
    assert site.fused and site.spec.endswith("key padding)"), site


def test_a_bound_that_is_a_number_is_a_band() -> None:
    """If no tensor is compared, the band still gets its name."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(M)[:, None], torch.arange(M)[None, :]
        return (q @ k.transpose(-2, -1)).masked_fill((j > i) | (i - j > 3), INF).softmax(-1) @ v

    (site,) = agrees(program, *qkv(Q=M)).sites
    assert "window(3)" in site.spec, site.spec


# ------------------------------------------------------------------------------- static caches

Write = Callable[[Tensor, Tensor, Tensor], None]


def index_copy(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.index_copy_(2, at, new)


def scatter(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.scatter_(2, at[None, None, :, None].expand_as(new), new)


def assign(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache[:, :, at] = new


def assign_first(cache: Tensor, new: Tensor, at: Tensor) -> None:
    """A slice known to the graph; the mask still goes by the tensor."""
    cache[:, :, : new.shape[2]] = new


WRITES: dict[str, Write] = {f.__name__: f for f in (index_copy, scatter, assign, assign_first)}


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("write", WRITES)
def test_a_static_cache(write: str, queries: int, kernel: str) -> None:
    """The cache is written, read, and left as in eager mode."""

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        WRITES[write](keys, k, at)
        WRITES[write](values, v, at)
        seen = torch.arange(keys.shape[2]) <= at[:, None]
        s = torch.where(seen, q @ keys.transpose(-2, -1) * 0.35, torch.finfo(q.dtype).min)
        return s.softmax(-1) @ values

    (keys, values, _), at = qkv(Q=M), torch.arange(4, 4 + queries)
    (site,) = agrees(step, *qkv(Q=queries), keys, values, at, kernel=kernel).sites
    assert site.fused, site.reason
    assert "causal" not in site.spec and by_tensor(site.spec), site.spec


def test_the_cache_of_one_step_is_read_by_the_next() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        hidden = torch.arange(M) > at[:, None]
        return (q @ keys.transpose(-2, -1)).masked_fill(hidden, INF).softmax(-1) @ values

    mine, theirs = ([torch.zeros(2, 2, M, 8) for _ in range(2)] for _ in range(2))
    first, seen = None, 0
    for position, queries in ((0, 4), (4, 1), (5, 1), (6, 1)):
        args, at = qkv(Q=queries), torch.arange(position, position + queries)
        got, report = compiled(step, *args, *mine, at, kernel="auto")
        seen += len(report.fused)
        torch.testing.assert_close(got, step(*args, theirs[0], theirs[1], at))
        first = got if first is None else first
    assert seen == 4
    torch.testing.assert_close(mine, theirs)
