"""The user's program, in which the pass is a guest: options, libraries, modes and hooks, and faults."""
