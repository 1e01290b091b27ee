"""Does what is foretold come true? Tokens a second, first tokens and peak memory, predicted at opening and then achieved.

    python benchmarks/predictions.py MODEL=MEMORY[,requests=N][,prompt=P][,SETTING=VALUE] ... [--tokens T] [--output FILE]

MODEL is a folder of `make_checkpoint.py`'s, or an alias; MEMORY a size, or `none`. Each case is a process of its own: it opens the
runtime, asks it for its forecast, answers, and compares. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import anyio

from aollm import AollmError, Runtime
from aollm.bench.machine import machine_card
from aollm.bench.measure import random_prompts, run_round
from aollm.bench.process import peak_rss_nbytes

LIMIT_S, ROUNDS_S = 600, 20
WITHIN, PEAK_WITHIN = 0.20, 0.05
OWN = ("requests", "prompt")

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what was predicted and what came")
    parser.add_argument("cases", nargs="+", metavar="MODEL=MEMORY[,...]", type=case_of)
    parser.add_argument("--tokens", type=int, default=9, help="new tokens of each request (default: 9)")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def case_of(text: str) -> Row:
    model, _, rest = text.partition("=")
    memory, *fields = rest.split(",")
    pairs = [field.partition("=")[::2] for field in fields]
    if not memory or not all(name and value for name, value in pairs):
        raise argparse.ArgumentTypeError(f"MODEL=MEMORY, then name=value, separated by commas, not {text!r}")
    given = {name: int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value) for name, value in pairs}
    return {"text": text, "model": model, "memory": None if memory == "none" else memory, "requests": 1, "prompt": 32, **given}


async def ask(case: Row, tokens: int) -> Row:
    """Predict, run, compare. The first round warms up; of those that follow the medians are what is compared."""
    settings = {name: value for name, value in case.items() if name not in (*OWN, "text", "model")}
    requests, prompt = case["requests"], case["prompt"]
    context = prompt + tokens + 1
    async with Runtime.open(case["model"], max_context_tokens=context, max_concurrent_requests=requests, **settings) as runtime:
        forecast, plan = runtime.forecast, runtime.plan
        assert forecast is not None and plan.predicted is not None
        speed = forecast.decode(requests, prompt + tokens // 2)
        predicted = {
            "tokens_per_second": speed.tokens_per_second,
            "first_token_seconds": forecast.first_token(prompt * requests),
            "peak_nbytes": forecast.peak_nbytes(requests, context),
        }
        rounds = []
        until = perf_counter() + ROUNDS_S
        while len(rounds) < 3 or (len(rounds) < 10 and perf_counter() < until):
            prompts = random_prompts(runtime, plan.vocabulary, requests, prompt, f"round {len(rounds)}")
            rounds.append(await run_round(runtime, prompts, tokens))
    achieved = {
        "tokens_per_second": median(done.tokens_per_second or 0.0 for done in rounds[1:]),
        "first_token_seconds": median(max(done.first_token_s) for done in rounds[1:]),
        "peak_nbytes": peak_rss_nbytes(),
    }
    ratio = {name: predicted[name] / value for name, value in achieved.items() if value}
    return {"case": case["text"], "limiter": speed.limiter, "predicted": predicted, "achieved": achieved, "ratio": ratio}


def run(case: Row, tokens: int) -> Row:
    """One case in a process of its own."""
    command = [sys.executable, __file__, case["text"], "--tokens", str(tokens), "--one"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"case": case["text"], "status": "unavailable", "reason": f"took longer than {LIMIT_S} s"}
    if done.returncode:
        return {"case": case["text"], "status": "unavailable", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def told(row: Row) -> str:
    if "ratio" not in row:
        return f"{row['case']:<44} {row['reason']}"
    parts = [f"{row['predicted'][name]:9.3g} {row['achieved'][name]:9.3g} {row['ratio'][name]:5.2f}" for name in row["ratio"]]
    return f"{row['case'][-44:]:<44} {' | '.join(parts)}"


def main() -> int:
    arguments = parse()
    if arguments.one:
        try:
            print(json.dumps(anyio.run(ask, arguments.cases[0], arguments.tokens)))
        except AollmError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    print(f"{'predicted, achieved, ratio of':<44} {'tokens a second':<25} | {'first token, s':<25} | peak bytes", flush=True)
    rows = []
    for case in arguments.cases:
        rows.append(run(case, arguments.tokens))
        print(told(rows[-1]), flush=True)
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    speeds = [ratio[name] for ratio in ratios for name in ("tokens_per_second", "first_token_seconds")]
    peaks = [ratio["peak_nbytes"] for ratio in ratios if "peak_nbytes" in ratio]
    result = {
        "bench": "predictions", "tokens": arguments.tokens, "rows": rows,
        "within_20_percent": sum(1 - WITHIN <= ratio <= 1 + WITHIN for ratio in speeds), "of": len(speeds),
        "peak_within_5_percent_and_not_under": sum(1 <= ratio <= 1 + PEAK_WITHIN for ratio in peaks), "peaks": len(peaks),
        "machine": machine_card(),
    }  # fmt: skip
    near, kept = result["within_20_percent"], result["peak_within_5_percent_and_not_under"]
    print(f"{near} of {len(speeds)} within 20 %; peaks 0 to 5 % above: {kept} of {len(peaks)}")
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
