"""The questions of `kv.py`: each measures one thing, and says whether it is what it should be."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import anyio
import torch

from aollm import Runtime
from aollm.ahead import Ahead
from aollm.bench.process import peak_rss_nbytes
from aollm.buffers import Lease, Ring
from aollm.demo.corpus import documents
from aollm.disk.base import Extent
from aollm.disk.threads import ThreadsDisk
from aollm.maths.attention import BLOCK
from aollm.port import Port
from aollm.probe import drive_speed
from aollm.request import Request
from aollm.sampling import Draw, Sampler, Sampling
from aollm.stores.cell import Cell, Run, runs
from aollm.stores.index import Index
from aollm.stores.node import Node, digest, pack_ids, root
from aollm.stores.pool import Slot
from aollm.stores.presets import PRESETS
from aollm.stores.records import Item, Loaded, Records, Shape
from aollm.stores.scratch import Scratch
from aollm.trace import Trace, covered

Row = dict[str, Any]
Question = Callable[[Path, int, Path | None], Awaitable[Row]]
WRITING = ("paged", "chunked", "streamed-segmented", "log-structured-journal", "tiered-write-back")


def some_ids(count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(3, 1400), k=count)


@dataclass(frozen=True)
class Steps:
    """Tokens of one answer, and what each step took and read."""

    ids: list[int]
    seconds: list[float]
    loaded: list[int]
    missing: list[int]


async def answer(runtime: Runtime, ids: list[int], count: int) -> Steps:
    found = Steps([], [], [], [])
    begun = time.perf_counter()
    async for token in runtime.stream(ids, max_new_tokens=count):
        now = time.perf_counter()
        events = runtime.trace.between(begun, now)
        found.ids.append(token.id)
        found.seconds.append(now - begun)
        found.loaded.append(sum(event.nbytes for event in events if event.name == "kvload"))
        pool = runtime.cache.pool
        whole = (len(ids) + len(found.ids) - 1) * pool.layers
        found.missing.append(2 * pool.row_nbytes * (whole - pool.all_rows))
        begun = now
    return found


async def context(folder: Path, rounds: int, model: Path | None) -> Row:
    """65,536 tokens, of which memory holds an eighth."""
    tokens, steps = 65_536, 12
    ids = some_ids(tokens - steps)
    share = tokens * 1536 // 8
    fields: Row = {"max_context_tokens": tokens, "max_concurrent_requests": 1, "dense_projection_chunk_rows": 512}
    async with Runtime.open(
        "demo", memory="640MiB", kv_cache_strategy="paged", kv_cache_memory=share, cache_dir=folder, **fields
    ) as runtime:  # fmt: skip
        cold = await answer(runtime, ids, steps)
        plan, peak = runtime.plan, peak_rss_nbytes() or 0
    async with Runtime.open("demo", **fields) as runtime:
        warm = await answer(runtime, ids, steps)
    extra = median(loaded / missing for loaded, missing in zip(cold.loaded[3:-1], cold.missing[2:-2], strict=True))
    same = cold.ids == warm.ids
    return {
        "bar": "memory in the ledger, reads within 5 %, same tokens",
        "told": f"{peak >> 20} of {plan.memory >> 20} MiB, reads {extra - 1:+.1%}, tokens {'equal' if same else 'DIFFER'}",
        "reached": peak <= plan.memory and extra <= 1.05 and same,
        "peak_rss_nbytes": peak, "memory": plan.memory, "kv_share_nbytes": share, "read_over_missing": extra, "equal": same,
        "first_token_s": cold.seconds[0], "first_token_resident_s": warm.seconds[0],
        "step_s": median(cold.seconds[3:-1]), "step_resident_s": median(warm.seconds[3:-1]), "bytes_per_step": median(cold.loaded[3:-1]),
    }  # fmt: skip


def shelf(folder: Path, disk: ThreadsDisk, preset: str, heads: int, trace: Trace, layers: int = 2) -> Records:
    shape = Shape(layers, heads, 64, torch.bfloat16)
    chosen = PRESETS[preset]
    assert chosen.layout is not None
    scratch = Scratch.open(folder / preset)
    return Records(disk, scratch, chosen.layout(4096 + 2 * BLOCK * shape.row_nbytes, None), chosen.codec, shape, trace)


async def rate(folder: Path, rounds: int, model: Path | None) -> Row:
    """Reading stored blocks, verified, as a pass does, against the drive read by the same disk and nothing else to do."""
    ratios: dict[str, list[float]] = {}
    async with Port() as port:
        disk = ThreadsDisk(port)
        for nbytes in (256 << 10, 1 << 20, 4 << 20):
            trace, ring = Trace(), Ring(4 * (4 << 20) + (1 << 20))
            records = shelf(folder, disk, "log-structured-journal", nbytes // (2 * BLOCK * 128), trace, 1)
            rows = records.shape.heads, records.shape.head_dim
            slot = Slot(0, torch.randn(BLOCK, *rows).bfloat16(), torch.randn(BLOCK, *rows).bfloat16())
            cells = [Cell(0, index, slot, BLOCK) for index in range((512 << 20) // nbytes)]
            for first in range(0, len(cells), 8):
                await records.write([Item(cell, BLOCK, 1) for cell in cells[first : first + 8]])
            for cell in cells:
                cell.slot = None
            extents = [cell.place.extent for cell in cells if cell.place is not None]
            whole = [Extent(extents[0].file, 0, extents[-1].end)]
            probe = Ring(64 << 20)
            ratios[f"{nbytes >> 10} KiB"] = found = []
            for _ in range(rounds):
                speed = await drive_speed(disk, whole, probe, 512 << 20)
                found.append(await read_all(records, cells, ring) / speed)
            await records.aclose()
        await disk.aclose()
    told = {name: median(found) for name, found in ratios.items()}
    return {
        "bar": "blocks of 256 KiB and more: ≥ 0.85 of the drive",
        "told": ", ".join(f"{name}: {ratio:.2f}" for name, ratio in told.items()),
        "reached": min(told.values()) >= 0.85, "of_drive": told, "turns": ratios,
    }  # fmt: skip


async def read_all(records: Records, cells: list[Cell], ring: Ring) -> float:
    """Bytes per second."""

    async def load(run: Run, lease: Lease) -> list[Loaded]:
        return await records.read(run, ring.arena.bytes[lease.offset : lease.offset + run.nbytes])

    plan = list(runs(cells, 4 << 20))
    begun = time.perf_counter()
    async with Ahead(iter(plan), lambda run: run.nbytes, load, ring) as ahead:
        for _ in plan:
            _, lease = await ahead.next()
            lease.release()
    return sum(run.nbytes for run in plan) / (time.perf_counter() - begun)


async def decode(folder: Path, rounds: int, model: Path | None) -> Row:
    """Weights and KV both stream: 3 GiB, an 8k context, half of its KV on disk."""
    tokens, steps = 8192, 2 + 3 * rounds
    async with Runtime.open(
        str(model), memory="3GiB", max_context_tokens=tokens, max_concurrent_requests=1, kv_cache_strategy="paged",
        kv_cache_memory=tokens * 114_688 // 2, cache_dir=folder,
    ) as runtime:  # fmt: skip
        seconds, nbytes, speeds, begun, now = [], [], [], time.perf_counter(), 0.0
        async for _ in runtime.stream(some_ids(tokens - steps), max_new_tokens=steps):
            now = time.perf_counter()
            events = [event for event in runtime.trace.between(begun, now) if event.name in ("kvload", "safetensor_pread")]
            inside = [event for event in events if event.start >= begun and event.end <= now]
            seconds.append(now - begun)
            nbytes.append(runtime.plan.streamed_nbytes_per_pass + sum(event.nbytes for event in events if event.name == "kvload"))
            speeds.append(sum(event.nbytes for event in inside) / covered(inside) if inside else 0.0)
            begun = now
        drive = max(runtime.drive_bytes_per_second or 0.0, median(speeds[2:-1]))
        kv = [event for event in runtime.trace.between(0, now) if event.name == "kvload"]
    of_bound = median(amount / drive / taken for amount, taken in zip(nbytes[2:-1], seconds[2:-1], strict=True))
    return {
        "bar": "half of 8k tokens of KV on disk, 3B: ≥ 0.85 of the bound",
        "told": f"{of_bound:.2f}: {median(seconds[2:-1]):.2f} s a step, {median(nbytes[2:-1]) / 1e9:.2f} GB, drive {drive / 1e9:.2f} GB/s",
        "reached": of_bound >= 0.85, "of_bound": of_bound, "step_s": seconds, "bytes": nbytes, "drive_bytes_per_second": drive,
        "probed_bytes_per_second": runtime.drive_bytes_per_second, "kv_events": len(kv), "first_token_s": seconds[0],
    }  # fmt: skip


async def writes(folder: Path, rounds: int, model: Path | None) -> Row:
    """Bytes written for 32k tokens; and where sequences come and go, so that journals are compacted."""
    tokens = 32_768
    plain = {}
    for strategy in ("paged", "log-structured-journal"):
        async with Runtime.open(
            "demo", max_context_tokens=tokens, max_concurrent_requests=1, kv_cache_strategy=strategy, kv_cache_memory="8MiB",
            cache_dir=folder,
        ) as runtime:  # fmt: skip
            await answer(runtime, some_ids(tokens - 2), 2)
            assert runtime.cache.records is not None
            plain[strategy] = runtime.cache.records.written_nbytes / (tokens * 1536)
    async with Runtime.open(
        "demo", max_context_tokens=4096, kv_cache_strategy="log-structured-journal", kv_cache_memory="8MiB", cache_dir=folder
    ) as runtime:  # fmt: skip
        kept = runtime.session()
        for turn in range(48):  # every other sequence ends: what lives is moved when half of a journal is dead
            prompt = some_ids(2100, turn)
            if turn % 8 == 0:
                async for _ in runtime.stream(prompt, max_new_tokens=1, session=kept):
                    pass
                kept = runtime.session()
            else:
                await answer(runtime, prompt, 1)
        state = runtime.cache_state()
        assert runtime.cache.records is not None
        compacted = runtime.cache.records.written_nbytes / (48 * 2048 * 1536)
    most = max(plain.values())
    return {
        "bar": "written / KV ≤ 1.05, with compaction ≤ 2.1",
        "told": f"{most:.3f} at most, {compacted:.2f} with {state['compaction_count']} compactions",
        "reached": most <= 1.05 and compacted <= 2.1 and state["compaction_count"] > 0, "written": plain, "compacted": compacted,
        "compactions": state["compaction_count"],
    }  # fmt: skip


async def presets(folder: Path, rounds: int, model: Path | None) -> Row:
    """Each preset on 8k tokens: what it writes, how fast it reads back, what it keeps in memory, and what a step takes."""
    tokens, steps, found = 8192, 4 + 4 * rounds, {}
    for strategy, preset in PRESETS.items():
        fields: Row = {"kv_cache_memory": "3MiB", "cache_dir": folder} if preset.layout is not None else {}
        fields |= {"kv_cache_window_tokens": 2048} if preset.windowed else {}
        async with Runtime.open(
            "demo", max_context_tokens=tokens, max_concurrent_requests=1, kv_cache_strategy=strategy, **fields
        ) as runtime:  # fmt: skip
            run, pool, records, most = None, runtime.cache.pool, runtime.cache.records, 0
            begun = time.perf_counter()
            run = await answer(runtime, some_ids(tokens - steps), steps)
            loads = [event for event in runtime.trace.between(begun + run.seconds[0], time.perf_counter()) if event.name == "kvload"]
            most = (tokens - 1) * pool.layers * 2 * pool.row_nbytes - run.missing[-2]
            found[strategy] = {
                "written_over_kv": records.written_nbytes / (tokens * 1536) if records is not None else 0.0,
                "read_bytes_per_second": sum(event.nbytes for event in loads) / covered(loads) if loads else None,
                "bytes_per_step": median(run.loaded[2:-1]), "memory_nbytes": most, "first_token_s": run.seconds[0],
                "step_s": median(run.seconds[2:-1]),
            }  # fmt: skip
    told = ", ".join(f"{name} {row['step_s'] * 1e3:.0f} ms" for name, row in found.items())
    return {"bar": "-", "told": told, "reached": True, "presets": found}


async def spill(folder: Path, rounds: int, model: Path | None) -> Row:
    """A prompt whose KV is written while the next layers compute, against one whose KV stays in memory."""
    tokens = 16_384
    fields: Row = {"max_context_tokens": tokens + 8, "max_concurrent_requests": 1, "dense_projection_chunk_rows": 512}
    taken: dict[str, list[float]] = {"resident": [], "paged": []}
    for turn in range(2 * rounds + 1):
        for strategy in taken:
            async with Runtime.open(
                "demo", kv_cache_strategy=strategy, kv_cache_memory="64MiB", cache_dir=folder, **fields
            ) as runtime:  # fmt: skip
                found = await answer(runtime, some_ids(tokens, turn), 2)
                taken[strategy].append(found.seconds[0])
    added = median(ours / theirs for ours, theirs in zip(taken["paged"][1:], taken["resident"][1:], strict=True)) - 1
    return {
        "bar": "time added to a pass by spilling ≤ 5 %",
        "told": f"{added:+.1%}", "reached": added <= 0.05, "added": added, "seconds": taken,
    }  # fmt: skip


CHILD = """
import sys, time, anyio
sys.path.insert(0, {here!r})
from kv_questions import some_ids
from aollm import Runtime
async def main():
    kept = dict(kv_cache_strategy={strategy!r}, kv_cache_lifecycle="persistent", cache_dir={folder!r})
    async with Runtime.open("demo", max_context_tokens=9000, **kept) as runtime:
        begun, ids = time.perf_counter(), []
        async with runtime.stream(some_ids(8192 + 40), max_new_tokens=8) as stream:
            async for token in stream:
                if not ids:
                    first = time.perf_counter() - begun
                ids.append(token.id)
            print(first, stream.request.prefix_hit_tokens, *ids, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


async def restart(folder: Path, rounds: int, model: Path | None) -> Row:
    """An 8k prompt, `kill -9` as soon as the answer is out, a new process, the same prompt. Not for what keeps its newest
    blocks in memory only, and says so."""
    found: Row = {}
    for strategy in (name for name in WRITING if PRESETS[name].residency.mode == "buffered-tail"):
        code = CHILD.format(here=str(Path(__file__).parent), strategy=strategy, folder=str(folder))
        told = []
        for _ in range(2):
            child = subprocess.Popen(  # noqa: ASYNC220  nothing else runs here
                [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
            )
            assert child.stdout is not None
            told.append(child.stdout.readline().split())
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        (cold, _, *first), (warm, hit, *second) = told
        found[strategy] = {"cold_s": float(cold), "warm_s": float(warm), "reused": int(hit) // BLOCK / 8, "equal": first == second}
    share = max(row["warm_s"] / row["cold_s"] for row in found.values())
    reused, equal = min(row["reused"] for row in found.values()), all(row["equal"] for row in found.values())
    return {
        "bar": "≥ 99 % of whole blocks, same tokens, TTFT ≤ 1/10",
        "told": f"{reused:.0%} of blocks, tokens {'equal' if equal else 'DIFFER'}, TTFT × {share:.3f} at most",
        "reached": reused >= 0.99 and equal and share <= 0.1, "strategies": found,
    }  # fmt: skip


async def lookup(folder: Path, rounds: int, model: Path | None) -> Row:
    """A prompt's longest prefix among 10,000 stored sequences of 8 blocks."""
    index, top = Index(BLOCK), root(bytes(16), "")
    maker = random.Random(0)
    for _ in range(10_000):
        parent = top
        for block in range(8):
            ids = pack_ids(maker.choices(range(100_000), k=BLOCK))
            name = digest(parent, ids)
            index.add(Node(name, parent, block, ids, ()))
            parent = name
    last, path = parent, []
    while (node := index.get(last)) is not None:
        path.insert(0, node)
        last = node.parent
    prompt = [int.from_bytes(node.ids[at : at + 4], "big") for node in path for at in range(0, len(node.ids), 4)]
    taken = []
    for cut in range(100):
        begun = time.perf_counter()
        found = await anyio.to_thread.run_sync(index.lookup, top, [*prompt[: 8000 - cut], 5])
        taken.append((time.perf_counter() - begun) * 1e3)
        assert found.tokens == 8000 - cut
    return {
        "bar": "≤ 10 ms among 10,000 sequences, off the loop", "told": f"{median(taken):.2f} ms, at most {max(taken):.2f}",
        "reached": max(taken) <= 10, "median_ms": median(taken), "max_ms": max(taken),
    }  # fmt: skip


class Forced(Sampler):
    """Says what it is told to, and how likely the model held it."""

    def __init__(self, vocabulary: int, ids: list[int]) -> None:
        super().__init__(Sampling(), vocabulary)
        self._told = iter(ids)

    def draw(self, logits: torch.Tensor, history: Any) -> Draw:
        chosen = next(self._told)
        return Draw(chosen, float(logits.float().log_softmax(-1)[chosen]), ())


async def quality(folder: Path, rounds: int, model: Path | None) -> Row:
    """int8: its bytes, and the perplexity of text that the bundled model has not seen, most of which is read back from disk."""
    losses, nbytes = {}, {}
    for strategy in ("log-structured-journal", "quantized-cold-tier"):
        total = count = 0.0
        for text in range(2 * rounds):
            async with Runtime.open(
                "demo", max_context_tokens=6144, max_concurrent_requests=1, kv_cache_strategy=strategy, kv_cache_memory="3MiB",
                cache_dir=folder,
            ) as runtime:  # fmt: skip
                ids = (await held_out(runtime, 900_000 + text, 4096 + 400))[: 4096 + 400]
                sampler = Forced(runtime.plan.vocabulary, ids[4096:])
                request = Request(0, ids[:4096], 400, frozenset(), [sampler], [runtime.text.decoder(())], runtime.engine.wake)
                runtime.engine.submit(request)
                while (token := await request.take()) is not None:
                    total, count = total - token.logprob, count + 1
                assert runtime.cache.records is not None
                nbytes[strategy] = runtime.cache.records.written_nbytes
        losses[strategy] = total / count
    worse = torch.tensor(losses["quantized-cold-tier"] - losses["log-structured-journal"]).exp().item() - 1
    share = nbytes["quantized-cold-tier"] / nbytes["log-structured-journal"]
    return {
        "bar": "int8: ≤ 0.55 of the bytes, perplexity + 1 % at most", "told": f"{share:.3f} of the bytes, perplexity {worse:+.2%}",
        "reached": share <= 0.55 and worse <= 0.01, "bytes": share, "perplexity": worse, "loss": losses,
    }  # fmt: skip


async def held_out(runtime: Runtime, seed: int, tokens: int) -> list[int]:
    ids: list[int] = []
    for document in documents(seed, 20_000, 24_000):
        ids += await anyio.to_thread.run_sync(runtime.text.encode, document)
        if len(ids) >= tokens:
            return ids
    raise AssertionError("the corpus ended")


async def window(folder: Path, rounds: int, model: Path | None) -> Row:
    """Memory and disk of a window, over twenty times its length."""
    tokens, seen = 2048, []
    async with Runtime.open(
        "demo", max_context_tokens=22 * tokens, max_concurrent_requests=1, kv_cache_strategy="sliding-window-ring-buffer",
        kv_cache_window_tokens=tokens, kv_cache_memory="6MiB", cache_dir=folder,
    ) as runtime:  # fmt: skip
        session = runtime.session()
        for turn in range(1, 21):
            async for _ in runtime.stream(some_ids(turn * tokens), max_new_tokens=2, session=session):
                pass
            on_disk = sum(path.stat().st_blocks * 512 for path in folder.rglob("*.ring"))  # noqa: ASYNC240
            seen.append((runtime.cache.pool.all_rows, on_disk))
        await session.aclose()
    rows, disk = ([found[part] for found in seen[3:]] for part in (0, 1))
    return {
        "bar": "memory and disk constant over 20 × the window",
        "told": f"rows {min(rows)} to {max(rows)}, disk {min(disk) >> 10} to {max(disk) >> 10} KiB",
        "reached": max(rows) <= runtime.cache.pool.tokens * 6 and max(disk) <= 1.05 * min(disk), "rows": rows, "disk_nbytes": disk,
    }  # fmt: skip


QUESTIONS: dict[str, Question] = {
    "context": context, "rate": rate, "decode": decode, "presets": presets, "writes": writes,
    "spill": spill, "restart": restart, "lookup": lookup,
    "quality": quality, "window": window,
}  # fmt: skip
