"""The mixture of experts that stands in the place of an MLP: a router, experts of which a row takes a few, and perhaps one
that all rows share.

Shazeer et al., 2017; Jiang et al., 2024 (Mixtral); the shared expert as in DeepSeekMoE (Dai et al., 2024) and Qwen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import ModelError
from .base import Angles, Experts, Mixed, Need, Params, Route, Step, Work, count, gated_mlp

Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What the router, the experts, and an expert's gate, up and down projections are called, within a layer."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sizes and names of one mixture. `renormalise`: gates sum to one. `shared`: width of the expert that all rows share, or 0."""

    hidden: int
    intermediate: int
    count: int
    top: int
    names: ExpertNames
    renormalise: bool
    shared: int = 0

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], names: ExpertNames, width: str, *, renormalise: bool, shared: int = 0
    ) -> Self:  # fmt: skip
        """Read the sizes; `width` is what `config.json` calls the experts' width."""
        number = "num_local_experts" if "num_local_experts" in config else "num_experts"
        experts, top = count(config, number, most=65_536), count(config, "num_experts_per_tok", 2, most=65_536)
        if top > experts:
            raise ModelError(f"config.json: num_experts_per_tok ({top}) must not be more than {number} ({experts})")
        return cls(count(config, "hidden_size"), count(config, width), experts, top, names, renormalise, shared)

    def step(self, layer: int, at: str, norm: Callable[[Tensor, Tensor], Tensor], act: Act) -> Step:
        """The step of layer `layer`, whose tensors' names begin with `at`; `norm(x, weight)` comes first."""

        def route(h: Tensor, weights: Params) -> tuple[Tensor, Tensor]:
            return choose(weights.linear("router", h), self.top, self.renormalise)

        def run(weights: Params, x: Tensor, angles: Angles) -> Work:
            h = norm(x, weights["norm"])
            yield Route(h, *route(h, weights))
            beside = x
            if self.shared:
                beside = x + gated_mlp(weights, h, act) * torch.sigmoid(weights.linear("shared_gate", h))
            mixed = yield Mixed()
            return beside + mixed

        params = {
            "norm": Need((self.hidden,), (f"{at}.post_attention_layernorm.weight",)),
            "router": Need((self.count, self.hidden), (f"{at}.{self.names.router}.weight",)),
        }
        if self.shared:
            names = ExpertNames().projections
            params |= self._projections(f"{at}.mlp.shared_expert", names, self.shared)
            params["shared_gate"] = Need((1, self.hidden), (f"{at}.mlp.shared_expert_gate.weight",))
        experts = Experts(
            self.count, self.top,
            lambda number: self._projections(f"{at}.{self.names.experts}.{number}", self.names.projections, self.intermediate),
            lambda rows, weights, number, beside: gated_mlp(weights, rows, act),
            lambda x, weights: route(norm(x, weights["norm"]), weights)[0],
        )  # fmt: skip
        return Step(layer, "mixture", params, run, experts=experts)

    def _projections(self, at: str, names: tuple[str, str, str], wide: int) -> dict[str, Need]:
        gate, up, down = (f"{at}.{name}.weight" for name in names)
        return {"gate_up": Need((2 * wide, self.hidden), (gate, up)), "down": Need((self.hidden, wide), (down,))}


def choose(logits: Tensor, top: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The `top` experts of each row of logits [T, E] and their shares of the softmax, both [T, top]."""
    gates, experts = logits.float().softmax(-1).topk(top, dim=-1)
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True)
    return experts, gates.to(logits.dtype)
