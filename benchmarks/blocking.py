"""What do the blocking faces cost? The same runtime is read by `async for` in its own loop, and by another thread through a client.

    python benchmarks/blocking.py [MODEL] [--memory M] [--tokens N] [--rounds R] [--output FILE]

The bundled model is the worst case: its passes are short, so crossing between threads weighs most. Ways take turns, in an order
that turns as well, and are compared round by round: a shared machine's speed changes meanwhile. The processor's time of the whole
process stands beside the clock's, and hangs less on what else runs. The promise is 3 % of the clock's time at most. Prints a table,
and as its last line one JSON object; exit code 1 when the promise was not kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

from aollm import AollmError, Runtime, RuntimeClient
from aollm.bench.machine import machine_card

PROMPT = "Once upon a time"
MOST = 0.03
PAIRS = {"blocking stream": "async stream", "blocking prompt": "async generate"}
"""What is held against what."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what the blocking faces cost beside the async one")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer (default: 200)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    arguments = parser.parse_args()
    if arguments.tokens < 1 or arguments.rounds < 2:
        parser.error("--tokens is at least 1, --rounds at least 2")
    return arguments


def ways(client: RuntimeClient, tokens: int) -> dict[str, Callable[[], int]]:
    """How an answer can be read. Each returns how many tokens it had; sampling is hot, so that no answer ends early."""
    settings: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 50.0, "seed": 1}

    async def read(runtime: Runtime) -> int:
        return len([token async for token in runtime.stream(PROMPT, **settings)])

    async def generate(runtime: Runtime) -> int:
        return len((await runtime.generate(PROMPT, **settings)).token_ids)

    return {
        "async stream": lambda: client.run(read),
        "blocking stream": lambda: len(list(client.stream(PROMPT, **settings))),
        "async generate": lambda: client.run(generate),
        "blocking prompt": lambda: len(client.prompt(PROMPT, **settings).token_ids),
    }


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds per token of the clock and of the processor, by way, round by round."""
    found: dict[str, dict[str, list[float]]] = {"clock": {}, "processor": {}}
    with RuntimeClient(arguments.model, memory=arguments.memory, max_context_tokens=arguments.tokens + 64) as client:
        readings = ways(client, arguments.tokens)
        lengths = Counter(read() for read in readings.values())  # warms up as well
        if len(lengths) > 1:
            raise SystemExit(f"blocking: the ways gave answers of different lengths: {dict(lengths)}")
        for turn in range(arguments.rounds):
            names = list(readings)
            names = names[turn % len(names) :] + names[: turn % len(names)]
            for name in names if turn // len(names) % 2 else names[::-1]:
                start, busy = perf_counter(), process_time()
                count = readings[name]()
                for kind, seconds in (("clock", perf_counter() - start), ("processor", process_time() - busy)):
                    found[kind].setdefault(name, []).append(seconds / count)
            print(f"round {turn + 1} of {arguments.rounds}", end="\r", file=sys.stderr, flush=True)
    return found


def compared(found: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """How much more time `name` takes than `base`, as a share: the median over the rounds and its quartiles."""
    shares = [took / beside - 1 for took, beside in zip(found[name], found[base], strict=True)]
    low, middle, high = quantiles(shares, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def main() -> int:
    arguments = parse()
    try:
        found = measure(arguments)
    except AollmError as error:
        print(f"blocking: {error}", file=sys.stderr)
        return 1
    slower = {kind: {name: compared(seconds, name, base) for name, base in PAIRS.items()} for kind, seconds in found.items()}
    print(f"{'way':>16}{'ms a token':>12}{'slower':>9}{'quartiles':>18}{'processor ms':>14}{'more':>8}{'quartiles':>18}")
    for name in found["clock"]:
        row = f"{name:>16}"
        for (kind, seconds), wide in zip(found.items(), (12, 14), strict=True):
            row += f"{median(seconds[name]) * 1e3:{wide}.3f}"
            if name in PAIRS:
                share = slower[kind][name]
                row += f"{share['median']:{9 if wide == 12 else 8}.1%}{share['lower_quartile']:10.1%}{share['upper_quartile']:8.1%}"
            else:
                row += " " * (27 if wide == 12 else 26)
        print(row.rstrip())
    line = json.dumps({
        "bench": "blocking", "model": Path(arguments.model).name, "memory": arguments.memory, "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "seconds_per_token": {kind: {name: median(each) for name, each in rows.items()} for kind, rows in found.items()},
        "more_than_async": slower, "promise": MOST, "machine": machine_card(),
    })  # fmt: skip
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0 if all(share["median"] <= MOST for share in slower["clock"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
