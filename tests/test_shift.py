"""A full context: the older half goes, what is kept is as if it had always stood there, and the answer goes on."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
import torch

from aollm import Runtime, StoreError, Token
from aollm.stores.cell import Cell
from aollm.stores.records import Loaded

pytestmark = [pytest.mark.anyio]
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")

LAYERS = 2
TOKEN = LAYERS * 2 * 2 * 16 * 4
CONTEXT = 128
LEAST = 1600
"""Tokens of memory that a last block and a pass of one chunk need."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer: its keys and values depend on their own token and position alone."""
    return tiny.save(tmp_path_factory.mktemp("flat"), num_hidden_layers=1, max_position_embeddings=8192)


def opened(folder: Path, cache: Path, strategy: str = "resident", context: int = CONTEXT, tokens: int = 8192, **fields: Any) -> Runtime:
    how = {"dense_projection_chunk_rows": 64, "max_concurrent_requests": 4, "max_context_tokens": context}
    return Runtime.open(folder, kv_cache_strategy=strategy, kv_cache_memory=tokens * TOKEN, cache_dir=cache, **{**how, **fields})


async def ids_of(runtime: Runtime, prompt: list[int], count: int, **fields: Any) -> list[int]:
    return [token.id async for token in runtime.stream(prompt, max_new_tokens=count, **fields)]


async def settled(runtime: Runtime) -> None:
    with anyio.fail_after(30):
        while runtime.engine.riders or runtime.cache.pool.reserved or runtime.cache.pool.all_rows:  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)


async def asked_anew(runtime: Runtime, prompt: list[int], count: int, keep: int, context: int) -> list[int]:
    """The answer when, whenever `context` tokens are reached, a fresh prompt has what is kept."""
    seen, found = list(prompt), list[int]()
    while len(found) < count:
        new = await ids_of(runtime, seen, min(context - len(seen) + 1, count - len(found)))
        found += new
        seen += new
        kept = min(keep, context // 2)
        seen = seen[:kept] + seen[kept + (context - kept) // 2 :]
    return found


@pytest.mark.parametrize("keep", [0, 4, 50, 1000])
async def test_prefill_answers_as_a_fresh_prompt_of_what_is_kept(folder: Path, tmp_path: Path, keep: int) -> None:
    prompt, count = tiny.prompt(100), 220
    async with opened(folder, tmp_path, context=2 * CONTEXT) as runtime:
        wanted = await asked_anew(runtime, prompt, count, keep, CONTEXT)
    async with opened(folder, tmp_path) as runtime:
        assert await ids_of(runtime, prompt, count, context_shift="prefill", keep_tokens=keep) == wanted
        await settled(runtime)


@ONE_LOOP
@pytest.mark.parametrize("keep", [0, 4, 50])
async def test_turned_keys_are_those_of_their_new_positions(flat: Path, tmp_path: Path, keep: int) -> None:
    prompt, count, rows = tiny.prompt(100), 220, []
    async with opened(flat, tmp_path) as runtime:
        for shift in ("prefill", "rotate"):
            how: dict[str, Any] = {"max_new_tokens": count, "context_shift": shift, "keep_tokens": keep, "logprobs": 1000}
            tokens = [token async for token in runtime.stream(prompt, **how)]
            rows.append(torch.tensor([[value for _, value in sorted(token.top_logprobs)] for token in tokens]))
    assert rows[0].shape == (count, 256)
    assert torch.allclose(rows[0], rows[1], atol=2e-4)


@ONE_LOOP
@pytest.mark.parametrize("shift", ["rotate", "prefill"])
async def test_an_answer_goes_on_past_the_context_and_is_whole(tmp_path: Path, shift: str) -> None:
    async with Runtime.open("demo", max_context_tokens=CONTEXT, cache_dir=tmp_path) as runtime:
        seen: list[Token] = []
        passes = runtime.engine.passes
        async for token in runtime.stream("Once upon a time", max_new_tokens=500, context_shift=shift):
            seen.append(token)
        assert seen[-1].finish_reason in ("length", "stop")
        text = "".join(token.text for token in seen)
        assert [token.index for token in seen] == list(range(len(seen)))
        ids = [token.id for token in seen if token.id not in runtime.text.stop_ids]
        whole = runtime.text.decoder(())
        assert text == "".join(whole.push(number) for number in ids) + whole.finish()
        assert runtime.engine.passes - passes == len(seen)
        await settled(runtime)


@ONE_LOOP
@pytest.mark.parametrize("shift", ["rotate", "prefill"])
async def test_it_goes_on_as_long_as_one_likes(folder: Path, tmp_path: Path, shift: str) -> None:
    async with opened(folder, tmp_path) as runtime:
        tokens = [token async for token in runtime.stream(tiny.prompt(100), max_new_tokens=6 * CONTEXT, context_shift=shift)]
        assert len(tokens) == 6 * CONTEXT and tokens[-1].finish_reason == "length"
        assert all(token.logprob <= 0 for token in tokens)
        await settled(runtime)


async def test_stop_ends_at_the_context(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path) as runtime:
        tokens = [token async for token in runtime.stream(tiny.prompt(100), max_new_tokens=500)]
        assert len(tokens) == CONTEXT - 100 and tokens[-1].finish_reason == "length"
        shifted = await ids_of(runtime, tiny.prompt(100), 500, context_shift="rotate")
        assert shifted[: len(tokens)] == [token.id for token in tokens]


async def test_branches_shift_each_for_itself(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path) as runtime:
        for shift in ("rotate", "prefill"):
            alone = await ids_of(runtime, tiny.prompt(100), 150, context_shift=shift)
            answer = await runtime.generate(tiny.prompt(100), n=3, max_new_tokens=150, context_shift=shift)
            assert [list(choice.token_ids) for choice in answer.choices] == [alone] * 3
        await settled(runtime)


@ONE_LOOP
@pytest.mark.parametrize("shift", ["rotate", "prefill"])
@pytest.mark.parametrize("keep", [4, 900, 1030])
@pytest.mark.parametrize("strategy", ["paged", "tiered-write-back", "log-structured-journal"])
async def test_blocks_on_disk_shift_as_those_in_memory_do(folder: Path, tmp_path: Path, strategy: str, keep: int, shift: str) -> None:
    context, prompt = 2600, tiny.prompt(2580)
    how: dict[str, Any] = {"context_shift": shift, "keep_tokens": keep}
    async with opened(folder, tmp_path, context=context) as runtime:
        wanted = await ids_of(runtime, prompt, 40, **how)
    async with opened(folder, tmp_path, strategy, context, LEAST) as runtime:
        assert await ids_of(runtime, prompt, 40, **how) == wanted
        await settled(runtime)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@ONE_LOOP
async def test_a_window_is_prefilled_again(folder: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"context_shift": "rotate"}
    async with opened(folder, tmp_path) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(100), 100, context_shift="prefill")
    async with opened(folder, tmp_path, "sliding-window-ring-buffer", kv_cache_window_tokens=512, tokens=LEAST) as runtime:
        assert await ids_of(runtime, tiny.prompt(100), 100, **how) == wanted
        await settled(runtime)


@pytest.mark.parametrize("shift", ["rotate", "prefill"])
async def test_a_block_that_cannot_be_read_is_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: str
) -> None:  # fmt: skip
    context, prompt = 2600, tiny.prompt(2580)
    async with opened(folder, tmp_path, context=context) as runtime:
        wanted = await ids_of(runtime, prompt, 40, context_shift="prefill")
    async with opened(folder, tmp_path, "paged", context, LEAST) as runtime:
        records, asked = runtime.cache.records, 0
        assert records is not None
        read = records.read_apart

        async def fails_once(cell: Cell) -> Loaded:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise StoreError("unreadable: a bad sector")
            return await read(cell)

        monkeypatch.setattr(records, "read_apart", fails_once)
        assert await ids_of(runtime, prompt, 40, context_shift=shift) == wanted
        assert asked or shift == "prefill"
        await settled(runtime)


@ONE_LOOP
async def test_turning_a_long_context_takes_no_more_memory_than_there_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    context, most = 7000, 0
    async with opened(folder, tmp_path, context=context) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(context - 4), 12, context_shift="rotate")
    async with opened(folder, tmp_path, "tiered-write-back", context, LEAST, max_concurrent_requests=1) as runtime:
        pool = runtime.cache.pool
        fill = pool.fill

        def filled(layer: int, rows: int) -> None:
            nonlocal most
            fill(layer, rows)
            most = max(most, pool.all_rows)

        monkeypatch.setattr(pool, "fill", filled)
        assert await ids_of(runtime, tiny.prompt(context - 4), 12, context_shift="rotate") == wanted
        assert 0 < most <= pool.tokens * pool.layers
        await settled(runtime)


@ONE_LOOP
async def test_others_ride_on_while_one_shifts(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path) as runtime:
        wanted = [await ids_of(runtime, tiny.prompt(90 + seed, seed), 100, context_shift="rotate") for seed in range(3)]
        found: dict[int, list[int]] = {}

        async def ride(seed: int) -> None:
            found[seed] = await ids_of(runtime, tiny.prompt(90 + seed, seed), 100, context_shift="rotate")

        async with anyio.create_task_group() as group:
            for seed in range(3):
                group.start_soon(ride, seed)
        assert [found[seed] for seed in range(3)] == wanted
        await settled(runtime)


@ONE_LOOP
async def test_what_was_turned_is_not_found_by_its_tokens(folder: Path, tmp_path: Path) -> None:
    context, prompt = 2600, tiny.prompt(2580)
    async with opened(folder, tmp_path, context=context) as runtime:
        wanted = await ids_of(runtime, prompt, 10)
    persistent: dict[str, Any] = {"kv_cache_lifecycle": "persistent"}
    async with opened(folder, tmp_path, "paged", context, LEAST, **persistent) as runtime:
        turned = await ids_of(runtime, prompt, 60, context_shift="rotate")
        assert turned[:10] == wanted
        assert await ids_of(runtime, prompt, 10) == wanted
    seen = prompt + turned
    kept = seen[:4] + seen[4 + (context - 4) // 2 :]
    async with opened(folder, tmp_path, "paged", context, LEAST, **persistent) as runtime:
        async with runtime.stream(kept, max_new_tokens=1) as stream:
            await anext(stream)
            assert stream.request is not None and stream.request.prefix_hit_tokens <= 4
        assert await ids_of(runtime, prompt, 10) == wanted
