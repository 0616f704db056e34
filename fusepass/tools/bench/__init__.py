"""`bench`: measures kernels against each other and against eager, and makes profiles from the results."""
