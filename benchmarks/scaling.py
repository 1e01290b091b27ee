"""How much more do many requests make together than one alone? One process, rounds of each number taking turns.

    python benchmarks/scaling.py MODEL --memory 3GiB --requests 1,8,16 [--tokens T] [--rounds R] [--output FILE]

Tokens per second are those of all requests together, in passes that only decode. The drive is probed before and after each
turn. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import anyio

from aollm import AollmError, Runtime
from aollm.bench.drive import Drive
from aollm.bench.machine import machine_card
from aollm.bench.measure import random_prompts, run_round, settle
from aollm.bench.overlap import Work, figures
from aollm.bench.process import peak_rss_nbytes

SHOWN = (
    "tokens_per_second",
    "seconds_per_pass",
    "bytes_per_pass",
    "compute_seconds_per_pass",
    "fraction_of_bound",
    "stall_share",
    "first_token_seconds",
)
Row = dict[str, Any]


def numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list such as 1,8,16")
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="tokens per second of many requests together over those of one alone")
    parser.add_argument("model", type=Path, help="folder of a safetensors checkpoint")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--requests", type=numbers, default=[1, 8, 16], metavar="N,N,…", help="the first is what others are held against")
    parser.add_argument("--tokens", type=int, default=6, help="new tokens of each request, at least 2 (default: 6)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each number (default: 3)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.rounds < 1 or arguments.prompt_tokens < 1:
        parser.error("--tokens is at least 2, --rounds and --prompt-tokens at least 1")
    return arguments


async def measure(arguments: argparse.Namespace) -> Row:
    model, memory, most = str(arguments.model), arguments.memory, max(arguments.requests)
    work = Work(model, memory, most, arguments.tokens, arguments.rounds, arguments.prompt_tokens)
    drive = Drive(arguments.model, work.disk_backend)
    await drive.probe()
    turns: dict[int, list[Row]] = {count: [] for count in arguments.requests}
    async with Runtime.open(work.config) as runtime:
        await settle()
        before = await drive.probe()
        for turn in range(work.rounds):
            for count in arguments.requests:
                prompts = random_prompts(runtime, runtime.plan.vocabulary, count, work.prompt_tokens, f"{turn}-{count}")
                found = await run_round(runtime, prompts, work.tokens)
                after = await drive.probe()
                turns[count].append(figures(found, median([before, after])) | {"requests": count, "tokens_made": found.tokens})
                before = after
                told = f"{count} at once: {found.tokens_per_second:.2f} tokens/s, {found.seconds_per_pass:.3f} s a pass"
                print(f"turn {turn + 1} of {work.rounds}, {told}", file=sys.stderr, flush=True)
        plan = {name: getattr(runtime.plan, name) for name in ("memory", "weights_nbytes", "pinned_nbytes", "streamed_nbytes_per_pass")}
    rows = {count: {name: median(turn[name] for turn in found) for name in SHOWN} for count, found in turns.items()}
    first = turns[arguments.requests[0]]
    for count, row in rows.items():
        pairs = zip(turns[count], first, strict=True)  # of one turn, so that what the drive does meanwhile cancels out
        row["times_the_first"] = median(mine["tokens_per_second"] / alone["tokens_per_second"] for mine, alone in pairs)
    return {
        "bench": "scaling", "model": arguments.model.resolve().name, "tokens": work.tokens, "rounds": work.rounds,
        "prompt_tokens": work.prompt_tokens, "plan": plan, "peak_rss_nbytes": peak_rss_nbytes(),
        "requests": rows, "turns": [turn for found in turns.values() for turn in found], "machine": machine_card(),
    }  # fmt: skip


def table(result: Row) -> str:
    lines = [f"{'at once':>8}{'tokens/s':>10}{'× first':>9}{'s/pass':>9}{'GB/pass':>9}{'computes s':>12}{'of bound':>10}{'stalled':>9}"]
    for count, row in result["requests"].items():
        lines.append(
            f"{count:8}{row['tokens_per_second']:10.2f}{row['times_the_first']:9.2f}{row['seconds_per_pass']:9.3f}"
            f"{row['bytes_per_pass'] / 1e9:9.3f}{row['compute_seconds_per_pass']:12.3f}"
            f"{row['fraction_of_bound']:10.1%}{row['stall_share']:9.0%}"
        )
    return "\n".join(lines)


def main() -> int:
    arguments = parse()
    try:
        result = anyio.run(measure, arguments)
    except AollmError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 1
    print(table(result))
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
