"""A recognised site: the specification, and the tensors and axes that its letters stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusepass.expressions.index import AxisSpace, Size
from fusepass.expressions.ir import Expr
from fusepass.rules.engine import Scope, Term
from fusepass.specification.attention import Attention


@dataclass
class Roles:
    """The finest axes of a site by role, each list outermost first.

    Query heads are ``kv_heads`` then ``group``: head ``h`` reads key/value head ``h // group``.
    """

    batch: list[str] = field(default_factory=list)
    kv_heads: list[str] = field(default_factory=list)
    group: list[str] = field(default_factory=list)
    query: list[str] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    head_dim: list[str] = field(default_factory=list)
    value_dim: list[str] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """The axes of the query heads."""
        return [*self.kv_heads, *self.group]

    def letters(self) -> dict[str, str]:
        """Axis name to letter, for texts."""
        table = dict.fromkeys(self.batch, "b") | dict.fromkeys(self.heads, "h")
        return table | dict.fromkeys(self.query, "i") | dict.fromkeys(self.key, "j")


@dataclass
class Site:
    """A recognised attention site: the specification and what its letters stand for.

    ``query``, ``keys`` and ``values`` list the tensors that may serve, from the operand of the product
    inwards through its views; every element of the operand is an element of each of them.

    If its keys were unfolded, ``windowed`` is its specification over the original keys, and ``original`` the
    site over them, if kernels can compute it.

    Attributes:
        products: the products that ``product`` is the sum of: itself, unless features are concatenated.
        copied: how many elements are copied to concatenate features.
        spared: how many elements the products have that would be stored as biases otherwise.
        apart: the same site with those products as biases.
    """

    spec: Attention
    roles: Roles
    space: AxisSpace
    query: list[Term]
    keys: list[Term]
    values: list[Term]
    operands: list[Term]
    out: Term
    product: Expr
    scope: Scope
    products: tuple[Expr, ...] = ()
    copied: Size = 0
    spared: Size = 0
    apart: Site | None = None
    windowed: Attention | None = None
    original: Site | None = None

    def __post_init__(self) -> None:
        self.products = self.products or (self.product,)

    @property
    def meaning(self) -> Attention:
        """The specification that says what the site means."""
        return self.windowed or self.spec

    @property
    def trace(self) -> list[str]:
        """The rules that applied, in order."""
        return self.scope.trace


__all__ = ["Roles", "Site"]
