"""Ask before running: what would be kept and read in several budgets, and how fast it would be; then run, and compare."""

import sys

import anyio

import aollm

MODEL = "demo"


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    for memory in ("100MiB", "360MiB", "1GiB"):
        try:
            plan = await aollm.plan(MODEL, memory=memory, max_context_tokens=1024)
        except aollm.MemoryBudgetError as error:
            print(f"{memory:>8}  does not fit; this would make it fit: {error.changes}")
            continue
        one = plan.predicted.speeds[0]
        kept = plan.pinned_nbytes / plan.weights_nbytes
        print(f"{memory:>8}  keeps {kept:4.0%}, {one.tokens_per_second:5.1f} tokens/s, limited by {one.limiter}")

    async with aollm.Runtime.open(MODEL, memory="1GiB", max_context_tokens=1024) as runtime:
        answer = await runtime.generate("Once upon a time", max_new_tokens=60)
    for told in ("predicted", "achieved"):
        figures = answer.profile[told]
        print(f"{told:>9}  first token {figures['first_token_seconds']:.3f} s, then {figures['tokens_per_second']:.1f} tokens/s")


anyio.run(main)
