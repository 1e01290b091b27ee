"""Runs programmes and prints their counts as one JSON object: `python -m survival [--soak] [--seed N] PROGRAMME...`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from . import nursery
from .programmes import PROGRAMMES, run


def main() -> int:
    """Run what the command line names; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m survival")
    parser.add_argument("programme", nargs="*", choices=[*PROGRAMMES, []])
    parser.add_argument("--soak", action="store_true", help="all of it, for an hour or two")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    nursery.warm()
    counts: dict[str, object] = {}
    failed = False
    for name in arguments.programme or PROGRAMMES:
        with tempfile.TemporaryDirectory() as folder:
            counts[name] = result = run(name, Path(folder), arguments.seed, arguments.soak)
            failed = failed or bool(result["failures"])
    json.dump(counts, sys.stdout, indent=1)
    print()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
