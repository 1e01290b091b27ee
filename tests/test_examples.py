"""Each example runs as it is; the two servers serve real clients over loopback."""

import ast
import importlib.util
import json
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import aiohttp.test_utils
import anyio
import httpx
import pytest

from aollm import DiskError, MemoryDisk, Runtime
from aollm.demo import MODEL

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVERS = ["starlette_app", "aiohttp_app"]
CLIENTS = 20
TOKENS = 24
OPENINGS = ["Once upon a time", "One morning", "Count from 3 to 12."]
ENDLESS = {"prompt": "Once upon a time", "max_new_tokens": 4000, "temperature": 50.0, "seed": 1}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"  # the event loop under test is the server's


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("hello", [str(MODEL)], r"\w+ \w+ \w+"),
        ("many_requests", [], r"(?s)1 requests, \d+ passes .* tokens/s.*12 requests, \d+ passes .* tokens/s\n\ntogether [\d.]+ times"),
        ("export_gds", [], r"(?s)wrote 7 files.*checked 56 tensors.*layer-0000/dense\.raw.*model: '(.*?)'\nexported: '\1'"),
        ("moe", [], r"(?s)[4-9]\d? of 32 experts have room.*token \d+: 8 experts asked for, [0-8] read"),
        ("adapter", [], r"(?s)(the model alone|garbler): Once upon a time.*(garbler|the model alone): Once upon a time"),
        ("cancel", [], r"(?s)left the loop: the request is gone: <Engine 0 riding.*timed out: .* 0 riding.*task cancelled: .* 0 riding"),
        ("trio_app", [], r"(?s)Once upon a time.*[1-9]\d* ticks meanwhile, the latest [\d.]+ ms late"),
        ("from_ollm", [], r"(?s)^(Once upon a time.*?)\n\nonce more, from the ids: \1\n$"),
        ("profile_request", [], r"(?s)24 tokens after 4.*compute +[1-9].*stall +[1-9].*read [1-9].* MB.*limited by \w+; \d+%.*achieved: "),
        ("trace_a_token", ["demo", "a.json"], r"(?s)at ms.*stall.*compute.*layer 0.*safetensor_pread.*bytes read, .*saved a\.json"),
        (
            "long_context",
            ["demo", "150"],
            r"(?s)2\d{3} tokens read.*in memory: [12]\d{3} tokens.*on disk: +[12]\d{3} tokens.* hid the silver key in the blue barn",
        ),
        (
            "resume_session",
            [],
            r"(?s)> My name is Vera.*from disk: [1-9]\d+ of \d+ prompt.*number of Mira is 4817.*anew: 0 of \d+.*number of Mira is 4817",
        ),
        ("branch", [], r"(?s)> Tell me.*\(2\d{3} of 2\d{3} prompt tokens were there\).*4 branches in \d+ passes; tokens in memory: 2\d{3}"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_script(name: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(words, ran.stdout), ran.stdout
    if name == "trace_a_token":
        events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
        assert {event["cat"] for event in events} >= {"compute", "stall", "safetensor_pread"}
    if name == "many_requests":
        alone, together = map(int, re.findall(r"requests, (\d+) passes", ran.stdout))
        assert together < 3 * alone  # twelve on their own would take twelve times as many


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_docstring(example: Path, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), flag])
    ended = 0
    try:
        runpy.run_path(str(example), run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    said = ast.get_docstring(ast.parse(example.read_text()), clean=False)
    shown = capsys.readouterr()
    assert said is not None and said.strip() in shown.out
    assert (ended, shown.err) == (0, "")
    if example.stem not in SERVERS:  # whose parsers tell their options too
        assert shown.out.strip() == said.strip()


@pytest.mark.parametrize(
    ("name", "usage"), [("adapter", "[model adapters]"), ("audio", "[model speech.wav]"), ("image", "[model picture.png]")]
)
@pytest.mark.parametrize("arguments", [["demo"], ["demo", "a", "b"]])
def test_usage(name: str, usage: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match=re.escape(f"usage: python examples/{name}.py {usage}")):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server in a process of its own."""
    process, url = start(request.param)
    try:
        yield url
    finally:
        assert stop(process) == ""


def start(name: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, EXAMPLES / f"{name}.py", "demo", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def stop(process: subprocess.Popen[str]) -> str:
    """Ask the process to end; returns its errors once it has ended by itself."""
    try:
        process.terminate()
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (0, -signal.SIGTERM)
    return errors


@pytest.fixture(scope="module")
async def known(anyio_backend: str) -> dict[str, str]:
    """The Runtime's own greedy answers to those openings at which each of its choices is clearest: rounding, which
    differs with the number of rows that share a product, may turn a choice that is not."""
    texts: dict[str, str] = {}
    margins: dict[str, float] = {}
    async with Runtime.open("demo") as runtime:
        for prompt in OPENINGS:
            tokens = [token async for token in runtime.stream(prompt, max_new_tokens=TOKENS, logprobs=2)]
            texts[prompt] = "".join(token.text for token in tokens)
            margins[prompt] = min(token.top_logprobs[0][1] - token.top_logprobs[1][1] for token in tokens)
    clearest = sorted(texts, key=margins.__getitem__)[-2:]
    return {prompt: texts[prompt] for prompt in clearest}


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=None), trust_env=False) as made:
        with anyio.fail_after(30):
            while True:  # the listener is there before the model is open
                with suppress(httpx.TransportError):
                    await made.get("/stats")
                    break
                await anyio.sleep(0.05)
        yield made


async def answer(client: httpx.AsyncClient, **fields: Any) -> str:
    """The text of a whole answer, as it comes event by event."""
    async with client.stream("POST", "/generate", json=fields) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
        return text_of([line async for line in response.aiter_lines()])


def text_of(lines: list[str]) -> str:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return "".join(json.loads(item)["text"] for item in data[:-1])


async def stats(client: httpx.AsyncClient) -> tuple[int, int]:
    """Requests that ride or wait, and passes so far."""
    told = (await client.get("/stats")).json()
    return told["riders"] + told["waiting"], told["passes"]


async def empty(client: httpx.AsyncClient) -> int:
    """Wait until nothing rides; returns the passes so far."""
    with anyio.fail_after(15):
        while True:
            riders, passes = await stats(client)
            if not riders:
                return passes
            await anyio.sleep(0.02)


@pytest.mark.anyio
async def test_one_client_gets_what_the_runtime_says(server: str, known: dict[str, str]) -> None:
    async with client(server) as http:
        for prompt, text in known.items():
            assert await answer(http, prompt=prompt, max_new_tokens=TOKENS) == text
        assert (await empty(http)) > 0


@pytest.mark.anyio
async def test_an_aiohttp_client_reads_the_same(server: str, known: dict[str, str]) -> None:
    prompt, text = next(iter(known.items()))
    async with client(server), aiohttp.ClientSession() as session:
        async with session.post(f"{server}/generate", json={"prompt": prompt, "max_new_tokens": TOKENS}) as response:
            assert text_of([line.decode().strip() async for line in response.content]) == text


@pytest.mark.anyio
async def test_clients_share_the_passes(server: str, known: dict[str, str]) -> None:
    prompts = [[*known][number % len(known)] for number in range(CLIENTS)]
    got: dict[int, str] = {}
    async with client(server) as http:

        async def ask(number: int) -> None:
            got[number] = await answer(http, prompt=prompts[number], max_new_tokens=TOKENS)

        before = await empty(http)
        for prompt in known:
            await answer(http, prompt=prompt, max_new_tokens=TOKENS)
        alone = (await empty(http) - before) / len(known)
        before = await empty(http)
        async with anyio.create_task_group() as group:
            for number in range(CLIENTS):
                group.start_soon(ask, number)
        assert got == {number: known[prompt] for number, prompt in enumerate(prompts)}
        assert await empty(http) - before < CLIENTS * alone / 3


@pytest.mark.anyio
async def test_a_client_that_goes_away_ends_its_request_alone(server: str, known: dict[str, str]) -> None:
    prompt, text = next(iter(known.items()))
    async with client(server) as http:
        before = await empty(http)
        async with anyio.create_task_group() as group:
            group.start_soon(leave, http, 0)
            group.start_soon(leave, http, 1)
            group.start_soon(leave, http, 5)
            assert await answer(http, prompt=prompt, max_new_tokens=TOKENS) == text
        assert await empty(http) - before < ENDLESS["max_new_tokens"] / 4


async def leave(client: httpx.AsyncClient, after: int) -> None:
    """Read so many events of an answer that does not end, then close the connection."""
    async with client.stream("POST", "/generate", json=ENDLESS) as response:
        lines = response.aiter_lines()
        while after:
            after -= (await anext(lines)).startswith("data: {")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b'{"prompt": ', "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "send an object"),
        (b'{"max_new_tokens": 4}', "send an object"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": 5}', "a prompt is text"),
        (b'{"prompt": [99999999]}', "out of range"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": [{"role": "user"}]}', "content"),
        (b'{"prompt": "a", "max_new_token": 3}', "did you mean max_new_tokens"),
        (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens"),
        (b'{"prompt": "a", "temperature": -1}', "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "stop": 5}', "stop"),
        (b'{"prompt": "a", "self": 1}', "self is not a setting"),
        (b'{"prompt": "a", "generation": {}}', "generation is not a setting"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, bytes) else "",
)
async def test_a_bad_request_is_refused(server: str, body: bytes, says: str) -> None:
    async with client(server) as http:
        response = await http.post("/generate", content=body)
        assert (response.status_code, response.headers["content-type"].split(";")[0]) == (400, "application/json")
        assert says in response.json()["error"]
        assert await empty(http) >= 0


@pytest.mark.anyio
@pytest.mark.parametrize("name", SERVERS)
async def test_a_server_ends_while_clients_read(name: str) -> None:
    process, url = await anyio.to_thread.run_sync(start, name)
    reading = anyio.Event()

    async def read() -> None:
        with suppress(httpx.TransportError):
            async with http.stream("POST", "/generate", json=ENDLESS) as response:
                async for _ in response.aiter_lines():
                    reading.set()

    try:
        async with client(url) as http, anyio.create_task_group() as group:
            group.start_soon(read)
            await reading.wait()
            await anyio.to_thread.run_sync(stop, process)
    finally:
        process.kill()


@asynccontextmanager
async def in_process(name: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an example's app in this process, whose connections send a comment after 20 ms without a token."""
    example = load(name)
    monkeypatch.setattr(example, "KEEPALIVE_S", 0.02)
    app = example.app("demo", **fields)
    if name == "starlette_app":
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
                yield http
    else:
        async with aiohttp.test_utils.TestServer(app) as listening:
            async with httpx.AsyncClient(base_url=str(listening.make_url("")), trust_env=False) as http:
                yield http


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.anyio
@pytest.mark.parametrize("name", SERVERS)
async def test_a_failing_drive_is_told_in_the_stream_and_a_slow_one_keeps_the_line_open(
    name: str, known: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = MemoryDisk.of(MODEL)
    prompt, text = next(iter(known.items()))
    async with in_process(name, monkeypatch, disk=disk, offload_cpu_layers=0) as http:
        disk.delay_s = 0.03
        last = len(disk.reads) + 45  # some passes on
        disk.fail = lambda extent: DiskError("the drive is gone") if len(disk.reads) > last else None
        response = await http.post("/generate", json={"prompt": prompt, "max_new_tokens": TOKENS})
        lines = [line for line in response.text.splitlines() if line]
        assert response.status_code == 200
        assert ": no token yet" in lines
        assert [json.loads(line[6:]) for line in lines if line.startswith("data: ")][-1] == {"error": "the drive is gone"}
        told = [json.loads(line[6:]).get("text", "") for line in lines if line.startswith("data: ")]
        assert text.startswith("".join(told)) and len(told) > 1
        disk.delay_s, disk.fail = 0.0, None
        assert await answer(http, prompt=prompt, max_new_tokens=TOKENS) == text
