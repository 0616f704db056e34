"""From a matrix product to the attention that it ends, or to the reason why it is none."""
