"""A dozen prompts ride on the same passes over the weights, so all of them take little longer than one.

python examples/many_requests.py [model]
"""

import sys
from time import perf_counter

import anyio

from aollm import Completion, Runtime

NAMES = ["Zoe", "Ben", "Mia", "Sam", "Lily", "Tom", "Anna", "Max", "Ella", "Leo", "Rosa", "Adam"]


async def together(runtime: Runtime, names: list[str]) -> float:
    """Tell a story about each name, all at once; prints them and what they took, returns tokens per second."""
    stories: dict[str, Completion] = {}

    async def tell(name: str) -> None:
        stories[name] = await runtime.generate([{"role": "user", "content": f"Tell me a story about {name}."}], max_new_tokens=48)

    start, passes = perf_counter(), runtime.engine.passes
    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(tell, name)
    speed = sum(story.usage.completion_tokens for story in stories.values()) / (perf_counter() - start)
    for name in names:
        print(f"{name:>6}: {stories[name].text[:100]!r}")
    print(f"{len(names)} requests, {runtime.engine.passes - passes} passes over the weights, {speed:.1f} tokens/s\n")
    return speed


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    async with Runtime.open((sys.argv[1:] or ["demo"])[0], offload_cpu_layers=0) as runtime:  # 0: read all layers in each pass
        await runtime.generate("Once upon a time", max_new_tokens=4)  # the first run is slower: it warms up
        alone = await together(runtime, NAMES[:1])
        print(f"together {await together(runtime, NAMES) / alone:.1f} times the tokens/s of one alone")


anyio.run(main)
