"""New nodes in a graph: how operands and results are laid out, what gradients are owed, and what dies."""
