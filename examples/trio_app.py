"""The same library under trio: two answers stream while another coroutine ticks, which shows that nothing blocks the loop.

python examples/trio_app.py [model]
"""

import sys
from math import inf

import trio

from aollm import Runtime


async def answer(runtime: Runtime, prompt: str) -> None:
    text = ""
    async for token in runtime.stream(prompt, max_new_tokens=48):
        text += token.text
    print(f"{prompt}{text}")


async def tick(every_s: float) -> None:
    """Counts ticks, and how late the latest came, until it is cancelled."""
    ticks, late = 0, -inf
    try:
        while True:
            due = trio.current_time() + every_s
            await trio.sleep_until(due)
            ticks, late = ticks + 1, max(late, trio.current_time() - due)
    finally:
        print(f"{ticks} ticks meanwhile, the latest {late * 1e3:.1f} ms late")


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    async with Runtime.open((sys.argv[1:] or ["demo"])[0]) as runtime, trio.open_nursery() as ticking:
        ticking.start_soon(tick, 0.01)
        async with trio.open_nursery() as answers:
            answers.start_soon(answer, runtime, "Once upon a time")
            answers.start_soon(answer, runtime, "One rainy Sunday, a young girl named")
        ticking.cancel_scope.cancel()


trio.run(main)
