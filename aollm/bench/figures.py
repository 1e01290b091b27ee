"""What one request took: times, memory, processor and cache, as the process that served it sees them.

What cannot be measured is None. It refuses to know why the request was made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter, process_time
from typing import Any

import anyio
import anyio.to_thread
import torch

from ..errors import first_of
from ..request import Token
from ..runtime import Runtime
from ..runtime_plan import RuntimePlan
from ..stream import TokenStream
from .measure import watch
from .passes import Pass, passes_of
from .process import allocator_slack_nbytes, memory
from .spread import Parts, at


@dataclass(frozen=True, slots=True)
class Measured:
    """One request: `figures` as JSON has them, and in `state` what is said once a lane. Seconds until the first token, and of each
    pass that only decoded, are in parts where passes tell them, and nothing was waited for in between."""

    figures: dict[str, Any]
    state: dict[str, Any]
    first_s: Sequence[Parts]
    decode_s: Sequence[Parts]


async def measured(runtime: Runtime, stream: TokenStream) -> Measured:
    """Read `stream`, which has not begun, to its end. Raises what reading it raises."""
    times: list[float] = []
    tokens: list[Token] = []
    lateness_s: list[float] = []
    first_cpu_s = 0.0
    passes, begun_cpu_s, start = runtime.engine.passes, process_time(), perf_counter()
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch, lateness_s)
            async with stream:
                async for token in stream:
                    times.append(perf_counter())
                    first_cpu_s = first_cpu_s or process_time() - begun_cpu_s
                    tokens.append(token)
            group.cancel_scope.cancel()
    except ExceptionGroup as raised:
        raise first_of(raised) from raised
    end, cpu_s = perf_counter(), process_time() - begun_cpu_s
    request, plan = stream.request, runtime.plan
    assert request is not None
    gaps = [later - earlier for earlier, later in pairwise(times)]
    first_s = times[0] - start if times else None
    profile = await anyio.to_thread.run_sync(runtime.profile_of, request, start, first_s, end - start, len(tokens))
    found = [] if profile is None else passes_of(runtime.trace.between(start, end), end)
    found = [each for each in found if each.start >= start]
    decode_s = [_parts(each, plan) for each in found if each.rows == 1] if found else [[gap] for gap in gaps]
    prefill = [part for each in found if each.rows > 1 for part in _parts(each, plan)]
    until_first = [[found[0].start - start, *prefill]] if prefill else [] if first_s is None else [[first_s]]
    cache = runtime.cache_state_of(request)
    figures = {
        "prompt_tokens": len(request.prompt), "output_tokens": len(tokens), "finish_reason": tokens[-1].finish_reason if tokens else None,
        "seconds": end - start, "ttft_seconds": first_s, "inter_token_seconds": _gaps(gaps),
        "prompt_tokens_per_second": len(request.prompt) / first_s if first_s else None,
        "output_tokens_per_second": len(tokens) / (end - start),
        "passes": runtime.engine.passes - passes, "pass_seconds": median(map(sum, decode_s)) if decode_s else None,
        "prefix_hit_tokens": request.prefix_hit_tokens, "prefix_miss_reason": request.prefix_miss_reason,
        **memory(), **_accelerator(), "cpu_seconds": cpu_s, "first_cpu_seconds": first_cpu_s,
        "cpu_share": cpu_s / (end - start) / (os.cpu_count() or 1),
        "cache_dir_size_mb": cache["persisted_bytes"] / 1e6 if cache["cache_mode"] == "disk-kv" else None,
        "loop_lateness_ms": lateness_ms(lateness_s),
    }  # fmt: skip
    state = {
        "kv_cache_strategy": cache["kv_cache_strategy"], "cache_state": cache,
        "chunked_prefill": chunked_prefill(plan, len(request.prompt) - request.prefix_hit_tokens), "native_runtime_profile": profile,
    }  # fmt: skip
    return Measured(figures, state, until_first, decode_s)


def chunked_prefill(plan: RuntimePlan, rows: int) -> dict[str, int]:
    """How `rows` rows of a prompt are cut: over how many passes, and inside a layer into how many chunks."""
    return {
        "rows": rows, "rows_per_pass": plan.max_rows, "passes": -(-rows // plan.max_rows),
        "chunk_rows": plan.chunk_rows, "chunks": -(-rows // plan.chunk_rows),
    }  # fmt: skip


def lateness_ms(late_s: Sequence[float]) -> dict[str, float] | None:
    """How late the event loop's beats of 5 ms came; None if there was none."""
    late = [each * 1e3 for each in late_s]
    return {"p50": median(late), "p99": at(late, 0.99), "max": max(late), "beats": len(late)} if late else None


def _parts(one: Pass, plan: RuntimePlan) -> Parts:
    """Of a pass that reads weights only the whole is told: its waits take turns, and the least of each would be none."""
    return [one.seconds] if plan.streamed_nbytes_per_pass else one.parts


def _gaps(gaps: Sequence[float]) -> dict[str, float] | None:
    """The times between tokens; None for an answer of one."""
    return {"p50": median(gaps), "p95": at(gaps, 0.95), "max": max(gaps)} if gaps else None


def _accelerator() -> dict[str, Any]:
    """Memory and use of the device, where torch has taken one; there, slack is what torch's allocator holds free."""
    if not torch.cuda.is_available() or not torch.cuda.memory_reserved():
        none = dict.fromkeys(("accelerator_memory_nbytes", "accelerator_peak_memory_nbytes", "accelerator_utilization"))
        return {**none, "allocator_slack_nbytes": allocator_slack_nbytes()}
    allocated = torch.cuda.memory_allocated()
    return {
        "accelerator_memory_nbytes": allocated, "accelerator_peak_memory_nbytes": torch.cuda.max_memory_allocated(),
        "accelerator_utilization": _utilization(), "allocator_slack_nbytes": torch.cuda.memory_reserved() - allocated,
    }  # fmt: skip


def _utilization() -> float | None:
    """The share of the last moments in which the device computed; None without NVIDIA's library for asking."""
    try:
        return torch.cuda.utilization() / 100
    except (ImportError, RuntimeError):
        return None
