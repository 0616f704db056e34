"""A call of several steps, and the steps written next to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass
class Expansion:
    """A call and the nodes that compute the same result, or the same tuple of results, step by step."""

    call: fx.Node
    steps: list[fx.Node]
    results: fx.Node | tuple[fx.Node | None, ...]

    def engage(self) -> None:
        """Use the steps' results in place of the call's."""
        for user, result in self._pairs():
            user.replace_all_uses_with(result, propagate_meta=False)

    def revert(self) -> None:
        """Use the call's results again, and remove the steps."""
        for user, result in self._pairs():
            result.replace_all_uses_with(user, propagate_meta=False)
        for node in reversed(self.steps):
            self.call.graph.erase_node(node)

    def accept(self) -> None:
        """Remove the call and the nodes that still read it, whose results nothing needs."""
        _erase_with_users(self.call)

    def used_outside(self) -> bool:
        """Does anything except the steps and the call's readers use a step?"""
        inside, results = set(self.steps), {r for _, r in self._pairs()}
        return any(u not in inside for n in self.steps if n not in results for u in n.users)

    def _pairs(self) -> list[tuple[fx.Node, fx.Node]]:
        """The nodes that hold the call's results, each with the step that computes it."""
        if isinstance(self.results, fx.Node):
            return [(self.call, self.results)]
        read = [(u, self.results[int(u.args[1])]) for u in self.call.users]  # type: ignore[arg-type]
        return [(u, r) for u, r in read if r is not None]


def _erase_with_users(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(user)
    node.graph.erase_node(node)


__all__ = ["Expansion"]
