"""Work that can be made to stand still: it never runs between a pause and its resume."""

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aollm.stores.interruptible import Interruptible


@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_work_stands_still_between_pause_and_resume(turns: int) -> None:
    """However few turns of the loop there are between."""
    work, begun, paused = Interruptible(), 0, False

    async def count() -> None:
        nonlocal begun
        assert not paused
        begun += 1
        await anyio.sleep_forever()

    async def turn(times: int) -> None:
        for _ in range(times):
            await checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(work.run, count)
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            await work.pause()
            paused = True
            await turn(turns)
            assert repr(work) == "<Interruptible still>"
            work.resume()
            paused = False
            await turn(turns)
        await work.pause()
        paused = True
        await anyio.wait_all_tasks_blocked()
        before, paused = begun, False
        work.resume()
        await anyio.wait_all_tasks_blocked()
        assert begun == before + 1 and repr(work) == "<Interruptible at work>"
        group.cancel_scope.cancel()
