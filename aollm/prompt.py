"""Prompts: what a caller gives, as the ids that the model is given, and the items among them.

Text, ids or messages; images and sounds are parts of messages. All that is slow runs in a worker thread. It refuses to
know how a prompt is answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from torch import Tensor

from .errors import RequestError
from .families.base import Tower
from .item import Item, marked
from .media import TYPES, read_part
from .text import Text

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's ids, those of items' rows above the vocabulary, and its items in order."""

    ids: list[int]
    items: tuple[Item, ...] = ()

    @property
    def length(self) -> str:
        """How many tokens there are, and how many of them stand for images or sounds."""
        rows = sum(item.rows for item in self.items)
        return f"{len(self.ids)} tokens" + (f" ({rows} of them for images or sounds, of which it has {len(self.items)})" if rows else "")


async def encode(
    prompt: Prompt, text: Text, tower: Tower | None, vocabulary: int, one_at_a_time: anyio.CapacityLimiter
) -> Encoded:  # fmt: skip
    """Raises `RequestError` for a prompt that is malformed, empty, or has parts that the model cannot take."""
    if isinstance(prompt, str):
        found = Encoded(await anyio.to_thread.run_sync(text.encode, prompt))
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError(f"a prompt is text, a list of token ids or a list of messages, not {type(prompt).__name__}")
    elif all(isinstance(item, Mapping) for item in prompt):
        messages = [item for item in prompt if isinstance(item, Mapping)]
        found = await anyio.to_thread.run_sync(_chat, messages, text, tower, vocabulary, limiter=one_at_a_time)
    elif wrong := [item for item in prompt if not isinstance(item, int) or isinstance(item, bool)]:
        raise RequestError(f"a token id is a whole number, not {wrong[0]!r}")
    else:
        found = Encoded([item for item in prompt if isinstance(item, int)])
        if outside := [item for item in found.ids if not 0 <= item < vocabulary]:
            raise RequestError(f"token id {outside[0]} is out of range: this model has ids from 0 to {vocabulary - 1}")
    if not found.ids:
        raise RequestError("the prompt is empty: give at least one token")
    return found


@dataclass(frozen=True, slots=True)
class _Ready:
    """An image or a sound as its tower takes it."""

    digest: bytes
    prepared: Tensor


def _chat(messages: Sequence[Mapping[str, Any]], text: Text, tower: Tower | None, vocabulary: int) -> Encoded:
    """A conversation; each image or sound is read, and stands in the template as a part that has nothing but its type."""
    found: list[_Ready] = []
    plain = [_without_media(message, f"messages[{index}]", tower, found) for index, message in enumerate(messages)]
    ids = text.chat(plain, () if tower is None else (tower.kind,))
    if not found or tower is None:
        return Encoded(ids)
    rows = [tower.rows(one.prepared) for one in found]
    ids, firsts = tower.place(ids, rows)
    items = tuple(
        Item(one.digest, one.prepared, first, count, tower.both_ways) for one, first, count in zip(found, firsts, rows, strict=True)
    )
    return Encoded(marked(ids, items, vocabulary), items)


def _without_media(message: Mapping[str, Any], where: str, tower: Tower | None, found: list[_Ready]) -> Mapping[str, Any]:
    """The message with its images or sounds taken out and added to `found`; what was read of each goes before the next is read."""
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return message
    parts = []
    for number, part in enumerate(content):
        kind = TYPES.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if kind is not None:
            try:
                found.append(_ready(part, kind, tower))
            except RequestError as error:
                raise RequestError(f"{where}.content[{number}]: {error}") from error
        parts.append(part if kind is None else {"type": kind})
    return {**message, "content": parts}


def _ready(part: Mapping[str, Any], kind: str, tower: Tower | None) -> _Ready:
    if tower is None or kind != tower.kind:
        takes = "text alone" if tower is None else f"text and {tower.kind}"
        raise RequestError(f"this model takes {takes} as it was opened, and no {kind}: leave the part out, or open one that does")
    media = read_part(part)
    return _Ready(media.digest, tower.prepare(media.data))
