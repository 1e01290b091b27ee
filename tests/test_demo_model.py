"""The bundled model: the text that transformers writes with it, and facts that it was told a thousand tokens before."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from aollm import Runtime
from aollm.demo import MODEL, corpus

PROMPTS = ["Once upon a time", "One rainy Sunday, a young girl named", "Question: What is 17 + 25?\nAnswer:"]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What transformers makes of each prompt, greedily, in the dtype of the weights."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=64, do_sample=False)
        found[prompt] = made[0, len(ids) :].tolist()
    return found


@pytest.mark.parametrize("layers", [None, 0, 2])
async def test_its_greedy_text_is_that_of_transformers(expected: dict[str, list[int]], layers: int | None) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    async with Runtime.open("demo", max_context_tokens=256, offload_cpu_layers=layers) as runtime:
        for prompt, ids in expected.items():
            answer = await runtime.generate(prompt, max_new_tokens=64)
            assert list(answer.token_ids) == ids
            assert answer.text == tokenizer.decode(ids)


async def test_it_recalls_a_fact_a_thousand_tokens_later() -> None:
    draw, tokenizer, right, tried = Random(5), Tokenizer.from_file(str(MODEL / "tokenizer.json")), 0, 0
    async with Runtime.open("demo", max_context_tokens=2048, offload_cpu_layers=0) as runtime:
        while tried < 8:
            planted, between, answer = corpus.probe(draw, draw.randrange(4000, 6000))
            if not 1000 <= len(tokenizer.encode(between).ids) < 1500:
                continue
            due = tokenizer.encode(answer).ids
            found = await runtime.generate(tokenizer.encode(planted + between).ids, max_new_tokens=len(due))
            right += list(found.token_ids) == due
            tried += 1
    assert right >= 7
