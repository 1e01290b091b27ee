"""The forecast: what a planned run will take, by arithmetic on sizes and on speeds that were measured.

A pass reads what is not kept while it computes, so it takes the longer of the two. Experts are known only when their layer is
reached, so the first of them is waited for. It refuses to know how speeds are measured.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .compute import FOREIGN, Compute
from .errors import ModelError
from .experts import Key
from .families.base import Experts, Family
from .maths.attention import BLOCK
from .pace import SAMPLE_NBYTES, Pace, measure
from .piece import Piece
from .prediction import FirstToken, Limiter, Prediction, Speed
from .runtime_plan import RuntimePlan, history_nbytes
from .stores.presets import PRESETS, ring_cells

Probe = Callable[[], Awaitable[float | None]]
"""Measures the drive: bytes per second, None where nothing is read again."""
LATER = ("pinned weights", "kv", "activations", "experts")
"""Lines of the ledger whose memory is not in use yet while the processor is measured."""
HOPS_S = 0.001
"""What a pass takes besides: its embedding rows, its draws, and the ways between threads."""
ENTRY_S = 0.002
"""What a request takes besides: its way to the engine, and its first token's way back."""
SHORT = 1024
"""Tokens of a history that is called short."""
PROMPTS = (32, 512, 4096)
"""Tokens of prompts whose first token is foretold, as far as they fit, and the longest that does."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Foretells passes of `plan`. `expert_nbytes` is what one expert takes to read."""

    plan: RuntimePlan
    family: Family
    pace: Pace
    drive_bytes_per_second: float | None
    expert_nbytes: float

    def decode(self, requests: int, context: int) -> Speed:
        """`requests` together, each making one token a pass."""
        dense_s, mixed_s = self.pace.pass_s(requests, requests, context), self.pace.mixed_s(requests, self.plan.chunk_rows)
        streamed, experts = self._streamed_nbytes(requests, context), self._missing_experts(requests)
        read_s, experts_s = self._read_s(streamed), self._read_s(experts * self.expert_nbytes)
        seconds = self._hops_s(experts) + max(read_s, dense_s) + self._in_turns(experts_s, mixed_s, experts)
        by_disk = read_s + experts_s >= dense_s + mixed_s
        limiter: Limiter = "disk" if by_disk else "memory" if requests <= 32 else "compute"
        return Speed(requests, context, seconds, int(streamed + experts * self.expert_nbytes), requests / seconds, limiter)

    def first_token(self, prompt_tokens: int) -> float:
        """Seconds until a prompt's first token, when nobody else rides."""
        plan = self.plan
        passes = -(-prompt_tokens // plan.max_rows)
        rows = -(-prompt_tokens // passes)
        read_s = self._read_s(passes * plan.streamed_nbytes_per_pass)
        experts = passes * self._missing_experts(rows)
        mixed_s = self.pace.mixed_s(prompt_tokens, plan.chunk_rows)
        turns_s = self._in_turns(self._read_s(experts * self.expert_nbytes), mixed_s, experts / passes)
        hops_s = passes * self._hops_s(experts)
        return ENTRY_S + hops_s + max(read_s, self.pace.prefill_s(prompt_tokens, plan.chunk_rows)) + turns_s

    def answer(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> tuple[float, float]:
        """Seconds until the first token of an answer, and until its last, while `requests` ride."""
        first = self.first_token(max(prompt_tokens, 1))
        return first, first + max(new_tokens - 1, 0) * self.decode(requests, prompt_tokens + new_tokens // 2).seconds_per_pass

    def compared(self, prompt_tokens: int, new_tokens: int, requests: int, first_s: float | None, last_s: float) -> dict[str, Any]:
        """What was `predicted` of an answer and what was `achieved`: `new_tokens` after `prompt_tokens` that had to be computed, in
        the company of all `requests`, the first and the last token after so many seconds."""
        predicted = self.answer(prompt_tokens, new_tokens, requests)
        return {"predicted": _figures(*predicted, new_tokens), "achieved": _figures(first_s, last_s, new_tokens)}

    def prediction(self) -> Prediction:
        """One request and all that may ride, with short and with full histories; first tokens of prompts of several lengths."""
        plan = self.plan
        contexts = sorted({min(SHORT, plan.max_context_tokens), plan.max_context_tokens})
        together = sorted({1, plan.max_concurrent_requests})
        longest = max(plan.max_context_tokens - 1, 1)
        prompts = sorted({*(tokens for tokens in PROMPTS if tokens < longest), longest})
        return Prediction(
            self.drive_bytes_per_second,
            tuple(self.decode(requests, context) for context in contexts for requests in together),
            tuple(FirstToken(tokens, self.first_token(tokens)) for tokens in prompts),
            self.peak_nbytes(plan.max_concurrent_requests, plan.max_context_tokens), self._disk_nbytes(),
        )  # fmt: skip

    def peak_nbytes(self, requests: int, tokens: int, answers: int = 1) -> int:
        """The most memory that the process will have while `requests` ride, each with `answers` answers of `tokens` tokens: what
        the ledger promises, less keys, values and states that only more of them would fill."""
        plan, family, answers = self.plan, self.family, min(requests * answers, self.plan.max_answers)
        held = min(answers * tokens, plan.kv_tokens)
        snapshots = min(plan.state_snapshot_nbytes, tokens // BLOCK * family.kv.state_nbytes)
        kv = history_nbytes(family, held, answers) + plan.kv_ring_nbytes + answers * snapshots
        return sum((plan.ledger | {"kv": min(kv, plan.ledger["kv"])}).values())

    def _read_s(self, nbytes: float) -> float:
        return nbytes / self.drive_bytes_per_second if self.drive_bytes_per_second else 0.0

    def _streamed_nbytes(self, requests: int, context: int) -> float:
        """Weights that are not kept, and what layers see of histories that are not in memory."""
        plan, kv = self.plan, self.family.kv
        if plan.cache_mode != "disk-kv" or not kv.layers:
            return plan.streamed_nbytes_per_pass
        seen = (min(context, kv.window(layer, plan.kv_window_tokens) or context) for layer in range(kv.layers))
        cold = fmean(max(requests * tokens - plan.kv_tokens, 0) for tokens in seen)
        return plan.streamed_nbytes_per_pass + cold * plan.kv_nbytes_per_token * self._coded

    @property
    def _mixtures(self) -> list[Experts]:
        return [step.experts for step in self.family.steps if step.experts is not None]

    def _missing_experts(self, rows: int) -> float:
        """Experts that a pass reads, if rows ask for all alike and those in memory are like the others."""
        plan = self.plan
        if plan.expert_slots >= plan.experts:
            return 0.0
        asked = sum(experts.count * (1 - (1 - experts.top / experts.count) ** rows) for experts in self._mixtures)
        return asked * (1 - plan.expert_slots / plan.experts)

    def _in_turns(self, read_s: float, mixed_s: float, experts: float) -> float:
        """Seconds of reading `experts` and of computing with them: one is computed with while the next is read, but a layer's first
        is waited for."""
        a_layer = max(experts / max(len(self._mixtures), 1), 1.0)
        return max(read_s, mixed_s) + min(read_s, mixed_s) / a_layer

    def _hops_s(self, experts: float) -> float:
        """Seconds of a pass that goes its ways, once more in each layer that waits for `experts`."""
        return HOPS_S * (1 + (len(self._mixtures) if experts else 0))

    def _disk_nbytes(self) -> int:
        """Keys and values of as many tokens as there can be."""
        plan, tokens = self.plan, self.plan.max_context_tokens
        if plan.cache_mode != "disk-kv":
            return 0
        if plan.kv_window_tokens is not None:
            tokens = min(tokens, ring_cells(plan.kv_window_tokens) * BLOCK)
        return int(self._coded * tokens * plan.max_concurrent_requests * plan.kv_nbytes_per_token)

    @property
    def _coded(self) -> float:
        """What a stored byte takes on disk."""
        return 0.5 if PRESETS[self.plan.kv_cache_strategy].codec.representation else 1.0


def _figures(first_s: float | None, last_s: float, tokens: int) -> dict[str, float | None]:
    """Seconds, and tokens per second after the first."""
    rate = (tokens - 1) / (last_s - first_s) if first_s is not None and tokens > 1 and last_s > first_s else None
    return {"first_token_seconds": first_s, "seconds": last_s, "tokens_per_second": rate}


async def foretell(
    plan: RuntimePlan, family: Family, pieces: Sequence[Piece], experts: Mapping[Key, Piece], compute: Compute, probe: Probe
) -> Forecast | None:  # fmt: skip
    """The forecast for `plan`, processor and drive being measured now, before weights are kept: the drive twice, of which
    the better counts, for what has been idle needs a moment, and what others ask of it comes and goes. None where a step
    cannot be run: its pass says so when the model is opened."""
    room = sum(plan.ledger.get(line, 0) for line in LATER)
    before = await probe() or 0.0
    try:
        pace = await compute.run(measure, family, pieces, experts, plan.kv_window_tokens, min(room, SAMPLE_NBYTES))
    except (*FOREIGN, ModelError):
        return None
    drive = max(before, await probe() or 0.0) or None
    expert_nbytes = fmean(piece.read_nbytes for piece in experts.values()) if experts else 0.0
    return Forecast(plan, family, pace, drive, expert_nbytes)
