"""From a matrix product to the attention that ends in it, or to the reason why it is not attention."""
