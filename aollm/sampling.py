"""From logits to one token: penalty, temperature, top-k, top-p, min-p, in the order and with the results of transformers.

A sampler belongs to one answer and has a random generator of its own, so what it draws never depends on who else rides
in the same pass. It knows nothing of models, text or requests.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import ModelError, RequestError

COLDEST = 1e-6  # below it, float32 would divide by zero; the draw is the same


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0`, `repetition_penalty=1` are off.

    `seed=None` draws from the system's entropy. `logprobs` is how many of the most likely tokens each draw reports.
    Raises `RequestError`, which names the field and what it accepts.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int = 0

    def __post_init__(self) -> None:
        number("temperature", self.temperature, 0 <= _real(self.temperature) <= 100, "a number from 0 (greedy) to 100")
        number("top_p", self.top_p, 0 <= _real(self.top_p) <= 1, "a number from 0 to 1 (off)")
        number("top_k", self.top_k, 0 <= _whole(self.top_k) < 2**31, "an integer from 0 (off) to 2147483647")
        number("min_p", self.min_p, 0 <= _real(self.min_p) <= 1, "a number from 0 (off) to 1")
        penalty = self.repetition_penalty
        number("repetition_penalty", penalty, 0.01 <= _real(penalty) <= 100, "a number from 0.01 to 100 (1 is off)")
        if self.seed is not None:
            number("seed", self.seed, -(2**63) <= _whole(self.seed) < 2**63, "None or an integer of 64 bits")
        number("logprobs", self.logprobs, 0 <= _whole(self.logprobs) <= 1000, "an integer from 0 (none) to 1000")


def number(field: str, value: object, holds: bool, accepted: str) -> None:
    """Raises `RequestError` for `field` unless `holds`."""
    if not holds:
        shown = "(an integer of thousands of bits)" if isinstance(value, int) and value.bit_length() > 4096 else reprlib.repr(value)
        raise RequestError(f"{field}={shown} is not accepted: give {accepted}")


def _real(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan  # NaN fails every comparison


def _whole(value: object) -> float:
    return value if isinstance(value, int) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True, slots=True)
class Draw:
    """One token: its `id`, its natural-log probability, and the most likely `(id, logprob)`, best first.

    Log-probabilities are the model's own: log-softmax of the raw logits in float32, before penalty and temperature.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one answer, over `vocabulary` ids; `choice` tells apart several answers to one seeded request."""

    def __init__(self, sampling: Sampling, vocabulary: int, choice: int = 0) -> None:
        self.sampling = sampling
        self.vocabulary = vocabulary
        self.draws = 0
        entropy = os.urandom(16) if sampling.seed is None else f"{sampling.seed} {choice}".encode()
        self._generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(entropy, digest_size=7).digest(), "big"))
        self._counted = 0  # how much of the history is in `_seen`
        self._seen = torch.zeros(vocabulary if sampling.repetition_penalty != 1 else 0, dtype=torch.bool)
        self._seen_ids = torch.empty(0, dtype=torch.long)

    def draw(self, logits: torch.Tensor, history: Sequence[int]) -> Draw:
        """The next token from `logits` [vocabulary], of any float type, on any device.

        `history` is prompt and answer so far; from call to call it grows at its end or is cut short. Raises `ModelError`
        when the logits say nothing: NaN, +inf, or all -inf.
        """
        if logits.shape != (self.vocabulary,):
            shape = tuple(logits.shape)
            raise ModelError(f"logits have the shape {shape}, not {(self.vocabulary,)}: vocab_size in config.json is wrong; correct it")
        raw = logits.detach().to("cpu", torch.float32)
        best = int(raw.argmax())  # the lowest id among equals; NaN counts as the largest
        if not math.isfinite(float(raw[best])):
            raise ModelError(
                f"the model's logits are unusable (their maximum is {float(raw[best])}, NaN is not a number): "
                "the weights are damaged, or overflow in this dtype; check the download or load in float32"
            )
        total = torch.logsumexp(raw, 0)
        chosen = best
        if self.sampling.repetition_penalty != 1 or self.sampling.temperature:
            scores = self._penalised(raw, history)
            chosen = self._pick(*candidates(scores, self.sampling)) if self.sampling.temperature else int(scores.argmax())
        self.draws += 1
        return Draw(chosen, float(raw[chosen] - total), most_likely(raw, total, self.sampling.logprobs))

    def _penalised(self, raw: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """Seen ids made less likely: positive logits divided, negative multiplied (CTRL, arXiv:1909.05858, §4.1)."""
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return raw
        if len(history) < self._counted:
            self._counted = 0
            self._seen.zero_()
        if len(history) > self._counted:
            fresh = torch.tensor(history[self._counted :], dtype=torch.long)
            self._seen[fresh[(fresh >= 0) & (fresh < self.vocabulary)]] = True
            self._seen_ids = self._seen.nonzero().view(-1)
            self._counted = len(history)
        seen = raw[self._seen_ids]
        return raw.index_copy(0, self._seen_ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    def _pick(self, ids: torch.Tensor, scores: torch.Tensor) -> int:
        """One of `ids` [N] with the probabilities softmax(`scores` [N]), from one random number."""
        heaps = torch.softmax(scores.double(), 0).cumsum(0)
        point = torch.rand((), dtype=torch.float64, generator=self._generator) * heaps[-1]
        index = int(torch.searchsorted(heaps, point, right=True))
        return int(ids[index]) if index < len(ids) else int(ids[scores.argmax()])  # rounding may put the point on the last edge

    def __repr__(self) -> str:
        return f"<Sampler {self.sampling}, {self.draws} drawn>"


def candidates(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids [N] that may be drawn from `scores` [vocabulary], and their scores [N], divided by the temperature.

    Ties at the edge of top-k all stay, as in transformers. Of ties at the edge of top-p the lower ids stay.
    """
    scores = (scores - scores.max()) / max(sampling.temperature, COLDEST)  # the maximum taken off: nothing overflows
    ids = torch.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        ids = (scores >= scores.topk(sampling.top_k).values[-1]).nonzero().view(-1)
        scores = scores[ids]
    if sampling.top_p < 1:
        kept = nucleus(torch.softmax(scores, 0), sampling.top_p)
        ids, scores = ids[kept], scores[kept]
    if sampling.min_p > 0:
        odds = torch.softmax(scores, 0)
        kept = odds >= sampling.min_p * odds.max()
        ids, scores = ids[kept], scores[kept]
    return ids, scores


def nucleus(odds: torch.Tensor, top_p: float) -> torch.Tensor:
    """Indices of the fewest of `odds` [N] that sum to `top_p` or more (arXiv:1904.09751), at least one.

    What is below (1 - top_p) / N cannot be among them however much of it there is, so only the rest is sorted.
    """
    possible = (odds > (1 - top_p) / (2 * len(odds))).nonzero().view(-1)
    odds_of = odds[possible]
    below = odds.sum() - odds_of.sum()
    ascending = odds_of.sort(descending=True, stable=True).indices.flip(0)
    removed = odds_of[ascending].cumsum(0) + below <= 1 - top_p
    removed[-1] = False
    return possible[ascending[~removed]].sort().values


def most_likely(raw: torch.Tensor, total: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` best of `raw` [vocabulary] as `(id, raw - total)`, best first, lower ids first among equals."""
    if not count:
        return ()
    ids = (raw >= raw.topk(min(count, len(raw))).values[-1]).nonzero().view(-1)
    ids = ids[raw[ids].sort(descending=True, stable=True).indices[:count]]
    return tuple(zip(ids.tolist(), (raw[ids] - total).tolist()))
