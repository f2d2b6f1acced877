"""interv's reference executor: the values with which all others are compared."""

from __future__ import annotations

import functools

from tests.bench.peers import common
from tests.bench.peers.interv_peer import Interv

if __name__ == "__main__":
    common.main(functools.partial(Interv, reference=True), "interv")
