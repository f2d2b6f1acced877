"""One module for each peer; each is a process of its own: `python -m tests.bench.peers.NAME`."""
