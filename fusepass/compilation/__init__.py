"""The pass over a graph, and the ways into it: the backend, `enable`, `fuse`, and guards of compiled code."""
