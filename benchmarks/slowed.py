"""`python -m aollm.bench` with a planted slowdown: each computation of the runtime takes a share longer, busily.

python benchmarks/slowed.py 0.15 --probe-runtime --probe-mode warm

It is what `regressions.py` has found, or not found. The benchmark's own yardstick is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any
from unittest.mock import patch

from aollm.bench.__main__ import main
from aollm.compute import Compute


class SlowCompute(Compute):
    """Computes, and then goes on for `share` of the time that it took."""

    share = 0.0

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        def slowed() -> Any:
            start = perf_counter()
            result = function(*args)
            until = perf_counter() + (perf_counter() - start) * self.share
            while perf_counter() < until:
                pass
            return result

        return await super().run(slowed)


if __name__ == "__main__":
    SlowCompute.share = float(sys.argv[1])
    with patch("aollm.runtime.Compute", SlowCompute):
        sys.exit(main(sys.argv[2:]))
