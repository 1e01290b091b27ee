"""Three ways to end a request early. Each gives back all that it held, within one layer: python examples/cancel.py [model]"""

import asyncio
import sys

import anyio

from aollm import Runtime, TokenStream


async def show(what: str, runtime: Runtime) -> None:
    """Wait until no KV is held any more; without the cancellation that would take 4000 tokens."""
    while runtime.cache_state()["reserved_tokens"]:  # noqa: ASYNC110  there is nothing left to wait for
        await anyio.sleep(0.001)
    print(f"{what}: the request is gone: {runtime.engine}")


async def read(stream: TokenStream) -> None:
    async for token in stream:
        print(token.text, end="", flush=True)


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    async with Runtime.open((sys.argv[1:] or ["demo"])[0]) as runtime:

        def endless() -> TokenStream:
            return runtime.stream("Once upon a time", max_new_tokens=4000, temperature=1.5, seed=1)

        async with endless() as stream:
            async for token in stream:
                if token.index == 10:
                    break
        await show("left the loop", runtime)

        with anyio.move_on_after(0.1):
            await read(endless())
        await show("\ntimed out", runtime)

        task = asyncio.create_task(read(endless()))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        await show("\ntask cancelled", runtime)


anyio.run(main)
