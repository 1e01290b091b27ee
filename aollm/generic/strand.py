"""One answer as transformers sees it: its ids so far, and what its model is called with next, cache and all.

`generate` prepares the first call; each family's own code prepares the others, so that whatever a family keeps between calls
is carried on. All of it runs in the compute thread.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""What families call their caches."""
BY_POSITION = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""What is given for each token of a prompt, and cut as the prompt is."""

MANY = 1 << 20
"""Tokens that `generate` is told may come; none are made by it."""


class Strand:
    """Ids [1, T] and keyword arguments; `fed` of the ids are in the cache."""

    def __init__(self, ids: Tensor, arguments: dict[str, Any], cut: bool) -> None:
        self.ids, self.arguments = ids, arguments
        self.cut = cut
        """Whether its prompt may be fed in parts."""
        self.fed = 0
        self.prompted = False

    @classmethod
    def begin(cls, model: Any, prompt: Sequence[int], inputs: Mapping[str, Tensor] | None) -> Strand:
        """A strand for `prompt`; encoders of text and images run now. `inputs`: what a processor made beside the ids."""
        ids = torch.tensor([list(prompt)])
        given = {"attention_mask": torch.ones_like(ids), **(inputs or {}), "input_ids": ids}
        made: list[Strand] = []

        def take(caller: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                arguments.pop(name)
            cut = inputs is None and not model.config.is_encoder_decoder and not model._is_stateful
            made.append(cls(input_ids, arguments, cut and isinstance(arguments.get("past_key_values"), Cache)))
            return input_ids

        model.generate(**given, max_length=ids.shape[1] + MANY, do_sample=False, use_cache=True, custom_generate=take)
        return made[0]

    @property
    def waiting(self) -> int:
        """Ids that are not yet in the cache."""
        return self.ids.shape[1] - self.fed

    def feed(self, model: Any, rows: int | None) -> Tensor | None:
        """One forward, of at most `rows` ids of a prompt that may be cut; the logits [vocabulary] of the last id, or None while
        others wait."""
        count = min(self.waiting, rows) if self.cut and rows is not None else self.waiting
        end, arguments = self.fed + count, self.arguments
        if end < self.ids.shape[1]:
            arguments = {name: _cut(value, end) if name in BY_POSITION else value for name, value in arguments.items()}
        begun = self.prompted or any(arguments.get(name) is not None for name in CACHES)
        called = model.prepare_inputs_for_generation(
            self.ids[:, :end], next_sequence_length=count if begun else None, is_first_iteration=not self.prompted, **arguments
        )
        out = model(**called, return_dict=True)
        self.fed = end
        if end < self.ids.shape[1]:
            self.arguments["past_key_values"] = out.past_key_values
            return None
        self.prompted = True
        self.arguments = model._update_model_kwargs_for_generation(out, self.arguments, is_encoder_decoder=model.config.is_encoder_decoder)
        logits: Tensor = out.logits[0, -1]
        return logits.clone()  # not a view that keeps the others

    def extend(self, token_id: int) -> None:
        """Go on with this id."""
        self.ids = torch.cat((self.ids, self.ids.new_tensor([[token_id]])), 1)

    def fork(self) -> Strand:
        """Another strand that goes on from here."""
        twin = Strand(self.ids, dict(self.arguments), self.cut)
        twin.arguments |= {name: copy.deepcopy(self.arguments[name]) for name in CACHES if self.arguments.get(name) is not None}
        twin.fed, twin.prompted = self.fed, self.prompted
        return twin

    def __repr__(self) -> str:
        return f"<Strand {self.fed} of {self.ids.shape[1]} ids fed>"


def _cut(value: Any, end: int) -> Any:
    return value[..., :end] if isinstance(value, Tensor) else value
