"""How near do mixtures and other families come to what the drive allows, and what do their parts cost? One process per question.

    python benchmarks/families.py [--gpt-oss DIR] [--qwen3-next DIR] [--gemma3 DIR] [--llama DIR] [--only NAME,NAME]
                                  [--rounds R] [--tokens T] [--folder DIR] [--output FILE]

Folders are those of `make_checkpoint.py`: gpt-oss-20b, four layers of qwen3-next-80b, gemma-3-4b; without `--llama` a model of
Llama-3.2-1B's shape is made for a question and removed. Random weights route uniformly: a trained router repeats itself, and
hits more. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio
from families_questions import QUESTIONS, Row, Work

from aollm import AollmError
from aollm.bench.machine import machine_card

LIMIT_S = 1500
MODELS = ("gpt_oss", "qwen3_next", "gemma3", "llama")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what families reach, and what experts, adapters, towers and exports cost")
    for name in MODELS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="DIR", help="folder of a checkpoint of this shape")
    parser.add_argument("--only", help=f"some of: {','.join(QUESTIONS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of what is compared, or of a stream (default: 3)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are measured in a turn, after a warm-up (default: 16)")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where models and adapters are made (default: .bench)")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    parser.add_argument("--question", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set((arguments.only or "").split(",")) - set(QUESTIONS) - {""}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(QUESTIONS)}")
    if arguments.rounds < 1 or not 2 <= arguments.tokens <= 64:
        parser.error("--rounds is at least 1, --tokens 2 to 64")
    return arguments


def ask(name: str, arguments: argparse.Namespace) -> Row:
    """The answer to one question, from a process of its own."""
    needs = QUESTIONS[name].model
    if needs is not None and needs != "llama" and getattr(arguments, needs) is None:
        return {"status": "unavailable", "reason": f"needs --{needs.replace('_', '-')}"}
    command = [sys.executable, __file__, "--question", name, "--folder", str(arguments.folder)]
    command += ["--rounds", str(arguments.rounds), "--tokens", str(arguments.tokens)]
    for model in MODELS:
        folder = getattr(arguments, model)
        command += [f"--{model.replace('_', '-')}", str(folder)] if folder is not None else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        return {"status": "failed", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return {"status": {True: "reached", False: "missed", None: "measured"}[found["reached"]], **found}


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'question':<12}{'status':<13}{'bar':<48}measured"]
    for name, row in rows.items():
        lines.append(f"{name:<12}{row['status']:<13}{row.get('bar', '-'):<48}{row.get('told', row.get('reason', ''))}")
        lines += [f"{'':<12}{line}" for line in row.get("more", ())]
    return "\n".join(lines)


def main() -> int:
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.question:
        question = QUESTIONS[arguments.question]
        model = getattr(arguments, question.model) if question.model is not None else None
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            try:
                row = anyio.run(question.ask, Work(Path(folder), model, arguments.rounds, arguments.tokens))
            except AollmError as error:
                print(f"families: {error}", file=sys.stderr)
                return 1
        print(json.dumps(row))
        return 0
    rows = {}
    for name in QUESTIONS if arguments.only is None else arguments.only.split(","):
        rows[name] = ask(name, arguments)
        print(f"{name}: {rows[name]['status']}", file=sys.stderr, flush=True)
    print(table(rows))
    about = {"bench": "families", "rounds": arguments.rounds, "tokens": arguments.tokens, "routing": "uniform: random weights"}
    line = json.dumps({**about, "questions": rows, "machine": machine_card()})
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0 if all(row["status"] in ("reached", "measured", "unavailable") for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
