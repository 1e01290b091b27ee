"""The towers of images and sounds against transformers': what goes in, what comes out, and where it goes in a prompt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mistral_common.tokens.tokenizers.audio import AudioConfig, AudioEncoder, AudioSpectrogramConfig, SpecialAudioIDs
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from aollm.errors import CheckpointError, ModelError, RequestError
from aollm.families.base import Params, Tower
from aollm.families.siglip import Siglip
from aollm.families.whisper import Whisper

TEXT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
EAR = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 16}
IMAGE, BEGIN, END = 500, 501, 502


def gemma(**eye: Any) -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 16}, vision_config={**EYE, "vision_use_head": False, **eye},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=BEGIN, eoi_token_index=END,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def voxtral(**ear: Any) -> VoxtralForConditionalGeneration:
    config = VoxtralConfig(
        text_config={**TEXT, "model_type": "llama"}, audio_config={**EAR, "max_source_positions": 40, **ear}, audio_token_id=24
    )
    return VoxtralForConditionalGeneration(config)


def save(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a model whose weights are all random, as `save_pretrained` writes them."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    model.to(dtype).eval().save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def run(tower: Tower, tensors: Mapping[str, Tensor], prepared: Tensor) -> Tensor:
    """All steps, one after the other, on weights stacked by hand."""
    x = prepared
    for step in tower.steps:
        params = {}
        for name, need in step.params.items():
            stacked = torch.cat([tensors[tensor] for tensor in need.tensors])
            assert stacked.shape == need.shape, name
            params[name] = stacked.to(need.dtype or tower.dtype)
        work = step.run(Params(params), x, ())
        with pytest.raises(StopIteration) as stop, torch.no_grad():
            next(work)
        x = stop.value.value
    return x


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error, most = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= tolerance * most, f"{error} of {most}"


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """Tones, noise and a silence."""
    at = np.arange(samples) / 16_000
    wave = 0.4 * np.sin(at * 2 * np.pi * 440) + 0.2 * np.sin(at * 2 * np.pi * 2500) + np.random.default_rng(seed).normal(0, 0.02, samples)
    wave[samples // 2 : samples // 2 + samples // 8] = 0
    return wave.astype(np.float32)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
EYES: dict[str, dict[str, Any]] = {
    "plain": {},
    "act": {"hidden_act": "gelu"},
    "eps": {"layer_norm_eps": 0.1},
    "layers": {"num_hidden_layers": 3, "num_attention_heads": 4},
    "pooled by 3": {"image_size": 84},
    "a patch too narrow": {"image_size": 60},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", EYES)
def test_rows_of_an_image_are_those_of_transformers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = gemma(**EYES[name])
    config, tensors = save(tmp_path, model, dtype)
    tower: Tower = Siglip(config, dtype, tensors)
    prepared = tower.prepare(picture(70, 90))
    with torch.no_grad():
        theirs = model.model.get_image_features(prepared.to(dtype)).pooler_output[0]
    assert tower.rows(prepared) == 4 == theirs.shape[0]
    near(run(tower, tensors, prepared), theirs, TOLERANCE[dtype])


PREFIXES = [
    ("vision_tower.vision_model.", ""),
    ("vision_tower.", ""),
    ("model.vision_tower.", "model."),
    ("model.vision_tower.vision_model.", "model."),
]


@pytest.mark.parametrize("prefixes", PREFIXES, ids=str)
def test_weights_of_an_eye_are_found_under_all_their_names(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    config, tensors = save(tmp_path, gemma(), torch.float32)
    wanted = run(tower := Siglip(config, torch.float32, tensors), tensors, tower.prepare(picture(56, 56)))
    renamed = {
        name.replace("vision_tower.", prefixes[0]).replace("multi_modal_projector.", f"{prefixes[1]}multi_modal_projector."): tensor
        for name, tensor in tensors.items()
    }
    tower = Siglip(config, torch.float32, renamed)
    assert torch.equal(run(tower, renamed, tower.prepare(picture(56, 56))), wanted)


EARS: dict[str, tuple[dict[str, Any], int]] = {
    "one chunk": ({}, 12_800),
    "part of a chunk": ({}, 5_000),
    "one sample": ({}, 1),
    "three chunks": ({}, 30_000),
    "act": ({"activation_function": "gelu_new"}, 14_000),
    "heads": ({"num_attention_heads": 4, "num_hidden_layers": 3}, 14_000),
    "one row each": ({"max_source_positions": 4}, 4_000),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", EARS)
def test_rows_of_a_sound_are_those_of_transformers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    options, samples = EARS[name]
    model = voxtral(**options)
    config, tensors = save(tmp_path, model, dtype)
    tower: Tower = Whisper(config, dtype, tensors)
    prepared = tower.prepare(sound(samples))
    with torch.no_grad():
        theirs = model.model.get_audio_features(prepared.to(dtype)).pooler_output
    assert tower.rows(prepared) == theirs.shape[0] == -(-samples // (320 * tower.positions)) * tower.positions // 4
    near(run(tower, tensors, prepared), theirs, TOLERANCE[dtype])


def test_residuals_of_an_ear_stay_within_float16(tmp_path: Path) -> None:
    config, tensors = save(tmp_path, voxtral(), torch.float16)
    tower = Whisper(config, torch.float16, tensors)
    step = next(step for step in tower.steps if step.name == "mlp")
    weights = {name: torch.cat([tensors[t] for t in need.tensors]) for name, need in step.params.items()}
    with pytest.raises(StopIteration) as stop:
        next(step.run(Params({**weights, "down_bias": torch.full((32,), 6e4).half()}), torch.full((40, 32), 6e4).half(), ()))
    assert torch.equal(stop.value.value, torch.full((40, 32), 65504.0 - 1000).half())


PUBLISHED = {
    "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 0.00392156862745098,
    "size": {"height": 56, "width": 56},
}  # fmt: skip
PREPARATIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "colours": {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.27, 0.28]},
    "one number": {"image_mean": 0.3, "image_std": 0.7},
    "nearest": {"resample": 0},
    "lanczos": {"resample": 1},
    "bicubic": {"resample": 3},
    "scale": {"rescale_factor": 0.01},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "no resize": {"do_resize": False},
}


@pytest.mark.parametrize("shape", [(56, 56), (200, 33), (1, 1), (57, 400)], ids=str)
@pytest.mark.parametrize("name", PREPARATIONS)
def test_pixels_are_those_of_transformers(name: str, shape: tuple[int, int]) -> None:
    settings = {**PUBLISHED, **PREPARATIONS[name]}
    tower = Siglip(GEMMA, torch.float32, SEES, settings)
    if not settings["do_resize"] and shape != (56, 56):
        with pytest.raises(RequestError, match="resize it"):
            tower.prepare(picture(*shape))
        return
    theirs = Gemma3ImageProcessorPil(**settings)(picture(*shape), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    ours = tower.prepare(picture(*shape))
    assert ours.is_contiguous() and ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("mels, positions", [(128, 1500), (80, 1500), (16, 40)])
@pytest.mark.parametrize("samples", [1, 399, 16_000, 480_000, 480_001, 1_000_000])
def test_log_mels_are_those_of_transformers(tmp_path: Path, mels: int, positions: int, samples: int) -> None:
    if positions == 40:
        samples = min(samples, 100_000)
    config = {"text_config": {"hidden_size": 64}, "audio_config": {**EAR, "num_mel_bins": mels, "max_source_positions": positions}}
    tower = Whisper(config, torch.float32, HEARS)
    size = 320 * positions
    extractor = WhisperFeatureExtractor(feature_size=mels)
    how = {"sampling_rate": 16_000, "padding": True, "pad_to_multiple_of": size, "truncation": False, "return_tensors": "pt"}
    theirs = extractor(sound(samples), **how)["input_features"].reshape(mels, -1, 2 * positions).transpose(0, 1)
    ours = tower.prepare(sound(samples))
    assert ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-4


def test_silence_and_a_loud_sound_have_log_mels_that_are_numbers() -> None:
    tower = Whisper(VOXTRAL, torch.float32, HEARS)
    assert torch.equal(tower.prepare(np.zeros(100, np.float32)), torch.full((1, 16, 80), -1.5))
    assert tower.prepare(np.full(100, 32_768, np.float32)).isfinite().all()


SEES = ["vision_tower.embeddings.patch_embedding.weight", "multi_modal_projector.mm_soft_emb_norm.weight"]
HEARS = ["audio_tower.conv1.weight", "multi_modal_projector.linear_1.weight"]
GEMMA: dict[str, Any] = {
    "text_config": {"hidden_size": 64}, "vision_config": EYE, "mm_tokens_per_image": 4,
    "image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END,
}  # fmt: skip
VOXTRAL: dict[str, Any] = {"text_config": {"hidden_size": 64}, "audio_config": {**EAR, "max_source_positions": 40}, "audio_token_id": 24}
NEWLINES = [10, 11, 12, 13, 14]


def tokenizer() -> Tokenizer:
    """One id for each letter, and for as many newlines in a row as Gemma's has at most, only fewer."""
    words = {"?": 0, **{letter: 100 + place for place, letter in enumerate("abc")}}
    special = {"<b>": BEGIN, "<i>": IMAGE, "<e>": END, **{"\n" * (count + 1): id for count, id in enumerate(NEWLINES)}}
    found = Tokenizer(WordLevel({**words, **special}, unk_token="?"))
    found.add_tokens([AddedToken(text, normalized=False) for text in [*special, *"abc"]])
    return found


@pytest.mark.parametrize(
    "text",
    [
        "a<b>b", "<b>", "a\n<b>b", "a\n\n<b>\nb", "<b><b>", "a<b>\n<b>\n\n\n<b>c", "a\n\n\n\n\n\n\n<b>\n\n\n\n\nb", "a\n\nb", "", "\n<b>\n",
    ],
)  # fmt: skip
def test_an_image_is_placed_as_in_the_text_with_all_of_it_written_out(text: str) -> None:
    tower, words = Siglip(GEMMA, torch.float32, SEES, newlines=NEWLINES), tokenizer()
    wanted = words.encode(text.replace("<b>", "\n\n<b><i><i><i><i><e>\n\n")).ids
    count = text.count("<b>")
    ids, firsts = tower.place(words.encode(text).ids, [4] * count)
    assert ids == wanted
    assert firsts == [at + 1 for at, id in enumerate(wanted) if id == BEGIN]
    assert tower.place(ids, [4] * count) == (ids, firsts)


def test_an_image_is_placed_without_newlines_where_there_are_none() -> None:
    tower = Siglip(GEMMA, torch.float32, SEES)
    assert tower.place([1, BEGIN, 2, BEGIN], [4, 4]) == ([1, BEGIN, *[IMAGE] * 4, END, 2, BEGIN, *[IMAGE] * 4, END], [2, 9])


@pytest.mark.parametrize("begin", [None, 25])
@pytest.mark.parametrize("asked", [[24], [25, 24]], ids=str)
@pytest.mark.parametrize("samples", [1, 480_000, 480_001])
def test_a_sound_is_placed_as_by_mistral(samples: int, asked: list[int], begin: int | None) -> None:
    theirs = AudioEncoder(AudioConfig(16_000, 12.5, AudioSpectrogramConfig(128, 160, 400), 30.0), SpecialAudioIDs(24, 25, None))
    wanted = theirs._encode_audio_tokens(theirs.next_multiple_of_chunk_frames(samples, 16_000))
    tower = Whisper({"text_config": {}, "audio_config": {}}, torch.float32, HEARS, begin_id=begin)
    rows = tower.rows(torch.empty(-(-samples // 480_000), 128, 3000, device="meta"))
    ids, firsts = tower.place([1, *asked, 2, *asked], [rows, rows])
    if begin is None and asked == [24]:
        wanted = wanted[1:]
    assert ids == [1, *wanted, 2, *wanted]
    assert firsts == [1 + len(wanted) - rows, 2 + 2 * len(wanted) - rows]
    assert tower.place(ids, [rows, rows]) == (ids, firsts)


PLACES = [
    (Siglip, GEMMA, SEES, [1, 2], [4], "1 images came with a prompt that has place for 0"),
    (Siglip, GEMMA, SEES, [BEGIN, BEGIN], [4], "1 images came with a prompt that has place for 2"),
    (Siglip, GEMMA, SEES, [BEGIN], [], "0 images"),
    (Siglip, GEMMA, SEES, [IMAGE], [], "stands nowhere else"),
    (Siglip, GEMMA, SEES, [BEGIN, IMAGE, IMAGE, END], [4], "or that id, 4 times 500"),
    (Siglip, GEMMA, SEES, [BEGIN, *[IMAGE] * 5, END], [4], "4 times 500"),
    (Whisper, VOXTRAL, HEARS, [1, 2], [10], "1 sounds came with a prompt that has place for 0"),
    (Whisper, VOXTRAL, HEARS, [24, 1, 24], [10], "more than 1"),
    (Whisper, VOXTRAL, HEARS, [24], [], "0 sounds came with a prompt that has place for more than 0"),
    (Whisper, VOXTRAL, HEARS, [24] * 9, [10], "more than 1"),
    (Whisper, VOXTRAL, HEARS, [24] * 11, [10], "more than 1"),
]


@pytest.mark.parametrize("family, config, names, ids, rows, why", PLACES)
def test_places_that_do_not_match_the_items_are_refused(
    family: Any, config: dict[str, Any], names: list[str], ids: list[int], rows: list[int], why: str
) -> None:
    with pytest.raises(RequestError, match=why):
        family(config, torch.float32, names).place(ids, rows)


WRONG: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (Siglip, {"vision_config": None}, {}, "vision_config must be an object"),
    (Siglip, {"vision_config": {**EYE, "num_attention_heads": 3}}, {}, "multiple of num_attention_heads"),
    (Siglip, {"vision_config": {**EYE, "num_channels": 1}}, {}, "3 channels"),
    (Siglip, {"vision_config": {**EYE, "hidden_act": "sine"}}, {}, "'sine' is not known"),
    (Siglip, {"vision_config": {**EYE, "hidden_size": "32"}}, {}, "hidden_size must be a whole number"),
    (Siglip, {"vision_config": {**EYE, "image_size": [56, 56]}}, {}, "image_size must be a whole number"),
    (Siglip, {"vision_config": {**EYE, "patch_size": 57}}, {}, "0 × 0 patches"),
    (Siglip, {"mm_tokens_per_image": 5}, {}, "cannot be pooled"),
    (Siglip, {"mm_tokens_per_image": 9}, {}, "cannot be pooled"),
    (Siglip, {}, {"size": {"height": 224, "width": 224}}, "56 × 56"),
    (Siglip, {}, {"size": {"shortest_edge": 56}}, "56 × 56"),
    (Siglip, {}, {"do_pan_and_scan": True}, "do_pan_and_scan"),
    (Siglip, {}, {"resample": 9}, "resample"),
    (Siglip, {}, {"resample": "bilinear"}, "resample"),
    (Siglip, {}, {"rescale_factor": "1/255"}, "rescale_factor"),
    (Siglip, {}, {"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
    (Siglip, {}, {"image_std": [0.5, 0.5, None]}, "image_std must be three numbers"),
    (Siglip, {}, {"image_std": [0.5, 0, 0.5]}, "must not be zero"),
    (Whisper, {"audio_config": []}, {}, "audio_config must be an object"),
    (Whisper, {"audio_config": {**EAR, "num_attention_heads": 5}}, {}, "multiple of num_attention_heads"),
    (Whisper, {"audio_config": {**EAR, "activation_function": None}}, {}, "None is not known"),
    (Whisper, {"audio_config": {**EAR, "max_source_positions": 41}}, {}, "41 frames of 32"),
    (Whisper, {"projector_hidden_act": "sine"}, {}, "projector_hidden_act 'sine'"),
    (Whisper, {}, {"feature_size": 80}, "feature_size must be 16, found 80"),
    (Whisper, {}, {"sampling_rate": 8000}, "sampling_rate must be 16000"),
    (Whisper, {}, {"dither": 0.1}, "dither must be 0.0"),
]


@pytest.mark.parametrize("family, config, preparation, why", WRONG)
def test_sizes_and_settings_that_cannot_be_are_refused(family: Any, config: dict[str, Any], preparation: dict[str, Any], why: str) -> None:
    base, names = (GEMMA, SEES) if family is Siglip else (VOXTRAL, HEARS)
    family(base, torch.float32, names)
    with pytest.raises(ModelError, match=why):
        family({**base, **config}, torch.float32, names, preparation)


@pytest.mark.parametrize("family, config, names", [(Siglip, GEMMA, SEES), (Whisper, VOXTRAL, HEARS)])
def test_a_checkpoint_of_the_language_model_alone_is_refused(family: Any, config: dict[str, Any], names: list[str]) -> None:
    for held in ([], names[:1], names[1:]):
        with pytest.raises(CheckpointError, match="the language model alone"):
            family(config, torch.float32, held)


@pytest.mark.parametrize("family, config, names", [(Siglip, GEMMA, SEES), (Whisper, VOXTRAL, HEARS)])
def test_steps_are_in_running_order(family: Any, config: dict[str, Any], names: list[str]) -> None:
    tower: Tower = family(config, torch.float32, names)
    first = "patches" if tower.kind == "image" else "frames"
    assert tower.both_ways == (tower.kind == "image")
    assert [(step.layer, step.name) for step in tower.steps] == [
        (-1, first), (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp"), (-1, "project"),
    ]  # fmt: skip
    assert all(step.attends is None and step.experts is None for step in tower.steps)


@pytest.mark.parametrize("rows, chunks", [(0, 1), (374, 1), (749, 1), (750, 2), (1 << 20, 80)])
def test_the_largest_item_of_a_prompt_is_known(rows: int, chunks: int) -> None:
    ear: Tower = Whisper({"text_config": {}, "audio_config": {}}, torch.float32, HEARS)
    assert ear.largest(rows) == (chunks, 128, 3000)
    eye: Tower = Siglip(GEMMA, torch.float32, SEES)
    assert eye.largest(rows) == tuple(eye.prepare(picture(9, 9)).shape)
    assert eye.text_hidden == 64 and ear.text_hidden == 3072
    with pytest.raises(RequestError, match="2401 s long"):
        ear.prepare(np.broadcast_to(np.float32(0), (2401 * 16_000,)))


def most_nbytes(tower: Tower, prepared: Tensor) -> int:
    """What torch allocates at most for a step, its input included."""
    x, found = prepared, 0
    for step in tower.steps:
        params = Params({name: torch.zeros(need.shape, dtype=need.dtype or tower.dtype) for name, need in step.params.items()})
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            with pytest.raises(StopIteration) as stop:
                next(step.run(params, x, ()))
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = x.nbytes
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            found = max(found, live)
        x = stop.value.value
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "hidden, wide, text",
    [(256, 256, 64), (64, 1024, 64), (128, 512, 2048)],
    ids=["hidden", "wide", "text"],
)
def test_what_a_step_needs_is_foretold(dtype: torch.dtype, hidden: int, wide: int, text: int) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye: Tower = Siglip(
        {**GEMMA, "text_config": {"hidden_size": text}, "vision_config": {**EYE, **sizes, "image_size": 192, "patch_size": 12}}, dtype, SEES
    )
    ears = {"text_config": {"hidden_size": text}, "audio_config": {**sizes, "num_mel_bins": 80, "max_source_positions": 128}}
    ear: Tower = Whisper(ears, dtype, HEARS)
    for tower, data in ((eye, picture(9, 9)), (ear, sound(1000)), (ear, sound(100_000))):
        prepared = tower.prepare(data)
        used = most_nbytes(tower, prepared)
        assert used <= tower.activation_nbytes(prepared.shape) <= 3.5 * used
