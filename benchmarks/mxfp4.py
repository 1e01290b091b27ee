"""How fast are rows times MXFP4 weights, against the memory's speed and against the same weights in bf16?

    python benchmarks/mxfp4.py [--outs 5760] [--ins 2880] [--rows 1,4,8,128] [--threads N]

The weights lie in memory, not in a cache: each call takes the next of many matrices. All candidates take turns in one run, and the best
time of each counts. Memory is measured by summing as many bytes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from aollm.bench.machine import machine_card
from aollm.maths.layers import linear
from aollm.maths.mxfp4 import compiled, dequantize, mxfp4_linear

POOL_NBYTES = 384 << 20
APART = 11  # a quarter of the pool at the default size: more than the caches
Call = Callable[[int], object]


def best_s(calls: dict[str, Call], turns: int) -> dict[str, float]:
    """The shortest time of each call; they take turns, and none gets a number that another has just had."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for place, (name, call) in enumerate(calls.items()):
            start = time.perf_counter()
            call(turn + APART * place)
            times[name].append(time.perf_counter() - start)
    return {name: min(each[1:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outs", type=int, default=5760)
    parser.add_argument("--ins", type=int, default=2880)
    parser.add_argument("--rows", default="1,4,8,128")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    groups = args.ins // 32
    packed_nbytes, plain_nbytes = args.outs * groups * 17, args.outs * args.ins * 2
    count, plain_count = POOL_NBYTES // packed_nbytes + 1, POOL_NBYTES // plain_nbytes + 1
    blocks = torch.randint(0, 256, (count, args.outs, groups, 16), dtype=torch.uint8)
    scales = torch.randint(118, 126, (count, args.outs, groups), dtype=torch.uint8)
    plain = torch.stack([dequantize(blocks[i], scales[i]) for i in range(plain_count)])
    words = blocks.view(count, -1).view(torch.int64)

    def measured(rows: int) -> dict[str, float]:
        x = torch.randn(rows, args.ins).bfloat16()
        calls: dict[str, Call] = {
            "packed": lambda turn: mxfp4_linear(x, blocks[turn % count], scales[turn % count]),
            "bf16": lambda turn: linear(x, plain[turn % plain_count]),
            "decoded": lambda turn: functional.linear(x, dequantize(blocks[turn % count], scales[turn % count])),
            "memory": lambda turn: words[turn % count].sum(),
        }
        return best_s(calls, args.turns if rows < 64 else max(3, args.turns // 8))

    print(f"{args.outs} × {args.ins} on {args.threads} threads, {'compiled' if compiled() else 'torch alone'}")
    results = []
    with torch.inference_mode():
        for rows in map(int, args.rows.split(",")):
            seconds = measured(rows)
            speed, memory = packed_nbytes / seconds["packed"], words[0].nbytes / seconds["memory"]
            results.append(
                {
                    "rows": rows,
                    **{f"{name}_s": value for name, value in seconds.items()},
                    "packed_bytes_per_second": speed,
                    "fraction_of_memory": speed / memory,
                    "speedup_over_bf16": seconds["bf16"] / seconds["packed"],
                }
            )
            print(
                f"{rows:4} rows: {seconds['packed'] * 1e3:7.2f} ms, {speed / 1e9:5.1f} GB/s packed, {speed / memory:4.0%} of memory; "
                f"bf16 {seconds['bf16'] * 1e3:7.2f} ms, decoded whole first {seconds['decoded'] * 1e3:7.2f} ms"
            )
    about = {"bench": "mxfp4", "outs": args.outs, "ins": args.ins, "threads": args.threads, "compiled": compiled()}
    print(json.dumps({**about, "rows": results, "machine": machine_card()}))


if __name__ == "__main__":
    main()
