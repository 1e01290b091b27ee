"""The blocking face: the tokens of the async one, whoever leaves early and however; threads, loops, interrupts and ends."""

import asyncio
import gc
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tiny
from safetensors.torch import load_file, save_file

from aollm import (
    Completion,
    ConfigError,
    DiskError,
    GenerationConfig,
    MemoryDisk,
    ModelError,
    RequestError,
    Runtime,
    RuntimeClient,
    Session,
    Token,
    Tokens,
)
from aollm.demo import MODEL
from aollm.disk.base import Extent
from aollm.request import OUTBOX

TOKENS = 16
ENDLESS: dict[str, Any] = {"max_new_tokens": 4000, "temperature": 50.0, "seed": 1}
PROMPTS: dict[str, Any] = {
    "text": "Once upon a time",
    "ids": [0, 15, 304, 277],
    "messages": [{"role": "user", "content": "Tell me a story about a cat."}],
}
PROGRAM = "from aollm import RuntimeClient\nclient = RuntimeClient('demo', max_context_tokens=4096)\n"
BLOCKING: dict[str, Callable[[RuntimeClient], object]] = {
    "prompt": lambda client: client.prompt("a", max_new_tokens=1),
    "stream": lambda client: client.stream("a"),
    "chat": lambda client: client.chat("a", max_new_tokens=1),
    "reset": lambda client: client.reset(),
    "run": lambda client: client.run(nothing),
    "open": lambda client: client.open(),
    "describe_plan": lambda client: client.describe_plan(),
}


async def nothing(runtime: Runtime) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32, whose greedy tokens do not hang on who rides along."""
    folder = Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("demo") / "model"))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny.edit(folder, lambda config: config.update(dtype="float32", torch_dtype="float32"))
    return folder


@pytest.fixture(scope="module")
def known(folder: Path) -> dict[str, Completion]:
    """What the async face says."""

    async def ask() -> dict[str, Completion]:
        async with Runtime.open(folder) as runtime:
            return {name: await runtime.generate(prompt, max_new_tokens=TOKENS) for name, prompt in PROMPTS.items()}

    return anyio.run(ask)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[RuntimeClient]:
    with RuntimeClient(folder, max_context_tokens=8192) as client:
        yield client


@pytest.fixture
def anyio_backend() -> str:
    raise AssertionError("name the loop")


def until(client: RuntimeClient, holds: Callable[[Runtime], bool]) -> None:
    """Return when `holds`, which is asked in the client's loop."""

    async def wait(runtime: Runtime) -> None:
        while not holds(runtime):  # noqa: ASYNC110  figures are no events
            await anyio.sleep(0.001)

    client.run(wait)


def idle(client: RuntimeClient) -> int:
    """The engine's passes once nobody rides or waits, and no keys and values are held."""
    until(client, lambda runtime: not runtime.engine.riders and not runtime.engine.waiting)
    until(client, lambda runtime: runtime.cache_state()["reserved_tokens"] == 0)
    return client.runtime.engine.passes


def client_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "aollm-client"}


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_tokens_are_those_of_the_async_face(client: RuntimeClient, known: dict[str, Completion], kind: str) -> None:
    expected = known[kind]
    tokens = list(client.stream(PROMPTS[kind], max_new_tokens=TOKENS))
    assert ("".join(token.text for token in tokens), tuple(token.id for token in tokens)) == (expected.text, expected.token_ids)
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    whole = client.prompt(PROMPTS[kind], GenerationConfig(max_new_tokens=TOKENS))
    assert (whole.choices, whole.usage) == (expected.choices, expected.usage)
    assert whole.profile is not None and whole.profile["events"]["compute"]["count"] > 0


def test_the_plan_is_json(client: RuntimeClient) -> None:
    plan = client.describe_plan()
    assert json.loads(json.dumps(plan))["family"] == "llama"
    assert plan == client.runtime.plan.as_dict()
    assert sum(plan["ledger"].values()) <= plan["memory"]


def leave_loop(client: RuntimeClient) -> None:
    for _ in client.stream("a", **ENDLESS):
        break


def leave_block(client: RuntimeClient) -> None:
    with client.stream("a", **ENDLESS) as tokens:
        assert tokens.request is not None and len(tokens.request.prompt) == 1
        next(tokens)


def fail(client: RuntimeClient) -> None:
    with pytest.raises(ZeroDivisionError), client.stream("a", **ENDLESS) as tokens:
        for token in tokens:
            _ = 1 / (token.index - 1)


def forget(client: RuntimeClient) -> None:
    kept = client.stream("a", **ENDLESS)
    next(kept)


def cancel_elsewhere(client: RuntimeClient) -> None:
    """The thread that reads sees an end like any other."""
    tokens, begun = client.stream("a", **ENDLESS), threading.Event()

    def read() -> int:
        next(tokens)
        begun.set()
        return len(list(tokens))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert begun.wait(60)
        tokens.cancel()
        assert reading.result(60) < 3000
    assert list(tokens) == []


def never_begin(client: RuntimeClient) -> None:
    tokens = client.stream("a", **ENDLESS)
    tokens.cancel()
    assert list(tokens) == [] and tokens.request is None


@pytest.mark.parametrize("leave", [leave_loop, leave_block, fail, forget, cancel_elsewhere, never_begin])
def test_leaving_early_cancels(client: RuntimeClient, known: dict[str, Completion], leave: Callable[[RuntimeClient], None]) -> None:
    before = idle(client)
    leave(client)
    assert idle(client) - before < 3000
    assert client.prompt(PROMPTS["text"], max_new_tokens=TOKENS).text == known["text"].text


def test_a_slow_reader_pauses_its_request_and_misses_nothing(client: RuntimeClient, known: dict[str, Completion]) -> None:
    count = 4 * OUTBOX
    before, settings = idle(client), {**ENDLESS, "max_new_tokens": count}
    with client.stream("a", **settings) as tokens:
        request = tokens.request
        assert request is not None
        until(client, lambda runtime: not request.has_room)
        assert client.prompt(PROMPTS["text"], max_new_tokens=TOKENS).token_ids == known["text"].token_ids  # others go on
        assert client.runtime.engine.passes - before <= 2 * OUTBOX + TOKENS + 2
        found = list(tokens)
    assert [token.index for token in found] == list(range(count))
    assert tuple(token.id for token in found) == client.prompt("a", **settings).token_ids


def test_each_of_several_threads_waits_for_itself_and_all_ride_together(client: RuntimeClient) -> None:
    prompts = ["Once", "One morning", "Count from 3 to 9.", "A duck", "The sea", "Hi"]
    alone = [client.prompt(prompt, max_new_tokens=TOKENS).token_ids for prompt in prompts]
    before = idle(client)
    ready = threading.Barrier(len(prompts))

    def read(prompt: str) -> tuple[int, ...]:
        ready.wait(60)
        return tuple(token.id for token in client.stream(prompt, max_new_tokens=TOKENS))

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(read, prompts)) == alone
    assert idle(client) - before < 4 * TOKENS


def test_several_threads_share_one_answer_and_all_see_its_end(client: RuntimeClient, known: dict[str, Completion]) -> None:
    tokens = client.stream(PROMPTS["text"], max_new_tokens=TOKENS)
    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(list, [tokens] * 3))
    found = sorted((token.index, token.id) for share in shares for token in share)
    assert tuple(id for _, id in found) == known["text"].token_ids


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("name", BLOCKING)
def test_in_the_thread_of_a_loop_it_says_so(client: RuntimeClient, loop: str, name: str) -> None:
    async def call() -> None:
        with pytest.raises(RequestError, match=r"event loop, which would stand still.*aollm\.Runtime.*worker thread"):
            BLOCKING[name](client)

    anyio.run(call, backend=loop)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_worker_threads_of_a_loop_may_wait(client: RuntimeClient, known: dict[str, Completion], loop: str) -> None:
    def read() -> str:
        return "".join(token.text for token in client.stream(PROMPTS["text"], max_new_tokens=TOKENS))

    async def call() -> list[str]:
        found = [await anyio.to_thread.run_sync(read)]
        if loop == "asyncio":
            found.append(await asyncio.to_thread(read))
        return found

    assert set(anyio.run(call, backend=loop)) == {known["text"].text}


def test_a_notebook_may_wait_in_its_cell(client: RuntimeClient, known: dict[str, Completion], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))

    async def cell() -> str:
        return client.prompt(PROMPTS["text"], max_new_tokens=TOKENS).text

    assert anyio.run(cell) == known["text"].text

    async def own(runtime: Runtime) -> None:
        client.prompt("a", max_new_tokens=1)

    with pytest.raises(RequestError, match="the client's own thread, and would wait for itself"):
        client.run(own)


def test_a_conversation_goes_on_until_it_is_reset_or_given_whole(client: RuntimeClient, folder: Path) -> None:
    said = ["My name is Vera.", "What is 17 + 25?"]

    async def turns() -> list[str]:
        async with Runtime.open(folder) as runtime, runtime.session() as session:
            return [(await collected(runtime, session, message)).text for message in said]

    expected = anyio.run(turns)
    client.reset()
    first, second = (client.chat(message, max_new_tokens=TOKENS) for message in said)
    assert [first.text, second.text] == expected
    talk = client.messages
    assert [message["content"] for message in talk] == [said[0], expected[0], said[1], expected[1]]
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert client.chat(talk[:3], max_new_tokens=TOKENS).text == expected[1]  # the whole of it
    assert client.messages == talk
    assert client.chat(PROMPTS["messages"], max_new_tokens=TOKENS).usage.prompt_tokens < second.usage.prompt_tokens
    assert len(client.messages) == 2
    client.reset()
    assert client.messages == []
    idle(client)


async def collected(runtime: Runtime, session: Session, message: str) -> Completion:
    return await runtime.collect(session.stream(message, max_new_tokens=TOKENS))


def test_turns_of_several_threads_come_one_after_the_other(client: RuntimeClient) -> None:
    client.reset()
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda message: client.chat(message, max_new_tokens=4), ["One", "Two", "Three"]))
    assert sorted(message["content"] for message in client.messages if message["role"] == "user") == ["One", "Three", "Two"]
    assert sorted(message["content"] for message in client.messages if message["role"] != "user") == sorted(a.text for a in answers)
    client.reset()


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda client: client.stream("a", max_new_token=3), "did you mean max_new_tokens"),
        (lambda client: client.prompt("a", temperature=-1), "temperature"),
        (lambda client: next(client.stream([99_999_999])), "out of range"),
        (lambda client: client.stream("").__enter__(), "empty"),
        (lambda client: client.prompt(5), "a prompt is text"),
        (lambda client: client.chat(""), "a text that is not empty"),
        (lambda client: client.chat([]), "a text that is not empty"),
        (lambda client: client.chat([5]), "messages with role and content"),
        (lambda client: client.chat([{"role": "user"}]), "content"),
        (lambda client: client.chat("a", n=2), "one answer a turn"),
    ],
)
def test_a_bad_request_is_refused(client: RuntimeClient, ask: Callable[[RuntimeClient], object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        ask(client)
    client.reset()
    idle(client)


def test_what_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    before = client_threads()
    with pytest.raises(ConfigError, match="did you mean memory"):
        RuntimeClient("demo", memry="1GiB")
    broken = RuntimeClient(tmp_path)
    for _ in range(2):  # it may be tried again
        with pytest.raises(ModelError), broken:
            pass
        with pytest.raises(ModelError):
            broken.prompt("a")
    joined(client_threads() - before)
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    assert RuntimeClient(tmp_path).prompt("a", max_new_tokens=1).usage.completion_tokens == 1


@contextmanager
def opening(client: RuntimeClient, disk: MemoryDisk) -> Iterator[Callable[[], object]]:
    """While another thread opens the client, which takes until what this gives is called."""
    begun, go = threading.Event(), threading.Event()

    def wait(extent: Extent) -> None:
        begun.set()
        assert go.wait(60)

    disk.fail = wait
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(client.open)
        assert begun.wait(60) and "not open" in repr(client)
        try:
            yield go.set
        finally:
            go.set()
            done.exception(60)


def test_closing_while_it_opens_waits_for_the_end_of_its_thread() -> None:
    before, disk = client_threads(), MemoryDisk.of(MODEL)
    client = RuntimeClient("demo", disk=disk)
    with opening(client, disk) as go:
        timer = threading.Timer(0.1, go)
        timer.start()
        client.close()
        assert client_threads() <= before
        timer.join()


def test_an_answer_that_is_cancelled_while_the_model_opens_is_not_begun() -> None:
    disk = MemoryDisk.of(MODEL)
    client = RuntimeClient("demo", disk=disk, max_context_tokens=8192)
    tokens = client.stream("a", **ENDLESS)
    with ThreadPoolExecutor(1) as pool, opening(client, disk) as go:
        read = pool.submit(lambda: list(tokens))
        while not tokens._beginning.locked():
            time.sleep(0.001)
        tokens.cancel()
        go()
        assert read.result(60) == []
    idle(client)
    client.close()


def test_all_readers_of_an_answer_that_cannot_begin_are_told() -> None:
    client = RuntimeClient("demo").open()
    tokens = client.stream("a", max_new_tokens=1)
    assert client._background is not None
    client._background.close()  # the runtime has ended, and the client does not know
    for _ in range(2):
        with pytest.raises(RequestError, match="runtime has ended"):
            tokens._begun().take()
    client.close()


def test_a_configured_number_of_answers_is_not_that_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOLLM_GENERATION__N", "2")
    with RuntimeClient("demo") as client:
        assert len(client.prompt("a", max_new_tokens=2).choices) == 2 and len(client.chat("a", max_new_tokens=2).choices) == 1


def test_a_failing_drive_reaches_the_thread_that_waits() -> None:
    disk = MemoryDisk.of(MODEL)
    with RuntimeClient("demo", disk=disk, offload_cpu_layers=0) as client:
        disk.fail = lambda extent: DiskError("the drive is gone")
        for ask in (lambda: client.prompt("a"), lambda: list(client.stream("a")), lambda: client.chat("a")):
            with pytest.raises(DiskError, match="the drive is gone"):
                ask()
        disk.fail = None
        assert client.prompt("a", max_new_tokens=2).usage.completion_tokens == 2


def joined(threads: set[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_closing_ends_what_is_under_way_and_all_threads() -> None:
    before = set(threading.enumerate())
    client = RuntimeClient("demo", max_context_tokens=8192)
    with client, ThreadPoolExecutor(3) as pool:
        kept = client.stream("a", **ENDLESS)
        next(kept)
        waiting: list[Callable[[], object]] = [lambda: client.prompt("a", **ENDLESS), lambda: list(client.stream("a", **ENDLESS))]
        under_way = [pool.submit(each) for each in waiting]
        until(client, lambda runtime: runtime.engine.riders == 3)
        client.close()
        for each in under_way:
            with pytest.raises(RequestError, match="closed before this"):
                each.result(60)
    with pytest.raises(RequestError, match="closed before this"):
        list(kept)
    for name, ask in BLOCKING.items():
        if name not in ("stream", "reset"):
            with pytest.raises(RequestError, match="this client is closed"):
                ask(client)
    client.close()
    assert "closed" in repr(client)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("aollm")]


def test_a_client_that_nobody_has_any_more_ends_its_thread(client: RuntimeClient) -> None:
    before = client_threads()
    tokens: Tokens | None = RuntimeClient("demo").stream("a", max_new_tokens=4)
    gc.collect()
    assert tokens is not None and len(list(tokens)) == 4  # who reads has it still
    [thread] = client_threads() - before
    tokens = None
    joined({thread})

    holder = [RuntimeClient("demo").open()]
    next(holder[0].stream("a", **ENDLESS))
    [thread] = client_threads() - before

    async def drop(runtime: Runtime) -> None:
        holder.clear()  # in a thread with a loop, which must not wait

    client.run(drop)
    joined({thread})


def test_an_interrupt_cancels_the_request_and_no_more() -> None:
    settings = ", ".join(f"{name}={value}" for name, value in ENDLESS.items())
    program = f"""{PROGRAM}
import threading, anyio
async def riding(runtime):
    while not runtime.engine.riders:
        await anyio.sleep(0.001)
async def idle(runtime):
    while runtime.engine.riders:
        await anyio.sleep(0.001)
def tell():
    client.run(riding)
    print('riding', flush=True)
for ask in client.prompt, client.chat, lambda *args, **settings: list(client.stream(*args, **settings)):
    before = client.runtime.engine.passes
    threading.Thread(target=tell).start()
    try:
        ask('a', {settings})
    except KeyboardInterrupt:
        client.run(idle)
        print('interrupted', client.runtime.engine.passes - before < 3000, client.prompt('a', max_new_tokens=4).usage.completion_tokens)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "riding\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted True 4\n"
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("tokens = client.stream('a', max_new_tokens=4000, temperature=50.0)\nprint(next(tokens).index)", "0\n"),
        ("print(client.prompt('a', max_new_tokens=1).usage.completion_tokens)\nraise SystemExit", "1\n"),
        (
            "import os\nclient.open()\nchild = os.fork()\n"
            "if not child:\n"
            "    try:\n        client.prompt('a')\n    except Exception as error:\n        print(type(error).__name__, error, flush=True)\n"
            "    client.close()\n    os._exit(0)\n"
            "os.waitpid(child, 0)\nprint(client.prompt('a', max_new_tokens=1).usage.completion_tokens)",
            "RequestError this client was opened before the process was forked; make a RuntimeClient in each process\n1\n",
        ),
    ],
    ids=["reading", "idle", "forked"],
)
def test_a_program_ends_with_a_client_open(program: str, says: str) -> None:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM + program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, says, "")


def test_what_a_thread_asks_of_the_loop_is_answered(client: RuntimeClient) -> None:
    async def engine(runtime: Runtime) -> tuple[str, Awaitable[None] | None]:
        return threading.current_thread().name, None

    assert client.run(engine) == ("aollm-client", None)

    async def fails(runtime: Runtime) -> Token:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.run(fails)
