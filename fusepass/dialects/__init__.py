"""Front ends: what the nodes of a captured graph mean, as :mod:`fusepass.expressions.ir` expressions."""
