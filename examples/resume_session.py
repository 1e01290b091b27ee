"""A conversation goes on in another runtime, as after a restart: what was computed of it comes from disk.

python examples/resume_session.py [model]
"""

import sys
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import anyio

from aollm import Runtime, Session

TURNS = [
    "My name is Vera.",
    "The secret number of Mira is 4817.",
    *[f"Tell me a story about a {animal}." for animal in ("fox", "duck", "cat")],
]


async def ask(session: Session, message: str, tokens: int) -> tuple[str, float, int, int]:
    """The answer, seconds to its first token, tokens of the prompt, and how many of them nothing had to be computed for."""
    start, first, text = perf_counter(), 0.0, ""
    async with session.stream(message, max_new_tokens=tokens) as stream:
        async for token in stream:
            first = first or perf_counter() - start
            text += token.text
    assert stream.request is not None
    return text, first, len(stream.request.prompt), stream.request.prefix_hit_tokens


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    model = (sys.argv[1:] or ["demo"])[0]
    with TemporaryDirectory() as folder:
        kept: dict[str, Any] = {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent", "cache_dir": folder}
        async with Runtime.open(model, **kept) as runtime, runtime.session() as session:
            for message in TURNS:
                text, *_ = await ask(session, message, 64)
                print(f"> {message}\n{text}")
            messages = session.messages

        question = "What is the secret number of Mira?"
        nothing: dict[str, Any] = {}
        for name, settings in (("from disk", kept), ("computed anew", nothing)):
            async with Runtime.open(model, **settings) as runtime, runtime.session(messages) as session:
                await runtime.generate("Hello", max_new_tokens=2)  # the first pass of a runtime is slower: it warms up
                text, first, prompt, reused = await ask(session, question, 16)
                print(f"\n{name}: {reused} of {prompt} prompt tokens reused, first token after {first * 1e3:.0f} ms\n> {question}\n{text}")


anyio.run(main)
