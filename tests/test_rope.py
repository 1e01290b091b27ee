"""Rotary positions: the frequencies of transformers for every published kind, and no other error than `ModelError` for a bad config."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from aollm.errors import ModelError
from aollm.maths.rope import Rope, rotate

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1.0 + 0.05 * i for i in range(16)], "long_factor": [1.5 * (i + 1) for i in range(16)]}

# parameters, max_position_embeddings
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default"}, 512),
    "linear": ({"rope_type": "linear", "factor": 8.0}, 512),
    "linear int": ({"rope_type": "linear", "factor": 3}, 512),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 128),
    "dynamic 1": ({"rope_type": "dynamic", "factor": 1.0}, 128),
    "llama3.1": ({**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
    "llama3.2": ({**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
    "llama3 small": ({**LLAMA3, "factor": 2.0, "original_max_position_embeddings": 64}, 128),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    "yarn by context": ({"rope_type": "yarn", "factor": 4.0}, 4096),
    "yarn 1": ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}, 64),
    "yarn mscale": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.0},
        163840,
    ),
    "yarn half mscale": ({"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7}, 163840),
    "yarn attention": ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.7}, 512),
    "yarn betas": ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 0.5}, 512),
    "yarn untruncated": ({"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}, 131072),
    "longrope": ({"rope_type": "longrope", **FACTORS, "factor": 8.0, "original_max_position_embeddings": 128}, 1024),
    "longrope by context": ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 128}, 1024),
    "longrope attention": ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 128, "attention_factor": 1.2}, 1024),
    "longrope small": ({"rope_type": "longrope", **FACTORS, "factor": 0.5, "original_max_position_embeddings": 128}, 1024),
}


def config_of(parameters: dict[str, Any], context: int, theta: float, head_dim: int = 32) -> dict[str, Any]:
    return {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rope_parameters": {**parameters, "rope_theta": theta},
    }


@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 513, 5000, 200_000])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_scale_are_those_of_transformers(kind: str, theta: float, length: int) -> None:
    parameters, context = KINDS[kind]
    given_config = config_of(parameters, context, theta)
    config = LlamaConfig(**given_config)
    if parameters["rope_type"] == "default":
        wanted, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        wanted, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    rope = Rope.from_config(given_config, 32)
    torch.testing.assert_close(rope.frequencies(length), wanted.float(), rtol=1e-6, atol=0)
    assert math.isclose(rope.scale, scale, rel_tol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_spelling_means_the_same(kind: str) -> None:
    parameters, context = KINDS[kind]
    new = config_of(parameters, context, 12_345.0)
    scaling = {("type" if key == "rope_type" else key): value for key, value in parameters.items()}
    old = {**new, "rope_theta": 12_345.0, "rope_scaling": scaling}
    del old["rope_parameters"]
    for length in (1, 200, 5000):
        assert torch.equal(Rope.from_config(old, 32).frequencies(length), Rope.from_config(new, 32).frequencies(length))
    assert Rope.from_config(old, 32).scale == Rope.from_config(new, 32).scale


@pytest.mark.parametrize("head_dim", [2, 4, 6, 20, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_and_rotation_are_those_of_transformers(head_dim: int, dtype: torch.dtype) -> None:
    given_config = config_of({"rope_type": "default"}, 512, 10_000.0, head_dim)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**given_config))
    positions = torch.tensor([0, 1, 2, 77, 511])
    torch.manual_seed(0)
    x = torch.randn(5, 3, head_dim).to(dtype)
    cos, sin = theirs(x, positions[None])
    wanted, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    ours = rotate(x, *Rope.from_config(given_config, head_dim).angles(positions, 512, dtype))
    torch.testing.assert_close(ours, wanted[0].transpose(0, 1), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_a_part_of_the_head_may_be_rotated() -> None:
    rope = Rope.from_config(config_of({"rope_type": "default", "partial_rotary_factor": 0.25}, 512, 10_000.0), 32)
    x = torch.randn(4, 2, 32)
    out = rotate(x, *rope.angles(torch.arange(4), 4, torch.float32))
    assert rope.dim == 8 and torch.equal(out[..., 8:], x[..., 8:]) and not torch.equal(out[1:, :, :8], x[1:, :, :8])


def test_angles_of_far_positions_are_exact() -> None:
    """Position × frequency in float32, as transformers has it, for a position that bfloat16 or float16 cannot hold."""
    rope = Rope.from_config(config_of({"rope_type": "default"}, 1 << 20, 10_000.0), 32)
    cos, _ = rope.angles(torch.tensor([1_000_001]), 1 << 20, torch.float32)
    assert math.isclose(float(cos[0, 0, 0]), math.cos(1_000_001), abs_tol=1e-5)


GOOD: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BAD: dict[str, Any] = {
    "text": "linear",
    "number": 3,
    "list": [1, 2],
    "unknown kind": {"rope_type": "spiral"},
    "kind of another type": {"rope_type": ["linear"]},
    "kind null": {"rope_type": None},
    "no factor": {"rope_type": "linear"},
    "factor text": {"rope_type": "linear", "factor": "x"},
    "factor null": {"rope_type": "linear", "factor": None},
    "factor list": {"rope_type": "dynamic", "factor": [2.0]},
    "factor 0": {"rope_type": "linear", "factor": 0},
    "factor nan": {"rope_type": "linear", "factor": math.nan},
    "factor inf": {"rope_type": "linear", "factor": math.inf},
    "factor negative": {"rope_type": "linear", "factor": -2.0},
    "theta text": {"rope_type": "default", "rope_theta": "x"},
    "theta list": {"rope_type": "default", "rope_theta": [1e4]},
    "theta negative": {"rope_type": "default", "rope_theta": -1.0},
    "theta nan": {"rope_type": "default", "rope_theta": math.nan},
    "theta inf": {"rope_type": "default", "rope_theta": math.inf},
    "theta huge": {"rope_type": "default", "rope_theta": 10**400},
    "partial text": {"rope_type": "default", "partial_rotary_factor": "x"},
    "partial 2": {"rope_type": "default", "partial_rotary_factor": 2.0},
    "partial negative": {"rope_type": "default", "partial_rotary_factor": -0.5},
    "llama3 incomplete": {"rope_type": "llama3", "factor": 8.0},
    "llama3 low 0": {**LLAMA3, "factor": 8.0, "low_freq_factor": 0},
    "llama3 original 0": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": -1},
    "yarn original text": {**GOOD, "original_max_position_embeddings": "x"},
    "yarn original negative": {**GOOD, "original_max_position_embeddings": -4},
    "yarn factor nan": {**GOOD, "factor": math.nan},
    "yarn attention nan": {**GOOD, "attention_factor": math.nan},
    "yarn attention text": {**GOOD, "attention_factor": "x"},
    "yarn mscale text": {**GOOD, "mscale": "x", "mscale_all_dim": 1.0},
    "yarn beta text": {**GOOD, "beta_fast": "x"},
    "yarn theta 1": {**GOOD, "rope_theta": 1.0},
    "longrope no factors": {"rope_type": "longrope", "factor": 2.0},
    "longrope short list": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0] * 16},
    "longrope long list short": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [1.0]},
    "longrope text": {"rope_type": "longrope", "factor": 2.0, "short_factor": "x", "long_factor": [1.0] * 16},
    "longrope 0": {"rope_type": "longrope", "factor": 2.0, "short_factor": [0.0] * 16, "long_factor": [1.0] * 16},
    "longrope long 0": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [0.0] * 16},
    "longrope nan": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [math.nan] * 16},
}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", BAD)
def test_malformed_parameters_are_a_model_error(name: str, key: str) -> None:
    config = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512, key: BAD[name]}
    with pytest.raises(ModelError, match=r"config.json"):
        Rope.from_config(config, 32)


@pytest.mark.parametrize("value", ["x", [1], math.nan, -1.0, math.inf])
def test_a_malformed_top_level_theta_is_a_model_error(value: Any) -> None:
    with pytest.raises(ModelError, match=r"rope_theta|config.json"):
        Rope.from_config({"max_position_embeddings": 512, "rope_theta": value}, 32)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.floats(), max_size=20)
KEYS = [
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "truncate",
    "short_factor",
    "long_factor",
    "partial_rotary_factor",
]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope"]), st.dictionaries(st.sampled_from(KEYS), SCALARS))
def test_whatever_the_parameters_frequencies_are_finite_or_refused(kind: str, parameters: dict[str, Any]) -> None:
    try:
        rope = Rope.from_config({"max_position_embeddings": 512, "rope_parameters": {"rope_type": kind, **parameters}}, 32)
    except ModelError:
        return
    for length in (1, 512, 513, 100_000):
        assert rope.frequencies(length).isfinite().all() and math.isfinite(rope.scale)
