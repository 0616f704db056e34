"""The errors of a fused and of an eager result, compared with the exact one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One output or gradient. Its errors are relative to the largest value of the exact result."""

    name: str
    eager_error: float
    fused_error: float
    difference: float
    """The largest difference between fused and eager, relative to the largest value of the eager result."""
    allowed: float
    """The largest fused error that passes."""

    @property
    def ok(self) -> bool:
        return self.fused_error <= self.allowed

    @property
    def ratio(self) -> float:
        """How many times larger the fused error is than the eager one."""
        if self.eager_error:
            return self.fused_error / self.eager_error
        return float("inf") if self.fused_error else 1.0
