"""What does it cost to keep keys and values on disk? One process per question, on the bundled model unless it says otherwise.

    python benchmarks/kv.py [--model DIR] [--only NAME,NAME] [--rounds R] [--folder DIR] [--output FILE]

`--model`: a Llama-3.2-3B-shaped checkpoint, for decoding with half of 8k tokens of KV on disk. What is compared is measured
in turns within one process. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
from kv_questions import QUESTIONS

from aollm import AollmError
from aollm.bench.machine import machine_card

Row = dict[str, Any]
LIMIT_S = 1500


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what it costs to keep keys and values on disk")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint of Llama-3.2-3B's shape, for `decode`")
    parser.add_argument("--only", help=f"some of: {','.join(QUESTIONS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where KV is written (default: .bench)")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    parser.add_argument("--question", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set((arguments.only or "").split(",")) - set(QUESTIONS) - {""}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(QUESTIONS)}")
    return arguments


def ask(name: str, arguments: argparse.Namespace) -> Row:
    """The answer to one question, from a process of its own."""
    if name == "decode" and arguments.model is None:
        return {"status": "unavailable", "reason": "needs --model"}
    command = [sys.executable, __file__, "--question", name, "--rounds", str(arguments.rounds), "--folder", str(arguments.folder)]
    command += ["--model", str(arguments.model)] if arguments.model else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        return {"status": "failed", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return {"status": "reached" if found["reached"] else "missed", **found}


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'question':<10}{'bar':<44}{'measured':<64}status"]
    for name, row in rows.items():
        lines.append(f"{name:<10}{row.get('bar', '-'):<44}{row.get('told', row.get('reason', '')):<64}{row['status']}")
    return "\n".join(lines)


def main() -> int:
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.question:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            try:
                row = anyio.run(QUESTIONS[arguments.question], Path(folder), arguments.rounds, arguments.model)
            except AollmError as error:
                print(f"kv: {error}", file=sys.stderr)
                return 1
        print(json.dumps(row))
        return 0
    rows = {}
    for name in QUESTIONS if arguments.only is None else arguments.only.split(","):
        rows[name] = ask(name, arguments)
        print(f"{name}: {rows[name]['status']}", file=sys.stderr, flush=True)
    print(table(rows))
    line = json.dumps({"bench": "kv", "rounds": arguments.rounds, "questions": rows, "machine": machine_card()})
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0 if all(row["status"] in ("reached", "unavailable") for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
