"""The pass over a graph, the ways into it (the backend, `enable`, `fuse`), and guards of compiled code."""
