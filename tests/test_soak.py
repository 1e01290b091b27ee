"""Hours in minutes: a random mix of requests that come, go, pause and are cancelled, on one runtime, for a long time."""

from __future__ import annotations

import gc
import os
import random
from time import monotonic

import anyio
import psutil
import pytest

from aollm import Runtime

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
PROMPTS = ["Once upon a time", "One rainy Sunday", "The secret number of Mira is", "One two three", "A fox and a goat"]


@pytest.mark.soak
async def test_a_random_mix_of_requests_stays_right_and_leaks_nothing() -> None:
    draw = random.Random(11)
    async with Runtime.open("demo", max_context_tokens=512, max_concurrent_requests=8, offload_cpu_layers=1) as runtime:
        alone = {prompt: (await runtime.generate(prompt, max_new_tokens=24)).token_ids for prompt in PROMPTS}
        process, finished, left = psutil.Process(), 0, 0

        async def one() -> None:
            nonlocal finished, left
            prompt, keep = draw.choice(PROMPTS), draw.choice([1, 5, 24, 24, 24])
            got: list[int] = []
            async with runtime.stream(prompt, max_new_tokens=24) as stream:
                async for token in stream:
                    got.append(token.id)
                    if draw.random() < 0.05:
                        await anyio.sleep(draw.random() / 50)
                    if len(got) == keep:
                        break
            assert tuple(got) == alone[prompt][:keep]
            finished, left = finished + (keep == 24), left + (keep != 24)

        async def client() -> None:
            while monotonic() < end:
                await one()

        async def minutes() -> tuple[int, int]:
            async with anyio.create_task_group() as group:
                for _ in range(12):
                    group.start_soon(client)
            while runtime.engine.riders:  # noqa: ASYNC110  nothing tells that the last one has gone
                await anyio.sleep(0.01)
            gc.collect()
            return process.memory_info().rss, process.num_fds()

        end = monotonic() + SECONDS / 4
        rss, fds = await minutes()  # warm
        end = monotonic() + SECONDS * 3 / 4
        later_rss, later_fds = await minutes()
        assert runtime.cache_state()["reserved_tokens"] == 0
        assert later_fds == fds
        assert later_rss - rss < 16 << 20
        assert finished and left
