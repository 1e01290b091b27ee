"""Conversations: every turn answers as the whole conversation asked at once would be, and computes only what is new."""

import shutil
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest
import tiny
from safetensors.torch import load_file, save_file

from aollm import RequestError, Runtime, StoreError
from aollm.demo import MODEL
from aollm.demo.story import story
from aollm.maths.attention import BLOCK
from aollm.session import Session
from aollm.stores.cell import Cell
from aollm.stores.records import Loaded

pytestmark = [pytest.mark.anyio]
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")

TOKEN = 6 * 2 * 2 * 32 * 4
LEAST = 1200
TURNS = ["What is 17 + 25?", "Tell me a story about a cat.", "Count from 3 to 9.", "Which day comes after Monday?"]
STORES: dict[str, dict[str, Any]] = {
    "resident": {"kv_cache_strategy": "resident"},
    "paged": {"kv_cache_strategy": "paged"},
    "tiered": {"kv_cache_strategy": "tiered-write-back"},
    "ring": {"kv_cache_strategy": "sliding-window-ring-buffer", "kv_cache_window_tokens": 4096},
    "persistent": {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent"},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32, whose greedy tokens do not hang on how rows are cut."""
    folder = Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("demo") / "model"))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny.edit(folder, lambda config: config.update(dtype="float32", torch_dtype="float32"))
    return folder


def opened(folder: Path, cache: Path, store: str = "resident", tokens: int = 3 * 4096, **fields: Any) -> Runtime:
    how = {"max_context_tokens": 4096, "max_concurrent_requests": 4, "kv_cache_memory": tokens * TOKEN, "cache_dir": cache}
    return Runtime.open(folder, **{**how, **STORES[store], **fields})


async def turn(session: Session, message: str, count: int = 24) -> tuple[list[int], int]:
    """The answer, and how many tokens of its prompt were computed."""
    async with session.stream(message, max_new_tokens=count) as stream:
        ids = [token.id async for token in stream]
        assert stream.request is not None
        await stream.ended()
        return ids, len(stream.request.prompt) - stream.request.prefix_hit_tokens


async def at_once(runtime: Runtime, messages: list[dict[str, Any]], count: int = 24) -> list[int]:
    return [token.id async for token in runtime.stream(messages, max_new_tokens=count)]


async def until_empty(runtime: Runtime) -> None:
    with anyio.fail_after(30):
        while runtime.cache.pool.reserved or runtime.cache.pool.all_rows:  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)


def long_message(seed: int, tokens: int) -> str:
    """A text of a little more than `tokens` tokens."""
    random, text = Random(seed), ""
    while len(text) < 5 * tokens:
        text += story(random) + "\n\n"
    return text


@ONE_LOOP
@pytest.mark.parametrize("store", STORES)
async def test_turns_answer_as_the_whole_conversation_does(folder: Path, tmp_path: Path, store: str) -> None:
    async with opened(folder, tmp_path, store) as runtime, runtime.session() as session:
        for number, message in enumerate(TURNS):
            asked = [*session.messages, {"role": "user", "content": message}]
            ids, computed = await turn(session, message)
            assert number == 0 or computed < 40
            async with Runtime.open(folder, max_context_tokens=4096) as other:
                assert ids == await at_once(other, asked)
            assert session.messages[:-1] == asked and session.messages[-1]["role"] == "assistant"
        await session.aclose()
        await until_empty(runtime)


@ONE_LOOP
@pytest.mark.parametrize("store", ["paged", "tiered", "ring", "persistent"])
async def test_what_was_said_long_ago_may_be_on_disk(folder: Path, tmp_path: Path, store: str) -> None:
    messages = [long_message(1, 2 * BLOCK), *TURNS[:2]]
    async with opened(folder, tmp_path) as other, other.session() as session:
        wanted = [(await turn(session, message))[0] for message in messages]
    how: dict[str, Any] = {"max_concurrent_requests": 1, "dense_projection_chunk_rows": 32}
    async with opened(folder, tmp_path, store, LEAST, **how) as runtime, runtime.session() as session:
        for number, message in enumerate(messages):
            ids, computed = await turn(session, message)
            assert ids == wanted[number] and (number == 0 or computed < 40)
            assert runtime.cache.pool.all_rows <= LEAST * 6
        await session.aclose()
        await until_empty(runtime)


@ONE_LOOP
async def test_rows_are_computed_for_what_is_new(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path) as runtime, runtime.session() as session:
        await turn(session, long_message(2, 500))
        first = session.store
        assert first is not None and first.tokens > 500
        runtime.trace._events.clear()
        ids, computed = await turn(session, TURNS[0])
        assert session.store is first
        rows: dict[str, int] = {}
        for event in runtime.trace.between(0, float("inf")):
            if event.name == "compute" and event.layer == 0:
                rows[event.label] = rows.get(event.label, 0) + event.rows
        assert rows and set(rows.values()) == {computed + len(ids) - 1}


@pytest.mark.parametrize("store", ["resident", "paged"])
async def test_a_turn_that_is_left_early_keeps_what_was_heard(folder: Path, tmp_path: Path, store: str) -> None:
    async with opened(folder, tmp_path, store) as runtime, runtime.session() as session:
        await turn(session, TURNS[0])
        heard = []
        async with session.stream(TURNS[1], max_new_tokens=200) as stream:
            async for token in stream:
                heard.append(token.text)
                if len(heard) == 7:
                    break
        await stream.ended()
        assert session.messages[-1] == {"role": "assistant", "content": "".join(heard)}
        asked = [*session.messages, {"role": "user", "content": TURNS[2]}]
        ids, computed = await turn(session, TURNS[2])
        assert computed < 40 and ids == await at_once(runtime, asked)
        session.stream(TURNS[3])  # nobody listens
        asked = [*session.messages[:-1], {"role": "user", "content": TURNS[0]}]
        assert (await turn(session, TURNS[0]))[0] == await at_once(runtime, asked)


@pytest.mark.parametrize("store", ["resident", "paged", "persistent"])
async def test_branches_share_and_then_differ(folder: Path, tmp_path: Path, store: str) -> None:
    async with opened(folder, tmp_path, store) as runtime, runtime.session() as session:
        await turn(session, long_message(3, 1200))
        async with session.branch() as branch:
            found: dict[str, tuple[list[int], int]] = {}
            asked = session.messages

            async def ride(which: Session, message: str) -> None:
                found[message] = await turn(which, message)

            async with anyio.create_task_group() as group:
                group.start_soon(ride, session, TURNS[0])
                group.start_soon(ride, branch, TURNS[1])
            for message in TURNS[:2]:
                ids, computed = found[message]
                assert computed < 40 and ids == await at_once(runtime, [*asked, {"role": "user", "content": message}])
            assert branch.messages != session.messages and branch.messages[:1] == session.messages[:1]
        assert (await turn(session, TURNS[2]))[1] < 40
        await session.aclose()
        await until_empty(runtime)


@pytest.mark.parametrize("store", STORES)
async def test_closing_gives_everything_back(folder: Path, tmp_path: Path, store: str) -> None:
    async with opened(folder, tmp_path, store) as runtime:
        for leave in (False, True):
            session = runtime.session()
            stream = session.stream(TURNS[1], max_new_tokens=100)
            await anext(stream)
            if not leave:
                async for _ in stream:
                    pass
            await session.aclose()
            await session.aclose()
            with pytest.raises(RequestError, match="closed"):
                session.stream("Hello")
            await until_empty(runtime)
        with pytest.raises(RequestError, match="branch"):
            runtime.session().stream("Hello", n=2)


@ONE_LOOP
@pytest.mark.parametrize("store", ["resident", "paged"])
async def test_who_is_idle_makes_way(folder: Path, tmp_path: Path, store: str) -> None:
    async with opened(folder, tmp_path, store, 4096 if store == "resident" else 2048 + 300) as runtime:
        sessions = [runtime.session() for _ in range(3)]
        for number, session in enumerate(sessions):
            await turn(session, long_message(number, 1100))
        assert await runtime.generate(tiny.prompt(3000), max_new_tokens=4)
        assert any(session.store is None or session.store.closed for session in sessions)
        for session in sessions:  # they go on all the same
            asked = [*session.messages, {"role": "user", "content": TURNS[0]}]
            assert (await turn(session, TURNS[0]))[0] == await at_once(runtime, asked)
        for session in sessions:
            await session.aclose()
        await until_empty(runtime)


@ONE_LOOP
async def test_what_left_the_window_is_computed_again(folder: Path, tmp_path: Path) -> None:
    window: dict[str, Any] = {"kv_cache_window_tokens": 600, "dense_projection_chunk_rows": 32}
    messages = [long_message(5, 2500), TURNS[0], TURNS[1]]
    async with opened(folder, tmp_path, "ring", **window) as runtime, runtime.session() as session:
        for message in messages:
            asked = [*session.messages, {"role": "user", "content": message}]
            ids, computed = await turn(session, message)
            assert message == messages[0] or computed < 40
            assert ids == await at_once(runtime, asked)
        session._messages = [{"role": "user", "content": long_message(5, 1200)}]  # another past, whose window is gone
        session._said = ["Yes."]
        asked = [*session.messages, {"role": "user", "content": TURNS[2]}]
        ids, computed = await turn(session, TURNS[2])
        assert computed > 1000 and ids == await at_once(runtime, asked)


@ONE_LOOP
async def test_many_conversations_at_once(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path, "paged", 5000) as runtime:
        found: dict[int, list[list[int]]] = {}

        async def talk(number: int) -> None:
            async with runtime.session([{"role": "system", "content": f"You are helper {number}."}]) as session:
                found[number] = [(await turn(session, message))[0] for message in TURNS]

        for number in range(4):
            await talk(number)
        alone = dict(found)
        found.clear()
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(talk, number)
        assert found == alone
        await until_empty(runtime)


async def test_a_beginning_that_cannot_be_read_is_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The history is cut in the middle of a stored block, and that block is lost."""
    how: dict[str, Any] = {"max_concurrent_requests": 1, "dense_projection_chunk_rows": 32}
    async with opened(folder, tmp_path, "paged", LEAST, **how) as runtime, runtime.session() as session:
        await turn(session, long_message(6, 3100))
        records, lost = runtime.cache.records, list[Cell]()
        assert records is not None

        async def fails(cell: Cell) -> Loaded:
            lost.append(cell)
            raise StoreError("unreadable: a bad sector")

        monkeypatch.setattr(records, "read_apart", fails)
        text = str(session.messages[0]["content"])
        session._messages = [{"role": "user", "content": text[: len(text) * 2 // 5]}]
        session._said = ["Yes."]
        asked = [*session.messages, {"role": "user", "content": TURNS[0]}]
        ids, _ = await turn(session, TURNS[0])
        assert ids == await at_once(runtime, asked)
        assert lost and (await turn(session, TURNS[1]))[0]
