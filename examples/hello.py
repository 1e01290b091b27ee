"""Ten lines that answer a prompt token by token: python examples/hello.py [model]"""

import sys

import anyio

from aollm import Runtime


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    async with Runtime.open((sys.argv[1:] or ["demo"])[0]) as runtime:
        async for token in runtime.stream("Once upon a time", max_new_tokens=64):
            print(token.text, end="", flush=True)


anyio.run(main)
