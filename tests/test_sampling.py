"""Sampling against transformers' own processors, by value; and draws that depend on nothing but seed, choice and logits."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from transformers.generation import logits_process

from aollm.errors import ModelError, RequestError
from aollm.sampling import Draw, Sampler, Sampling, candidates

VOCABULARY = 300


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def theirs(raw: torch.Tensor, history: list[int], sampling: Sampling) -> torch.Tensor:
    """Scores [vocabulary] after transformers' processors, in the order in which `generate` applies them."""
    ids, scores = torch.tensor([history]), raw.clone()[None]
    if sampling.repetition_penalty != 1:
        scores = logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    if sampling.temperature:
        scores = logits_process.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = logits_process.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = logits_process.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = logits_process.MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores[0]


def odds(sampling: Sampling, raw: torch.Tensor, history: list[int]) -> torch.Tensor:
    """Our probabilities [vocabulary]."""
    ids, scores = candidates(Sampler(sampling, VOCABULARY)._penalised(raw, history), sampling)
    return torch.zeros(VOCABULARY).scatter(0, ids, torch.softmax(scores, 0))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": 10_000},
        {"top_p": 0.0},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.2, 4.0])
def test_filters_equal_transformers(fields: dict[str, Any], scale: float) -> None:
    sampling = Sampling(**{"temperature": 1.0, **fields})
    for seed in range(8):
        raw, history = logits(seed, scale), [seed, 5, 5, VOCABULARY - 1]
        expected = torch.softmax(theirs(raw, history, sampling), 0)
        found = odds(sampling, raw, history)
        assert found.nonzero().tolist() == expected.nonzero().tolist()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_ties_at_the_edge_of_top_k_all_stay() -> None:
    raw = torch.full((VOCABULARY,), -50.0)
    raw[[3, 9, 200]] = 1.0
    assert odds(Sampling(temperature=1, top_k=2), raw, []).nonzero().view(-1).tolist() == [3, 9, 200]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_equals_transformers(penalty: float) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    sampler, history = Sampler(sampling, VOCABULARY), [1, 2]
    for seed in range(30):
        raw = logits(seed, 0.5)
        drawn = sampler.draw(raw, history).id
        assert drawn == int(theirs(raw, history, sampling).argmax())
        history.append(drawn)


def test_penalty_follows_a_history_that_is_cut_short() -> None:
    sampling, raw = Sampling(repetition_penalty=2.0), torch.zeros(VOCABULARY)
    raw[7], raw[8] = 3.0, 2.0
    sampler = Sampler(sampling, VOCABULARY)
    assert [sampler.draw(raw, history).id for history in ([7], [7, 8], [8], [])] == [8, 7, 7, 7]
    assert sampler.draw(raw, [-1, VOCABULARY + 5]).id == 7  # placeholders of images are no ids


def test_the_lowest_id_wins_ties() -> None:
    raw = torch.zeros(VOCABULARY, dtype=torch.bfloat16)
    raw[[40, 12, 99]] = 2.5
    drawn = Sampler(Sampling(logprobs=2), VOCABULARY).draw(raw, [])
    assert drawn.id == 12
    assert [id for id, _ in drawn.top] == [12, 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_the_models_own(dtype: torch.dtype, temperature: float) -> None:
    raw = logits(3).to(dtype)
    expected = torch.log_softmax(raw.float(), 0)
    drawn = Sampler(Sampling(temperature, top_k=5, repetition_penalty=1.7, seed=1, logprobs=4), VOCABULARY).draw(raw, [4, 5])
    assert drawn.logprob == pytest.approx(float(expected[drawn.id]), abs=1e-5)
    assert [id for id, _ in drawn.top] == expected.sort(descending=True, stable=True).indices[:4].tolist()
    assert [logprob for _, logprob in drawn.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_more_logprobs_than_ids() -> None:
    top = Sampler(Sampling(logprobs=50), 3).draw(torch.tensor([0.0, 2.0, 1.0]), []).top
    assert [id for id, _ in top] == [1, 2, 0]
    assert sum(math.exp(logprob) for _, logprob in top) == pytest.approx(1)


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.5, top_k=6, seed=11)
    raw, count = logits(5), 6000
    sampler = Sampler(sampling, VOCABULARY)
    drawn = torch.tensor([sampler.draw(raw, []).id for _ in range(count)]).bincount(minlength=VOCABULARY) / count
    expected = torch.softmax(theirs(raw, [], sampling), 0)
    assert float((drawn - expected).abs().max()) < 4 * math.sqrt(0.25 / count)
    assert set(drawn.nonzero().view(-1).tolist()) <= set(expected.nonzero().view(-1).tolist())


def answer(sampler: Sampler, count: int = 20) -> list[int]:
    return [sampler.draw(logits(step), []).id for step in range(count)]


def test_draws_depend_on_seed_and_choice_alone() -> None:
    sampling = Sampling(temperature=2.0, seed=7)
    alone = answer(Sampler(sampling, VOCABULARY))
    a, b = Sampler(sampling, VOCABULARY), Sampler(sampling, VOCABULARY, choice=1)
    torch.manual_seed(0)
    together = []
    for step in range(20):
        torch.rand(3)
        together.append((a.draw(logits(step), []).id, b.draw(logits(step), []).id))
    assert [first for first, _ in together] == alone
    assert [second for _, second in together] == answer(Sampler(sampling, VOCABULARY, choice=1)) != alone
    assert answer(Sampler(Sampling(temperature=2.0, seed=8), VOCABULARY)) != alone


def test_no_seed_is_new_each_time() -> None:
    assert answer(Sampler(Sampling(temperature=5.0), VOCABULARY)) != answer(Sampler(Sampling(temperature=5.0), VOCABULARY))


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-6, 100])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    raw = logits(2, 200.0)
    raw[0] = -math.inf
    drawn = Sampler(Sampling(temperature=temperature, seed=0, top_p=0.99, min_p=1e-9), VOCABULARY).draw(raw, [])
    assert temperature == 100 or drawn.id == int(raw.argmax())
    assert math.isfinite(drawn.logprob)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("value", "everywhere"), [(math.nan, False), (math.nan, True), (math.inf, False), (-math.inf, True)])
def test_logits_that_say_nothing(value: float, everywhere: bool, temperature: float) -> None:
    raw = logits(0)
    raw[slice(None) if everywhere else slice(4, 5)] = value
    with pytest.raises(ModelError, match="NaN"):
        Sampler(Sampling(temperature=temperature), VOCABULARY).draw(raw, [])


def test_logits_of_another_size() -> None:
    with pytest.raises(ModelError, match="shape"):
        Sampler(Sampling(), VOCABULARY).draw(torch.zeros(4), [])


NUMBERS = [math.nan, math.inf, -math.inf, -1, "1", None, True, [1.0], 10**400, 10**5000, [1] * 10_000]


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("temperature", "top_p", "min_p", "repetition_penalty") for value in NUMBERS]
    + [(field, value) for field in ("top_k", "logprobs") for value in [*NUMBERS, 1.0, 2**40]]
    + [("seed", value) for value in (1.5, "1", True, 2**63, math.nan)]
    + [("top_p", 1.01), ("min_p", 1.01), ("repetition_penalty", 0), ("temperature", 101)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{field}=.* give .*(a number|an integer)") as raised:
        Sampling(**{field: value})
    assert len(str(raised.value)) < 200


def test_values_are_frozen_and_shown() -> None:
    sampling = Sampling(temperature=1, seed=3)
    with pytest.raises(FrozenInstanceError):
        sampling.top_k = 3  # type: ignore[misc]
    sampler = Sampler(sampling, 4)
    assert isinstance(sampler.draw(torch.zeros(4), []), Draw)
    assert "1 drawn" in repr(sampler)
