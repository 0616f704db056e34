"""`bench`: kernels measured against each other and against eager, and the profiles made of that."""
