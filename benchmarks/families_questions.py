"""The questions of `families.py`: each measures one thing, and says whether it is what it should be (None: there is no bar)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import psutil
import torch
from make_checkpoint import PUBLISHED, write_checkpoint
from routing import COLD, EXPERTS, LAYERS, PASSES, TOP, TOPIC, drawn, own_hits, simple_hits
from safetensors.torch import save_file
from shapes import llama

from aollm import ConfigError, RequestError, Runtime
from aollm.bench.drive import Drive
from aollm.bench.interval import interval_of
from aollm.bench.measure import random_prompts, settle
from aollm.bench.process import peak_rss_nbytes
from aollm.checkpoint import open_checkpoint
from aollm.compute import Compute
from aollm.disk.auto import open_disk
from aollm.export.writer import write_export
from aollm.item import Item
from aollm.port import Port
from aollm.settings import RuntimeConfig
from aollm.survey import survey
from aollm.towers import Towers
from aollm.trace import READS, Event, Trace, covered

Row = dict[str, Any]
WARM_TOKENS = 4
"""Tokens of each stream before those that count; its prompt has touched most experts by then."""
PROMPT_TOKENS = 32
EXPERT = re.compile(r"layer \d+ expert \d+")
RANK = 16


@dataclass(frozen=True, slots=True)
class Work:
    """What a question is given: a folder of its own, a model's folder if it has one, and how long to measure."""

    folder: Path
    model: Path | None
    rounds: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Question:
    """`model`: whose folder it wants."""

    ask: Callable[[Work], Awaitable[Row]]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of one answer, between two of its tokens: what it took, and what the kernel read for this process meanwhile."""

    start: float
    end: float
    tokens: int
    events: Sequence[Event]
    kernel_nbytes: int | None

    def per_token_ms(self, name: str) -> dict[str, float]:
        """Milliseconds of a token by what they went to: labels of `compute` or `stall`, without layers' numbers."""
        found: dict[str, float] = {}
        for event in self.events:
            if event.name == name and event.start >= self.start and event.end <= self.end:
                label = re.sub(r"(layer \d+ )|( from row \d+)", "", event.label)
                found[label] = found.get(label, 0.0) + (event.end - event.start) * 1e3 / self.tokens
        return {label: round(spent, 2) for label, spent in sorted(found.items(), key=lambda item: -item[1])}


async def turn(runtime: Runtime, prompt: Sequence[int], tokens: int) -> Turn:
    """One stream, of which the first `WARM_TOKENS` tokens do not count."""
    marks: list[tuple[float, int | None]] = []
    async for _ in runtime.stream(prompt, max_new_tokens=WARM_TOKENS + tokens):
        marks.append((time.perf_counter(), kernel_nbytes()))
    if len(marks) <= WARM_TOKENS:
        raise RequestError(f"the answer ended after {len(marks)} tokens, and {WARM_TOKENS} are a warm-up; ask for more --rounds")
    (start, before), (end, after) = marks[WARM_TOKENS - 1], marks[-1]
    read = after - before if before is not None and after is not None else None
    events = await anyio.to_thread.run_sync(runtime.trace.between, start, end)
    return Turn(start, end, len(marks) - WARM_TOKENS, events, read)


def kernel_nbytes() -> int | None:
    """Bytes that the kernel fetched from the drive for this process; None where it does not tell."""
    return psutil.Process().io_counters().read_bytes if psutil.LINUX else None


async def streamed(memory: str, bar: float, work: Work) -> Row:
    """One stream within `memory`: a token's time against reading its bytes at the drive's speed."""
    assert work.model is not None
    drive, found = Drive(work.model, "auto"), list[Row]()
    await drive.probe()
    context = PROMPT_TOKENS + WARM_TOKENS + work.tokens + 1
    async with Runtime.open(work.model, memory=memory, max_context_tokens=context, max_concurrent_requests=1) as runtime:
        await settle()
        before = await drive.probe()
        for number in range(work.rounds):
            (prompt,) = random_prompts(runtime, runtime.plan.vocabulary, 1, PROMPT_TOKENS, str(number))
            measured = await turn(runtime, prompt, work.tokens)
            await settle()
            after = await drive.probe()
            found.append(figures(runtime, measured, (before + after) / 2))
            before = after
        plan, peak = runtime.plan, peak_rss_nbytes() or 0
    told = {name: median(row[name] for row in found) for name in found[0] if isinstance(found[0][name], float)}
    fits, exact = peak <= plan.memory, abs(told["read_over_wanted"] - 1) <= 0.01
    last, slots = found[-1], f"{plan.expert_slots} of {plan.experts} have room"
    routed = [
        f"experts: {told['chosen']:.0f} asked for a token, {told['hit_share']:.0%} there or on their way, {told['kept_share']:.0%} without "
        f"any read; {slots}; guesses are {told['guessed_share']:.0%} of the bytes; routing is uniform"
    ]  # fmt: skip
    return {
        "bar": f"≥ {bar:.2f} of the bound, reads within 1 %, in memory",
        "told": f"{told['of_bound']:.2f}: {told['token_s'] * 1e3:.0f} ms a token, {told['nbytes'] / 1e9:.3f} GB, "
        f"drive {told['drive_bytes_per_second'] / 1e9:.2f} GB/s, "
        f"read / wanted {told['read_over_wanted']:.4f}, peak {peak >> 20} of {plan.memory >> 20} MiB",
        "more": [
            *(routed if plan.experts else []),
            f"the longer of drive and compute is {told['of_longer']:.2f} of the time; of {last['token_s'] * 1e3:.0f} ms "
            f"{last['reading_s'] * 1e3:.0f} had a read under way, {last['other_ms']:.0f} were neither of these:",
            *(f"{name} ms: " + ", ".join(f"{label} {ms:.0f}" for label, ms in last[name].items()) for name in ("compute", "stall")),
        ],
        "reached": told["of_bound"] >= bar and fits and exact, **told, "peak_rss_nbytes": peak, "memory": plan.memory,
        "experts": plan.experts, "expert_slots": plan.expert_slots, "pinned_nbytes": plan.pinned_nbytes,
        "streamed_nbytes_per_pass": plan.streamed_nbytes_per_pass, "turns": found,
    }  # fmt: skip


def figures(runtime: Runtime, measured: Turn, probed: float) -> Row:
    """One turn against the drive's speed: that of the probes around it, or what it reached meanwhile where that was more.

    An expert that is asked for and neither in memory nor on its way is read: `wanted` are those, what streams, and what was
    read on a guess, whose part is `guessed_share`. `kept_share`: of those asked for, how many more than were read in any way.
    """
    plan, seconds = runtime.plan, measured.end - measured.start
    reads = [event for event in measured.events if event.name in READS]
    inside = interval_of(reads, measured.start, measured.end)
    if not (nbytes := sum(each for _, _, each in inside.reads)):
        raise ConfigError("all of this model fits in memory, so nothing is read; name one with more layers")
    busy = covered(Event("stall", start, end) for start, end, _ in inside.reads)
    drive = max(probed, nbytes / busy)
    loads = [event for event in measured.events if event.name == "experts_load" and measured.start <= event.start < measured.end]
    chosen, asked = sum(event.rows for event in loads), sum(event.nbytes for event in loads)
    experts = interval_of([event for event in reads if EXPERT.fullmatch(event.label)], measured.start, measured.end)
    guessed = max(sum(each for _, _, each in experts.reads) - asked, 0)
    kind = max((event.nbytes for event in reads if EXPERT.fullmatch(event.label)), default=1)
    row_nbytes = sum(event.nbytes for event in reads if event.label == "embedding rows")
    wanted = plan.streamed_nbytes_per_pass * measured.tokens + asked + guessed + row_nbytes
    compute, stall = measured.per_token_ms("compute"), measured.per_token_ms("stall")
    token_s, disk_s, compute_s = seconds / measured.tokens, nbytes / drive, sum(compute.values()) * measured.tokens / 1e3
    return {
        "token_s": token_s, "of_bound": disk_s / seconds, "of_longer": max(disk_s, compute_s) / seconds,
        "nbytes": nbytes / measured.tokens, "reading_s": busy / measured.tokens,
        "drive_bytes_per_second": drive, "probed_bytes_per_second": probed, "reading_bytes_per_second": nbytes / busy,
        "chosen": chosen / measured.tokens, "hit_share": 1 - asked / kind / chosen if chosen else 0.0,
        "kept_share": 1 - (asked + guessed) / kind / chosen if chosen else 0.0,
        "read_over_wanted": (nbytes if measured.kernel_nbytes is None else measured.kernel_nbytes) / wanted,
        "guessed_share": guessed / nbytes, "compute": compute, "stall": stall,
        "other_ms": token_s * 1e3 - sum(compute.values()) - sum(stall.values()),
    }  # fmt: skip


async def adapters(work: Work) -> Row:
    """Four requests in one batch, each with an adapter of its own, and then none; all weights in memory, so that nothing hides them."""
    model = await llama_folder(work)
    names = [f"a{number}" for number in range(4)]
    for seed, name in enumerate(names):
        await anyio.to_thread.run_sync(save_adapter, model, work.folder / "adapters" / name, seed)
    kinds: dict[str, list[float]] = {"none": [], "adapters": []}
    context = PROMPT_TOKENS + WARM_TOKENS + work.tokens + 1
    async with Runtime.open(
        model, memory="6GiB", adapter_dir=work.folder / "adapters", max_context_tokens=context, max_concurrent_requests=4
    ) as runtime:  # fmt: skip
        prompts = random_prompts(runtime, runtime.plan.vocabulary, 4, PROMPT_TOKENS, "adapters")
        for number in range(4 * work.rounds + 2):
            kind = ["none", "adapters", "adapters", "none"][number % 4]
            taken = await together(runtime, prompts, names if kind == "adapters" else [None] * 4, work.tokens)
            if number >= 2:
                kinds[kind].append(taken)
    slower = median(kinds["adapters"]) / median(kinds["none"]) - 1
    return {
        "bar": "4 adapters of rank 16 in a batch of 4: ≤ 8 % slower",
        "told": f"{slower:+.1%}: {median(kinds['adapters']) * 1e3:.1f} against {median(kinds['none']) * 1e3:.1f} ms a pass",
        "reached": slower <= 0.08, "slower": slower, "pass_s": kinds, "streamed_nbytes_per_pass": runtime.plan.streamed_nbytes_per_pass,
    }  # fmt: skip


async def together(runtime: Runtime, prompts: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int) -> float:
    """The median of a pass's seconds while all decode."""
    times: list[float] = []

    async def read(number: int) -> None:
        count = WARM_TOKENS + tokens
        async for _ in runtime.stream(prompts[number], max_new_tokens=count, adapter=names[number]):
            if number == 0:
                times.append(time.perf_counter())

    async with anyio.create_task_group() as group:
        for number in range(len(prompts)):
            group.start_soon(read, number)
    return median(after - before for before, after in pairwise(times[2:-1]))


def save_adapter(model: Path, folder: Path, seed: int) -> None:
    """A LoRA with random weights on all linear modules, as PEFT saves it."""
    folder.mkdir(parents=True)
    generator, tensors, targets = torch.Generator().manual_seed(seed), {}, set()
    for tensor in llama(json.loads((model / "config.json").read_text())):
        if tensor.name.endswith("_proj.weight"):
            module, (out, inner) = tensor.name.removesuffix(".weight"), tensor.shape
            targets.add(module.rpartition(".")[2])
            for half, shape in (("A", (RANK, inner)), ("B", (out, RANK))):
                values = torch.randn(*shape, generator=generator) * 0.01
                tensors[f"base_model.model.{module}.lora_{half}.weight"] = values.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(targets), "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


async def llama_folder(work: Work) -> Path:
    """The model that was named, or one of Llama-3.2-1B's shape, made for the question."""
    if work.model is not None:
        return work.model
    shape, out = PUBLISHED["llama-3.2-1b"], work.folder / "llama-3.2-1b"
    config = shape.sliced(None) | {"torch_dtype": "bfloat16"}
    await anyio.to_thread.run_sync(write_checkpoint, shape, config, "bf16", out)
    return out


async def experts(work: Work) -> Row:
    """Hit rates of the cache that runtimes use, on made routing, against the last used and the most used ones."""
    traces = {"uniform": drawn(False, None), "skewed": drawn(True, None), "drifting": drawn(True, TOPIC)}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, passes in traces.items():
        found[name] = {}
        for share in (0.125, 0.25, 0.5):
            slots = int(LAYERS * EXPERTS * share)
            found[name][f"{share:.1%}"] = {
                "ours": await own_hits(passes, slots), "lru": simple_hits(passes, slots, True), "lfu": simple_hits(passes, slots, False)
            }  # fmt: skip
    cells = [(name, share, rates) for name, shares in found.items() for share, rates in shares.items()]
    behind = max(max(rates["lru"], rates["lfu"]) - rates["ours"] for _, _, rates in cells)
    return {
        "bar": "≤ 2 points behind the better of LRU and LFU",
        "told": f"{behind * 100:.1f} points behind at most; {LAYERS} × {EXPERTS} experts, top {TOP}, {PASSES - COLD} passes",
        "more": [
            f"{name} routing, {share} of slots: " + ", ".join(f"{kind} {rate:.1%}" for kind, rate in rates.items())
            for name, share, rates in cells
        ],
        "reached": behind <= 0.02, "behind": behind, "hits": found,
    }  # fmt: skip


async def images(work: Work) -> Row:
    """The tower's time for one image, its weights read from the drive each time."""
    assert work.model is not None
    seconds, trace, drive = [], Trace(), Drive(work.model, "auto")
    async with Port() as port:
        disk, reason = open_disk("auto", port, work.model)
        compute = Compute(port, psutil.cpu_count(logical=True) or 1)
        found = await survey(RuntimeConfig.of(work.model, {"max_context_tokens": 1024}), work.model, disk, reason)
        tower, pieces = found.tower, found.tower_pieces
        assert tower is not None
        for number in range(work.rounds):
            image = np.random.default_rng(number).integers(0, 256, (896, 896, 3), dtype=np.uint8)
            ready = await anyio.to_thread.run_sync(tower.prepare, image)
            start = time.perf_counter()
            rows = await Towers(pieces, 0, disk, compute, trace).rows(Item(bytes([number]), ready, 0, tower.rows(ready), tower.both_ways))
            seconds.append(time.perf_counter() - start)
        compute.close()
        await disk.aclose()
    nbytes, speed, taken = sum(piece.read_nbytes for piece in pieces), await drive.probe(), median(seconds)
    return {
        "told": f"{taken:.2f} s an image of {len(rows)} rows, {nbytes / 1e6:.0f} MB of weights, "
        f"which the drive reads in {nbytes / speed:.2f} s",
        "reached": None, "image_s": taken, "nbytes": nbytes, "drive_bytes_per_second": speed, "turns": seconds,
    }  # fmt: skip


async def export(work: Work) -> Row:
    """Bytes read and written a second while an export is made, against the drive when it only reads."""
    model = await llama_folder(work)
    drive, speeds = Drive(model, "auto"), list[float]()
    probes = [await drive.probe()]
    async with Port() as port:
        disk, _ = open_disk("auto", port, model)
        checkpoint = await open_checkpoint(model, disk, "published")
        for _ in range(work.rounds):
            start = time.perf_counter()
            manifest = await write_export(checkpoint, work.folder / "export", disk, replace=True)
            speeds.append(2 * manifest.nbytes / (time.perf_counter() - start))
            probes.append(await drive.probe())
        await disk.aclose()
    speed, probed = median(speeds), median(probes)
    return {
        "told": f"{speed / 1e9:.2f} GB/s read and written, {manifest.nbytes / 1e9:.2f} GB each; "
        f"the drive alone reads {probed / 1e9:.2f} GB/s",
        "reached": None, "bytes_per_second": speed, "nbytes": manifest.nbytes, "drive_bytes_per_second": probed, "turns": speeds,
    }  # fmt: skip


QUESTIONS: dict[str, Question] = {
    "gpt-oss": Question(partial(streamed, "6GiB", 0.80), "gpt_oss"),
    "qwen3-next": Question(partial(streamed, "3GiB", 0.80), "qwen3_next"),
    "gemma3": Question(partial(streamed, "3GiB", 0.88), "gemma3"),
    "adapters": Question(adapters, "llama"), "experts": Question(experts), "images": Question(images, "gemma3"),
    "export": Question(export, "llama"),
}  # fmt: skip
