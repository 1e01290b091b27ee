"""Prompts whose beginning was computed before, by this process or another one: found again, and never mistaken."""

import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tiny
from anyio.from_thread import start_blocking_portal
from safetensors.torch import load_file, save_file

from aollm import ConfigError, Runtime
from aollm.maths.attention import BLOCK
from aollm.stores.housekeeping import ls, pin

pytestmark = [pytest.mark.anyio]
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")

LAYERS = 2
TOKEN = LAYERS * 2 * 2 * 16 * 4
PROMPT = tiny.prompt(2 * BLOCK + 300)
EXACT = ["chunked", "paged", "streamed-segmented", "log-structured-journal", "sliding-window-ring-buffer", "tiered-write-back"]
BLOCK_NBYTES = LAYERS * (4096 + BLOCK * TOKEN // LAYERS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, max_position_embeddings=8192)


def opened(folder: Path, cache: Path, strategy: str = "paged", **fields: Any) -> Runtime:
    window = {"kv_cache_window_tokens": 8192} if strategy == "sliding-window-ring-buffer" else {}
    lifecycle = {"kv_cache_lifecycle": "persistent"} if strategy != "resident" else {}
    how = {"kv_cache_memory": 4096 * TOKEN, "dense_projection_chunk_rows": 64, "max_concurrent_requests": 4, **lifecycle, **window}
    return Runtime.open(folder, kv_cache_strategy=strategy, cache_dir=cache, **{**how, **fields})


async def ask(runtime: Runtime, prompt: list[int] = PROMPT, count: int = tiny.COUNT, **fields: Any) -> tuple[list[int], int, str | None]:
    """The tokens, how many of the prompt's were found, and why not more."""
    async with runtime.stream(prompt, max_new_tokens=count, **fields) as stream:
        ids = [token.id async for token in stream]
        assert stream.request is not None
        return ids, stream.request.prefix_hit_tokens, stream.request.prefix_miss_reason


async def told(folder: Path, cache: Path, prompt: list[int] = PROMPT, strategy: str = "paged", **fields: Any) -> tuple[list[int], int, str]:
    """The same of a runtime that is opened for it, and closed."""
    async with opened(folder, cache, strategy, **fields) as runtime:
        ids, hit, reason = await ask(runtime, prompt)
        return ids, hit, reason or ""


@pytest.fixture(scope="session")
def wanted(folder: Path) -> list[int]:
    """What follows `PROMPT`."""

    async def find() -> list[int]:
        async with opened(folder, folder, "resident") as runtime:
            return (await ask(runtime))[0]

    with start_blocking_portal() as portal:
        return portal.call(find)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def data_files(cache: Path) -> list[Path]:
    names = {"LOCK", "manifest", "identity.json"}
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name not in names)


# Found again


@pytest.mark.parametrize("strategy", EXACT)
async def test_a_prompt_is_found_by_the_next_runtime(folder: Path, tmp_path: Path, wanted: list[int], strategy: str) -> None:
    ids, hit, reason = await told(folder, tmp_path, strategy=strategy)
    assert (ids, hit) == (wanted, 0) and "nothing is stored" in reason
    for _ in range(2):
        async with opened(folder, tmp_path, strategy) as runtime:
            assert await ask(runtime) == (wanted, len(PROMPT) - 1, None)
            start = runtime.engine.passes
            assert await ask(runtime) == (wanted, len(PROMPT) - 1, None)  # while it is open too
            assert runtime.engine.passes - start == len(wanted)


async def test_a_longer_prompt_goes_on_from_what_is_stored(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    longer = [*PROMPT, *wanted, *tiny.prompt(900, 5)]
    expected, _, _ = await told(folder, tmp_path / "other", longer)
    await told(folder, tmp_path)
    ids, hit, reason = await told(folder, tmp_path, longer)
    assert ids == expected and len(PROMPT) <= hit < len(PROMPT) + len(wanted) and "nothing is stored past" in reason
    assert (await told(folder, tmp_path, longer))[:2] == (expected, len(longer) - 1)
    assert (await told(folder, tmp_path))[:2] == (wanted, len(PROMPT) - 1)


async def test_what_is_quantized_is_found_too(folder: Path, tmp_path: Path) -> None:
    first, _, _ = await told(folder, tmp_path, strategy="quantized-cold-tier")
    second, hit, _ = await told(folder, tmp_path, strategy="quantized-cold-tier")
    assert hit == len(PROMPT) - 1 and len(first) == len(second) == tiny.COUNT
    third, hit, _ = await told(folder, tmp_path, strategy="quantized-cold-tier")
    assert (third, hit) == (second, len(PROMPT) - 1)


SCRIPT = """
import json, os, sys, anyio
from aollm import Runtime

async def main():
    folder, cache, prompt, options, wait = json.loads(sys.argv[1])
    async with Runtime.open(folder, cache_dir=cache, **options) as runtime:
        async with runtime.stream(prompt, max_new_tokens=6) as stream:
            ids = [token.id async for token in stream]
            hit = stream.request.prefix_hit_tokens
        await runtime.cache.flush()
        print(json.dumps([ids, hit]), flush=True)
        if wait:
            await anyio.sleep_forever()

anyio.run(main)
"""


@asynccontextmanager
async def elsewhere(folder: Path, cache: Path, wait: bool) -> AsyncIterator[tuple[list[int], int]]:
    """Another process that asks the same; if it is to wait it is killed in the end."""
    options = {
        "kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent", "kv_cache_memory": 4096 * TOKEN,
        "dense_projection_chunk_rows": 64, "max_concurrent_requests": 4,
    }  # fmt: skip
    argument = json.dumps([str(folder), str(cache), PROMPT, options, wait])
    async with await anyio.open_process([sys.executable, "-c", SCRIPT, argument], stderr=None) as process:
        assert process.stdout is not None
        said = b""
        while not said.endswith(b"\n"):
            said += await process.stdout.receive()
        ids, hit = json.loads(said)
        try:
            yield ids, hit
        finally:
            if wait:
                os.kill(process.pid, signal.SIGKILL)
            await process.wait()


@ONE_LOOP
async def test_what_a_killed_process_had_flushed_is_found(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    async with elsewhere(folder, tmp_path, wait=True) as (ids, hit):
        assert (ids, hit) == (wanted, 0)
    assert await told(folder, tmp_path) == (wanted, len(PROMPT) - 1, "") or (await told(folder, tmp_path))[1] >= 2 * BLOCK


@ONE_LOOP
async def test_two_processes_share_a_folder(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    async with elsewhere(folder, tmp_path, wait=True):
        ids, hit, _ = await told(folder, tmp_path)
        assert ids == wanted and hit >= 2 * BLOCK
    async with opened(folder, tmp_path) as runtime:
        async with elsewhere(folder, tmp_path, wait=False) as (ids, _):
            assert ids == wanted
        assert (await ask(runtime))[0] == wanted


async def test_two_runtimes_share_a_folder(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    other = tiny.prompt(len(PROMPT), 3)
    async with opened(folder, tmp_path) as one, opened(folder, tmp_path) as two:
        found: list[list[int]] = []

        async def ride(runtime: Runtime, prompt: list[int]) -> None:
            found.append((await ask(runtime, prompt))[0])

        async with anyio.create_task_group() as group:
            for runtime in (one, two):
                group.start_soon(ride, runtime, PROMPT)
                group.start_soon(ride, runtime, other)
        assert sorted(found) == sorted([wanted, wanted, (await ask(two, other))[0], (await ask(one, other))[0]])
        await one.cache.flush()
        await two.cache.flush()
    assert len(ls(tmp_path / "kv_cache_paged")) == 2
    ids, hit, _ = await told(folder, tmp_path)
    assert ids == wanted and hit >= 2 * BLOCK


# Not found


async def test_a_prompt_that_goes_another_way_says_where(folder: Path, tmp_path: Path) -> None:
    at = BLOCK + 200
    other = [*PROMPT[:at], (PROMPT[at] + 1) % 256, *PROMPT[at + 1 :]]
    expected, _, _ = await told(folder, tmp_path / "other", other)
    await told(folder, tmp_path)
    assert await told(folder, tmp_path, other) == (expected, at, f"diverged at token {at}")
    async with opened(folder, tmp_path) as runtime:
        assert (await ask(runtime, other)) == (expected, len(other) - 1, None)


async def test_other_weights_are_another_model(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    await told(folder, tmp_path / "cache")
    changed = copied(folder, tmp_path / "model")
    tensors = load_file(changed / "model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * 1.01
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    _, hit, reason = await told(changed, tmp_path / "cache")
    assert hit == 0 and "other weights" in reason
    assert (await told(folder, tmp_path / "cache"))[:2] == (wanted, len(PROMPT) - 1)
    same = copied(folder, tmp_path / "same")
    assert (await told(same, tmp_path / "cache"))[:2] == (wanted, len(PROMPT) - 1)


async def test_another_tokenizer_or_configuration_is_another_model(folder: Path, tmp_path: Path) -> None:
    await told(folder, tmp_path / "cache")
    changed = copied(folder, tmp_path / "model")
    (changed / "chat_template.jinja").write_text("{{ messages[0].content }}")
    _, hit, reason = await told(changed, tmp_path / "cache")
    assert hit == 0 and "other tokenizer" in reason
    again = copied(folder, tmp_path / "again")
    tiny.edit(again, lambda config: config.update(rms_norm_eps=1e-3))
    _, hit, reason = await told(again, tmp_path / "cache")
    assert hit == 0 and "other" in reason


async def test_salts_keep_prompts_apart(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    async with opened(folder, tmp_path) as runtime:
        assert (await ask(runtime, cache_salt="one"))[:2] == (wanted, 0)
        assert (await ask(runtime, cache_salt="two"))[:2] == (wanted, 0)
        assert (await ask(runtime))[:2] == (wanted, 0)
        await runtime.cache.flush()
    async with opened(folder, tmp_path) as runtime:
        assert (await ask(runtime, cache_salt="two"))[:2] == (wanted, len(PROMPT) - 1)
        assert (await ask(runtime, cache_salt="three"))[:2] == (wanted, 0)


@ONE_LOOP
@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("where", ["header", "payload", "short"])
async def test_what_was_damaged_is_a_miss(folder: Path, tmp_path: Path, wanted: list[int], strategy: str, where: str) -> None:
    await told(folder, tmp_path, strategy=strategy)
    file = max(data_files(tmp_path), key=lambda path: path.stat().st_size)
    if where == "short":
        os.truncate(file, file.stat().st_size // 2)
    else:
        data = bytearray(file.read_bytes())
        for at in range(0 if where == "header" else 4096 + 1000, len(data), 4096 if where == "header" else 60_000):
            data[at] ^= 0x40
        file.write_bytes(data)
    async with opened(folder, tmp_path, strategy) as runtime:
        ids, _, _ = await ask(runtime)
        assert ids == wanted
        state = runtime.cache_state()
        assert where == "short" or state["misses_corrupt"] + state["misses_unreadable"] > 0
    assert (await told(folder, tmp_path, strategy=strategy))[:2] == (wanted, len(PROMPT) - 1)


async def test_a_manifest_that_was_damaged_is_set_aside(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    await told(folder, tmp_path)
    (manifest,) = tmp_path.rglob("manifest")
    data = bytearray(manifest.read_bytes())
    data[10] ^= 1
    manifest.write_bytes(data)
    assert (await told(folder, tmp_path))[:2] == (wanted, 0)
    assert (await told(folder, tmp_path))[:2] == (wanted, len(PROMPT) - 1)


# Room and age


@ONE_LOOP
async def test_what_is_over_the_quota_goes(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    quota = 4 * BLOCK_NBYTES
    expected = []
    async with opened(folder, tmp_path, kv_cache_max_bytes=quota) as runtime:
        for seed in range(4):
            expected.append((await ask(runtime, tiny.prompt(len(PROMPT), seed)))[0])
            await runtime.cache.flush()
    assert sum(int(str(entry["bytes"])) for entry in ls(tmp_path / "kv_cache_paged")) <= quota
    async with opened(folder, tmp_path, kv_cache_max_bytes=quota) as runtime:
        ids, hit, _ = await ask(runtime, tiny.prompt(len(PROMPT), 3))
        assert ids == expected[3] and hit == len(PROMPT) - 1  # the last used stay
    ids, hit, reason = await told(folder, tmp_path, kv_cache_max_bytes=quota)
    assert ids == wanted == expected[0] and hit < len(PROMPT) - 1 and reason


async def test_an_evicted_prompt_says_so(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    async with opened(folder, tmp_path, kv_cache_max_bytes=3 * BLOCK_NBYTES) as runtime:
        await ask(runtime)
        await runtime.cache.flush()
        for seed in (1, 2):
            await ask(runtime, tiny.prompt(len(PROMPT), seed))
            await runtime.cache.flush()
        await anyio.sleep(0.1)
        ids, hit, reason = await ask(runtime)
        assert ids == wanted and hit < len(PROMPT) - 1 and reason == "evicted"


async def test_what_is_too_old_goes(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    await told(folder, tmp_path)
    await anyio.sleep(0.3)
    async with opened(folder, tmp_path, kv_cache_max_age_s=0.2) as runtime:
        await ask(runtime, tiny.prompt(50), 1)
        await runtime.cache.flush()
        await anyio.sleep(0.2)
        ids, hit, reason = await ask(runtime)
        assert ids == wanted and hit == 0 and reason == "evicted"


async def test_what_is_pinned_stays(folder: Path, tmp_path: Path, wanted: list[int]) -> None:
    await told(folder, tmp_path)
    await anyio.to_thread.run_sync(pin, tmp_path / "kv_cache_paged", "", True)
    async with opened(folder, tmp_path, kv_cache_max_age_s=0.01, kv_cache_max_bytes=BLOCK_NBYTES) as runtime:
        await ask(runtime, tiny.prompt(len(PROMPT), 1))
        await runtime.cache.flush()
        await anyio.sleep(0.1)
        assert await ask(runtime) == (wanted, len(PROMPT) - 1, None)


async def test_a_quota_that_no_block_fits_into_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_max_bytes"):
        async with opened(folder, tmp_path, kv_cache_max_bytes=1000):
            pass


async def test_keys_that_depend_on_the_length_are_not_shared(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    folder = tiny.save(tmp_path / "model", num_hidden_layers=1, rope_parameters=rope)
    with pytest.raises(ConfigError, match="runtime-scoped"):
        async with opened(folder, tmp_path / "cache"):
            pass
    async with Runtime.open(folder, kv_cache_strategy="paged", cache_dir=tmp_path / "cache") as runtime:
        assert await ask(runtime, tiny.prompt(100))


# With little memory


@ONE_LOOP
@pytest.mark.parametrize("strategy", ["paged", "tiered-write-back", "log-structured-journal"])
async def test_it_is_found_with_memory_for_a_part_of_it(folder: Path, tmp_path: Path, wanted: list[int], strategy: str) -> None:
    for hit in (0, len(PROMPT) - 1, len(PROMPT) - 1):
        ids, found, _ = await told(folder, tmp_path, strategy=strategy, kv_cache_memory=1600 * TOKEN)
        assert (ids, found) == (wanted, hit)


async def test_many_prompts_with_one_beginning(folder: Path, tmp_path: Path) -> None:
    prompts = [[*PROMPT, *tiny.prompt(50 + seed, seed)] for seed in range(4)]
    expected = []
    async with opened(folder, tmp_path, "resident") as runtime:
        for prompt in prompts:
            expected.append((await ask(runtime, prompt))[0])
    await told(folder, tmp_path)
    async with opened(folder, tmp_path) as runtime:
        found: dict[int, tuple[list[int], int]] = {}

        async def ride(number: int) -> None:
            ids, hit, _ = await ask(runtime, prompts[number])
            found[number] = ids, hit

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(ride, number)
        assert [found[number][0] for number in range(4)] == expected
        assert all(found[number][1] >= len(PROMPT) for number in range(4))
