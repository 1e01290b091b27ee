"""Does a run keep to its memory, and what does less of it cost? One process per budget, in a memory group of exactly that size.

    python benchmarks/budgets.py MODEL --budgets 1.5GiB,2GiB,3GiB,5GiB,8GiB [--tokens T] [--rounds R] [--output FILE]

Each process is `python -m aollm.bench overlap`, which probes the drive itself. Prints a table, and as its last line one JSON
object. Exit code 1 when resident memory went over a budget, or a process was killed or failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from cap import MemoryCap

from aollm.bench.machine import machine_card
from aollm.values import nbytes

SAMPLE_S = 0.02
GIB = 2**30

Record = dict[str, Any]


def budgets(text: str) -> list[tuple[str, int]]:
    try:
        return [(part, nbytes(part)) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed and resident memory of one model at several memory budgets")
    parser.add_argument("model", type=Path, help="folder of a safetensors checkpoint")
    parser.add_argument("--budgets", type=budgets, default=budgets("1.5GiB,2GiB,3GiB,5GiB,8GiB"), metavar="SIZE,SIZE,…")
    parser.add_argument("--tokens", type=int, default=6, help="new tokens of each request, at least 2 (default: 6)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    return parser.parse_args()


def sampled(process: subprocess.Popen[str]) -> tuple[str, str, int]:
    """Wait for `process`; its output, its errors, and the most resident memory that was seen meanwhile."""
    most, watched = 0, psutil.Process(process.pid)
    while True:
        try:
            output, errors = process.communicate(timeout=SAMPLE_S)
            return output, errors, most
        except subprocess.TimeoutExpired:
            try:
                most = max(most, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                continue


def measure(arguments: argparse.Namespace, budget: str, limit: int) -> Record:
    command = [sys.executable, "-m", "aollm.bench", "overlap", str(arguments.model), "--memory", budget]
    for name in ("tokens", "rounds", "requests", "prompt_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    pipe = subprocess.PIPE
    with MemoryCap(limit) as cap:
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=cap.enter)
        output, errors, rss = sampled(process)
    record: Record = {"budget": budget, "budget_nbytes": limit, "cap": cap.kind, "killed": cap.killed, "group_peak_nbytes": cap.peak_nbytes}
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        reason = "killed above the budget" if cap.killed else f"exit code {process.returncode}: {last}"
        return record | {"status": "failed", "reason": reason, "sampled_rss_nbytes": rss}
    found = json.loads(output.splitlines()[-1])
    peak = max(rss, found["peak_rss_nbytes"] or 0)
    names = ("seconds_per_pass", "bytes_per_pass", "drive_bytes_per_second", "fraction_of_bound", "stall_share", "limiter")
    return record | {
        "status": "ok" if peak <= limit and not cap.killed else "over",
        **{name: found[name] for name in names},
        "streamed_nbytes_per_pass": found["plan"]["streamed_nbytes_per_pass"],
        "sampled_rss_nbytes": rss,
        "peak_rss_nbytes": peak,
    }


def table(records: list[Record]) -> str:
    lines = [
        f"{'budget':>8}{'s/pass':>9}{'GB/pass':>9}{'drive GB/s':>12}{'of bound':>10}{'stalled':>9}{'RSS GiB':>9}{'group GiB':>11}  status"
    ]
    for record in records:
        if record["status"] == "failed":
            lines.append(f"{record['budget']:>8}  failed: {record['reason']}")
            continue
        group = "-" if record["group_peak_nbytes"] is None else f"{record['group_peak_nbytes'] / GIB:.2f}"
        lines.append(
            f"{record['budget']:>8}{record['seconds_per_pass']:9.3f}{record['bytes_per_pass'] / 1e9:9.3f}"
            f"{record['drive_bytes_per_second'] / 1e9:12.2f}{record['fraction_of_bound']:10.1%}{record['stall_share']:9.0%}"
            f"{record['peak_rss_nbytes'] / GIB:9.2f}{group:>11}  {record['status']}"
        )
    return "\n".join([*lines, "RSS: the most resident memory of the process; group: that of its memory group, page cache included"])


def main() -> int:
    arguments = parse()
    records = []
    for budget, limit in arguments.budgets:
        records.append(measure(arguments, budget, limit))
        print(f"{budget}: {records[-1]['status']}", file=sys.stderr, flush=True)
    print(table(records))
    work = {name: getattr(arguments, name) for name in ("tokens", "rounds", "requests", "prompt_tokens")}
    line = json.dumps({"bench": "budgets", "model": arguments.model.resolve().name, **work, "budgets": records, "machine": machine_card()})
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0 if all(record["status"] == "ok" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
