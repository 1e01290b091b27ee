"""A model with the `generate` that transformers' models have: tensors of ids in, tensors of ids out.

What transformers reads of `generation_config.json` holds here too. What only transformers can do is refused by name. It
refuses to know where weights, keys and values are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import anyio
import torch
from torch import Tensor

from ..client import RuntimeClient
from ..errors import RequestError, first_of
from ..meter import amount, speed
from ..runtime import Runtime
from ..settings import GenerationConfig
from ..text import read_json

MAX_NEW_TOKENS, TOP_K = 20, 50
"""What transformers takes where nobody says anything."""
CHOICES = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "max_length")
IDS = ("eos_token_id", "pad_token_id")
WITHOUT_EFFECT: Mapping[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "return_dict_in_generate": False, "output_scores": False,
    "output_logits": False, "output_attentions": False, "output_hidden_states": False, "synced_gpus": False, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "early_stopping": False, "typical_p": 1.0, "min_new_tokens": 0, "min_length": 0,
}  # fmt: skip
"""Settings of transformers that are not known here, and the values with which they say nothing."""
IGNORED = ("use_cache", "token_type_ids", "cache_implementation", "position_ids", "bos_token_id")
MEDIA = ("pixel_values", "input_features", "audio_values", "pixel_attention_mask", "image_sizes")


class Streamer(Protocol):
    """Who is told of tokens as they come: a `TextStreamer`, ours or transformers'."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


class Generator:
    """The model in `folder`. `open` gives what answers, for what is handed over as `past_key_values`; `adapter` is the one in use.

    With `logging` each answer leaves a line on stderr.
    """

    def __init__(
        self, folder: Path, device: torch.device, open: Callable[[Any], RuntimeClient], adapter: str | None = None, logging: bool = False
    ) -> None:  # fmt: skip
        self.device = device
        self.adapter = adapter
        self._folder, self._open, self._logging = folder, open, logging
        self._said = _said(folder)

    def generate(
        self, inputs: Tensor | None = None, *, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, streamer: Streamer | None = None, seed: int | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """The prompts int64 [B, T] and their answers, as int64 [B, T + N], ended answers padded; a batch rides in the same passes.

        `attention_mask` [B, T] is 0 where a prompt is padded. `past_key_values` is what `Inference.DiskCache` gives. `streamer` is
        for one prompt. `options`: max_new_tokens (20), max_length, do_sample, temperature, top_p, top_k, min_p, repetition_penalty,
        eos_token_id (which ends an answer besides the model's own), pad_token_id. Without `seed` what is drawn hangs on torch's
        own generator. Raises `RequestError` for other options, and what opening a `RuntimeClient` raises.
        """
        ids = _batch(inputs if input_ids is None else input_ids)
        settings = {**self._said, **_checked(options)}
        prompts = _prompts(ids, attention_mask, settings)
        if streamer is not None and len(prompts) > 1:
            raise RequestError(f"streamer: it is for one prompt, not {len(prompts)}; leave it out, or call generate for each")
        ends = _listed(options.get("eos_token_id"))
        each = [self._settings(settings, ids.shape[1], seed, row) for row in range(len(prompts))]
        client, start = self._open(past_key_values), perf_counter()
        if len(prompts) == 1:
            answers = [self._streamed(client, prompts[0], each[0], ends, ids, streamer)]
        else:
            answers = client.run(lambda runtime: _together(runtime, prompts, each, ends))
        if self._logging:
            self._log(client, sum(map(len, answers)), perf_counter() - start)
        width = max(map(len, answers))
        pad = next(iter([*_listed(settings.get("pad_token_id")), *_listed(settings.get("eos_token_id"))]), 0)
        new = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers], dtype=torch.long, device=ids.device)
        return torch.cat([ids, new], 1)

    def _streamed(
        self, client: RuntimeClient, prompt: list[int], settings: GenerationConfig, ends: Sequence[int], ids: Tensor,
        streamer: Streamer | None,
    ) -> list[int]:  # fmt: skip
        answer: list[int] = []
        with client.stream(prompt, settings) as tokens:
            try:
                if streamer is not None:
                    streamer.put(ids.cpu())
                for token in tokens:
                    answer.append(token.id)
                    if streamer is not None:
                        streamer.put(torch.tensor([token.id]))
                    if token.id in ends:
                        break
            finally:
                if streamer is not None:
                    streamer.end()
        return answer

    def _settings(self, said: Mapping[str, Any], width: int, seed: int | None, row: int) -> GenerationConfig:
        """One row's settings; `width` is that of all prompts, padding included."""
        count = said.get("max_new_tokens")
        if count is None:
            count = said["max_length"] - width if said.get("max_length") else MAX_NEW_TOKENS
            if count < 1:
                raise RequestError(f"max_length={said['max_length']}: the prompt has {width} tokens; give max_new_tokens instead")
        found = {"n": 1, "max_new_tokens": count, "repetition_penalty": said.get("repetition_penalty", 1.0), "adapter": self.adapter}
        if said.get("do_sample"):
            found |= {"temperature": said.get("temperature", 1.0), "top_p": said.get("top_p", 1.0), "min_p": said.get("min_p", 0.0)}
            found |= {"top_k": said.get("top_k", TOP_K), "seed": int(torch.randint(2**62, ())) if seed is None else seed + row}
        return GenerationConfig.of(None, found)

    def _log(self, client: RuntimeClient, count: int, seconds: float) -> None:
        profile = client.runtime.profile(perf_counter() - seconds)
        read = f", {amount(profile['bytes_read'])} read" if profile is not None else ""
        print(f"aollm: {count} tokens in {seconds:.2f} s, {speed(count / seconds)}{read}", file=sys.stderr, flush=True)

    def __repr__(self) -> str:
        return f"<Generator {self._folder.name} on {self.device}>"


async def _together(
    runtime: Runtime, prompts: Sequence[list[int]], settings: Sequence[GenerationConfig], ends: Sequence[int]
) -> list[list[int]]:  # fmt: skip
    """The answers to all prompts, which are submitted in one turn of the loop, and so ride from the same pass on."""
    answers: list[list[int]] = [[] for _ in prompts]

    async def read(row: int) -> None:
        async with runtime.stream(prompts[row], settings[row]) as stream:
            async for token in stream:
                answers[row].append(token.id)
                if token.id in ends:
                    break

    try:
        async with anyio.create_task_group() as group:
            for row in range(len(prompts)):
                group.start_soon(read, row)
    except BaseExceptionGroup as raised:
        raise first_of(raised) from raised
    return answers


def _batch(ids: Any) -> Tensor:
    """The prompts as int64 [B, T]."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        what = f"a tensor {list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise RequestError(f"input_ids: a tensor of ids [B, T] is wanted, as a tokenizer gives it with return_tensors='pt', not {what}")
    return ids.long()


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say something; `RequestError` for those that cannot be heeded."""
    given = {name: value for name, value in options.items() if value is not None}
    if media := [name for name in MEDIA if name in given]:
        raise RequestError(
            f"{media[0]}: images and sounds are read by aollm itself: give RuntimeClient.prompt or Runtime.stream the messages, "
            "with parts such as {'type': 'image', 'path': ...}, and leave the processor out"
        )
    for name, value in given.items():
        if name not in (*CHOICES, *IDS, *IGNORED) and (name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]):
            raise RequestError(f"{name}: generate does not know this of transformers' options; there are {', '.join((*CHOICES, *IDS))}")
    return {name: value for name, value in given.items() if name in (*CHOICES, *IDS)}


def _prompts(ids: Tensor, mask: Tensor | None, said: Mapping[str, Any]) -> list[list[int]]:
    """Each row without its padding, which is where `mask` is 0 or, without one, where transformers takes it to be."""
    pads, ends = _listed(said.get("pad_token_id")), _listed(said.get("eos_token_id"))
    if mask is None:
        mask = ids != pads[0] if pads and pads[0] not in ends and bool((ids == pads[0]).any()) else torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise RequestError(f"attention_mask: a tensor {list(ids.shape)} of 0 and 1 is wanted, like input_ids")
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu() != 0, strict=True)]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise RequestError(f"row {empty[0]} of input_ids is nothing but padding: give it at least one token")
    return rows


def _listed(ids: Any) -> list[int]:
    """One id, several, or none, as a list."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    found = [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
    if wrong := [each for each in found if type(each) is not int]:
        raise RequestError(f"a token id is a whole number, not {wrong[0]!r:.100}")
    return found


def _said(folder: Path) -> dict[str, Any]:
    """What the model's files say of generation: transformers believes `generation_config.json` or, without one, `config.json`."""
    generation, config = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    nested = config.get("text_config")
    found: dict[str, Any] = {}
    for source in (generation, config, nested if isinstance(nested, dict) else {}):
        names = (*CHOICES, *IDS) if source is generation or not generation else ("eos_token_id",)
        found = {**{name: source[name] for name in names if source.get(name) is not None}, **found}
    return found
