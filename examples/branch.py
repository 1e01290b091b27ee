"""One prefix, several ways to go on: branches share its whole blocks of 1,024 tokens in memory, and ride on the same passes.

python examples/branch.py [model]
"""

import sys

import anyio

from aollm import Runtime, Session

STORY = "Once upon a time a kind duck named Wilma lived in a green garden. " * 130
QUESTIONS = ["Tell me a story about Tom.", "Tell me a story about a fox.", "What is 3 + 4?", "Which day comes after Monday?"]


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    answers: dict[str, str] = {}

    async def ask(session: Session, question: str) -> None:
        text = ""
        async with session.stream(question, max_new_tokens=40) as stream:
            async for token in stream:
                text += token.text
        assert stream.request is not None
        reused, prompt = stream.request.prefix_hit_tokens, len(stream.request.prompt)
        answers[question] = f"{text}\n  ({reused} of {prompt} prompt tokens were there)"

    async with Runtime.open((sys.argv[1:] or ["demo"])[0]) as runtime, runtime.session() as trunk:
        await ask(trunk, f"Hello. {STORY}")
        before, passes = runtime.cache_state()["resident_tokens"], runtime.engine.passes
        branches = [trunk.branch() for _ in QUESTIONS]
        async with anyio.create_task_group() as group:
            for branch, question in zip(branches, QUESTIONS, strict=True):
                group.start_soon(ask, branch, question)
        for question in QUESTIONS:
            print(f"> {question}\n{answers[question]}")
        after = runtime.cache_state()["resident_tokens"]
        print(f"{len(branches)} branches in {runtime.engine.passes - passes} passes; tokens in memory: {before} before, {after} now,")
        print(f"where {len(branches) + 1} conversations that share nothing have more than {(len(branches) + 1) * before}")
        for branch in branches:
            await branch.aclose()


anyio.run(main)
