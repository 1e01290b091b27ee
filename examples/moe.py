"""A mixture in less memory than its experts need: how many were asked for, how many were there, what was read for each token.

python examples/moe.py model [memory for experts], such as: python examples/moe.py gpt-oss-20B 2GiB
"""

import sys
from time import perf_counter

import anyio

from aollm import Runtime
from aollm.trace import READS


async def main(model: str, memory: str | None) -> None:
    async with Runtime.open(model, expert_memory=memory) as runtime:
        plan = runtime.plan
        if not plan.experts:
            sys.exit(f"{model} has no experts; name a mixture, such as gpt-oss-20B")
        print(f"{plan.expert_slots} of {plan.experts} experts have room, {plan.expert_slot_nbytes / 1e6:.1f} MB each")
        start = perf_counter()
        async for token in runtime.stream("Once upon a time", max_new_tokens=16):
            events = [event for event in runtime.trace.between(start, perf_counter()) if event.end > start]
            layers = [event for event in events if event.name == "experts_load"]
            asked, read = sum(event.rows for event in layers), sum(" expert " in event.label for event in events if event.name in READS)
            nbytes = sum(event.nbytes for event in events if event.name in READS)
            print(f"{token.text!r:>14}: {asked} experts asked for, {read} read, {nbytes / 1e6:.1f} MB in all")
            start = perf_counter()


anyio.run(main, sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
