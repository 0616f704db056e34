"""Features concatenated, or a product stored as a bias: what is expected to be faster comes first."""

from __future__ import annotations

import pytest
import torch

from fusepass.expressions.index import Facts
from fusepass.expressions.ir import Expr, expr, leaf, pointwise
from fusepass.recognition.recognize import recognise
from fusepass.rules.site import Site
from fusepass.selection.forms import forms

HALF = torch.bfloat16


def site(queries: int, keys: int, heads: int = 8, dims: tuple[int, int] = (64, 64)) -> Site:
    """Attention with scores that are the sum of two products."""
    products = []
    for n, d in enumerate(dims):
        q, k = leaf(f"q{n}", (1, heads, queries, d), HALF), leaf(f"k{n}", (1, heads, keys, d), HALF)
        shape = (1, heads, queries, keys)
        products.append(expr("dot", (q, k), ("bhqd", "bhkd", "bhqk"), shape, HALF))
    scores = pointwise("add", *products)
    weights = expr("softmax", (scores,), (3,), scores.shape, HALF)
    reading = recognise(_times_values(weights), Facts())
    assert isinstance(reading, Site)
    return reading


def _times_values(weights: Expr) -> Expr:
    b, h, q, k = weights.shape
    v = leaf("v", (b, h, k, 64), HALF)
    return expr("dot", (weights, v), ("bhqk", "bhkd", "bhqd"), (b, h, q, 64), HALF)


@pytest.mark.parametrize(
    ("queries", "keys", "first"),
    [(1, 65536, 64), (16, 16, 128), (512, 512, 128), (2048, 2048, 128), (4, 8192, 64)],
)
def test_copies_are_weighed_against_the_stored_product(queries: int, keys: int, first: int) -> None:
    ways = forms([(1, site(queries, keys))])
    assert [parts[0][1].spec.head_dim for parts in ways] == [first, 192 - first]


def test_what_is_copied_and_what_is_spared() -> None:
    one = site(512, 256)
    assert (one.copied, one.spared) == (8 * (512 + 256) * 128, 8 * 512 * 256)
    assert one.apart is not None and one.apart.copied == one.apart.spared == 0
    assert len(one.products) == 2 and one.apart.products == (one.apart.product,)


def test_one_product_has_one_form() -> None:
    apart = site(16, 16).apart
    assert apart is not None
    assert forms([(1, apart), (-1, apart)]) == [[(1, apart), (-1, apart)]]
