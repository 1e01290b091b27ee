"""Gemma 3's eye: the SigLIP vision transformer, and the projector that makes its patches rows of the language model.

SigLIP (Zhai et al., 2023), Gemma 3 (Gemma Team, 2025). One image of one size is one item; pan-and-scan is not done. Knows
nothing of files and formats: an image is an array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ModelError, RequestError
from ..maths.layers import ACTIVATIONS, rms_norm_about_one
from .base import Angles, Need, Params, Step, Work, count, positive, prefix_of, section


@dataclass(frozen=True, slots=True)
class Pixels:
    """How an image becomes numbers: the side that it is resized to, Pillow's filter for that, and what its values become."""

    size: int
    resample: int | None
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], size: int) -> Pixels:
        """What `preprocessor_config.json` says, for a tower that takes images of `size`."""
        given = config.get("size") or {"height": size, "width": size}
        if given != {"height": size, "width": size}:
            raise ModelError(f"preprocessor_config.json: size must be that of config.json, {size} × {size}, found {given!r}")
        if config.get("do_pan_and_scan"):
            raise ModelError("preprocessor_config.json: do_pan_and_scan is not done here; set it to false")
        resample = config.get("resample", 2)
        if resample not in range(6):
            raise ModelError(f"preprocessor_config.json: resample must be one of Pillow's filters, 0 to 5, found {resample!r}")
        scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        if not isinstance(scale, int | float) or isinstance(scale, bool):
            raise ModelError(f"preprocessor_config.json: rescale_factor must be a number, found {scale!r}")
        moves = config.get("do_normalize", True)
        mean, deviation = (
            channels(config, key) if moves else flat for key, flat in (("image_mean", (0.0,) * 3), ("image_std", (1.0,) * 3))
        )
        if not all(deviation):
            raise ModelError(f"preprocessor_config.json: image_std must not be zero, found {deviation!r}")
        return cls(size, resample if config.get("do_resize", True) else None, float(scale), mean, deviation)

    def of(self, data: np.ndarray) -> np.ndarray:
        """An image uint8 [H, W, 3] as float32 [S, S, 3]."""
        if self.resample is not None:
            data = np.asarray(imaging().fromarray(data).resize((self.size, self.size), self.resample))
        if data.shape != (self.size, self.size, 3):
            raise RequestError(f"the image has shape {list(data.shape)}, this model takes {[self.size, self.size, 3]}: resize it")
        scaled = (data.astype(np.float64) * self.scale).astype(np.float32)
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)


class Siglip:
    """Sizes and steps of one tower: `config` is the model's `config.json`, `dtype` that of its weights, `names` what they are called.

    `preparation`: the model's `preprocessor_config.json`. `newlines`: the tokenizer's ids of one newline, of two in a row, and
    so on, as far as it has an id of their own for them; empty where an image is not set apart by newlines.
    Raises `ModelError` for sizes and settings that cannot be.
    """

    kind = "image"
    both_ways = True

    def __init__(
        self,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        names: Iterable[str],
        preparation: Mapping[str, Any] | None = None,
        newlines: Sequence[int] = (),
    ) -> None:
        own = section(config, "vision_config")
        self.hidden = count(own, "hidden_size", 768)
        self.intermediate = count(own, "intermediate_size", 3072)
        self.heads = count(own, "num_attention_heads", 12, most=65_536)
        layers = count(own, "num_hidden_layers", 12, most=4096)
        self.size = count(own, "image_size", 224, most=16_384)
        self.patch = count(own, "patch_size", 16, most=16_384)
        self.eps = positive(own, "layer_norm_eps", 1e-6)
        self.text_hidden = count(section(config, "text_config"), "hidden_size", 2304)
        act = own.get("hidden_act", "gelu_pytorch_tanh")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise ModelError(f"config.json: hidden_act {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[act]
        if self.hidden % self.heads:
            raise ModelError(f"config.json: hidden_size ({self.hidden}) must be a multiple of num_attention_heads ({self.heads})")
        if count(own, "num_channels", 3) != 3:
            raise ModelError(f"config.json: images have 3 channels here, num_channels is {own['num_channels']}")
        self.tokens = count(config, "mm_tokens_per_image", 256)
        self.side, kept = self.size // self.patch, math.isqrt(self.tokens)
        if not self.side or kept**2 != self.tokens or self.side % kept:
            raise ModelError(f"config.json: {self.side} × {self.side} patches cannot be pooled to mm_tokens_per_image ({self.tokens})")
        self.pool = self.side // kept
        self.image_id = count(config, "image_token_index", 262_144, most=1 << 30)
        self.ends = count(config, "boi_token_index", 255_999, most=1 << 30), count(config, "eoi_token_index", 256_000, most=1 << 30)
        self.newlines = tuple(newlines)
        self.dtype = dtype
        self.pixels = Pixels.read(preparation or {}, self.size)
        names = tuple(names)
        tower = prefix_of(names, "embeddings.patch_embedding.weight")
        self.steps: Sequence[Step] = (
            self._patches_step(tower),
            *(step for layer in range(layers) for step in self._layer_steps(layer, f"{tower}encoder.layers.{layer}")),
            self._project_step(tower, prefix_of(names, "mm_soft_emb_norm.weight")),
        )

    def prepare(self, data: np.ndarray) -> Tensor:
        """Pixels [1, 3, S, S]: resized by Pillow, rescaled and shifted as `preprocessor_config.json` says."""
        return torch.from_numpy(self.pixels.of(data)).permute(2, 0, 1)[None].contiguous()

    def rows(self, prepared: Tensor) -> int:
        """As many for each image."""
        return self.tokens

    def largest(self, rows: int) -> tuple[int, ...]:
        """All images are of one size."""
        return 1, 3, self.size, self.size

    def place(self, ids: Sequence[int], rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Each begin-of-image id becomes two newlines, itself, the image's rows, end-of-image and two newlines.

        Newlines beside these are counted together with them, so that the ids are those of the text with all of it written out.
        """
        ids, run = list(ids), [self.ends[0], *[self.image_id] * self.tokens, self.ends[1]]
        placed: list[int] = []
        firsts: list[int] = []
        at = 0
        while at < len(ids):
            if ids[at] != run[0]:
                placed.append(ids[at])
                at += 1
                continue
            written = ids[at : at + len(run)] == run
            breaks = [0, 0] if written else [2, 2]
            at += len(run) if written else 1
            while not written and placed and placed[-1] in self.newlines:
                breaks[0] += self.newlines.index(placed.pop()) + 1
            while not written and at < len(ids) and ids[at] in self.newlines:
                breaks[1] += self.newlines.index(ids[at]) + 1
                at += 1
            placed += self._breaks(breaks[0])
            firsts.append(len(placed) + 1)
            placed += [*run, *self._breaks(breaks[1])]
        if len(firsts) != len(rows) or placed.count(self.image_id) != len(rows) * self.tokens:
            raise RequestError(
                f"{len(rows)} images came with a prompt that has place for {len(firsts)}: each image takes one id {run[0]} "
                f"(or that id, {self.tokens} times {self.image_id}, and {run[-1]}), and {self.image_id} stands nowhere else"
            )
        return placed, firsts

    def activation_nbytes(self, prepared: Sequence[int]) -> int:
        """The largest of the steps: pixels and patches, attention, the MLP, or the last norm and what is pooled from it."""
        item, patches = self.dtype.itemsize, self.side**2
        cut = prepared[-1] * prepared[-2] * 3 * (4 + 2 * item) + 3 * patches * self.hidden * item
        layer = patches * item * max(10 * self.hidden, 4 * self.hidden + 2 * self.intermediate)
        last = 4 * patches * self.hidden * item + self.tokens * (12 * self.hidden + 2 * self.text_hidden * item)
        return max(cut, layer, last)

    def patches(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """Pixels [1, 3, S, S] to patches [T, hidden], with what the tower has learned of their places."""
        yield from ()
        side, p = self.side, self.patch
        x = x[0, :, : side * p, : side * p].to(w["patches"].dtype)
        x = x.reshape(3, side, p, side, p).permute(1, 3, 0, 2, 4).reshape(side**2, 3 * p * p)  # [T, 3 p p]
        return functional.linear(x, w["patches"].flatten(1), w["patches_bias"]) + w["positions"]

    def attention(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + attention(norm(x)), all patches with each other."""
        yield from ()
        h = functional.layer_norm(x, (self.hidden,), w["norm"], w["norm_bias"], self.eps)
        q, k, v = w.linear("qkv", h).view(x.shape[0], 3, self.heads, -1).permute(1, 2, 0, 3)[:, None]  # [1, H, T, D] each
        o = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(x.shape)
        return x + w.linear("o", o)

    def mlp(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + mlp(norm(x))."""
        yield from ()
        h = functional.layer_norm(x, (self.hidden,), w["norm"], w["norm_bias"], self.eps)
        return x + w.linear("down", self.act(w.linear("up", h)))

    def project(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """Patches [T, hidden] to rows [n, text hidden]: normed, averaged over squares, normed again as Gemma does, multiplied."""
        yield from ()
        x = functional.layer_norm(x, (self.hidden,), w["norm"], w["norm_bias"], self.eps)
        x = functional.avg_pool2d(x.T.reshape(1, self.hidden, self.side, self.side), self.pool)[0].flatten(1).T  # [n, hidden]
        return rms_norm_about_one(x, w["soft_norm"], self.eps) @ w["project"]

    def _patches_step(self, tower: str) -> Step:
        at = f"{tower}embeddings"
        params = {
            "patches": Need((self.hidden, 3, self.patch, self.patch), (f"{at}.patch_embedding.weight",)),
            "patches_bias": Need((self.hidden,), (f"{at}.patch_embedding.bias",)),
            "positions": Need((self.side**2, self.hidden), (f"{at}.position_embedding.weight",)),
        }
        return Step(-1, "patches", params, self.patches)

    def _layer_steps(self, layer: int, at: str) -> tuple[Step, Step]:
        attention = {
            **both("norm", f"{at}.layer_norm1", (self.hidden,)),
            "qkv": Need((3 * self.hidden, self.hidden), tuple(f"{at}.self_attn.{name}_proj.weight" for name in "qkv")),
            "qkv_bias": Need((3 * self.hidden,), tuple(f"{at}.self_attn.{name}_proj.bias" for name in "qkv")),
            **both("o", f"{at}.self_attn.out_proj", (self.hidden, self.hidden)),
        }
        mlp = {
            **both("norm", f"{at}.layer_norm2", (self.hidden,)),
            **both("up", f"{at}.mlp.fc1", (self.intermediate, self.hidden)),
            **both("down", f"{at}.mlp.fc2", (self.hidden, self.intermediate)),
        }
        return Step(layer, "attention", attention, self.attention), Step(layer, "mlp", mlp, self.mlp)

    def _project_step(self, tower: str, projector: str) -> Step:
        params = {
            **both("norm", f"{tower}post_layernorm", (self.hidden,)),
            "soft_norm": Need((self.hidden,), (f"{projector}mm_soft_emb_norm.weight",)),
            "project": Need((self.hidden, self.text_hidden), (f"{projector}mm_input_projection_weight",)),
        }
        return Step(-1, "project", params, self.project)

    def _breaks(self, count: int) -> list[int]:
        """Ids of `count` newlines in a row, the longest first."""
        most = len(self.newlines)
        return [self.newlines[-1]] * (count // most) + [self.newlines[count % most - 1]] * (count % most > 0) if most else []


def both(name: str, at: str, shape: tuple[int, ...]) -> dict[str, Need]:
    """A weight of `shape` and its bias."""
    return {name: Need(shape, (f"{at}.weight",)), f"{name}_bias": Need(shape[:1], (f"{at}.bias",))}


def channels(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Three numbers of `preprocessor_config.json`, one for each colour; one number stands for all."""
    value = config.get(key, 0.5)
    found = value if isinstance(value, list | tuple) else [value] * 3
    if len(found) != 3 or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in found):
        raise ModelError(f"preprocessor_config.json: {key} must be three numbers, found {value!r}")
    return tuple(float(each) for each in found)


def imaging() -> Any:
    """Pillow's `Image`; imported when the first image comes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ModelError("images are resized by Pillow, which is not installed: pip install 'aollm[images]'") from error
    return Image
