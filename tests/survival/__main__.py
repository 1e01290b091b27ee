"""Runs programmes and prints their counts as one JSON object: `python -m survival [--soak] [--seed N] PROGRAMME...`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import nursery
from .programmes import PROGRAMMES, run


def main() -> int:
    """Run what the command line names; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m survival")
    parser.add_argument("programme", nargs="*", choices=[*PROGRAMMES, []])
    parser.add_argument("--soak", action="store_true", help="all of it, for an hour or two")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--asked", action="store_true", help="run the programmes that standard input names, a line each, and answer with a line"
    )
    arguments = parser.parse_args()

    def counts(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run(name, Path(folder), arguments.seed, arguments.soak)

    nursery.warm()
    if arguments.asked:
        for line in sys.stdin:
            print(json.dumps({line.strip(): counts(line.strip())}), flush=True)
        return 0
    found = {name: counts(name) for name in arguments.programme or PROGRAMMES}
    json.dump(found, sys.stdout, indent=1)
    print()
    return int(any(result["failures"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
