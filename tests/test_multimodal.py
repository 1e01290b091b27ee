"""Images and sounds from messages to answers, against what transformers makes of the same messages."""

import base64
import gc
import io
import json
import math
import os
import re
import subprocess
import sys
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import tiny
import torch
from fake_device import FakeDevice
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from aollm import ModelError, RequestError, Runtime, TokenStream
from aollm.cli import main
from aollm.item import Item, whole
from aollm.text import Text


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop is enough for what numbers come out; the engine's own tests run on both."""
    return "asyncio"


COUNT = 6
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
BREAKS = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]
TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
{{ '<start_of_turn>' ~ ('model' if message['role'] == 'assistant' else message['role']) ~ '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
SIZES = {"small": (56, 4), "wide": (112, 64)}
"""Pixels of an image's side, and rows that it becomes: fewer than a sliding window of 16, and more."""


def gemma_tokenizer() -> Tokenizer:
    """Bytes, and Gemma's special ids and newlines of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in BREAKS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return tokenizer


def save_gemma(folder: Path, side: int, rows: int, **eye: int) -> Path:
    """A tiny Gemma 3 that sees images of `side` pixels as `rows` rows, with all that its processor is made from."""
    tokenizer = gemma_tokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    config = Gemma3Config(
        text_config={
            "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 2048,
            "initializer_range": 0.15, "bos_token_id": ids["<bos>"], "eos_token_id": None, "pad_token_id": ids["<pad>"],
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": side,
            "patch_size": 14, "vision_use_head": False, **eye,
        },
        mm_tokens_per_image=rows, image_token_index=ids["<image_soft_token>"], boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"], eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.normal_(1.0 if "vision" in name and name.endswith("weight") else 0.0, 0.2)
            elif "mm_input" in name or "vision" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tiny.edit(folder, lambda config: config.pop("eos_token_id", None))
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    pixels = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Colours that vary from place to place and from picture to picture."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed)}


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Samples at 16,000 Hz that vary."""
    return (np.random.default_rng(seed).standard_normal(round(seconds * 16_000)) / 8).astype(np.float32)


def sound(seconds: float, seed: int = 0) -> dict[str, Any]:
    return {"type": "audio", "audio": speech(seconds, seed), "sampling_rate": 16_000}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


class Oracle:
    """A folder, and what transformers' own model says to messages."""

    folder: Path
    model: PreTrainedModel

    def __init__(self) -> None:
        self._known: dict[str, tiny.Answer] = {}

    def inputs(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """What the model is given."""
        raise NotImplementedError

    async def answer(self, messages: Sequence[Mapping[str, Any]]) -> tiny.Answer:
        """Greedy tokens, made in a thread of its own, and once."""
        if (key := repr(messages)) not in self._known:
            self._known[key] = await anyio.to_thread.run_sync(self._answer, messages)
        return self._known[key]

    @torch.no_grad()
    def _answer(self, messages: Sequence[Mapping[str, Any]]) -> tiny.Answer:
        inputs = self.inputs(messages)
        out = self.model(**inputs, use_cache=True)
        found, rows = [], []
        while True:
            rows.append(out.logits[0, -1].float())
            found.append(int(rows[-1].argmax()))
            if len(found) == COUNT:
                logits = torch.stack(rows)
                return tiny.Answer(found, logits.log_softmax(-1), float(logits.abs().max()))
            one = torch.tensor([[found[-1]]])
            kinds = {"token_type_ids": torch.zeros_like(one)} if "token_type_ids" in inputs else {}
            out = self.model(input_ids=one, past_key_values=out.past_key_values, use_cache=True, **kinds)


class Gemma(Oracle):
    """Gemma 3, its inputs made by its own processor."""

    def __init__(self, folder: Path, size: str) -> None:
        super().__init__()
        self.folder, self.rows = save_gemma(folder, *SIZES[size]), SIZES[size][1]
        self.model: PreTrainedModel = Gemma3ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        ends = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), extra_special_tokens=named, **ends)
        images = Gemma3ImageProcessorPil.from_pretrained(folder)
        self.processor = Gemma3Processor(images, tokenizer, TEMPLATE, image_seq_length=self.rows)

    def inputs(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        pictures = [part["image"] for part in parts if "image" in part]
        text = self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        made = self.processor(images=[pictures] if pictures else None, text=[text], add_special_tokens=False, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "token_type_ids", "pixel_values") if name in made}


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gemma]:
    return {size: Gemma(tmp_path_factory.mktemp(size), size) for size in SIZES}


def agree(found: tiny.Answer, wanted: tiny.Answer) -> None:
    assert found.ids == wanted.ids
    assert float((found.logprobs - wanted.logprobs).abs().max()) < 1e-3 * wanted.most


def runs(runtime: Runtime, first: str = "patches") -> int:
    """How often the tower ran."""
    return sum(event.label.startswith("tower ") and event.label.endswith(first) for event in runtime.trace.between(0.0, math.inf))


LONG = "the quick brown fox jumps over the lazy dog, " * 30
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "none": [{"role": "user", "content": "What is 3 + 4?"}],
    "one": [user(said("What is this?"), image(1))],
    "first": [user(image(1), said("What is this?"))],
    "between": [user(said("Look:"), image(1), said("what is this?"))],
    "alone": [user(image(2))],
    "two": [user(image(1), said("and"), image(2), said("differ how?"))],
    "side by side": [user(image(1), image(2))],
    "twice the same": [user(image(1), said("and"), image(1))],
    "across blocks": [user(said(LONG[: 1024 - 40]), image(1), said("what was that?"))],
    "turns": [user(image(1), said("A?")), {"role": "assistant", "content": "A b."}, user(said("And"), image(2), said("?"))],
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"offload_cpu_layers": 0},
    "on a device": {"on": FakeDevice(), "offload_gpu_layers": 1, "offload_cpu_layers": 1},
    "small chunks": {"dense_projection_chunk_rows": 13},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
async def test_messages_with_images_are_answered_as_transformers_answers_them(gemmas: dict[str, Gemma], size: str, way: str) -> None:
    gemma = gemmas[size]
    async with Runtime.open(gemma.folder, max_context_tokens=1536, **WAYS[way]) as runtime:
        for messages in CONVERSATIONS.values():
            agree(await tiny.ours(runtime, messages, COUNT), await gemma.answer(messages))
        assert runs(runtime) == 2  # two pictures, whoever shows them


async def test_images_share_a_pass_with_text_and_with_each_other(gemmas: dict[str, Gemma]) -> None:
    gemma = gemmas["wide"]
    found: dict[str, tiny.Answer] = {}

    async def ask(name: str) -> None:
        found[name] = await tiny.ours(runtime, CONVERSATIONS[name], COUNT)

    async with Runtime.open(gemma.folder, max_context_tokens=1536) as runtime, anyio.create_task_group() as group:
        for name in CONVERSATIONS:
            group.start_soon(ask, name)
    assert runtime.engine.passes < len(CONVERSATIONS) * COUNT
    assert runs(runtime) == 2
    for name, messages in CONVERSATIONS.items():
        agree(found[name], await gemma.answer(messages))


async def test_all_answers_to_an_image_begin_with_one_prefill(gemmas: dict[str, Gemma]) -> None:
    gemma, messages = gemmas["wide"], CONVERSATIONS["between"]
    async with Runtime.open(gemma.folder, max_context_tokens=256) as runtime:
        alone = await runtime.generate(messages, max_new_tokens=COUNT)
        drawn = await runtime.generate(messages, max_new_tokens=COUNT, n=2)
        assert [choice.token_ids for choice in drawn.choices] == [alone.token_ids] * 2 == [tuple((await gemma.answer(messages)).ids)] * 2
        assert runs(runtime) == 1


@pytest.mark.parametrize("size", SIZES)
async def test_an_image_that_no_pass_has_room_for_is_not_parted(gemmas: dict[str, Gemma], size: str) -> None:
    gemma = gemmas[size]
    messages = [user(said("x" * 150), image(1), said("y" * 50), image(2), said("z"))]
    config = {"kv_cache_strategy": "paged", "kv_cache_memory": "1MiB", "dense_projection_chunk_rows": 16, "max_concurrent_requests": 2}
    with anyio.fail_after(90):
        async with Runtime.open(gemma.folder, max_context_tokens=512, **config) as runtime:
            assert runtime.plan.max_rows < 150
            agree(await tiny.ours(runtime, messages, COUNT), await gemma.answer(messages))


async def hits(stream: TokenStream, wanted: tiny.Answer) -> int:
    """How many tokens of the prompt were there already; the answer is to be `wanted`."""
    tokens = [token async for token in stream]
    rows = torch.full((len(tokens), wanted.logprobs.shape[1]), torch.nan)
    for row, token in zip(rows, tokens, strict=True):
        for number, value in token.top_logprobs:
            row[number] = value
    agree(tiny.Answer([token.id for token in tokens], rows, 0.0), wanted)
    assert stream.request is not None
    return stream.request.prefix_hit_tokens


async def test_a_stored_image_is_found_again_and_no_other(gemmas: dict[str, Gemma], tmp_path: Path) -> None:
    gemma = gemmas["wide"]
    fields: dict[str, Any] = {
        "kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent", "cache_dir": tmp_path, "max_context_tokens": 1536,
    }  # fmt: skip
    tail = said(LONG[:1100])
    variants = {
        "same": [user(image(1), tail)],
        "other image": [user(image(2), tail)],
        "no image": [user(tail)],
        "other end": [user(image(1), tail, said("and so on"))],
    }
    wanted = {name: await gemma.answer(messages) for name, messages in variants.items()}
    assert not torch.allclose(wanted["same"].logprobs, wanted["other image"].logprobs, atol=1e-2 * wanted["same"].most)

    async def ask(name: str) -> int:
        return await hits(runtime.stream(variants[name], max_new_tokens=COUNT, logprobs=1000), wanted[name])

    async with Runtime.open(gemma.folder, **fields) as runtime:
        assert await ask("same") == 0
    async with Runtime.open(gemma.folder, **fields) as runtime:
        assert [await ask("other image"), await ask("no image"), runs(runtime)] == [8, 6, 1]  # what comes before the image
        assert [await ask("same"), await ask("other end"), runs(runtime)] == [1181, 1173, 1]  # the first image is keys and values now


async def test_a_turn_that_follows_an_image_computes_what_is_new(gemmas: dict[str, Gemma]) -> None:
    gemma = gemmas["wide"]
    async with Runtime.open(gemma.folder, max_context_tokens=512) as runtime, runtime.session() as session:
        reused: list[int] = []
        for message in (user(said("What is"), image(1)), user(said("And"), image(1), said("again?")), {"role": "user", "content": "Sure?"}):
            stream = session.stream(message, max_new_tokens=COUNT, logprobs=1000)
            reused.append(await hits(stream, await gemma.answer(session.messages)))
        assert runs(runtime) == 1
    first, second = (gemma.inputs(session.messages[:count])["input_ids"].shape[1] for count in (1, 3))
    assert reused[0] == 0 and reused[1] > first - 20 and reused[2] > second - 20  # all but what the template writes after a turn


def png(change: Callable[[bytes], bytes] = lambda data: data, frames: int = 1, **size: int) -> dict[str, Any]:
    """A part with a PNG, or a GIF of several frames, that something happened to."""
    pictures = [Image.fromarray(picture(seed, **size)) for seed in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, "PNG" if frames == 1 else "GIF", **({"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}))
    return {"type": "image", "image": change(file.getvalue())}


BAD_IMAGES: list[tuple[dict[str, Any], str]] = [
    ({"type": "image", "image": b"not an image at all"}, r"content\[1\]: the image cannot be decoded"),
    (png(lambda data: data[: len(data) // 2]), "the image cannot be decoded"),
    (png(lambda data: b""), "the image is empty"),
    (png(height=1, width=16_385), "16385 × 1 pixels"),
    (png(frames=2), "the image has 2 frames"),
    ({"type": "image", "image": np.zeros((4, 4), np.float32)}, "array is uint8"),
    ({"type": "image_url", "image_url": {"url": "http://localhost/cat.png"}}, "is not fetched; download it first"),
    ({"type": "image", "image": "/nowhere/cat.png"}, "cannot be read"),
    ({"type": "image"}, "this one has 0 of them"),
    (sound(1), "takes text and image as it was opened, and no audio"),
    ({"type": "video", "video": "a.mp4"}, "is of type 'video': this model takes text and image"),
    (said("<start_of_image>"), "1 images came with a prompt that has place for 2"),
]  # fmt: skip


async def test_bad_parts_are_refused_and_nobody_else_is_harmed(gemmas: dict[str, Gemma]) -> None:
    gemma, good = gemmas["small"], CONVERSATIONS["two"]
    async with Runtime.open(gemma.folder, max_context_tokens=256) as runtime:
        for part, why in BAD_IMAGES:
            beside = runtime.stream(good, max_new_tokens=2 * COUNT)
            first = await anext(beside)
            with pytest.raises(RequestError, match=why):
                await runtime.generate([user(image(1), part)])
            assert [first.id, *[token.id async for token in beside]][:COUNT] == (await gemma.answer(good)).ids
        await nothing_left(runtime)


async def nothing_left(runtime: Runtime) -> None:
    """All requests are gone, and what they held is free."""
    assert runtime.engine.riders == runtime.engine.waiting == 0
    assert runtime.cache is not None and runtime.cache.pool.reserved == 0


async def test_a_context_that_an_image_overfills_is_told_with_numbers(gemmas: dict[str, Gemma]) -> None:
    async with Runtime.open(gemmas["wide"].folder, max_context_tokens=100) as runtime:
        with pytest.raises(RequestError, match=r"has 156 tokens \(128 of them for images .* it has 2\) and the context 100: shorten"):
            await runtime.generate([user(image(1), image(2), said("Which?"))])
        assert runs(runtime) == 0


async def test_a_model_opened_without_its_tower_takes_text_alone(gemmas: dict[str, Gemma]) -> None:
    gemma = gemmas["small"]
    async with Runtime.open(gemma.folder, max_context_tokens=256, multimodal=False) as runtime:
        assert "towers" not in runtime.plan.ledger
        assert all(step.id != "multimodal-shell" for step in runtime.plan.passes)
        with pytest.raises(RequestError, match="takes text alone as it was opened, and no image"):
            await runtime.generate(CONVERSATIONS["one"])
        agree(await tiny.ours(runtime, CONVERSATIONS["none"], COUNT), await gemma.answer(CONVERSATIONS["none"]))


SPECIAL_IDS = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[AVAILABLE_TOOLS]": 5, "[/AVAILABLE_TOOLS]": 6, "[TOOL_RESULTS]": 7,
    "[/TOOL_RESULTS]": 8, "[TOOL_CALLS]": 9, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12, "[IMG_END]": 13,
    "[PREFIX]": 14, "[MIDDLE]": 15, "[SUFFIX]": 16, "[SYSTEM_PROMPT]": 17, "[/SYSTEM_PROMPT]": 18,
    "[TOOL_CONTENT]": 19, "[AUDIO]": 24, "[BEGIN_AUDIO]": 25, "[TRANSCRIBE]": 34,
}  # fmt: skip
CHUNK_S, CHUNK_ROWS = 0.8, 10
"""Seconds of a chunk of the tiny model, 30 in a real one, and the rows that it becomes."""


def save_tekken(folder: Path) -> Path:
    """Mistral's kind of tokenizer: bytes, and special ids where Voxtral has them."""
    names = {number: name for name, number in SPECIAL_IDS.items()}
    spectrogram = {"num_mel_bins": 16, "hop_length": 160, "window_size": 400}
    config = {
        "pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "num_vocab_tokens": 257, "default_vocab_size": 40 + 257,
        "default_num_special_tokens": 40, "version": "v7",
    }  # fmt: skip
    tokens = [base64.b64encode(token).decode() for token in (*(bytes([byte]) for byte in range(256)), b"th")]
    described = {
        "config": config,
        "vocab": [{"rank": rank, "token_bytes": token, "token_str": None} for rank, token in enumerate(tokens)],
        "special_tokens": [{"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True} for rank in range(40)],
        "audio": {"sampling_rate": 16_000, "frame_rate": 12.5, "chunk_length_s": CHUNK_S, "audio_encoding_config": spectrogram},
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(described))
    return folder


def save_voxtral(folder: Path) -> Path:
    """A tiny Voxtral with its tokenizer."""
    config = VoxtralConfig(
        text_config={
            "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
            "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
        },
        audio_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 16,
            "max_source_positions": 40,
        },
        audio_token_id=SPECIAL_IDS["[AUDIO]"],
    )  # fmt: skip
    torch.manual_seed(6)
    model = VoxtralForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "audio" in name or "projector" in name:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    preparation = {"feature_size": 16, "hop_length": 160, "n_fft": 400, "sampling_rate": 16_000, "chunk_length": 30}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return save_tekken(folder)


class Voxtral(Oracle):
    """Voxtral, its inputs made by mistral-common and transformers' feature extractor."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = save_voxtral(folder)
        self.model = VoxtralForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.text = MistralTokenizer.from_file(folder / "tekken.json")
        self.extractor = WhisperFeatureExtractor(feature_size=16)

    def ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """As mistral-common writes them, sounds and all."""
        return list(self.text.encode_chat_completion(ChatCompletionRequest.from_openai([spoken(message) for message in messages])).tokens)

    def inputs(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        how = {"sampling_rate": 16_000, "padding": True, "pad_to_multiple_of": round(CHUNK_S * 16_000), "truncation": False}
        chunks = [
            self.extractor(part["audio"], return_tensors="pt", **how)["input_features"].reshape(16, -1, 80).transpose(0, 1)
            for part in parts
            if part["type"] == "audio"
        ]
        return {"input_ids": torch.tensor([self.ids(messages)]), **({"input_features": torch.cat(chunks)} if chunks else {})}


def spoken(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its sounds as wav files, which mistral-common takes."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [
        part if part["type"] == "text" else {"type": "input_audio", "input_audio": {"data": wav(part["audio"]), "format": "wav"}}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def wav(samples: np.ndarray) -> str:
    """A wav file of 16 bits a sample, in base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
        writer.writeframes((samples * 32_767).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def voxtral(tmp_path_factory: pytest.TempPathFactory) -> Voxtral:
    return Voxtral(tmp_path_factory.mktemp("voxtral"))


SPEECHES: dict[str, list[dict[str, Any]]] = {
    "none": [{"role": "user", "content": "What is the time?"}],
    "short": [user(sound(0.5))],
    "text after": [user(sound(0.5), said("What is said?"))],
    "text before": [user(said("Listen: "), sound(0.5, 1))],
    "two chunks": [user(sound(1.2), said("What is said?"))],
    "a whole chunk": [user(sound(CHUNK_S), said("What is said?"))],
    "two sounds": [user(sound(0.5), sound(0.5, 1), said("Who?"))],
    "apart": [user(sound(1.2), said("and"), sound(0.3, 1))],
    "the same twice": [user(sound(0.5), said("and"), sound(0.5))],
    "across blocks": [user(said(LONG[: 1024 - 16]), sound(1.2), said("was?"))],
    "turns": [user(sound(0.5), said("Who?")), {"role": "assistant", "content": "the man"}, user(said("And"), sound(0.9, 1))],
}


@pytest.mark.parametrize("way", WAYS)
async def test_messages_with_sounds_are_answered_as_transformers_answers_them(voxtral: Voxtral, way: str) -> None:
    async with Runtime.open(voxtral.folder, max_context_tokens=1536, **WAYS[way]) as runtime:
        for messages in SPEECHES.values():
            stream = runtime.stream(messages, max_new_tokens=COUNT, logprobs=1000)
            assert await hits(stream, await voxtral.answer(messages)) == 0
            assert stream.request is not None
            assert [number if number < 300 else 24 for number in stream.request.prompt] == voxtral.ids(messages)
        assert runs(runtime, "frames") == 6


async def test_sounds_share_a_pass_and_turns_share_sounds(voxtral: Voxtral) -> None:
    async def ask(messages: list[dict[str, Any]]) -> None:
        agree(await tiny.ours(runtime, messages, COUNT), await voxtral.answer(messages))

    async with Runtime.open(voxtral.folder, max_context_tokens=1536) as runtime:
        async with anyio.create_task_group() as group:
            for messages in SPEECHES.values():
                group.start_soon(ask, messages)
        assert runtime.engine.passes < len(SPEECHES) * COUNT and runs(runtime, "frames") == 6
        async with runtime.session() as session:
            for message, least in ((user(sound(1.2), said("Who?")), 0), (user(said("And "), sound(1.2)), 20)):
                stream = session.stream(message, max_new_tokens=COUNT, logprobs=1000)
                assert await hits(stream, await voxtral.answer(session.messages)) >= least
        assert runs(runtime, "frames") == 6


async def test_a_sound_may_ride_on_several_passes(voxtral: Voxtral) -> None:
    messages = [user(said("x" * 150), sound(12.0), said("z"))]
    config = {"kv_cache_strategy": "paged", "kv_cache_memory": "512KiB", "dense_projection_chunk_rows": 16, "max_concurrent_requests": 2}
    async with Runtime.open(voxtral.folder, max_context_tokens=512, **config) as runtime:
        assert runtime.plan.max_rows < 150
        agree(await tiny.ours(runtime, messages, COUNT), await voxtral.answer(messages))
        assert runs(runtime, "frames") == 1


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("position, wanted", [(0, 0), (4, 4), (5, 4), (9, 4), (10, 10), (14, 10), (15, 15), (20, 20), (99, 99)])
def test_positions_within_an_image_are_moved_to_its_beginning(position: int, wanted: int, both_ways: bool) -> None:
    items = [Item(b"", torch.empty(0), first, rows, both_ways) for first, rows in ((4, 6), (10, 5))]
    assert whole(position, items) == (wanted if both_ways else position)


BAD_SOUNDS: list[tuple[dict[str, Any], str]] = [
    ({"type": "audio", "audio": b"RIFF and no more"}, r"content\[1\]: the sound cannot be decoded"),
    ({"type": "audio", "audio": np.zeros(0, np.float32), "sampling_rate": 16_000}, "the sound is empty, 0 samples"),
    ({"type": "audio", "audio": speech(1), "sampling_rate": 999}, "sampling_rate is 999; give samples a second"),
    ({"type": "audio", "audio": speech(1)}, "sampling_rate is None"),
    ({"type": "audio", "audio": np.full(9, np.nan), "sampling_rate": 16_000}, "values that are no numbers"),
    ({"type": "audio", "audio": np.zeros(2_500_000, np.float32), "sampling_rate": 1000}, "longer than 40 minutes"),
    ({"type": "input_audio", "input_audio": {"data": "https://localhost/a.wav", "format": "wav"}}, "cannot be decoded"),
    ({"type": "audio", "url": "https://localhost/a.wav"}, "is not fetched; download it first"),
    (sound(40), r"has 5\d\d tokens \(510 of them for images or sounds, of which it has 2\) and the context 256"),
    (image(1), "takes text and audio as it was opened, and no image"),
]


async def test_bad_sounds_are_refused_and_nobody_else_is_harmed(voxtral: Voxtral) -> None:
    good = SPEECHES["apart"]
    async with Runtime.open(voxtral.folder, max_context_tokens=256) as runtime:
        for part, why in BAD_SOUNDS:
            beside = runtime.stream(good, max_new_tokens=2 * COUNT)
            first = await anext(beside)
            with pytest.raises(RequestError, match=why):
                await runtime.generate([user(sound(0.5), part)])
            assert [first.id, *[token.id async for token in beside]][:COUNT] == (await voxtral.answer(good)).ids
        with pytest.raises(RequestError, match="mistral-common refuses these messages"):
            await runtime.generate([{"role": "assistant", "content": "I"}])
        await nothing_left(runtime)


TALKS: dict[str, list[dict[str, Any]]] = {
    **SPEECHES,
    "system": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "this [AUDIO] <s> naïve 🙂"}],
    "system as parts": [{"role": "system", "content": "Be kind."}, user(said("the"), said("path"))],
}


@pytest.mark.parametrize("name", TALKS)
def test_tekken_conversations_are_written_as_by_mistral_common(voxtral: Voxtral, name: str) -> None:
    text = Text.load(voxtral.folder)
    wanted: list[int] = []
    for number in voxtral.ids(TALKS[name]):
        if number != 24 or wanted[-1] != 24:
            wanted.append(number)
    parts = [
        {**message, "content": [{"type": "audio"} if part["type"] == "audio" else part for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in TALKS[name]
    ]
    assert text.chat(parts, ("audio",)) == wanted
    assert text.render(parts, ("audio",)).startswith("<s>[")


def test_tekken_text_is_what_went_in(voxtral: Voxtral) -> None:
    text = Text.load(voxtral.folder)
    assert (text.vocabulary, text.bos_id, text.eos_id, text.stop_ids) == (297, 1, 2, {2})
    ids = text.encode("the naïve 🙂")
    assert ids[0] == 1 and ids[1] == 40 + 256 and text.decode(ids) == "the naïve 🙂"
    decoder = text.decoder(["ve"])
    assert "".join([decoder.push(number) for number in ids] + [decoder.finish()]) == "the naï" and decoder.stopped


BLOCKED = """
import sys
sys.modules["mistral_common"] = None
from pathlib import Path
from aollm.errors import ModelError
from aollm.text import Text
try:
    Text.load(Path(sys.argv[1]))
except ModelError as error:
    print(error)
"""


def test_without_mistral_common_the_pip_line_is_told(voxtral: Voxtral) -> None:
    ran = subprocess.run([sys.executable, "-c", BLOCKED, voxtral.folder], capture_output=True, text=True, timeout=110)
    assert ran.stdout.endswith("tekken.json is read by mistral-common, which is not installed: pip install 'aollm[audio]'\n"), ran.stderr


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"config": {"version": "v99"}}'])
def test_a_damaged_tekken_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "tekken.json").write_bytes(damage)
    with pytest.raises(ModelError, match=r"tekken.json cannot be loaded: .*; download it again"):
        Text.load(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, a sound, and a file that is none of these."""
    folder = tmp_path_factory.mktemp("files")
    for seed in (1, 2):
        Image.fromarray(picture(seed)).save(folder / f"{seed}.png")
    (folder / "0.wav").write_bytes(base64.b64decode(wav(speech(1.2))))
    (folder / "bad").write_bytes(b"neither")
    return folder


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`aollm run` in the files' folder: its exit code, output and errors."""
    monkeypatch.chdir(files)

    def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
        code = main(["run", str(folder), "What is this?", "--max-new-tokens", str(COUNT), "--max-context-tokens", "256", *arguments])
        return (code, *capsys.readouterr())

    return run


def test_the_command_shows_pictures_and_plays_sounds(
    gemmas: dict[str, Gemma], voxtral: Voxtral, files: Path, command: Command
) -> None:  # fmt: skip
    question = said("What is this?")
    with wave.open(str(files / "0.wav")) as file:
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(32_768)
    for oracle, arguments, parts in (
        (gemmas["small"], ["--image", "1.png", "--image", "2.png"], [image(1), image(2)]),
        (voxtral, ["--audio", "0.wav"], [{"type": "audio", "audio": heard}]),
    ):
        code, out, errors = command(oracle.folder, *arguments, "--json")
        assert (code, json.loads(out)["token_ids"]) == (0, anyio.run(oracle.answer, [user(*parts, question)]).ids), errors


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--image", "bad"], "--image bad: the image cannot be decoded"),
        (["--image", "1.png", "--image", "none.png"], r"--image none.png: .* cannot be read"),
        (["--audio", "bad"], "--audio bad: the sound cannot be decoded"),
        (["--audio", "0.wav"], "takes text and image as it was opened, and no audio"),
        (["--image", "1.png", "--adapter", "kind"], "adapter: there is no 'kind'"),
    ],
)
def test_a_file_that_cannot_be_taken_is_an_error_of_one_line(
    gemmas: dict[str, Gemma], command: Command, arguments: list[str], why: str
) -> None:  # fmt: skip
    code, out, errors = command(gemmas["small"].folder, *arguments)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"aollm: error: .*{why}.*\n", errors), errors


def resident(field: str) -> int:
    """Bytes of memory that the process has now (`VmRSS`), or had at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory cannot be reset here")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_tower_is_streamed_within_what_was_set_aside_for_it(tmp_path: Path, anyio_backend: str) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
    folder = await anyio.to_thread.run_sync(lambda: save_gemma(tmp_path, 448, 64, **sizes))
    growth = []
    async with Runtime.open(folder, max_context_tokens=512) as runtime:
        line = runtime.plan.ledger["towers"]
        assert line < 32 << 20 < sum(file.stat().st_size for file in folder.glob("*.safetensors")) - runtime.plan.weights_nbytes
        for seed in range(5):
            await runtime.generate([user(said("x" * 150))], max_new_tokens=2)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            await runtime.generate([user(said("x" * 80), image(seed))], max_new_tokens=2)
            growth.append(resident("VmHWM") - before)
        assert runs(runtime) == 5
    assert min(growth) < 1.1 * line, [f"{nbytes / line:.2f}" for nbytes in growth]


@pytest.mark.parametrize("name", ["image", "audio"])
def test_the_examples_run_as_they_are(name: str, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / f"{name}.py"
    ran = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(rf": {'28' if name == 'image' else '117'} tokens read, \d+ written\n$", ran.stdout), ran.stdout
