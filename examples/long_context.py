"""A document whose keys and values do not fit the memory that they are given: most of them lie on disk, and are read when needed.

python examples/long_context.py [model] [stories]
"""

import random
import sys
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import anyio

from aollm import Runtime

FACT, QUESTION, CUE = "Mira hid the silver key in the blue barn.", "Where did Mira hide the silver key?", "Mira hid the silver key in the"
NAMES, THINGS, PLACES = ["Tom", "Vera", "Otto", "Lily"], ["boat", "kite", "lamp", "drum"], ["river", "hill", "garden", "bridge"]


def document(stories: int) -> str:
    """The fact, near the beginning, so many small stories, and the question with the beginning of its answer."""
    pick = random.Random(7).choice
    told = [f"One day {pick(NAMES)} took a {pick(THINGS)} to the {pick(PLACES)}. It was a good day." for _ in range(stories)]
    return "\n\n".join([FACT, *told, f"Question: {QUESTION}\nAnswer: {CUE}"])


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    model, stories, *_ = [*sys.argv[1:], *["demo", "250"][len(sys.argv) - 1 :]]
    with TemporaryDirectory() as folder:
        async with Runtime.open(model, kv_cache_strategy="paged", kv_cache_memory="4MiB", cache_dir=folder) as runtime:
            start, first, text = perf_counter(), 0.0, ""
            state: dict[str, Any] = {}
            async with runtime.stream(document(int(stories)), max_new_tokens=4) as stream:
                async for token in stream:
                    if not text:
                        first, state = perf_counter(), runtime.cache_state()
                    text += token.text
            assert stream.request is not None
            prompt, end = len(stream.request.prompt), perf_counter()
            print(f"{prompt} tokens read in {first - start:.1f} s: {prompt / (first - start):.0f} tokens/s")
            print(f"{token.index} more written at {token.index / (end - first):.1f} tokens/s")
            print(f"in memory: {state['resident_tokens']} tokens of each layer at most, {state['resident_bytes'] / 1e6:.2f} MB in all")
            print(f"on disk:   {state['persisted_tokens']} tokens of each layer, {state['persisted_bytes'] / 1e6:.2f} MB in all")
            print(f"{QUESTION} {CUE}{text}")


anyio.run(main)
