"""How soon is a cancelled request gone, and does anything of it stay? Cancelled while its prompt is read, and while it decodes.

    python benchmarks/cancel.py MODEL --memory 3GiB [--prompt-tokens P] [--rounds R] [--output FILE]

Gone is a request that is closed and whose KV is given back; the promise is one layer's time. One second later, reading ahead
has filled its buffers, and through the following second nothing may be read. Prints a table, and as its last line one JSON
object. Exit code 1 when something stayed.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import anyio

from aollm import AollmError, Runtime
from aollm.bench.machine import machine_card
from aollm.bench.measure import random_prompts, settle
from aollm.bench.process import read_nbytes, rss_nbytes
from aollm.stream import TokenStream

POLL_S = 0.0005
QUIET_NBYTES = 1 << 20  # the counters themselves are files that are read
GONE_WITHIN_S = 60.0
DECODED = 2
MIB = 2**20

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="how soon cancelled requests are gone, and what they leave behind")
    parser.add_argument("model", type=Path, help="folder of a safetensors checkpoint")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the request cancelled in its prefill (default: 256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    arguments = parser.parse_args()
    if arguments.prompt_tokens < 1 or arguments.rounds < 1:
        parser.error("--prompt-tokens and --rounds are at least 1")
    return arguments


async def until_half(stream: TokenStream) -> None:
    """Wait until the pass under way has done between a third and two thirds of its pieces."""
    while not 1 / 3 < stream.progress < 2 / 3:  # noqa: ASYNC110  progress is a figure, not an event
        await anyio.sleep(POLL_S)


def layer_seconds(runtime: Runtime, since: float) -> float | None:
    """Median time from the end of one layer to the end of the next, in the passes since `since`; None before two have ended."""
    ends: list[tuple[int, float]] = []
    for event in sorted(runtime.trace.between(since, perf_counter()), key=lambda event: event.end):
        if event.name == "compute" and event.layer >= 0:
            if ends and ends[-1][0] == event.layer:
                ends.pop()
            ends.append((event.layer, event.end))
    steps = [after - before for (low, before), (high, after) in pairwise(ends) if high == low + 1]
    return median(steps) if steps else None


async def cancel_once(runtime: Runtime, phase: str, prompt: list[int]) -> Row:
    await settle()
    before, start = rss_nbytes(), perf_counter()
    stream = runtime.stream(prompt, max_new_tokens=64)
    async with stream:
        if phase == "decode":
            for _ in range(DECODED):
                await anext(stream)
            start = perf_counter()
            while stream.progress >= 1 / 3:  # noqa: ASYNC110  that of the pass which made the last token
                await anyio.sleep(POLL_S)
        await until_half(stream)
        request = stream.request
        cancelled = perf_counter()
    with anyio.move_on_after(GONE_WITHIN_S):
        while request is not None and not (request.closed and runtime.cache_state()["reserved_tokens"] == 0):  # noqa: ASYNC110
            await anyio.sleep(POLL_S)
    gone_s = perf_counter() - cancelled
    await anyio.sleep(1)
    read_before = read_nbytes()
    await anyio.sleep(1)
    read_after = read_nbytes()
    return {
        "phase": phase, "gone_seconds": gone_s, "layer_seconds": layer_seconds(runtime, start),
        "reserved_tokens": runtime.cache_state()["reserved_tokens"],
        "read_nbytes_in_the_second_after": None if read_before is None or read_after is None else read_after - read_before,
        "rss_before_nbytes": before, "rss_after_nbytes": rss_nbytes(),
    }  # fmt: skip


async def measure(arguments: argparse.Namespace) -> list[Row]:
    context = arguments.prompt_tokens + 64
    rows = []
    async with Runtime.open(arguments.model, memory=arguments.memory, max_context_tokens=context, max_concurrent_requests=1) as runtime:
        for turn in range(arguments.rounds):
            for phase, tokens in (("prefill", arguments.prompt_tokens), ("decode", min(8, arguments.prompt_tokens))):
                [prompt] = random_prompts(runtime, runtime.plan.vocabulary, 1, tokens, f"{turn}-{phase}")
                rows.append(await cancel_once(runtime, phase, prompt))
                print(f"turn {turn + 1} of {arguments.rounds}, {phase}: {rows[-1]['gone_seconds']:.3f} s", file=sys.stderr, flush=True)
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'phase':>8}{'gone after s':>14}{'a layer s':>11}{'KV tokens':>11}{'read later MiB':>16}{'RSS before':>12}{'after MiB':>11}"]
    for row in rows:
        layer = "-" if row["layer_seconds"] is None else f"{row['layer_seconds']:.4f}"
        read = "-" if row["read_nbytes_in_the_second_after"] is None else f"{row['read_nbytes_in_the_second_after'] / MIB:.2f}"
        lines.append(
            f"{row['phase']:>8}{row['gone_seconds']:14.4f}{layer:>11}{row['reserved_tokens']:11}{read:>16}"
            f"{row['rss_before_nbytes'] / MIB:12.1f}{row['rss_after_nbytes'] / MIB:11.1f}"
        )
    return "\n".join(lines)


def clean(row: Row) -> bool:
    return row["reserved_tokens"] == 0 and (row["read_nbytes_in_the_second_after"] or 0) < QUIET_NBYTES


def main() -> int:
    arguments = parse()
    try:
        rows = anyio.run(measure, arguments)
    except AollmError as error:
        print(f"cancel: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    known = [row for row in rows if row["layer_seconds"]]
    layers = {
        phase: max((row["gone_seconds"] / row["layer_seconds"] for row in known if row["phase"] == phase), default=None)
        for phase in ("prefill", "decode")
    }
    work = {"model": arguments.model.resolve().name, "memory": arguments.memory, "prompt_tokens": arguments.prompt_tokens}
    line = json.dumps({"bench": "cancel", **work, "most_layers_until_gone": layers, "cancelled": rows, "machine": machine_card()})
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0 if all(clean(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
