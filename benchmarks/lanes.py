"""One function per system: load the checkpoint its own way, then decode greedily, one token at a time.

Each runs alone in its process (`peers.py --lane NAME` calls `run_lane`), imports only its own libraries, and stamps every
token on the `Clock`. A lane knows nothing of the others, of caps or of rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from card import package_version

KEPT_NBYTES = 2 << 30  # beside weights in memory: libraries, copies of the layer at hand; 1.25 to 3 GiB measure the same


@dataclass(frozen=True, slots=True)
class Job:
    """The same work for every lane; `memory` is the cap as written, `memory_nbytes` the number (`None`: no cap)."""

    model: Path
    work: Path
    memory: str
    memory_nbytes: int | None
    prompt: list[int]
    tokens: int
    threads: int


@dataclass(slots=True)
class Clock:
    """When things happened: `loaded` once, `token` after each token; the first token carries the prompt."""

    begin: float = field(default_factory=time.perf_counter)
    last: float = 0.0
    load_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    read_nbytes: list[int] = field(default_factory=list)

    def loaded(self) -> None:
        self.last = time.perf_counter()
        self.load_s = self.last - self.begin

    def token(self, number: int) -> None:
        now = time.perf_counter()
        self.token_s.append(now - self.last)
        self.token_ids.append(number)
        self.read_nbytes.append(drive_nbytes())
        self.last = time.perf_counter()


def drive_nbytes() -> int:
    """Bytes this process has had fetched from storage so far, page faults and O_DIRECT included."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def decode(model: Any, job: Job, clock: Clock) -> None:
    """Greedy decoding with a transformers model and its own cache."""
    import torch

    rows, cache = torch.tensor([job.prompt]), None
    with torch.inference_mode():
        for _ in range(job.tokens):
            out = model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, rows = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            clock.token(int(rows[0, 0]))


def transformers(job: Job, clock: Clock) -> None:
    """Weights stay views of the mapped safetensors files (no copy, checked on 5.23), so the page cache streams them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    clock.loaded()
    decode(model, job, clock)


def accelerate(job: Job, clock: Clock) -> None:
    """`device_map="auto"`: what the cap leaves goes to memory, the other layers to disk."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    placed: dict[str, Any] = {}
    if job.memory_nbytes is not None:
        placed["max_memory"] = {"cpu": max(0, job.memory_nbytes - KEPT_NBYTES)}
        placed["offload_folder"] = job.work / "offload"
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16, device_map="auto", **placed)
    clock.loaded()
    decode(model, job, clock)


def llama_cpp(job: Job, clock: Clock) -> None:
    """The same weights as a bf16 GGUF, mapped."""
    from llama_cpp import Llama

    path = str(job.work / "model.gguf")
    model = Llama(path, n_ctx=512, n_threads=job.threads, n_threads_batch=job.threads, use_mmap=True, verbose=False)
    clock.loaded()
    model.reset()
    rows = job.prompt
    for _ in range(job.tokens):
        model.eval(rows)
        rows = [model.sample(temp=0.0)]
        clock.token(rows[0])


def airllm(job: Job, clock: Clock) -> None:
    """Layer files of its own making, loaded before each layer and dropped after it."""
    import torch
    from airllm import AutoModel

    torch.set_num_threads(job.threads)
    shards = str(job.work / "airllm")
    model = AutoModel.from_pretrained(str(job.model), device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=shards)
    clock.loaded()
    decode(model, job, clock)


def aollm(job: Job, clock: Clock) -> None:
    import anyio
    import torch

    from aollm import Runtime

    torch.set_num_threads(job.threads)
    fields: dict[str, Any] = {} if job.memory_nbytes is None else {"memory": job.memory}

    async def run() -> None:
        async with Runtime.open(str(job.model), max_context_tokens=512, max_concurrent_requests=1, **fields) as runtime:
            clock.loaded()
            async for token in runtime.stream(job.prompt, max_new_tokens=job.tokens, temperature=0):
                clock.token(token.id)

    anyio.run(run)


def prepare_llama_cpp(job: Job) -> None:
    from to_gguf import convert

    if not (job.work / "model.gguf").exists():
        convert(job.model, job.work / "model.gguf")


def prepare_airllm(job: Job) -> None:
    """Split the checkpoint as its first load does; later loads find the files."""
    from airllm import AutoModel

    (job.work / "airllm").mkdir(exist_ok=True)
    AutoModel.from_pretrained(str(job.model), device="cpu", layer_shards_saving_path=str(job.work / "airllm"))


LANES: dict[str, Callable[[Job, Clock], None]] = {
    "transformers": transformers,
    "accelerate": accelerate,
    "llama.cpp": llama_cpp,
    "airllm": airllm,
    "aollm": aollm,
}
PREPARE: dict[str, Callable[[Job], None]] = {"llama.cpp": prepare_llama_cpp, "airllm": prepare_airllm}
PACKAGES = {"llama.cpp": "llama-cpp-python"}


def peak_rss_nbytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def run_lane(name: str, job: Job, prepare: bool) -> dict[str, Any]:
    """Run one lane here and now; a lane that fails is reported with its reason, never with numbers."""
    try:
        if prepare:
            PREPARE[name](job)
            return {"status": "ok"}
        clock = Clock()
        LANES[name](job, clock)
        if len(clock.token_ids) != job.tokens:
            raise ValueError(f"{len(clock.token_ids)} tokens came, {job.tokens} were asked for")
        record = {"status": "ok", "version": package_version(PACKAGES.get(name, name)) or "checkout", "peak_rss_nbytes": peak_rss_nbytes()}
    except Exception as error:  # the lane boundary: whatever a peer raises is its result
        return {"status": "unavailable", "reason": f"{type(error).__name__}: {error}"[:300]}
    rows = asdict(clock)
    return record | {key: rows[key] for key in ("load_s", "token_s", "token_ids", "read_nbytes")}
