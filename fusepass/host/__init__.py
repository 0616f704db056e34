"""The user's program, in which the pass is a guest: options, modes and hooks, and faults of the pass."""
