"""Draws for the answers whose input a pass has ended. All of it runs in the compute thread."""

from __future__ import annotations

from torch import Tensor

from .batch import Batch, Segment
from .compute import FOREIGN
from .errors import AollmError, ModelError
from .request import Answer
from .sampling import Draw


def drawing(answer: Answer) -> list[Answer]:
    """Who samples from an answer's logits: itself, and after the prompt all its siblings."""
    return [answer] if answer.produced else answer.request.answers


def sample(batch: Batch, logits: Tensor) -> list[list[Draw] | AollmError]:
    """For each segment whose input ended a draw for each of its answers, or why there is none. Runs in the compute thread."""
    ends = [segment for segment in batch.segments if segment.ends_input]
    return [[] if segment.missed is not None else _draw(segment, row) for segment, row in zip(ends, logits, strict=True)]


def _draw(segment: Segment, row: Tensor) -> list[Draw] | AollmError:
    try:
        return [choice.sampler.draw(row, choice.history) for choice in drawing(segment.answer)]
    except AollmError as error:  # such as logits that are not numbers: the others are not affected
        return error
    except FOREIGN as error:
        return ModelError(f"no token could be drawn: {error}")
