"""New nodes in a graph: the layout of operands and results, the gradients they owe, and what becomes dead."""
