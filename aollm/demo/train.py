"""Trains the bundled model: `python -m aollm.demo.train`, about three quarters of an hour on two cores.

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
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from . import MODEL, corpus
from .card import heldout, perplexity, recall, write, write_card

SPECIALS = [corpus.BEGIN, corpus.END, corpus.USER, corpus.ASSISTANT]
HEADS, KV_HEADS, HEAD, THETA = 8, 2, 32, 500000.0
VOCABULARY = 1408  # nearly every word of the text is one token
# share of the steps, rows in a step, tokens in a row, smallest and largest document in characters
STAGES = ((0.35, 16, 128, 150, 520), (0.35, 4, 512, 400, 2100), (0.30, 2, 2048, 1500, 8600))
Report = Callable[[int, float, float], None]  # tokens so far, mean loss of the last 50 steps, seconds
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
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


def gradients(model: LlamaForCausalLM, batch: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The mean loss of the next tokens, then its gradient for each parameter."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    # a mask of ones keeps transformers from taking a jump in the positions for a new sequence
    ones = torch.ones_like(inputs)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache is shared by the threads
        logits = model(input_ids=inputs, attention_mask=ones, position_ids=places, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


def fit(
    model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, steps: int, peak: float, report: Report, every: int
) -> None:
    """Muon for the matrices, AdamW for embeddings and norms; reports every so many steps and at the end."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adam)
    losses: list[float] = []
    step, tokens, started, rng = 0, 0, time.monotonic(), Random(seed)
    pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    for stage, (share, count, length, smallest, largest) in enumerate(STAGES):
        source = rows(tokenizer, seed + 10 + stage, length, smallest, largest)
        plain = torch.arange(length).expand(count, length)
        for _ in range(round(share * steps)):
            rate = min((step + 1) / 60, 1.0, 1.6 * (1 - step / steps) + 0.01)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
            places = positions(rng, count, length) if length == STAGES[-1][1] else plain
            batch, part = torch.tensor([next(source) for _ in range(count)]), max(1, count // 4)
            parts = list(pool.map(partial(gradients, model), torch.split(batch, part), torch.split(places, part)))
            loss, *grads = (torch.stack(each).mean(0) for each in zip(*parts, strict=True))
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            step, tokens = step + 1, tokens + count * length
            if step % 25 == 0:
                recent = sum(losses[-25:]) / 25
                speed = tokens / (time.monotonic() - started)
                print(f"step {step}/{steps} rows of {length} loss {recent:.3f} {speed:.0f} tokens/s", flush=True)
            if step % every == 0 or step == steps:
                report(tokens, sum(losses[-50:]) / len(losses[-50:]), time.monotonic() - started)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, figures: dict[str, object]) -> None:
    """The files transformers would look for, weights in bfloat16, and the figures of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
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
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=MODEL)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--peak", type=float, default=0.005, help="highest learning rate of Muon")
    parser.add_argument("--save-every", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the parallel parts are rows of a step: a busy core then delays nobody else
    tokenizer, model = train_tokenizer(options.seed), new_model(options.seed)
    ids = tokenizer.encode(heldout(options.seed)).ids

    def report(tokens: int, loss: float, seconds: float) -> None:
        model.train(False)
        rates = [recall(model, tokenizer, Random(1), *bounds, count=12) for bounds in ((32, 128), (256, 512), (1000, 1500))]
        print(f"held-out perplexity {perplexity(model, ids):.3f} recall near, middle, far {rates}")
        print(repr(write(model, tokenizer, f"{corpus.BEGIN}Once upon a time", 60)), flush=True)
        figures = dict(seed=options.seed, steps=options.steps, tokens=tokens, loss=loss, seconds=round(seconds))
        save(model, tokenizer, options.output, figures)
        model.train(True)

    fit(model, tokenizer, options.seed, options.steps, options.peak, report, options.save_every)
    print(write_card(options.output))


if __name__ == "__main__":
    main()
