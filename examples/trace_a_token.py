"""What happens while one token is made: each read, wait and computation of its pass, as a table and as a Chrome trace.

python examples/trace_a_token.py [model] [trace.json], then open the file in ui.perfetto.dev or chrome://tracing
"""

import sys
from time import perf_counter

import anyio

from aollm import Runtime


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    model, path, *_ = [*sys.argv[1:], *["demo", "trace.json"][len(sys.argv) - 1 :]]
    async with Runtime.open(model, offload_cpu_layers=0) as runtime:  # 0: read all layers from disk, as for a model beyond memory
        await runtime.generate("Once upon a time", max_new_tokens=2)  # the first run is slower: it warms up
        start = perf_counter()
        answer = await runtime.generate("Once upon a time", max_new_tokens=1)
        events = [event for event in runtime.trace.between(start, perf_counter()) if event.end > start]
        print(f"{'at ms':>8} {'took ms':>8}  {'event':<18} {'what':<20} {'bytes':>10} {'rows':>5}")
        for event in sorted(events, key=lambda event: event.start):
            times = f"{(event.start - start) * 1e3:8.2f} {(event.end - event.start) * 1e3:8.2f}"
            print(f"{times}  {event.name:<18} {event.label:<20} {event.nbytes or '':>10} {event.rows or '':>5}")
        stalled = answer.profile["events"]["stall"]["total_ms"]
        print(f"the token is {answer.text!r}; {answer.profile['bytes_read']} bytes read, compute waited {stalled:.2f} ms for them")
        runtime.trace.save(path)
        print(f"saved {path}")


anyio.run(main)
