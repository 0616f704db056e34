"""The user's program, in which the pass is a guest: its options, its modes and hooks, and faults."""
