"""One question to a model and to each of its LoRA adapters, all in the same passes: python examples/adapter.py model adapters

`adapters` is a folder as PEFT saves it, or one with such folders in it.
"""

import sys
from pathlib import Path

import anyio

from aollm import Runtime
from aollm.adapters.adapter import CONFIG

PROMPT = "Once upon a time"


async def main(model: str, folder: Path, names: list[str]) -> None:
    answers: dict[str | None, str] = {}
    async with Runtime.open(model, adapter_dir=folder) as runtime:

        async def ask(adapter: str | None) -> None:
            answers[adapter] = "".join([token.text async for token in runtime.stream(PROMPT, max_new_tokens=32, adapter=adapter)])

        async with anyio.create_task_group() as group:
            for name in (None, *names):
                group.start_soon(ask, name)
    for name in (None, *names):
        print(f"{name or 'the model alone'}: {PROMPT}{answers[name]}")


FOLDER = Path(sys.argv[2])
NAMES = [FOLDER.name] if (FOLDER / CONFIG).is_file() else sorted(path.parent.name for path in FOLDER.glob(f"*/{CONFIG}"))
anyio.run(main, sys.argv[1], FOLDER, NAMES)
