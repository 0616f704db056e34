"""What a graph says, as immutable expressions: numbers, sizes, indices, contents of leaves, and intervals."""
