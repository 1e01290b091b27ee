"""References to models: what they mean, and how a repository arrives from a Hub that runs here, on loopback."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
import pytest
import tiny

from aollm.checkpoint import INDEX, SINGLE
from aollm.commands.fetch import Arrival
from aollm.demo import MODEL as DEMO
from aollm.errors import ModelError
from aollm.hub import Repository, missing
from aollm.reference import ALIASES, describe, find, locate
from aollm.terminal import Terminal

COMMIT, OTHER = "a" * 40, "b" * 40
LEFT_OUT = (
    "README.md", "modeling.py", "pytorch_model.bin", "tokenizer.pkl", "consolidated.safetensors", "original/model.safetensors",
    "metal/model.bin", "onnx/config.json", "model.fp16.safetensors", "params.json", "tokenizer_code.py",
)  # fmt: skip


class Hub:
    """The few answers of the Hub that are asked for, and a log of what was."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits = {"main": COMMIT}
        self.refusal: tuple[int, str] | None = None  # of files: a status, and the Hub's name for it
        self.answer: Callable[[dict[str, Any]], object] = lambda told: None  # alters the listing
        self.cuts: dict[str, list[int]] = {}  # bytes after which a connection breaks
        self.sent: dict[str, bytes] = {}  # in place of what is in the file
        self.ranges = True
        self.trickle_s = 0.0  # between two parts of a file
        self.resume = threading.Event()
        self.resume.set()
        self.paused, self.quit = threading.Event(), threading.Event()
        self.log: list[tuple[str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume.set()
        self.quit.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def fetched(self) -> list[str]:
        """Names of the files that were asked for."""
        return [path for path, _ in self.log if not path.startswith("/api/")]

    def listing(self, name: str, commit: str) -> dict[str, Any]:
        siblings = []
        for file, data in self.files.items():
            entry: dict[str, Any] = {
                "rfilename": file,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if file.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        told = {"id": name, "sha": commit, "siblings": siblings}
        self.answer(told)
        return told

    def etag(self, file: str) -> str:
        entry = next(entry for entry in self.listing("", "")["siblings"] if entry["rfilename"] == file)
        return str(entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"])

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(self.path.partition("?")[0])
                if path.startswith("/api/models/org/model/revision/"):
                    hub.log.append((path, None))
                    revision = path.rpartition("/revision/")[2]
                    if revision in (commits := {**hub.commits, **{commit: commit for commit in hub.commits.values()}}):
                        self.reply(200, json.dumps(hub.listing("org/model", commits[revision])).encode())
                    else:
                        self.reply(404, b"", "RevisionNotFound")
                elif path.startswith("/org/model/resolve/"):
                    self.file(path.split("/", 5)[5])
                else:
                    hub.log.append((path, None))
                    self.reply(404, b"", "RepoNotFound")

            def reply(self, status: int, data: bytes, code: str = "", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), "X-Error-Code": code, **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def file(self, name: str) -> None:
                asked = self.headers.get("Range")
                if self.command == "GET":
                    hub.log.append((name, asked))
                data = hub.sent.get(name, hub.files[name])
                if hub.refusal is not None:
                    return self.reply(hub.refusal[0], b"", hub.refusal[1])
                if self.command == "HEAD":
                    return self.reply(200, data, ETag=f'"{hub.etag(name)}"', X_Repo_Commit=COMMIT)
                start, status = 0, 200
                if asked and hub.ranges:
                    start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
                part = data[start:]
                self.send_response(status)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                if cuts := hub.cuts.get(name):
                    self.wfile.write(part[: cuts.pop(0)])
                    self.wfile.flush()
                    hub.paused.set()
                    hub.resume.wait(20)
                    self.close_connection = True
                else:
                    with contextlib.suppress(OSError):
                        for at in range(0, len(part), 1 << 16):
                            self.wfile.write(part[at : at + (1 << 16)])
                            hub.quit.wait(hub.trickle_s)

        return Handler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model in shards, with all that real repositories have beside it."""
    folder = tiny.save(tmp_path_factory.mktemp("model"), shard="90KB")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert INDEX in files and len([name for name in files if name.endswith(".safetensors")]) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "tekken.json"):
        files[name] = json.dumps({"file": name}).encode()
    return files


@pytest.fixture
def hub(model: dict[str, bytes]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.files = {**model, **{name: b"left out " + name.encode() for name in LEFT_OUT}}
        yield hub


@pytest.fixture
def single(hub: Hub) -> Hub:
    """A repository with a megabyte of weights in one file."""
    hub.files = {"config.json": b"{}", "tokenizer.json": b"{ }", SINGLE: bytes(range(256)) * 4096}
    return hub


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cache(root: Path, files: dict[str, bytes], revision: str = "main") -> Path:
    """The layout of huggingface_hub's cache, made by hand."""
    folder = root / "models--org--model"
    snapshot = folder / "snapshots" / COMMIT
    for path in (folder / "refs", folder / "blobs", snapshot):
        path.mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for name, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        (folder / "blobs" / digest).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return snapshot


@pytest.mark.parametrize(
    "reference, meant",
    [
        ("demo", DEMO),
        ("gpt-oss-20B", Repository("openai/gpt-oss-20b")),
        ("llama3-8B-chat", Repository("meta-llama/Llama-3.1-8B-Instruct")),
        ("org/model", Repository("org/model")),
        ("org/model@v1.0", Repository("org/model", "v1.0")),
        ("hf://org/model", Repository("org/model")),
        ("hf://org/model@refs/pr/3", Repository("org/model", "refs/pr/3")),
        (f"org/a_b.c-d@{COMMIT}", Repository("org/a_b.c-d", COMMIT)),
    ],
)
def test_what_a_reference_means(reference: str, meant: Path | Repository) -> None:
    assert locate(reference) == meant


def test_every_alias_can_be_written_as_what_it_means() -> None:
    assert set(ALIASES) == {
        "demo", "llama3-1B-chat", "llama3-3B-chat", "llama3-8B-chat", "gemma3-12B", "qwen3-next-80B", "gpt-oss-20B", "voxtral-small-24B",
    }  # fmt: skip
    assert all(locate(str(meant)) == meant for meant in ALIASES.values())


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "plain", "demo"):
        (tmp_path / name).mkdir(parents=True)
    assert locate("org/model") == Path("org/model")
    assert locate("plain") == Path("plain")
    assert locate("hf://org/model") == Repository("org/model")
    assert locate("demo") == DEMO  # a folder with nothing in it does not hide the model
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert locate("demo") == Path("demo")


@pytest.mark.parametrize(
    "reference, message",
    [
        ("llama3-8b", "did you mean llama3-8B-chat"),
        ("GPT-OSS-20B", "did you mean gpt-oss-20B"),
        ("nowhere", "nowhere does not exist; give the folder of a model"),
        ("", "'' does not exist"),
        ("/no/such/folder", "does not exist"),
        ("../no-such", "does not exist"),
        ("a/b/c", "does not exist"),
        ("org/../model", "does not exist"),
        ("org/model@", "does not exist"),
        ("org\\model", "does not exist"),
        ("org/mo\0del", "org/mo"),
        ("x" * 10_000, "x"),
        ("org/" + "x" * 10_000, "org/x"),
        ("org/" + "x" * 100, "does not exist"),
        ("~nobody-of-this-name/model", "looked up"),
        ("hf://", "names no repository"),
        ("hf://model", "names no repository"),
        ("hf://org/..", "names no repository"),
        ("hf://org/model@../../x", "names no repository"),
        ("hf://org/model@a..b", "names no repository"),
        ("hf://org/model@/etc", "names no repository"),
        ("hf://org/a--b", "names no repository"),
        ("hf://org/model/file", "names no repository"),
        ("hf://org/mod\nel", "names no repository"),
        ("hf://örg/model", "names no repository"),
        (__file__, "is a file, not a folder"),
        ("m.gguf", "m.gguf is a file, not a folder, and GGUF is not read; take the model"),
    ],
)
async def test_what_means_nothing_is_told(
    reference: str, message: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))
    Path("m.gguf").touch()
    with pytest.raises(ModelError) as caught:
        await find(reference, tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())


async def test_only_what_is_needed_arrives(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    folder = await find("org/model", tmp_path, progress=lambda *seen: told.append(seen), endpoint=hub.endpoint)
    assert folder == tmp_path / "models--org--model" / "snapshots" / COMMIT
    assert tree(folder) == {name: data for name, data in model.items()}
    assert sorted(hub.fetched) == sorted(model)
    assert (tmp_path / "models--org--model" / "refs" / "main").read_text() == COMMIT
    assert not list(tmp_path.rglob("*.incomplete"))
    whole = sum(len(data) for name, data in model.items() if name != INDEX)
    assert told[-1][:2] == (whole, whole)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    weights = [name.endswith(".safetensors") for _, _, name in told]
    assert weights == sorted(weights)  # the texts come first

    hub.log.clear()
    assert await find("hf://org/model@main", tmp_path, endpoint=hub.endpoint) == folder
    assert await find(f"org/model@{COMMIT}", tmp_path, endpoint=hub.endpoint) == folder
    assert hub.log == []  # nobody was asked


async def test_what_describes_a_model_arrives_alone_and_the_rest_later(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    folder = await describe("org/model", tmp_path, endpoint=hub.endpoint)
    here = {path.name for path in folder.iterdir()}
    assert {"config.json", INDEX, "tokenizer.json"} <= here
    assert not [name for name in (*here, *hub.fetched) if name.endswith(".safetensors")]
    asked = len(hub.log)
    assert await describe("org/model", tmp_path, endpoint=hub.endpoint) == folder
    assert len(hub.log) == asked  # nothing more
    assert await find("org/model", tmp_path, endpoint=hub.endpoint) == folder
    assert {name for name in model if name.endswith(".safetensors")} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "names, weights", [([SINGLE, "consolidated.safetensors", INDEX], [SINGLE]), (["odd.safetensors"], ["odd.safetensors"])]
)
async def test_one_file_of_weights(hub: Hub, names: list[str], weights: list[str], tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "tokenizer.model": b"x", **{name: name.encode() for name in names}}
    folder = await find("org/model", tmp_path, endpoint=hub.endpoint)
    assert sorted(tree(folder)) == sorted(["config.json", "tokenizer.model", *weights])
    assert await missing(folder) == []


async def test_a_broken_connection_is_gone_on_with(single: Hub, tmp_path: Path) -> None:
    single.cuts[SINGLE] = [300_000, 400_000]
    folder = await find("org/model", tmp_path, endpoint=single.endpoint)
    assert tree(folder) == single.files
    starts = [int(str(asked).removeprefix("bytes=").partition("-")[0]) for name, asked in single.log if name == SINGLE]
    assert len(starts) == 3 and starts[0] == 0 and 0 < starts[1] <= 300_000 < starts[2] <= 700_000


async def test_a_cancelled_download_is_gone_on_with_by_the_next(single: Hub, tmp_path: Path) -> None:
    single.cuts[SINGLE] = [600_000]
    single.resume.clear()
    async with anyio.create_task_group() as group:

        async def cancel() -> None:
            await anyio.to_thread.run_sync(single.paused.wait, 10)
            while not any(path.stat().st_size for path in tmp_path.rglob("*.incomplete")):  # noqa: ASYNC110
                await anyio.sleep(0.02)
            group.cancel_scope.cancel()

        group.start_soon(cancel)
        await find("org/model", tmp_path, endpoint=single.endpoint)
    assert group.cancel_scope.cancelled_caught
    single.resume.set()
    [partial] = tmp_path.rglob("*.incomplete")
    there = partial.stat().st_size
    assert 0 < there <= 600_000
    single.log.clear()
    told: list[int] = []
    folder = await find("org/model", tmp_path, progress=lambda done, total, name: told.append(done), endpoint=single.endpoint)
    assert tree(folder) == single.files
    [asked] = [asked for name, asked in single.log if name == SINGLE]
    assert asked is not None and int(asked.removeprefix("bytes=").partition("-")[0]) >= there
    assert single.fetched == [SINGLE]
    assert told[-1] == sum(map(len, single.files.values()))


async def test_nothing_goes_on_after_a_cancelled_download(single: Hub, tmp_path: Path) -> None:
    single.files[SINGLE] = bytes(16 << 20)
    single.trickle_s = 0.01
    begun = threading.Event()
    async with anyio.create_task_group() as group:

        async def cancel() -> None:
            await anyio.to_thread.run_sync(begun.wait, 10)
            group.cancel_scope.cancel()

        group.start_soon(cancel)
        await find(
            "org/model", tmp_path, progress=lambda done, total, name: begun.set() if name == SINGLE else None, endpoint=single.endpoint
        )
    [partial] = tmp_path.rglob("*.incomplete")
    sizes = []
    for _ in range(2):
        await anyio.sleep(0.4)
        sizes.append(partial.stat().st_size)
    assert sizes[0] == sizes[1] < 16 << 20


async def test_a_hub_without_ranges_sends_all_again(single: Hub, tmp_path: Path) -> None:
    single.ranges, single.cuts[SINGLE] = False, [300_000]
    told: list[int] = []
    folder = await find("org/model", tmp_path, progress=lambda done, total, name: told.append(done), endpoint=single.endpoint)
    assert tree(folder) == single.files
    assert told[-1] == sum(map(len, single.files.values()))


async def test_a_busy_hub_is_asked_again(single: Hub, tmp_path: Path) -> None:
    single.refusal = (503, "")

    def relent() -> None:
        while len(single.fetched) < 3:
            threading.Event().wait(0.01)
        single.refusal = None

    thread = threading.Thread(target=relent, daemon=True)
    thread.start()
    assert tree(await find("org/model", tmp_path, endpoint=single.endpoint)) == single.files
    thread.join(5)


@pytest.mark.parametrize(
    "sent, message",
    [(b"?" * (1 << 20), "arrived damaged"), (b"?" * (2 << 20), "longer than")],
    ids=["damaged", "longer"],
)
async def test_bytes_that_are_not_what_was_promised(single: Hub, sent: bytes, message: str, tmp_path: Path) -> None:
    single.sent[SINGLE] = sent
    single.ranges = False
    with pytest.raises(ModelError, match=message):
        await find("org/model", tmp_path, endpoint=single.endpoint)
    assert not list(tmp_path.glob("*/snapshots/*/*.safetensors"))
    single.sent.clear()
    assert tree(await find("org/model", tmp_path, endpoint=single.endpoint)) == single.files


@pytest.mark.parametrize("length", [5000, 1 << 20, 2 << 20])
async def test_a_partial_file_of_something_else_is_found_out(single: Hub, length: int, tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{single.etag(SINGLE)}.incomplete").write_bytes(b"?" * length)
    assert tree(await find("org/model", tmp_path, endpoint=single.endpoint)) == single.files


@pytest.mark.parametrize(
    "reference, refusal, message",
    [
        (
            "org/model",
            (403, "GatedRepo"),
            "org/model is gated: accept its terms at http://127.0.0.1:*/org/model, then log in with `hf auth login`",
        ),
        ("org/model", (401, "GatedRepo"), "is gated"),
        ("org/model", (403, ""), "refuses org/model (403)*`hf auth login`"),
        ("org/other", None, "org/other does not exist, neither as a folder nor as http*/org/other"),
        ("org/model@v9", None, "org/model has no revision v9"),
        ("org/model", (404, "EntryNotFound"), "does not exist, or a file of it"),
        ("org/model", (418, ""), "answered 418"),
    ],
)
async def test_a_refusal_is_told(hub: Hub, reference: str, refusal: tuple[int, str] | None, message: str, tmp_path: Path) -> None:
    hub.refusal = refusal
    with pytest.raises(ModelError) as caught:
        await find(reference, tmp_path, endpoint=hub.endpoint)
    at = 0
    for part in message.split("*"):
        assert (at := str(caught.value).find(part, at)) >= 0, str(caught.value)
    assert not list(tmp_path.glob("*/refs/*"))


async def test_what_does_not_fit_is_not_begun(single: Hub, tmp_path: Path) -> None:
    def enormous(told: dict[str, Any]) -> None:
        told["siblings"][-1]["lfs"]["size"] = 1 << 60

    single.answer = enormous
    with pytest.raises(ModelError, match=r"1,073,742,848 MiB are still|are still to be downloaded and .* has .* free; make room") as caught:
        await find("org/model", tmp_path, endpoint=single.endpoint)
    assert "free; make room" in str(caught.value) and "are still to be downloaded" in str(caught.value)
    assert single.fetched == []


def set_commit(value: object) -> Callable[[dict[str, Any]], object]:
    return lambda told: told.update(sha=value)


def set_first(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda told: told["siblings"][0].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        set_commit("../../../evil"), set_commit(None), set_commit(7), set_commit("main"),
        set_first("blobId", "../../evil"), set_first("blobId", None), set_first("size", -1), set_first("size", "9"),
        set_first("lfs", {"size": 4, "sha256": "/evil", "pointerSize": 1}), set_first("lfs", {"size": 4}), set_first("lfs", [1]),
        lambda told: told.update(siblings=[{}]), lambda told: told.update(siblings=7), lambda told: told.pop("id"),
    ],
)  # fmt: skip
async def test_a_listing_that_lies_writes_nothing(single: Hub, change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    single.answer = change
    root = tmp_path / "inner" / "models"
    with pytest.raises(ModelError, match="not understood"):
        await find("org/model", root, endpoint=single.endpoint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["../evil.json", "../../config.json", "/tmp/config.json", "a/../config.json", ".config.json", "-x.json", "tokenizer\n.json"]
)
async def test_odd_names_stay_away(single: Hub, name: str, tmp_path: Path) -> None:
    plain = {**single.files}
    single.files[name] = b"{}"
    assert tree(await find("org/model", tmp_path, endpoint=single.endpoint)) == plain


@pytest.mark.parametrize(
    "picks, message",
    [
        ({"weight_map": {"a": "../../../evil.safetensors"}}, "not the plain name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not the plain name"),
        ({"weight_map": {"a": 7}}, "not the plain name"),
        ({"weight_map": {"a": "absent.safetensors"}}, "does not have"),
        ({"weight_map": {}}, "names no files"),
        ([], "cannot be used"),
    ],
)
async def test_an_index_that_lies(hub: Hub, picks: object, message: str, tmp_path: Path) -> None:
    hub.files[INDEX] = json.dumps(picks).encode()
    with pytest.raises(ModelError, match=message):
        await find("org/model", tmp_path, endpoint=hub.endpoint)
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    "files, message",
    [
        (["config.json", "pytorch_model.bin"], "no *.safetensors at its top; pytorch_model.bin is of a kind that is not read"),
        (["model.gguf"], "no *.safetensors at its top; model.gguf"),
        (["consolidated.safetensors", "params.json"], "no config.json at its top"),
        (["config.json", "a.safetensors", "b.safetensors"], "2 *.safetensors files and no model.safetensors.index.json"),
        (["config.json", "original/model.safetensors"], "no *.safetensors at its top"),
        ([], "no *.safetensors"),
    ],
)
async def test_a_repository_that_is_no_model(hub: Hub, files: list[str], message: str, tmp_path: Path) -> None:
    hub.files = dict.fromkeys(files, b"{}")
    with pytest.raises(ModelError) as caught:
        await find("org/model", tmp_path, endpoint=hub.endpoint)
    assert message in str(caught.value)
    assert hub.fetched == []


DEAD = "http://127.0.0.1:9"  # discard: nobody listens


async def test_without_a_network_what_is_cached_whole_is_used(model: dict[str, bytes], tmp_path: Path) -> None:
    snapshot = cache(tmp_path / "whole", model)
    for reference in ("org/model", f"org/model@{COMMIT}"):
        assert await find(reference, tmp_path / "whole", endpoint=DEAD) == snapshot
    speechless = cache(
        tmp_path / "speechless", {name: data for name, data in model.items() if name not in ("tokenizer.json", "tekken.json")}
    )
    assert await find("org/model", tmp_path / "speechless", endpoint=DEAD) == speechless
    shard = next(name for name in model if name.endswith(".safetensors"))
    for number, (name, root) in enumerate([(shard, "a"), ("config.json", "b"), (INDEX, "c")]):
        cache(tmp_path / root, {other: data for other, data in model.items() if other != name})
        expected = SINGLE if number == 2 else name
        with pytest.raises(ModelError, match=rf"cannot be reached.*lacks {expected} of org/model.*run this again with the network"):
            await find("org/model", tmp_path / root, endpoint=DEAD)
    with pytest.raises(ModelError, match="org/model is no folder, nor in"):
        await find("org/model", tmp_path / "empty", endpoint=DEAD)
    with pytest.raises(ModelError, match="without force_download"):
        await find("org/model", tmp_path / "whole", True, endpoint=DEAD)


async def test_what_is_missing_of_a_cached_snapshot_is_fetched(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    snapshot = cache(tmp_path, {name: data for name, data in model.items() if name.endswith(".safetensors")})
    assert await find("org/model", tmp_path, endpoint=hub.endpoint) == snapshot
    assert tree(snapshot) == model
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


async def test_a_branch_that_moved_is_fetched_when_asked_for(single: Hub, tmp_path: Path) -> None:
    first = await find("org/model", tmp_path, endpoint=single.endpoint)
    single.commits["main"] = OTHER
    single.files["config.json"] = b'{"new": 1}'
    assert await find("org/model", tmp_path, endpoint=single.endpoint) == first
    single.log.clear()
    second = await find(f"org/model@{OTHER}", tmp_path, endpoint=single.endpoint)
    assert tree(second) == single.files and single.fetched == ["config.json"]  # the rest is the same
    single.log.clear()
    assert await find("org/model", tmp_path, force_download=True, endpoint=single.endpoint) == second
    assert sorted(single.fetched) == sorted(single.files)
    assert await find("org/model", tmp_path, endpoint=DEAD) == second
    assert tree(first)["config.json"] == b"{}"


async def test_two_at_once_fetch_each_file_once(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    folders = []

    async def one() -> None:
        folders.append(await find("org/model", tmp_path, endpoint=hub.endpoint))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(one)
    assert len(set(folders)) == 1 and tree(folders[0]) == model
    assert sorted(hub.fetched) == sorted(model)


async def test_a_folder_that_cannot_be_written(single: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written: Not a directory; make room or mend it"):
        await find("org/model", tmp_path / "file" / "models", endpoint=single.endpoint)


def test_huggingface_hub_and_this_find_each_others_files(single: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    theirs = hf_hub_download("org/model", SINGLE, cache_dir=tmp_path, endpoint=single.endpoint)
    single.log.clear()
    folder = anyio.run(lambda: find("org/model", tmp_path, endpoint=single.endpoint))
    assert sorted(single.fetched) == ["config.json", "tokenizer.json"]
    assert Path(theirs) == folder / SINGLE and Path(theirs).read_bytes() == single.files[SINGLE]
    assert try_to_load_from_cache("org/model", "config.json", cache_dir=tmp_path) == str(folder / "config.json")


def test_what_is_shown_while_a_model_arrives() -> None:
    out, err = io.StringIO(), io.StringIO()
    arrival = Arrival(Terminal(out=out, err=err), "org/model")
    assert "looking for org/model" in "".join(text for text, _ in arrival.live())
    arrival.tell(1_000_000, 4_000_000, "a.safetensors")
    arrival.tell(3_000_000, 4_000_000, "b.safetensors")
    shown = "".join(text for text, _ in arrival.live())
    assert all(part in shown for part in (" 75%", "3 MB of 4 MB", "b.safetensors"))
    assert (out.getvalue(), err.getvalue()) == ("", "downloading org/model, 4 MB\n")
    Arrival(Terminal(True, out, quiet := io.StringIO()), "org/model").tell(1, 2, "a")
    assert quiet.getvalue() == ""


def program(*arguments: str, home: Path, hub: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AOLLM_"))}
    return subprocess.run(
        [sys.executable, "-m", "aollm", *arguments], capture_output=True, text=True, timeout=60, cwd=home,
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": hub, **environment},
    )  # fmt: skip


def test_a_program_downloads_once_and_then_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    hub.files = {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()}
    prompt = ("run", "org/model", "Once upon a time", "--max-new-tokens", "4", "--memory", "2GiB")
    first = program(*prompt, home=tmp_path, hub=hub.endpoint)
    assert first.returncode == 0, first.stderr
    assert "downloading org/model, " in first.stderr and str(tmp_path / "hub") in first.stderr
    second = program(*prompt, "--quiet", home=tmp_path, hub=DEAD, HF_HUB_OFFLINE="1")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    shutil.rmtree(tmp_path / "hub" / "models--org--model" / "snapshots")
    third = program(*prompt, home=tmp_path, hub=DEAD, HF_HUB_OFFLINE="1")
    assert third.returncode == 1
    assert third.stderr.startswith("aollm: error: HF_HUB_OFFLINE is set, so nothing is downloaded; ")
    assert "lacks config.json, model.safetensors, tokenizer.json of org/model: run this again with the network" in third.stderr
