"""Trains the bundled model: `python -m aollm.demo.train`, about half an hour on two cores.

First the tokenizer (byte-level BPE, digits apart), then a small llama on text that `corpus` writes as
it goes: short rows first, 2,048 tokens at the end, there with jumps in the positions so that far ones
are not new to it. Ends with the card, every figure measured on text of another seed.
It knows nothing of the rest of aollm; the model is transformers' own.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from . import MODEL, corpus
from .card import heldout, perplexity, recall, write, write_card

SPECIALS = [corpus.BEGIN, corpus.END, corpus.USER, corpus.ASSISTANT]
HEADS, KV_HEADS, HEAD = 8, 2, 32
THETA = 1e8  # of RoPE: half of the pairs of a head turn so slowly that 2,000 tokens are near
LONG = 2048  # rows of this length have jumps in their positions
VOCABULARY = 1408  # nearly every word of the text is one token
Report = Callable[[int, int, float], None]  # step, its tokens, its loss
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows of tokens, positions, weights
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training; with `copied` above 1 it learns to look back sooner, and trusts it too much."""

    share: float  # of the steps
    rows: int  # in a step
    length: int  # of a row, in tokens
    smallest: int  # document, in characters
    largest: int
    copied: float  # weight in the loss of a token that could have been copied from its row


STAGES = (
    Stage(0.320, 16, 128, 150, 520, 6),
    Stage(0.280, 4, 512, 400, 2100, 6),
    Stage(0.275, 2, LONG, 1500, 8600, 6),
    Stage(0.125, 2, LONG, 1500, 8600, 1),
)


def train_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = corpus.documents(seed, 300, 3000)
    tokenizer.train_from_iterator((next(documents) for _ in range(4000)), trainer)
    return tokenizer


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=448,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, pairs: int = 5, strength: float = 7.0) -> None:
    """Starts head h of the first layer as one that reads the token h + 1 places back.

    Recall needs such heads, and to find them by descent takes most of a short training. Feature 0 is the same
    in every embedding; from it come a constant key and a query turned by h + 1 places, in the fastest RoPE pairs.
    """
    size, attention = HEAD, model.model.layers[0].self_attn
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    model.model.embed_tokens.weight *= 8
    model.model.embed_tokens.weight[:, 0] = 2.0
    model.model.norm.weight.fill_(0.1)
    turns = THETA ** (-torch.arange(pairs) * 2 / size)
    for head in range(KV_HEADS):
        attention.k_proj.weight[head * size : head * size + pairs, 0] = strength / 4
    for head in range(HEADS):
        angle, first, second = (head + 1) * turns, head * size, head * size + size // 2
        attention.q_proj.weight[first : first + pairs, 0] = strength / 4 * angle.cos()
        attention.q_proj.weight[second : second + pairs, 0] = -strength / 4 * angle.sin()


def rows(tokenizer: Tokenizer, seed: int, length: int, smallest: int, largest: int) -> Iterator[list[int]]:
    """Rows of `length` + 1 tokens; each begins with a whole document, the last one is cut."""
    documents, row = corpus.documents(seed, smallest, largest), []
    while True:
        row += tokenizer.encode(next(documents)).ids
        if len(row) > length:
            yield row[: length + 1]
            row = []


def positions(rng: Random, count: int, length: int) -> torch.Tensor:
    """0, 1, 2, ... in half of the rows; the others jump ahead twice, by up to 40,000 in all."""
    table = torch.arange(length).repeat(count, 1)
    for row in table[::2]:
        for _ in range(2):
            row[rng.randrange(1, length) :] += int(20000 ** rng.random())
    return table


def weigh(row: list[int], copied: float) -> list[float]:
    """A weight for each token but the first: `copied` where it ends four tokens that the row had before, as answers do."""
    seen: set[tuple[int, ...]] = set()
    weights = []
    for end in range(2, len(row) + 1):
        four = tuple(row[max(0, end - 4) : end])
        weights.append(copied if four in seen else 1.0)
        seen.add(four)
    return weights


def batches(tokenizer: Tokenizer, seed: int, steps: int, first: int) -> Iterator[Batch]:
    """Rows, positions and weights for each step from `first` on; a stage that lies before it is left out whole."""
    done = 0
    for number, stage in enumerate(STAGES):
        source, rng = rows(tokenizer, seed + 10 + number, stage.length, stage.smallest, stage.largest), Random(seed)
        places = torch.arange(stage.length).expand(stage.rows, stage.length)
        start, done = max(first, done), steps if stage is STAGES[-1] else done + round(stage.share * steps)
        for _ in range(start, done):
            batch = [next(source) for _ in range(stage.rows)]
            if stage.length == LONG:
                places = positions(rng, stage.rows, stage.length)
            yield torch.tensor(batch), places, torch.tensor([weigh(row, stage.copied) for row in batch])


def gradients(model: LlamaForCausalLM, batch: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """The mean loss of the next tokens, then for each parameter the gradient of the weighted loss."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    # a mask of ones keeps transformers from taking a jump in the positions for a new sequence
    ones = torch.ones_like(inputs)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache is shared by the threads
        logits = model(input_ids=inputs, attention_mask=ones, position_ids=places, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    return [losses.detach().mean(), *torch.autograd.grad(loss, list(model.parameters()))]


def fit(model: LlamaForCausalLM, data: Iterator[Batch], first: int, steps: int, peak: float, report: Report) -> None:
    """Muon for the matrices, AdamW for embeddings and norms; a report after every step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adam)

    def rate(done: int) -> float:
        return min((done + 1) / 60, 1.0, 1.6 * (1 - (first + done) / steps) + 0.01)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step, batch in enumerate(data, first + 1):
            size = max(1, len(batch[0]) // 4)
            parts = list(pool.map(partial(gradients, model), *(torch.split(each, size) for each in batch)))
            loss, *grads = (torch.stack(each).mean(0) for each in zip(*parts, strict=True))
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            report(step, batch[1].numel(), loss.item())


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, figures: dict[str, Any]) -> None:
    """The files transformers would look for, weights in bfloat16, and the figures of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    # both spellings: rope_parameters and dtype are transformers 5, rope_theta and torch_dtype are everybody else
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= {"rope_theta": THETA, "torch_dtype": "bfloat16"}
    dump(folder / "config.json", config)
    dump(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    dump(folder / "training.json", figures)
    dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": corpus.BEGIN,
            "eos_token": corpus.END,
            "pad_token": corpus.END,
            "additional_special_tokens": SPECIALS[2:],
            "model_max_length": 131072,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )


def dump(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--output", type=Path, default=MODEL)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--peak", type=float, default=0.006, help="highest learning rate of Muon")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from what --output holds")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the parallel parts are rows of a step: a busy core then delays nobody else
    tokenizer, model = train_tokenizer(options.seed), new_model(options.seed)
    figures: dict[str, Any] = dict(seed=options.seed, steps=options.steps, done=0, tokens=0, seconds=0.0, loss=0.0)
    if options.resume:
        figures = json.loads((options.output / "training.json").read_text())
        figures["resumed"] = [*figures.get("resumed", []), figures["done"]]
        load_model(model, str(options.output / "model.safetensors"), strict=False)
    ids = tokenizer.encode(heldout(options.seed)).ids
    losses: list[float] = []
    started, before = time.monotonic(), figures["seconds"]

    def report(step: int, tokens: int, loss: float) -> None:
        losses.append(loss)
        recent = losses[-50:]
        figures.update(done=step, tokens=figures["tokens"] + tokens, loss=sum(recent) / len(recent))
        figures["seconds"] = round(before + time.monotonic() - started)
        if step % 25 == 0:
            print(f"step {step}/{options.steps} loss {figures['loss']:.3f} {figures['tokens']:,} tokens {figures['seconds']} s", flush=True)
        if step % options.save_every == 0 or step == options.steps:
            model.train(False)
            rates = [recall(model, tokenizer, Random(1), *bounds, count=12) for bounds in ((32, 128), (256, 512), (1000, 1500))]
            print(f"held-out perplexity {perplexity(model, ids):.3f} recall near, middle, far {rates}")
            print(repr(write(model, tokenizer, f"{corpus.BEGIN}Once upon a time", 60)), flush=True)
            save(model, tokenizer, options.output, figures)
            model.train(True)

    data = batches(tokenizer, options.seed, options.steps, figures["done"])
    fit(model, data, figures["done"], options.steps, options.peak, report)
    print(write_card(options.output))


if __name__ == "__main__":
    main()
