"""How fast is aollm beside other systems that run models from disk: same weights, same prompt, same memory, same minutes?

    python benchmarks/peers.py MODEL --memory 3GiB --tokens 8 --rounds 3 [--peers transformers,aollm] [--output FILE]

Every lane is a process of its own under the memory cap (`cap.py`), lanes take turns round by round, and before each one the
page cache of model and library files is dropped. Seconds per token leave out loading and the first token. Prints a table,
and as its last line one JSON object. What each lane does is in `lanes.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cap import MemoryCap
from card import drive_speed, drop_page_cache, machine_card
from lanes import LANES, PREPARE, Job, run_lane

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
PROMPT_TOKENS = 16
TIMEOUT_S = 1800.0

Record = dict[str, Any]


def memory_nbytes(text: str) -> int | None:
    """`3GiB`, `500 MB`, `none` -> bytes, or None for no cap."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a size like 3GiB nor 'none'")
    return int(float(match[1]) * UNITS[match[2] or ""])


def lane_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in LANES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no lane is called {', '.join(unknown)}; there are {', '.join(LANES)}")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="seconds per token of several systems on one checkpoint under one memory cap")
    parser.add_argument("model", type=Path, help="folder of a safetensors checkpoint")
    parser.add_argument("--memory", default="3GiB", help="cap on each process, page cache included, or 'none' (default: 3GiB)")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens per round, at least 2 (default: 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=lane_names, default=list(LANES), help=f"of {','.join(LANES)}")
    parser.add_argument("--work", type=Path, help="folder for converted files (default: MODEL.peers)")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    parser.add_argument("--lane", choices=LANES, help="run one lane in this process, without a cap, and print its JSON")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} has no config.json")
    if arguments.tokens < 2 or arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--tokens is at least 2, --rounds and --threads at least 1")
    try:
        memory_nbytes(arguments.memory)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --memory: {error}")
    return arguments


def job_of(arguments: argparse.Namespace) -> Job:
    config = json.loads((arguments.model / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    prompt = random.Random(0).sample(range(1000, min(vocabulary, 100_000)), PROMPT_TOKENS)
    model = arguments.model.resolve()
    work = arguments.work or model.with_name(f"{model.name}.peers")
    work.mkdir(parents=True, exist_ok=True)
    return Job(model, work.resolve(), arguments.memory, memory_nbytes(arguments.memory), prompt, arguments.tokens, arguments.threads)


def lane_process(name: str, job: Job, *, prepare: bool = False) -> Record:
    """Run a lane in a child under the cap (preparation has none); its record, with the peak the cap saw."""
    command = [sys.executable, __file__, str(job.model), "--lane", name, "--memory", job.memory, "--tokens", str(job.tokens)]
    command += ["--threads", str(job.threads), "--work", str(job.work)] + (["--prepare"] if prepare else [])
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(job.threads)}
    pipe = subprocess.PIPE
    with MemoryCap(None if prepare else job.memory_nbytes) as cap:
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=cap.enter)
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"status": "unavailable", "reason": f"took longer than {TIMEOUT_S:.0f} s"}
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        reason = f"killed above the memory cap of {job.memory}" if cap.killed else f"exit code {process.returncode}: {last[:200]}"
        return {"status": "unavailable", "reason": reason, "cap": cap.kind}
    record: Record = json.loads(output.splitlines()[-1])
    told = f"python benchmarks/peers.py {job.model.name} --lane {name} --memory {job.memory} --tokens {job.tokens} --threads {job.threads}"
    return record | {"peak_memory_nbytes": cap.peak_nbytes, "cap": cap.kind, "command": told}


def cached_files(job: Job) -> list[Path]:
    """Whatever a lane may find in the page cache: weights in every format, and the libraries."""
    libraries = Path(sysconfig.get_path("purelib")).rglob("*.so*")
    weights = (path for folder in (job.model, job.work) for path in folder.rglob("*"))
    return [path for path in (*weights, *libraries) if path.is_file()]


def measure(names: list[str], job: Job, rounds: int, say: Callable[[str], None]) -> tuple[dict[str, list[Record]], list[float]]:
    """Records of each lane by round, and the drive's bytes per second before each round."""
    weights = max(job.model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    records: dict[str, list[Record]] = {name: [] for name in names}
    for name in names:
        if name in PREPARE:
            say(f"preparing {name}")
            record = lane_process(name, job, prepare=True)
            if record["status"] != "ok":
                records[name].append(record)
    drive = []
    for turn in range(rounds):
        drive.append(drive_speed(weights))
        say(f"round {turn + 1} of {rounds}: the drive reads {drive[-1] / 1e9:.2f} GB/s")
        for name in names:
            if any(record["status"] != "ok" for record in records[name]):
                continue
            drop_page_cache(cached_files(job))
            record = lane_process(name, job)
            records[name].append(record)
            steps = " ".join(f"{seconds:.3f}" for seconds in record.get("token_s", [])) or record["reason"]
            say(f"  {name}: page cache dropped, then {steps}")
    return records, drive


def summary(records: list[Record], nbytes: int) -> Record:
    """One lane's medians over all rounds; a lane that failed once has no numbers."""
    for number, record in enumerate(records, 1):
        if record["status"] != "ok":
            return {"status": "unavailable", "reason": record["reason"], "failed_at": number}
    seconds = statistics.median(second for record in records for second in record["token_s"][1:])
    reads = [b - a for record in records for a, b in zip(record["read_nbytes"], record["read_nbytes"][1:], strict=False)]
    peaks = [record["peak_memory_nbytes"] for record in records]
    return {
        "status": "ok",
        "version": records[0]["version"],
        "seconds_per_token": seconds,
        "seconds_per_token_by_round": [statistics.median(record["token_s"][1:]) for record in records],
        "weights_bytes_per_second": nbytes / seconds,
        "drive_bytes_per_token": statistics.median(reads),
        "first_token_s": statistics.median(record["token_s"][0] for record in records),
        "load_s": statistics.median(record["load_s"] for record in records),
        "peak_memory_nbytes": None if None in peaks else max(peaks),
        "peak_rss_nbytes": max(record["peak_rss_nbytes"] for record in records),
        "token_ids": records[0]["token_ids"],
        "cap": records[0]["cap"],
        "command": records[0]["command"],
    }


def compare_tokens(lanes: dict[str, Record]) -> None:
    """Tell each lane how many leading tokens it shares with the first lane that ran; bf16 sums may part ways later."""
    ran = [lane for lane in lanes.values() if lane["status"] == "ok"]
    for lane in ran:
        pairs = zip(lane["token_ids"], ran[0]["token_ids"], strict=True)
        lane["leading_tokens_shared"] = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def table(lanes: dict[str, Record]) -> str:
    own = lanes.get("aollm", {}).get("seconds_per_token")
    lines = [f"{'lane':14}{'s/token':>9}{'x aollm':>9}{'GB/s':>7}{'read GB':>9}{'load s':>8}{'peak GiB':>10}{'same ids':>10}  version"]
    for name, lane in lanes.items():
        if lane["status"] != "ok":
            lines.append(f"{name:14}unavailable: {lane['reason']}")
            continue
        ratio = f"{lane['seconds_per_token'] / own:.2f}" if own else "-"
        peak = lane["peak_memory_nbytes"] or lane["peak_rss_nbytes"]
        cells = f"{lane['seconds_per_token']:9.3f}{ratio:>9}{lane['weights_bytes_per_second'] / 1e9:7.2f}"
        cells += f"{lane['drive_bytes_per_token'] / 1e9:9.2f}{lane['load_s']:8.1f}{peak / 2**30:10.2f}{lane['leading_tokens_shared']:10}"
        lines.append(f"{name:14}{cells}  {lane['version']}")
    lines.append("GB/s: checkpoint bytes over seconds per token; read GB: from the drive per token; peak: page cache included under a")
    lines.append("cgroup; same ids: leading tokens equal to those of the first lane that ran")
    return "\n".join(lines)


def main() -> int:
    arguments = parse()
    job = job_of(arguments)
    if arguments.lane:
        print(json.dumps(run_lane(arguments.lane, job, arguments.prepare)))
        return 0
    job = replace(job, memory=arguments.memory.replace(" ", ""))
    nbytes = sum(path.stat().st_size for path in job.model.glob("*.safetensors"))
    card = machine_card()
    records, drive = measure(arguments.peers, job, arguments.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    lanes = {name: summary(rows, nbytes) for name, rows in records.items()}
    compare_tokens(lanes)
    print(table(lanes))
    work = {"model": job.model.name, "checkpoint_nbytes": nbytes, "memory": job.memory, "prompt_tokens": PROMPT_TOKENS}
    work |= {"new_tokens": job.tokens, "rounds": arguments.rounds, "threads": job.threads, "dtype": "bf16", "page_cache": "dropped"}
    line = json.dumps({"work": work, "machine": card | {"drive_bytes_per_second": drive}, "lanes": lanes})
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
