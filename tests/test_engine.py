"""Requests together: the same tokens in any company, and nobody hurt by who is slow, leaves, fails or is cancelled."""

import asyncio
import gc
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny

from aollm import AollmError, ConfigError, DiskError, MemoryBudgetError, MemoryDisk, ModelError, RequestError, Runtime, Token
from aollm.disk.base import Extent
from aollm.request import OUTBOX

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

CONTEXT = 512


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture
async def runtime(folder: Path, anyio_backend: str) -> AsyncIterator[Runtime]:
    async with Runtime.open(folder, max_context_tokens=CONTEXT) as runtime:
        yield runtime


def streamed(folder: Path, disk: MemoryDisk, **fields: Any) -> Runtime:
    """Nothing is kept, so that each pass reads all."""
    return Runtime.open(folder, disk=disk, offload_cpu_layers=0, max_context_tokens=CONTEXT, **fields)


async def ids_of(runtime: Runtime, prompt: Any, count: int = 12, **fields: Any) -> list[int]:
    return [token.id async for token in runtime.stream(prompt, max_new_tokens=count, **fields)]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for `holds()`; fails when that takes long."""
    with anyio.fail_after(30):
        while not holds():  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)


async def settled(runtime: Runtime) -> None:
    """Wait until nobody rides and nothing is held."""
    await until(lambda: not (runtime.engine._riders or runtime.engine._inbox or runtime.cache.pool.reserved))


def mixed(count: int) -> list[list[int]]:
    return [tiny.prompt(1 + (37 * seed) % 90, seed) for seed in range(count)]


# Company


async def test_twenty_at_once_get_what_each_gets_alone(runtime: Runtime) -> None:
    alone = [await ids_of(runtime, prompt) for prompt in mixed(20)]
    found: dict[int, list[int]] = {}

    async def ride(number: int, prompt: list[int]) -> None:
        await anyio.sleep(0.001 * number)
        found[number] = await ids_of(runtime, prompt)

    async with anyio.create_task_group() as group:
        for number, prompt in enumerate(mixed(20)):
            group.start_soon(ride, number, prompt)
    assert [found[number] for number in range(20)] == alone
    await settled(runtime)


async def test_the_demo_tells_a_story_to_many_as_to_one(anyio_backend: str) -> None:
    prompts = [f"Once upon a time there was a {thing}" for thing in ("cat", "dog", "girl", "boy", "tree", "fish", "king", "bear")]
    async with Runtime.open("demo", max_context_tokens=256) as runtime:
        alone = [(await runtime.generate(prompt, max_new_tokens=24)).text for prompt in prompts]
        found: dict[int, str] = {}

        async def ride(number: int) -> None:
            found[number] = (await runtime.generate(prompts[number], max_new_tokens=24)).text

        async with anyio.create_task_group() as group:
            for number in range(len(prompts)):
                group.start_soon(ride, number)
        assert [found[number] for number in range(len(prompts))] == alone


async def test_who_joins_later_changes_nothing_for_who_rides(runtime: Runtime) -> None:
    prompt = tiny.prompt(30)
    wanted = await ids_of(runtime, prompt, 30)
    found = []
    async with anyio.create_task_group() as group:
        async for token in runtime.stream(prompt, max_new_tokens=30):
            found.append(token.id)
            if token.index % 10 == 5:
                group.start_soon(ids_of, runtime, tiny.prompt(80 + token.index, token.index))
    assert found == wanted


async def test_greedy_answers_to_one_prompt_are_equal(runtime: Runtime) -> None:
    answer = await runtime.generate(tiny.prompt(40), n=3, max_new_tokens=20)
    wanted = tuple(await ids_of(runtime, tiny.prompt(40), 20))
    assert [choice.token_ids for choice in answer.choices] == [wanted] * 3
    assert answer.usage.prompt_tokens == 40 and answer.usage.completion_tokens == 60
    await settled(runtime)


async def test_sampled_answers_depend_on_seed_and_number_alone(runtime: Runtime) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_new_tokens": 15}
    alone = (await runtime.generate(tiny.prompt(25), n=3, **sampling)).choices
    assert len({choice.token_ids for choice in alone}) == 3
    assert (await runtime.generate(tiny.prompt(25), **sampling)).token_ids == alone[0].token_ids
    found: list[Any] = []

    async def again() -> None:
        found.append((await runtime.generate(tiny.prompt(25), n=3, **sampling)).choices)

    async with anyio.create_task_group() as group:
        for number, prompt in enumerate(mixed(6)):
            group.start_soon(lambda p=prompt, s=number: ids_of(runtime, p, 15, temperature=1.5, seed=s))
        group.start_soon(again)
        group.start_soon(again)
    assert found == [alone, alone]


async def test_a_seed_is_reproducible_and_none_is_not(runtime: Runtime) -> None:
    prompt = tiny.prompt(25)
    first, second = [await ids_of(runtime, prompt, 20, temperature=1.0, seed=5) for _ in range(2)]
    other = await ids_of(runtime, prompt, 20, temperature=1.0, seed=6)
    assert first == second != other
    assert await ids_of(runtime, prompt, 20, temperature=2.0) != await ids_of(runtime, prompt, 20, temperature=2.0)


async def test_bytes_read_by_a_pass_do_not_depend_on_its_riders(folder: Path) -> None:
    async def read(count: int) -> tuple[int, int]:
        disk = MemoryDisk.of(folder)
        async with streamed(folder, disk, prefetch_depth=1) as runtime:
            begun = len(disk.reads)
            passes = runtime.engine.passes
            async with anyio.create_task_group() as group:
                for prompt in mixed(count):
                    group.start_soon(ids_of, runtime, prompt, 20)
            layers = sum(extent.nbytes for extent in disk.reads[begun:] if extent.nbytes > 64 * 4)  # rows of the table are 256 bytes
            return layers, runtime.engine.passes - passes

    (one, one_passes), (many, many_passes) = await read(1), await read(12)
    assert many_passes <= one_passes + 3
    assert abs(many / many_passes - one / one_passes) < 0.1 * one / one_passes


async def test_the_first_come_is_the_first_served(folder: Path) -> None:
    async with Runtime.open(folder, max_context_tokens=CONTEXT, max_concurrent_requests=1) as runtime:
        order: list[int] = []

        async def ride(number: int) -> None:
            await ids_of(runtime, tiny.prompt(10 + 20 * (number % 2), number), 3 + number % 3)
            order.append(number)

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(ride, number)
                await anyio.sleep(0.002)
        assert order == sorted(order)


async def test_a_long_prompt_does_not_starve_who_decodes_nor_the_reverse(folder: Path) -> None:
    async with Runtime.open(folder, max_context_tokens=4000, dense_projection_chunk_rows=256) as runtime:
        done: list[str] = []

        async def ride(name: str, length: int, count: int) -> None:
            await ids_of(runtime, tiny.prompt(length), count)
            done.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(ride, "decoder", 5, 200)
            await anyio.sleep(0.02)
            group.start_soon(ride, "long", 3000, 1)
            group.start_soon(ride, "short", 5, 3)
        assert done[-1] == "decoder" and sorted(done[:2]) == ["long", "short"]


# Readers


async def test_a_slow_reader_holds_up_nobody_and_loses_nothing(runtime: Runtime) -> None:
    count = OUTBOX * 2 + 30
    wanted = await ids_of(runtime, tiny.prompt(20), count)
    async with runtime.stream(tiny.prompt(20), max_new_tokens=count) as slow:
        found = [(await anext(slow)).id]
        with anyio.fail_after(30):
            for seed in range(3):
                assert len(await ids_of(runtime, tiny.prompt(20, seed), 100)) == 100
        assert slow.request is not None and len(slow.request._outbox) <= OUTBOX
        found += [token.id async for token in slow]
    assert found == wanted
    await settled(runtime)


async def test_a_slow_reader_of_many_answers_loses_nothing(runtime: Runtime) -> None:
    wanted = (await runtime.generate(tiny.prompt(20), n=16, temperature=1.0, seed=1, max_new_tokens=10)).choices
    tokens: list[Token] = []
    async for token in runtime.stream(tiny.prompt(20), n=16, temperature=1.0, seed=1, max_new_tokens=10):
        tokens.append(token)
        await anyio.sleep(0.001)
    for choice, whole in enumerate(wanted):
        mine = [token for token in tokens if token.choice == choice]
        assert tuple(token.id for token in mine) == whole.token_ids
        assert [token.index for token in mine] == list(range(10))
        assert [token.finish_reason for token in mine] == [None] * 9 + ["length"]


async def test_reading_the_stream_of_a_finished_request_twice_gives_nothing_more(runtime: Runtime) -> None:
    stream = runtime.stream(tiny.prompt(5), max_new_tokens=3)
    assert len([token async for token in stream]) == 3
    assert [token async for token in stream] == []


async def test_two_tasks_may_read_one_stream(runtime: Runtime) -> None:
    wanted = await ids_of(runtime, tiny.prompt(5), 40)
    found: list[tuple[int, int]] = []

    async def read(stream: Any) -> None:
        async for token in stream:
            found.append((token.index, token.id))

    with anyio.fail_after(30):
        async with runtime.stream(tiny.prompt(5), max_new_tokens=40) as stream, anyio.create_task_group() as group:
            group.start_soon(read, stream)
            group.start_soon(read, stream)
    assert [id for _, id in sorted(found)] == wanted


async def test_two_tasks_may_begin_one_stream(anyio_backend: str) -> None:
    """Both ask for the first token of a stream that nobody has entered: there is one request, not two."""
    async with Runtime.open("demo", max_context_tokens=CONTEXT) as runtime:
        wanted = await ids_of(runtime, "Once upon a time", 40)
        found: list[int] = []

        async def read(stream: Any) -> None:
            found.extend([token.id async for token in stream])

        with anyio.fail_after(30):
            stream = runtime.stream("Once upon a time", max_new_tokens=40)
            async with anyio.create_task_group() as group:
                group.start_soon(read, stream)
                group.start_soon(read, stream)
        assert sorted(found) == sorted(wanted)
        await settled(runtime)


# Leaving


async def test_breaking_out_of_the_loop_cancels(runtime: Runtime) -> None:
    async for token in runtime.stream(tiny.prompt(20), max_new_tokens=400):
        if token.index == 2:
            break
    await settled(runtime)
    assert len(await ids_of(runtime, tiny.prompt(20))) == 12


async def test_leaving_the_context_cancels(runtime: Runtime) -> None:
    async with runtime.stream(tiny.prompt(20), max_new_tokens=400) as stream:
        await anext(stream)
    await settled(runtime)
    assert [token async for token in stream] == []


async def test_a_stream_that_is_never_read_costs_nothing(runtime: Runtime) -> None:
    stream = runtime.stream(tiny.prompt(20), max_new_tokens=400)
    await anyio.sleep(0.05)
    assert not runtime.cache.pool.reserved
    del stream
    await settled(runtime)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_stream_that_dies_in_a_reference_cycle_cancels_from_any_thread(runtime: Runtime, paused: bool) -> None:
    """The collector runs in whichever thread allocates; an engine that waits for a slow reader must still wake up."""

    def abandon(stream: Any) -> None:
        circle: list[Any] = [stream]
        circle.append(circle)

    gc.collect()
    gc.disable()
    try:
        stream = runtime.stream(tiny.prompt(20), max_new_tokens=400)
        await anext(stream)
        if paused:
            request = stream.request
            await until(lambda: not request.has_room)
            await anyio.sleep(0.05)
            del request
        abandon(stream)
        del stream
        await anyio.to_thread.run_sync(gc.collect)
    finally:
        gc.enable()
    await settled(runtime)


@pytest.mark.parametrize("wait_s", [0.0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4])
async def test_cancelling_the_reader_at_any_moment_frees_all(folder: Path, wait_s: float) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(20), 5)
        disk.delay_s = 0.01
        with anyio.move_on_after(wait_s) as scope:
            await ids_of(runtime, tiny.prompt(200), 100)
        assert scope.cancelled_caught
        await settled(runtime)
        disk.delay_s = 0.0
        assert await ids_of(runtime, tiny.prompt(20), 5) == wanted


async def test_cancelling_one_of_many_does_not_change_the_others(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        prompts = mixed(4)
        wanted = [await ids_of(runtime, prompt, 8) for prompt in prompts]
        disk.delay_s = 0.003
        for wait_s in (0.01, 0.03, 0.06, 0.1):
            found: dict[int, list[int]] = {}

            async def ride(number: int, found: dict[int, list[int]]) -> None:
                found[number] = await ids_of(runtime, prompts[number], 8)

            async with anyio.create_task_group() as group:
                for number in (0, 1):
                    group.start_soon(ride, number, found)
                with anyio.move_on_after(wait_s):
                    await ids_of(runtime, tiny.prompt(150, 9), 100)
                for number in (2, 3):
                    group.start_soon(ride, number, found)
            assert [found[number] for number in range(4)] == wanted
            await settled(runtime)


async def test_cancelling_ends_within_one_layer(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk, prefetch_depth=1) as runtime:
        disk.delay_s = 0.1
        with anyio.move_on_after(0.25):
            await ids_of(runtime, tiny.prompt(50), 100)
        cancelled = time.perf_counter()
        await settled(runtime)
        events = runtime.trace.between(cancelled, time.perf_counter())
        assert sum(event.name == "compute" and event.start > cancelled for event in events) <= 1  # of a pass's eight


async def test_cancelling_while_in_line_leaves_the_line(folder: Path) -> None:
    async with Runtime.open(folder, max_context_tokens=CONTEXT, max_concurrent_requests=1) as runtime:
        async with runtime.stream(tiny.prompt(20), max_new_tokens=400) as first:
            await anext(first)
            with anyio.move_on_after(0.05) as scope:
                await ids_of(runtime, tiny.prompt(20))
            assert scope.cancelled_caught
        await settled(runtime)
        assert len(await ids_of(runtime, tiny.prompt(20))) == 12


async def test_who_waits_behind_a_cancelled_one_is_served(folder: Path) -> None:
    async with Runtime.open(folder, max_context_tokens=CONTEXT, max_concurrent_requests=1) as runtime:
        found: list[int] = []

        async def last() -> None:
            found.extend(await ids_of(runtime, tiny.prompt(20)))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                async with runtime.stream(tiny.prompt(20), max_new_tokens=400) as first:
                    await anext(first)
                    async with runtime.stream(tiny.prompt(30), max_new_tokens=400):
                        group.start_soon(last)
                        await anyio.sleep(0.02)
        assert len(found) == 12


async def test_generate_is_cancelled_like_a_stream(runtime: Runtime) -> None:
    with anyio.move_on_after(0.05) as scope:
        await runtime.generate(tiny.prompt(20), max_new_tokens=490)
    assert scope.cancelled_caught or sys.gettrace()
    await settled(runtime)


# Ends


async def test_max_new_tokens_and_indices(runtime: Runtime) -> None:
    for count in (1, 2, 7):
        tokens = [token async for token in runtime.stream(tiny.prompt(9), max_new_tokens=count)]
        assert [token.index for token in tokens] == list(range(count))
        assert [token.finish_reason for token in tokens] == [None] * (count - 1) + ["length"]
        assert all(token.logprob <= 0 and token.top_logprobs == () and token.text == "" for token in tokens)


@pytest.mark.parametrize("left", [1, 2, 5])
async def test_a_full_context_ends_an_answer(runtime: Runtime, left: int) -> None:
    answer = await runtime.generate(tiny.prompt(CONTEXT - left), max_new_tokens=50)
    assert len(answer.token_ids) == left and answer.finish_reason == "length"


async def test_stop_ids_of_the_model_end_an_answer(folder: Path, tmp_path: Path) -> None:
    async with Runtime.open(folder) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(20), 12)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tiny.edit(tmp_path, lambda config: config.update(eos_token_id=[wanted[5], 999]))
    first = wanted.index(wanted[5])
    async with Runtime.open(tmp_path) as runtime:
        answer = await runtime.generate(tiny.prompt(20), max_new_tokens=12)
        assert answer.token_ids == tuple(wanted[: first + 1]) and answer.finish_reason == "stop"
        assert (await runtime.generate(tiny.prompt(20), max_new_tokens=first + 1)).finish_reason == "stop"


async def test_text_of_tokens_is_the_text_of_the_answer(anyio_backend: str) -> None:
    async with Runtime.open("demo", max_context_tokens=512) as runtime:
        answer = await runtime.generate("Once upon a time", max_new_tokens=60)
        tokens = [token async for token in runtime.stream("Once upon a time", max_new_tokens=60)]
        assert answer.text == "".join(token.text for token in tokens) and len(answer.text) > 60
        assert answer.token_ids == tuple(token.id for token in tokens)
        assert tokens[-1].finish_reason == answer.finish_reason and not any(token.finish_reason for token in tokens[:-1])
        assert answer.text.strip() == runtime.text.decode(answer.token_ids).strip()


async def test_stop_strings_end_an_answer_before_them(anyio_backend: str) -> None:
    async with Runtime.open("demo", max_context_tokens=512) as runtime:
        whole = (await runtime.generate("Once upon a time", max_new_tokens=60)).text
        for stop in (whole[20:25], whole[7:8], whole[3:30]):
            answer = await runtime.generate("Once upon a time", max_new_tokens=60, stop=stop)
            assert answer.finish_reason == "stop" and answer.text == whole[: whole.index(stop)]
        both = await runtime.generate("Once upon a time", max_new_tokens=60, stop=[whole[40:50], whole[20:25], "never said"])
        assert both.text == whole[: whole.index(whole[20:25])]
        never = await runtime.generate("Once upon a time", max_new_tokens=60, stop="never said")
        assert never.text == whole
        n = await runtime.generate("Once upon a time", max_new_tokens=60, stop=whole[20:25], n=2)
        assert [choice.text for choice in n.choices] == [both.text] * 2
        await settled(runtime)


async def test_chat_and_text_and_ids_are_all_prompts(anyio_backend: str) -> None:
    async with Runtime.open("demo", max_context_tokens=512) as runtime:
        by_text = await runtime.generate("Once upon a time", max_new_tokens=8)
        by_ids = await runtime.generate(runtime.text.encode("Once upon a time"), max_new_tokens=8)
        assert by_text.token_ids == by_ids.token_ids
        assert (await runtime.generate(tuple(runtime.text.encode("Once upon a time")), max_new_tokens=8)).token_ids == by_ids.token_ids


# Disks that fail


@pytest.mark.parametrize("after", [0, 1, 2, 5, 8, 13, 30])
async def test_a_failing_read_fails_its_riders_and_no_later_ones(folder: Path, after: int) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(20), 6)
        left = [after]

        def fail(extent: Extent) -> Exception | None:
            left[0] -= 1
            return DiskError("the drive is gone; plug it in again") if left[0] == -1 else None

        disk.fail = fail
        failed = []

        async def ride(number: int) -> None:
            try:
                await ids_of(runtime, tiny.prompt(20, number), 6)
            except DiskError as error:
                failed.append(str(error))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(ride, number)
        assert failed and set(failed) == {"the drive is gone; plug it in again"}
        await settled(runtime)
        with anyio.fail_after(30):
            for _ in range(3):
                assert await ids_of(runtime, tiny.prompt(20), 6) == wanted


async def test_a_disk_that_always_fails_fails_each_request(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        disk.fail = lambda extent: DiskError("broken")
        for _ in range(4):
            with pytest.raises(DiskError, match="broken"), anyio.fail_after(30):
                await ids_of(runtime, tiny.prompt(20), 6)
        await settled(runtime)


async def test_a_paused_reader_survives_a_failure_that_it_did_not_ride(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        count = OUTBOX + 20
        wanted = await ids_of(runtime, tiny.prompt(20), count)
        async with runtime.stream(tiny.prompt(20), max_new_tokens=count) as slow:
            found = [(await anext(slow)).id]
            await until(lambda: slow.request is not None and not slow.request.has_room)
            disk.fail = lambda extent: DiskError("broken")
            with pytest.raises(DiskError), anyio.fail_after(30):
                await ids_of(runtime, tiny.prompt(10), 5)
            disk.fail = None
            found += [token.id async for token in slow]
        assert found == wanted


async def test_tokens_made_before_a_failure_are_handed_out(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(20), 30)
        async with runtime.stream(tiny.prompt(20), max_new_tokens=30) as stream:
            found = [(await anext(stream)).id for _ in range(3)]
            disk.fail = lambda extent: DiskError("broken")
            with pytest.raises(DiskError):
                async for token in stream:
                    found.append(token.id)
            assert found == wanted[: len(found)]
            assert [token async for token in stream] == []


async def test_a_disk_that_stalls_for_a_second_only_delays(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(20), 6)
        left = [1]

        def delay(extent: Extent) -> float:
            left[0] -= 1
            return 1.0 if left[0] == 0 else 0.0

        disk.delay_s = delay
        start = anyio.current_time()
        assert await ids_of(runtime, tiny.prompt(20), 6) == wanted
        assert left[0] < 0
        profile = runtime.profile(0)
        assert anyio.current_time() - start > 0.5 or profile["events"]["stall"]["max_ms"] > 0


async def test_damaged_weights_are_a_model_error_and_no_crash(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        for data in {id(data): data for data in disk.files.values()}.values():
            start = 8 + int.from_bytes(data[:8], "little")
            data[start:] = b"\xff" * (len(data) - start)  # NaN
        with pytest.raises(ModelError, match=r"NaN|unusable"):
            for _ in range(3):  # what was read ahead is still good
                await ids_of(runtime, tiny.prompt(20), 6)
        await settled(runtime)


# Closing


async def test_closing_while_requests_live_gives_them_a_typed_error(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    errors: list[BaseException] = []

    async def ride(runtime: Runtime, number: int) -> None:
        try:
            await ids_of(runtime, tiny.prompt(20, number), 400)
        except AollmError as error:
            errors.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            async with streamed(folder, disk, max_concurrent_requests=2) as runtime:
                disk.delay_s = 0.001
                for number in range(4):
                    group.start_soon(ride, runtime, number)
                await anyio.sleep(0.1)
    assert len(errors) == 4 and all("closed" in str(error) for error in errors)


@pytest.mark.parametrize("wait_s", [0.0, 0.002, 0.004, 0.008, 0.016, 0.03])
@pytest.mark.parametrize("disk", ["threads", "uring", "portable"])
async def test_closing_while_it_computes_or_reads_does_not_hang(folder: Path, disk: str, wait_s: float) -> None:
    with anyio.fail_after(30):
        async with Runtime.open(folder, max_context_tokens=2000, disk_backend=disk, offload_cpu_layers=0) as runtime:
            async with runtime.stream(tiny.prompt(1500), max_new_tokens=12):
                await anyio.sleep(wait_s)


async def test_closing_while_a_resident_model_computes_does_not_hang(folder: Path) -> None:
    for wait_s in (0.0, 0.005, 0.01, 0.02):
        with anyio.fail_after(30):
            async with Runtime.open(folder, max_context_tokens=2000) as runtime:
                async with runtime.stream(tiny.prompt(1500), max_new_tokens=12):
                    await anyio.sleep(wait_s)


async def test_a_stream_of_a_closed_runtime_is_an_error(folder: Path) -> None:
    async with Runtime.open(folder) as runtime:
        early = runtime.stream(tiny.prompt(5))
        half = runtime.stream(tiny.prompt(5), max_new_tokens=400)
        await anext(half)
    for stream in (early, runtime.stream(tiny.prompt(5))):
        with pytest.raises(AollmError, match=r"clos|not open"), anyio.fail_after(30):
            await anext(stream)
    with pytest.raises(AollmError, match="clos"), anyio.fail_after(30):
        async for _ in half:
            pass


async def test_a_prompt_that_is_being_encoded_when_the_runtime_closes_is_an_error(anyio_backend: str) -> None:
    errors: list[BaseException] = []

    async def ride(runtime: Runtime) -> None:
        try:
            await runtime.generate("Once upon a time")
        except AollmError as error:
            errors.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            async with Runtime.open("demo", max_context_tokens=CONTEXT) as runtime:
                encode, go_on = runtime.text.encode, threading.Event()
                runtime.text.encode = lambda text: go_on.wait(3) and encode(text)  # type: ignore[method-assign]
                group.start_soon(ride, runtime)
                await anyio.sleep(0.05)
            go_on.set()
    assert len(errors) == 1


async def test_a_runtime_that_is_not_open_says_so(folder: Path) -> None:
    runtime = Runtime.open(folder)
    with pytest.raises(AollmError, match=r"async with|open"):
        await runtime.generate([1, 2])
    repr(runtime)


class Ours(Exception):
    """Not aollm's."""


BODIES: dict[str, BaseException] = {
    "error": Ours("mine"),
    "value error": ValueError("mine"),
    "aollm's": RequestError("mine"),
    "group": ExceptionGroup("mine", [Ours("inside")]),
    "nested group": ExceptionGroup("mine", [ExceptionGroup("inner", [Ours("inside")]), ValueError("x")]),
    "keyboard": KeyboardInterrupt("mine"),
    "exit": SystemExit(3),
    "base group": BaseExceptionGroup("mine", [KeyboardInterrupt(), Ours("inside")]),
    "generator": GeneratorExit("mine"),
}


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("name", BODIES)
async def test_an_error_of_the_body_passes_unchanged(folder: Path, name: str, busy: bool) -> None:
    raised = BODIES[name]
    try:
        async with Runtime.open(folder, max_context_tokens=CONTEXT) as runtime:
            stream = runtime.stream(tiny.prompt(20), max_new_tokens=400)
            if busy:
                await anext(stream)
            raise raised
    except BaseException as caught:  # whatever it is, it is to be this one
        assert caught is raised
    else:
        pytest.fail("it was swallowed")


async def test_an_outer_cancel_scope_closes_cleanly(folder: Path) -> None:
    for busy in (False, True):
        with anyio.move_on_after(0.3) as scope:
            async with Runtime.open(folder, max_context_tokens=CONTEXT) as runtime:
                if busy:
                    async for _ in runtime.stream(tiny.prompt(20), max_new_tokens=490):
                        await anyio.sleep(0.01)
                await anyio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_task_group_around_a_runtime_may_be_cancelled(folder: Path) -> None:
    opened = anyio.Event()

    async def serve() -> None:
        async with Runtime.open(folder, max_context_tokens=CONTEXT) as runtime:
            opened.set()
            while True:
                await ids_of(runtime, tiny.prompt(20), 50)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            await opened.wait()
            await anyio.sleep(0.05)
            group.cancel_scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("wait_s", [0.0, 0.002, 0.01, 0.03, 0.06, 0.1, 0.2])
async def test_the_cancel_of_asyncio_itself_closes_cleanly(folder: Path, anyio_backend: str, wait_s: float) -> None:
    """`asyncio.timeout` and `Task.cancel` know nothing of shields."""
    disk = MemoryDisk.of(folder)
    disk.delay_s = 0.002
    before = left()[0]

    async def serve() -> None:
        async with streamed(folder, disk) as runtime:
            while True:
                await ids_of(runtime, tiny.prompt(300), 50)

    for times in (1, 2):
        task = asyncio.create_task(serve())
        for _ in range(times):
            await asyncio.sleep(wait_s)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left()[0] <= before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_cancel_of_asyncio_itself_ends_one_reader(runtime: Runtime, anyio_backend: str) -> None:
    wanted = await ids_of(runtime, tiny.prompt(20), 30)
    for wait_s in (0.0, 0.001, 0.01, 0.03):
        other = asyncio.create_task(ids_of(runtime, tiny.prompt(20), 30))
        task = asyncio.create_task(ids_of(runtime, tiny.prompt(200), 300))
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await other == wanted
        await settled(runtime)


async def test_two_runtimes_at_once(folder: Path) -> None:
    async with Runtime.open(folder, max_context_tokens=CONTEXT) as one, Runtime.open("demo", max_context_tokens=256) as two:
        wanted = await ids_of(one, tiny.prompt(20))
        found: list[Any] = []

        async def ride() -> None:
            found.append(await ids_of(one, tiny.prompt(20)))

        async with anyio.create_task_group() as group:
            group.start_soon(ride)
            assert (await two.generate("Once upon a time", max_new_tokens=20)).text
        assert found == [wanted]


async def test_one_runtime_is_entered_once(folder: Path) -> None:
    runtime = Runtime.open(folder)
    async with runtime:
        pass
    with pytest.raises(AollmError):
        async with runtime:
            pass


# What is left behind


def left() -> tuple[set[str], set[str]]:
    gc.collect()
    threads = {thread.name for thread in threading.enumerate() if "aollm" in thread.name}
    return threads, {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def damaged(folder: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change(tmp_path)
    return tmp_path


def shorten(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


FAILS: dict[str, tuple[Callable[[Path], object], dict[str, Any], type[AollmError]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), {}, ModelError),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), {}, ModelError),
    "short weights": (shorten, {}, ModelError),
    "other sizes": (lambda f: tiny.edit(f, lambda c: c.update(hidden_size=32)), {}, ModelError),
    "no memory": (lambda f: None, {"memory": "1MiB"}, MemoryBudgetError),
    "no gds": (lambda f: None, {"disk_backend": "gds"}, ConfigError),
}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("disk", ["threads", "uring", "portable"])
@pytest.mark.parametrize("name", FAILS)
async def test_opening_that_fails_leaves_nothing(folder: Path, tmp_path: Path, name: str, disk: str) -> None:
    change, fields, error = FAILS[name]
    bad = damaged(folder, tmp_path, change)
    before = left()
    for _ in range(2):
        with pytest.raises(AollmError) as raised:
            async with Runtime.open(bad, **{"disk_backend": disk, **fields}):
                pass
        assert isinstance(raised.value, error), raised.value
    after = left()
    assert after[0] <= before[0] and not [file for file in after[1] - before[1] if "pipe" not in file and "socket" not in file]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("disk", ["threads", "uring", "portable"])
async def test_closing_leaves_nothing(folder: Path, disk: str) -> None:
    before = len(os.listdir("/proc/self/fd")), left()[0]
    for _ in range(3):
        async with Runtime.open(folder, disk_backend=disk, offload_cpu_layers=0, max_context_tokens=CONTEXT) as runtime:
            await ids_of(runtime, tiny.prompt(20), 3)
            await anext(runtime.stream(tiny.prompt(20), max_new_tokens=300))
    assert left()[0] <= before[1] and len(os.listdir("/proc/self/fd")) <= before[0]


async def test_a_closed_runtime_gives_its_memory_back(folder: Path) -> None:
    async def use() -> list[weakref.ref[Any]]:
        async with Runtime.open(folder, offload_cpu_layers=1, max_context_tokens=CONTEXT) as runtime:
            await ids_of(runtime, tiny.prompt(20), 3)
            return [weakref.ref(thing) for thing in (runtime, runtime.engine, runtime.cache.pool, runtime.engine._model.weights.ring)]

    refs = await use()
    await anyio.sleep(0.01)
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


async def test_cancelling_while_it_opens_leaves_nothing(folder: Path) -> None:
    before = left()[0]
    for wait_s in (0.0, 0.001, 0.003, 0.01, 0.02):
        with anyio.move_on_after(wait_s):
            async with Runtime.open(folder, offload_cpu_layers=0) as runtime:
                await ids_of(runtime, tiny.prompt(20), 300)
        assert left()[0] <= before


# What is told

EVENT_FIGURES = {"count", "total_ms", "min_ms", "median_ms", "p95_ms", "max_ms", "mean_ms", "bytes"}
EVENT_NAMES = {
    "layer_load",
    "experts_load",
    "kvload",
    "kvsave",
    "kvcompact",
    "gds_read",
    "safetensor_read",
    "safetensor_pread",
    "offloaded_cpu_to_cuda",
    "compute",
    "stall",
}
PATHS = {"gds", "safetensor-io", "cpu-offloaded-artifacts", "disk-kv-cache", "torch-artifact-io"}


@pytest.mark.parametrize("layers", [0, 1, None])
async def test_the_profile_of_an_answer(folder: Path, tmp_path: Path, layers: int | None) -> None:
    async with Runtime.open(folder, offload_cpu_layers=layers, max_context_tokens=CONTEXT) as runtime:
        await ids_of(runtime, tiny.prompt(20), 3)
        start = runtime.engine.passes
        answer = await runtime.generate(tiny.prompt(20), max_new_tokens=10)
        passes = runtime.engine.passes - start
        profile = answer.profile
        assert {"storage_paths", "events", "bytes_read", "bytes_written", "drive_bytes_per_second", "fraction_of_bound", "limiter"} <= set(
            profile
        )
        assert set(profile["events"]) <= EVENT_NAMES and {"compute", "stall"} <= set(profile["events"])
        for figures in profile["events"].values():
            assert set(figures) == EVENT_FIGURES
            assert 0 <= figures["min_ms"] <= figures["median_ms"] <= figures["p95_ms"] <= figures["max_ms"] <= figures["total_ms"]
        assert passes == 10 and profile["bytes_written"] == 0 and set(profile["storage_paths"]) <= PATHS
        assert profile["limiter"] in ("disk", "compute", "memory") and profile["fraction_of_bound"] > 0
        if layers is None:
            assert profile["bytes_read"] <= 30 * 64 * 4  # rows of the embedding table
        else:
            wanted = runtime.plan.streamed_nbytes_per_pass * passes
            assert 0.7 * wanted <= profile["bytes_read"] <= 1.3 * wanted + runtime.plan.ring_nbytes
            assert profile["storage_paths"] == ["safetensor-io"] and profile["drive_bytes_per_second"] > 0
        json.dumps(profile)
        assert answer.plan is runtime.plan and json.dumps(answer.plan.as_dict()) and json.dumps(answer.cache_state)
        runtime.trace.save(tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert {event["cat"] for event in events} <= EVENT_NAMES and all(event["ph"] in "XM" and event["dur"] >= 0 for event in events)


async def test_stall_partitions_the_time_in_which_compute_waited(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk) as runtime:
        disk.delay_s = 0.005
        answer = await runtime.generate(tiny.prompt(20), max_new_tokens=5)
        waits = sorted((e.start, e.end) for e in runtime.trace.between(0, float("inf")) if e.name in ("stall", "compute"))
        assert all(left[1] <= right[0] + 1e-4 for left, right in pairwise(waits))
        assert answer.profile["events"]["stall"]["total_ms"] > 5


async def test_progress_grows_while_a_prompt_is_prefilled(folder: Path) -> None:
    disk = MemoryDisk.of(folder)
    async with streamed(folder, disk, prefetch_depth=1) as runtime:
        disk.delay_s = 0.02
        seen: list[float] = []

        async def watch(stream: Any) -> None:
            while True:
                seen.append(stream.progress)
                await anyio.sleep(0.01)

        async with anyio.create_task_group() as group, runtime.stream(tiny.prompt(100), max_new_tokens=1) as stream:
            group.start_soon(watch, stream)
            await anext(stream)
            group.cancel_scope.cancel()
        assert seen == sorted(seen) and len(set(seen)) > 2 and all(0 <= value <= 1 for value in seen)
