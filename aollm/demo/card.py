"""Measures a bundled model and writes its card: `python -m aollm.demo.card`.

Perplexity and recall are taken on text of a seed that training never uses, with the weights as
they are saved. `heldout.txt` beside the model is that text. Knows nothing of how it was trained
but the figures in `training.json`.
"""

import argparse
import json
import math
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from . import MODEL, corpus

# recall is measured from so many tokens to so many tokens after the planted fact; training ends at 2,048
DISTANCES = ((32, 128), (256, 512), (512, 1000), (1000, 1500), (1500, 2000), (3500, 4000), (7500, 8000))
PROMPTS = (
    f"{corpus.BEGIN}Once upon a time",
    f"{corpus.BEGIN}{corpus.USER}Tell me a story about a fox.{corpus.END}{corpus.ASSISTANT}",
    f"{corpus.BEGIN}The secret number of Mira is 4817. Tom hid the silver key in the blue barn.\n\n"
    "Question: Where did Tom hide the silver key?\nAnswer:",
)


def heldout(seed: int, size: int = 60_000) -> str:
    """Documents of a seed that training never uses."""
    documents, text = corpus.documents(seed + 1_000_000, 400, 8000), ""
    while len(text) < size:
        text += next(documents)
    return text


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids: list[int], window: int = 2048) -> float:
    """Over whole windows side by side, each read from its own start."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - window, window):
        part = torch.tensor([ids[start : start + window + 1]])
        logits = model(input_ids=part[:, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, part[0, 1:], reduction="sum").item()
        count += window
    return math.exp(total / count)


@torch.inference_mode()
def recall(model: LlamaForCausalLM, tokenizer: Tokenizer, rng: Random, near: int, far: int, count: int) -> float:
    """Share of planted facts answered exactly (every token greedy) from `near` to `far` tokens later."""
    right = tried = 0
    while tried < count:
        planted, between, answer = corpus.probe(rng, rng.randrange(3 * near, 5 * far))
        told, gap, due = (tokenizer.encode(text).ids for text in (planted, between, answer))
        if not near <= len(gap) < far:
            continue
        logits = model(input_ids=torch.tensor([told + gap + due[:-1]]), use_cache=False, logits_to_keep=len(due)).logits
        right += logits[0].argmax(-1).tolist() == due
        tried += 1
    return right / tried


@torch.inference_mode()
def write(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, count: int = 120) -> str:
    """The prompt and what the model writes after it, greedily, up to `<|end|>`."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits
        ids.append(int(logits[0, -1].argmax()))
        if tokenizer.id_to_token(ids[-1]) == corpus.END:
            break
    return tokenizer.decode(ids, skip_special_tokens=False)


def write_card(folder: Path, count: int = 100) -> str:
    """Measures the model in `folder`, writes `heldout.txt` and `README.md` there, returns the card."""
    figures = json.loads((folder / "training.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = heldout(figures["seed"])
    (folder / "heldout.txt").write_text(text)
    ids = tokenizer.encode(text).ids
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train(False)
    parameters, nbytes = sum(p.numel() for p in model.parameters()), (folder / "model.safetensors").stat().st_size
    shape, rng = model.config, Random(figures["seed"])
    asked = [(near, far, count if far <= 2048 else count // 4) for near, far in DISTANCES]
    shares = [recall(model, tokenizer, rng, *each) for each in asked]
    whole, short = perplexity(model, ids), perplexity(model, ids, 512)
    half = perplexity(model.to(torch.bfloat16), ids)
    samples = [write(model, tokenizer, prompt) for prompt in PROMPTS]
    resumed = "".join(f"; stopped and resumed (new optimizer) at step {step:,}" for step in figures.get("resumed", []))
    table = "\n".join(f"| {near:,} to {far:,} | {n} | {share:.0%} |" for (near, far, n), share in zip(asked, shares, strict=True))
    card = f"""# The bundled model of aollm

A llama of {parameters:,} parameters ({nbytes:,} bytes in bfloat16), trained from nothing on text that a
script of this repository writes: small stories, planted facts that are asked for again, sums, lists, chats. It is here
so that the demo and the tests have a real model without a download. It knows nothing else, and adds badly.

| shape | |
|---|---|
| layers, hidden, MLP | {shape.num_hidden_layers}, {shape.hidden_size}, {shape.intermediate_size} |
| heads, KV heads, head size | {shape.num_attention_heads}, {shape.num_key_value_heads}, {shape.head_dim} |
| vocabulary | {shape.vocab_size} (byte-level BPE, digits apart, tied with the head) |
| longest context by its config | {shape.max_position_embeddings:,}; trained on rows of 2,048 with jumps in the positions |

| training | |
|---|---|
| command | `python -m aollm.demo.train --seed {figures["seed"]} --steps {figures["steps"]}` |
| tokens | {figures["tokens"]:,} in {figures["steps"]:,} steps, no text twice{resumed} |
| loss, mean of the last 50 steps | {figures["loss"]:.3f} |
| time | {figures["seconds"] / 60:.0f} minutes on two shared cores |

Measured on text of another seed, weights as saved, computed in float32 (`python -m aollm.demo.card` measures again):

| perplexity of `heldout.txt` ({len(ids):,} tokens) | |
|---|---|
| windows of 2,048 | {whole:.4f} |
| windows of 512 | {short:.4f} |
| windows of 2,048, computed in bfloat16 | {half:.4f} |

Recall: a fact is planted, stories, sums and seven other facts follow, then the question; all tokens of the answer must
be the most likely ones.

| tokens between fact and answer | questions | exact |
|---|---|---|
{table}

Greedy samples:

"""
    card += "\n".join(f"```\n{sample}\n```" for sample in samples) + "\n"
    (folder / "README.md").write_text(card)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=100, help="recall questions at each distance")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(write_card(options.model, options.count))


if __name__ == "__main__":
    main()
