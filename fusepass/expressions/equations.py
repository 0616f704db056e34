"""What guards say about symbolic sizes: the symbols that their equations tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from torch.utils._sympy.functions import Max, Mod

#: PyTorch's classes of integer quotients.
_QUOTIENTS = ("FloorDiv", "CleanDiv")


def is_quotient(size: Any) -> bool:
    """Is it an integer quotient as a whole?"""
    return type(size).__name__ in _QUOTIENTS


def quotients(size: Any) -> list[Any]:
    """The integer quotients in a size."""
    return [e for e in sympy.preorder_traversal(size) if is_quotient(e)]


class Equations:
    """Symbols that guards equate with numbers and, where quotients are equated, with other sizes.

    Args:
        shape_env: PyTorch's symbolic-shape environment, whose guards grow in number.
        with_ratios: writes divisions of a size as ratios, where they are proved to be exact.
    """

    def __init__(self, shape_env: Any, with_ratios: Callable[[Any], Any]) -> None:
        self._env, self._with_ratios = shape_env, with_ratios
        self._known: dict[Any, Any] = {}
        self._same: dict[Any, Any] = {}  # quotients by others that are equal
        self._open: list[Any] = []  # equations that have told nothing so far
        self._read = 0  # how many guards were read

    def applied(self, size: Any) -> Any:
        """A size with its divisions as ratios, and with what the equations tell."""
        self.known()
        return self._replaced(size)

    def known(self) -> dict[Any, Any]:
        """Numbers and sizes, by symbol."""
        new = self._env.guards[self._read :]
        self._read += len(new)
        claims = (g.expr for g in new if isinstance(g.expr, sympy.Eq))
        self._open += [claim for claim in claims if not claim.has(Mod, Max)]
        told = len(new)
        while told:
            told = sum(map(self._solve, tuple(self._open)))
        return self._known

    def _replaced(self, size: Any) -> Any:
        return self._with_ratios(size).xreplace(self._same).xreplace(self._known)

    def _solve(self, claim: Any) -> bool:
        """Does an equation tell a symbol, or that two quotients are one?  If not, it may do so later."""
        sides = [self._replaced(side) for side in claim.args]
        rest = sympy.expand(sympy.fraction(sympy.together(sides[0] - sides[1]))[0])
        symbols = sorted(rest.free_symbols, key=str)
        if rest == 0 or (len(symbols) > 1 and not quotients(claim)):
            self._open.remove(claim)
            return False
        if all(map(is_quotient, sides)):
            self._open.remove(claim)
            self._same[sides[0]] = sides[1]
            return True
        for symbol in symbols:
            value = _solution(rest, symbol)
            if value is not None and symbol not in self._known:
                self._open.remove(claim)
                self._known = {s: v.xreplace({symbol: value}) for s, v in self._known.items()}
                self._known[symbol] = value
                return True
        return False


def _solution(rest: Any, symbol: Any) -> Any:
    """What a symbol is where ``rest`` is zero: a number, or a size with integers as factors; else None.

    It is divided only by numbers, and by quotients that other sizes are divided by: they are not zero.
    """
    if not rest.is_polynomial(symbol) or sympy.degree(rest, symbol) != 1:
        return None
    factor, others = rest.coeff(symbol, 1), sympy.expand(-rest.coeff(symbol, 0))
    if factor.is_Integer:
        value = others / factor
        return value if all(c.is_Integer for c in value.as_coefficients_dict().values()) else None
    sign, divisor = factor.as_coeff_Mul()
    return others / factor if abs(sign) == 1 and is_quotient(divisor) else None


__all__ = ["Equations", "is_quotient", "quotients"]
