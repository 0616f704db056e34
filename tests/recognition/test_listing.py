"""Every softmax between two products is listed once, however much was done around it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.expressions.ir import Expr, const, expr, leaf, pointwise
from fusepass.recognition import resemblance
from fusepass.recognition.resemblance import of_activations, products_behind, softmaxes_behind, were_scores
from tests.capture import agrees

INF = float("inf")
LONG = 120  # steps of a chain, of several nodes each


def chain(x: Tensor, steps: int = LONG) -> Tensor:
    """A long chain of steps, each of which reads its input twice."""
    for n in range(steps):
        x = torch.sigmoid(x) * 0.5 + x * (1 - n / 1000)
    return x


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x * x * x)))


def norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    s = q @ k.mT / 8
    return (s if mask is None else s + mask).softmax(-1) @ v


def on_values(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(q, k, chain(v))


def on_queries(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(chain(q), k, v)


def on_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(q, chain(k), v)


def on_everything(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(chain(q), chain(k), chain(v))


def on_a_mask(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(q, k, v, chain(g[..., :5], 60))


def on_values_gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    v = gelu(norm(v, g[0, 0, 0]))
    v = v * torch.sigmoid(g) + v * 0.1
    return attention(q, k, v)


def on_values_gated_by_a_softmax(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(q, k, chain(v * g.softmax(-1)))


def on_the_result(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return chain(attention(q, k, v)) * torch.sigmoid(g)


def mask_of_two(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    mask = chain(g[..., :5], 40)
    return attention(attention(q, k, v, mask), k, v, mask)


def values_of_two(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    v = chain(v, 40)
    return attention(q, k, v) + attention(g, k, v)


def layers(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    x = q
    for _ in range(6):
        x = x + attention(x, k, gelu(x))
        x = x + gelu(x) * torch.sigmoid(g)
    return x


def one_softmax_two_products(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    w = (q @ k.mT / 8).softmax(-1)
    return w @ chain(v), w @ g


#: Programs, and how many sites they have.
PROGRAMS: dict[Callable[..., Any], int] = {
    on_values: 1, on_queries: 1, on_keys: 1, on_everything: 1, on_a_mask: 1, on_values_gated: 1,
    on_values_gated_by_a_softmax: 1, on_the_result: 1, mask_of_two: 2, values_of_two: 2, layers: 6,
    one_softmax_two_products: 2,
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_every_site_is_listed_once(program: Callable[..., Any], kernel: str) -> None:
    given = [torch.randn(2, 2, 5, 8) for _ in range(4)]
    sites = agrees(program, *given, kernel=kernel).sites
    assert len({s.node for s in sites}) == len(sites) == PROGRAMS[program], sites
    assert all(s.fused for s in sites), sites


def odd_weights(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """No rule peels the cosine."""
    return torch.cos((q @ k.mT / 8).softmax(-1)) @ chain(v)


def odd_scores(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return chain(q @ k.mT).cumsum(-1).softmax(-1) @ chain(v)


def exponential_of_weights(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return torch.exp((q @ k.mT / 8).softmax(-1)) @ chain(v)


def returned(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return chain(q @ g.mT).softmax(-1)


def two_in_a_row(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return returned(q, k, v, g), odd_scores(q, k, v, g)


@pytest.mark.parametrize(
    ("program", "count"),
    [(odd_weights, 1), (odd_scores, 1), (exponential_of_weights, 1), (returned, 1), (two_in_a_row, 2)],
)
def test_what_stays_is_listed_once(program: Callable[..., Any], count: int) -> None:
    sites = agrees(program, *[torch.randn(2, 2, 5, 8) for _ in range(4)]).sites
    assert len({s.node for s in sites}) == len(sites) == count, sites
    assert all(s.reason and not s.fused for s in sites)


def test_what_is_no_attention_is_not_listed() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return chain(q).softmax(-1) * torch.exp(chain(v)) @ k.mT

    assert not agrees(program, *[torch.randn(2, 2, 5, 8) for _ in range(4)]).sites


# ------------------------------------------------------------------------------- expressions

X = leaf("x", (2, 4, 4), torch.float32)


def dot(a: Expr, b: Expr) -> Expr:
    return expr("dot", (a, b), ("abc", "acd", "abd"), (2, 4, 4), torch.float32)


def softmax(x: Expr, op: str = "softmax") -> Expr:
    return expr(op, (x,), (2,), x.shape, x.dtype)


def longer(x: Expr, steps: int) -> Expr:
    for n in range(steps):
        x = pointwise("add", pointwise("mul", x, x), pointwise("mul", const(n + 0.5), x))
    return x


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "exp"])
def test_softmaxes_are_found_behind_chains(op: str) -> None:
    weights = softmax(dot(X, X), op)
    for anchor in (dot(longer(weights, 300), X), dot(X, longer(weights, 300)), dot(weights, longer(X, 300))):
        assert softmaxes_behind(anchor) == {weights}
    assert softmaxes_behind(dot(X, longer(dot(weights, X), 3))) == set(), "not those of another product"
    assert softmaxes_behind(dot(softmax(longer(weights, 3)), X)) == {softmax(longer(weights, 3))}


def test_products_are_found_behind_chains_in_their_order() -> None:
    leaves = [leaf(f"x{n}", (2, 4, 4), torch.float32) for n in range(8)]
    products = [dot(a, X) for a in leaves]
    parts = [dot(softmax(longer(p, 100)), longer(X, 100)) for p in products]
    whole = parts[0]
    for part in parts[1:]:
        whole = expr("cat", (whole, part), (0,), (2, 4, 4), torch.float32)
    added = expr("cat", tuple(parts), (0,), (16, 4, 4), torch.float32)
    assert set(products_behind(added)) == set(products)
    assert products_behind(added) == products_behind(added)


def test_activations_are_found_behind_chains() -> None:
    flat = leaf("w", (4, 4), torch.float32)
    linear = expr("dot", (X, flat), ("abc", "dc", "abd"), (2, 4, 4), torch.float32)
    assert of_activations(longer(dot(X, X), 300))
    assert not of_activations(longer(linear, 300)) and not of_activations(longer(X, 300))
    assert of_activations(pointwise("add", longer(linear, 300), longer(dot(X, X), 300)))


def test_scores_that_were_written_to_are_found_behind_chains() -> None:
    unknown = leaf("s@7", (2, 4, 4), torch.float32)
    weights = softmax(longer(unknown, 300))
    assert were_scores(weights, {unknown: longer(dot(X, X), 300)})
    assert not were_scores(weights, {unknown: X}) and not were_scores(weights, {})


def test_a_graph_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites of a graph together look at every node once, instead of each at everything behind it."""
    looked: list[Expr] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(node: Expr, below: Any) -> Any:
            looked.append(node)
            return function(node, below)

        return look

    for name in ("_joined", "_of_rank_three"):
        monkeypatch.setattr(resemblance, name, counted(getattr(resemblance, name)))
    nodes, values = 0, leaf("long", (2, 4, 4), torch.float32)
    for n in range(300):
        values = longer(values, 10)
        nodes += 30
        scores = pointwise("mul", dot(values, X), const(n + 0.5))
        assert softmaxes_behind(dot(softmax(scores), values)) == {softmax(scores)}
        assert of_activations(scores)
    assert len(looked) < 2 * nodes + 10 * 300


def test_nothing_is_kept_alive() -> None:
    scores = pointwise("mul", dot(leaf("gone", (2, 4, 4), torch.float32), X), const(0.123))
    anchor = dot(longer(softmax(scores), 5), pointwise("exp", X))
    assert len(softmaxes_behind(anchor)) == 2 and of_activations(scores)
    gone = weakref.ref(scores)
    del anchor, scores
    gc.collect()
    assert gone() is None
