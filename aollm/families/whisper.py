"""Voxtral's ear: the Whisper encoder, and the projector that makes four of its frames one row of the language model.

Whisper (Radford et al., 2022), Voxtral (Mistral AI, 2025). A sound is cut into chunks of 30 s, the last one filled up with
silence; a chunk never hears another. Knows nothing of files and formats: a sound is an array of samples, 16,000 a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ModelError, RequestError
from ..maths.layers import ACTIVATIONS
from .base import Angles, Need, Params, Step, Work, count, prefix_of, section

RATE_HZ, WINDOW, HOP = 16_000, 400, 160
LONGEST_S = 40 * 60  # what Voxtral was made for
EPS = 1e-5


class Whisper:
    """Sizes and steps of one tower: `config` is the model's `config.json`, `dtype` that of its weights, `names` what they are called.

    `preparation`: the model's `preprocessor_config.json`. `begin_id` is put before each sound that has none; None for nothing.
    Raises `ModelError` for sizes and settings that cannot be.
    """

    kind = "audio"
    both_ways = False

    def __init__(
        self,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        names: Iterable[str],
        preparation: Mapping[str, Any] | None = None,
        begin_id: int | None = None,
    ) -> None:
        own = section(config, "audio_config")
        self.hidden = count(own, "hidden_size", 1280)
        self.intermediate = count(own, "intermediate_size", 5120)
        self.heads = count(own, "num_attention_heads", 20, most=65_536)
        layers = count(own, "num_hidden_layers", 32, most=4096)
        self.mels = count(own, "num_mel_bins", 128, most=65_536)
        self.positions = count(own, "max_source_positions", 1500, most=1 << 20)
        self.text_hidden = count(section(config, "text_config"), "hidden_size", 3072)
        self.act, self.projector_act = activation(own, "activation_function"), activation(config, "projector_hidden_act")
        if self.hidden % self.heads:
            raise ModelError(f"config.json: hidden_size ({self.hidden}) must be a multiple of num_attention_heads ({self.heads})")
        if self.positions * self.hidden % self.intermediate:
            raise ModelError(
                f"config.json: {self.positions} frames of {self.hidden} numbers cannot be cut into rows of {self.intermediate}"
            )
        self.tokens = self.positions * self.hidden // self.intermediate
        self.audio_id = count(config, "audio_token_id", 24, most=1 << 30)
        self.begin_id = begin_id
        self.dtype = dtype
        fixed = {
            "feature_size": self.mels,
            "hop_length": HOP,
            "n_fft": WINDOW,
            "sampling_rate": RATE_HZ,
            "padding_value": 0.0,
            "dither": 0.0,
        }
        for key, value in fixed.items():
            if (found := (preparation or {}).get(key, value)) != value:
                raise ModelError(f"preprocessor_config.json: {key} must be {value}, found {found!r}")
        names = tuple(names)
        tower, projector = prefix_of(names, "conv1.weight"), prefix_of(names, "linear_1.weight")
        self.steps: Sequence[Step] = (
            self._frames_step(tower),
            *(step for layer in range(layers) for step in self._layer_steps(layer, f"{tower}layers.{layer}")),
            self._project_step(tower, projector),
        )

    def prepare(self, data: np.ndarray) -> Tensor:
        """Log-mel energies [chunks, mel, frames], as the feature extractor of Whisper has them: the loudest of all sets the floor."""
        size = 2 * self.positions * HOP
        if len(data) > LONGEST_S * RATE_HZ:
            raise RequestError(f"the sound is {len(data) / RATE_HZ:.0f} s long, {LONGEST_S} s are taken at most; cut it into parts")
        chunks = max(1, -(-len(data) // size))
        sound = torch.zeros(1, chunks * size)
        sound[0, : len(data)] = torch.from_numpy(np.ascontiguousarray(data, np.float32))
        sound = functional.pad(sound, (WINDOW // 2, WINDOW // 2), mode="reflect")[0]
        window, filters = torch.hann_window(WINDOW), mel_filters(self.mels)
        mel = torch.empty(chunks, self.mels, 2 * self.positions)
        for chunk in range(chunks):
            part = sound[chunk * size : (chunk + 1) * size + WINDOW - HOP]
            power = torch.stft(part, WINDOW, HOP, window=window, center=False, return_complex=True).abs().square()  # [F, frames]
            torch.mm(filters, power, out=mel[chunk])
        mel.clamp_(min=1e-10).log10_()
        return mel.clamp_(min=float(mel.max()) - 8.0).add_(4.0).div_(4.0)

    def rows(self, prepared: Tensor) -> int:
        """As many for each chunk."""
        return prepared.shape[0] * self.tokens

    def largest(self, rows: int) -> tuple[int, ...]:
        """As many chunks as make that many rows, or as the longest sound has."""
        longest = -(-LONGEST_S * RATE_HZ // (2 * self.positions * HOP))
        return min(max(1, rows // self.tokens), longest), self.mels, 2 * self.positions

    def place(self, ids: Sequence[int], rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Each audio id becomes as many as its sound has rows, with the begin id before them."""
        ids = list(ids)
        placed: list[int] = []
        firsts: list[int] = []
        at = 0
        while at < len(ids):
            if ids[at] != self.audio_id:
                placed.append(ids[at])
                at += 1
                continue
            if len(firsts) == len(rows):
                break
            count = rows[len(firsts)]
            at += count if ids[at : at + count] == [self.audio_id] * count else 1
            if self.begin_id is not None and placed[-1:] != [self.begin_id]:
                placed.append(self.begin_id)
            firsts.append(len(placed))
            placed += [self.audio_id] * count
        if at < len(ids) or len(firsts) < len(rows):
            found = f"{len(firsts)}" if at == len(ids) else f"more than {len(firsts)}"
            raise RequestError(
                f"{len(rows)} sounds came with a prompt that has place for {found}: each sound takes one id {self.audio_id}, "
                "or as many as it has rows"
            )
        return placed, firsts

    def activation_nbytes(self, prepared: Sequence[int]) -> int:
        """What goes in and comes out, for all chunks, and the largest of the steps for one."""
        item, (chunks, mels, frames) = self.dtype.itemsize, prepared
        one = self.positions * self.hidden * item
        ends = max(4 * chunks * mels * frames + chunks * one, 2 * chunks * one, chunks * (one + self.tokens * self.text_hidden * item))
        first = mels * frames * item + 5 * self.hidden * frames * item + self.positions * self.hidden * 8
        layer = self.positions * item * max(9 * self.hidden, 3 * self.hidden + 2 * self.intermediate)
        last = 2 * one + 6 * self.tokens * self.text_hidden * item
        return ends + max(first, layer, last)

    def frames(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """Log-mel [chunks, mel, frames] to frames [chunks · T, hidden], half as many, with their places in the chunk."""
        yield from ()

        def one(mel: Tensor) -> Tensor:
            h = functional.gelu(functional.conv1d(mel.to(w["first"].dtype), w["first"], w["first_bias"], padding=1))
            h = functional.gelu(functional.conv1d(h, w["second"], w["second_bias"], stride=2, padding=1))[0].T  # [T, hidden]
            return (h + w["positions"]).to(h.dtype)

        return by_chunk(one, x, 1)

    def attention(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + attention(norm(x)), the frames of a chunk with each other."""
        yield from ()

        def one(x: Tensor) -> Tensor:
            h = functional.layer_norm(x, (self.hidden,), w["norm"], w["norm_bias"], EPS)
            q, v = w.linear("qv", h).view(x.shape[0], 2, self.heads, -1).permute(1, 2, 0, 3)[:, None]  # [1, H, T, D] each
            k = w.linear("k", h).view(x.shape[0], self.heads, -1).transpose(0, 1)[None]
            o = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(x.shape)
            return x + w.linear("o", o)

        return by_chunk(one, x, self.positions)

    def mlp(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + mlp(norm(x))."""
        yield from ()

        def one(x: Tensor) -> Tensor:
            h = functional.layer_norm(x, (self.hidden,), w["norm"], w["norm_bias"], EPS)
            x = x + w.linear("down", self.act(w.linear("up", h)))
            most = torch.finfo(x.dtype).max - 1000
            return x.clamp_(-most, most) if x.dtype == torch.float16 else x  # Whisper's residuals outgrow float16

        return by_chunk(one, x, self.positions)

    def project(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """Frames [chunks · T, hidden] to rows [n, text hidden]: normed, taken several at a time, through two products."""
        yield from ()

        def one(x: Tensor) -> Tensor:
            h = functional.layer_norm(x, (self.hidden,), w["norm"], w["norm_bias"], EPS).view(-1, self.intermediate)
            return w.linear("out", self.projector_act(w.linear("in", h)))

        return by_chunk(one, x, self.positions)

    def _frames_step(self, at: str) -> Step:
        params = {
            "first": Need((self.hidden, self.mels, 3), (f"{at}conv1.weight",)),
            "first_bias": Need((self.hidden,), (f"{at}conv1.bias",)),
            "second": Need((self.hidden, self.hidden, 3), (f"{at}conv2.weight",)),
            "second_bias": Need((self.hidden,), (f"{at}conv2.bias",)),
            "positions": Need((self.positions, self.hidden), (f"{at}embed_positions.weight",), torch.float32),
        }
        return Step(-1, "frames", params, self.frames)

    def _layer_steps(self, layer: int, at: str) -> tuple[Step, Step]:
        wide, own = (self.hidden,), f"{at}.self_attn"
        attention = {
            "norm": Need(wide, (f"{at}.self_attn_layer_norm.weight",)),
            "norm_bias": Need(wide, (f"{at}.self_attn_layer_norm.bias",)),
            "qv": Need((2 * self.hidden, self.hidden), (f"{own}.q_proj.weight", f"{own}.v_proj.weight")),
            "qv_bias": Need((2 * self.hidden,), (f"{own}.q_proj.bias", f"{own}.v_proj.bias")),
            "k": Need((self.hidden, self.hidden), (f"{own}.k_proj.weight",)),
            "o": Need((self.hidden, self.hidden), (f"{own}.out_proj.weight",)),
            "o_bias": Need(wide, (f"{own}.out_proj.bias",)),
        }
        mlp = {
            "norm": Need(wide, (f"{at}.final_layer_norm.weight",)),
            "norm_bias": Need(wide, (f"{at}.final_layer_norm.bias",)),
            "up": Need((self.intermediate, self.hidden), (f"{at}.fc1.weight",)),
            "up_bias": Need((self.intermediate,), (f"{at}.fc1.bias",)),
            "down": Need((self.hidden, self.intermediate), (f"{at}.fc2.weight",)),
            "down_bias": Need(wide, (f"{at}.fc2.bias",)),
        }
        return Step(layer, "attention", attention, self.attention), Step(layer, "mlp", mlp, self.mlp)

    def _project_step(self, at: str, projector: str) -> Step:
        params = {
            "norm": Need((self.hidden,), (f"{at}layer_norm.weight",)),
            "norm_bias": Need((self.hidden,), (f"{at}layer_norm.bias",)),
            "in": Need((self.text_hidden, self.intermediate), (f"{projector}linear_1.weight",)),
            "out": Need((self.text_hidden, self.text_hidden), (f"{projector}linear_2.weight",)),
        }
        return Step(-1, "project", params, self.project)


def activation(config: Mapping[str, Any], key: str) -> Callable[[Tensor], Tensor]:
    """The activation that `config.json` names."""
    name = config.get(key, "gelu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(f"config.json: {key} {name!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def by_chunk(run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """What `run` makes of each `size` of x, one behind the other; only one chunk's intermediate results are ever in memory."""
    count = x.shape[0] // size
    if count == 1:
        return run(x)
    parts = x.chunk(count)
    y = run(parts[0])
    rows = y.shape[0]
    out = y.new_empty(count * rows, *y.shape[1:])
    out[:rows] = y
    del y  # before the next chunk needs its room
    for at in range(1, count):
        out[at * rows : (at + 1) * rows] = run(parts[at])
    return out


def mel_filters(count: int) -> Tensor:
    """Triangles [count, frequencies] of equal area, their corners evenly spaced in mels from 0 to 8,000 Hz.

    The scale is Slaney's (Auditory Toolbox, 1998): linear up to 1,000 Hz, which is 15 mels, logarithmic above.
    """
    top_hz, step = RATE_HZ / 2, np.log(6.4) / 27
    mels = np.linspace(0.0, 15 + np.log(top_hz / 1000) / step, count + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))[:, None]  # [count + 2, 1], Hz
    slopes = (np.linspace(0, top_hz, WINDOW // 2 + 1) - corners[:-1]) / np.diff(corners, axis=0)
    triangles = np.maximum(0, np.minimum(slopes[:-1], 1 - slopes[1:]))
    return torch.from_numpy(triangles * 2 / (corners[2:] - corners[:-2])).float()
