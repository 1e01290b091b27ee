"""Prompts: what a caller gives, as the ids that the model is given, and the items among them.

Text, ids or messages; images and sounds are parts of messages. All that is slow runs in a worker thread. It refuses to
know how a prompt is answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from .errors import RequestError
from .families.base import Tower
from .item import Item, marked
from .media import TYPES, Media, read_part
from .text import Text

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's ids, those of items' rows above the vocabulary, and its items in order."""

    ids: list[int]
    items: tuple[Item, ...] = ()


async def encode(prompt: Prompt, text: Text, tower: Tower | None, vocabulary: int) -> Encoded:
    """Raises `RequestError` for a prompt that is malformed, empty, or has parts that the model cannot take."""
    if isinstance(prompt, str):
        found = Encoded(await anyio.to_thread.run_sync(text.encode, prompt))
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError(f"a prompt is text, a list of token ids or a list of messages, not {type(prompt).__name__}")
    elif all(isinstance(item, Mapping) for item in prompt):
        messages = [item for item in prompt if isinstance(item, Mapping)]
        found = await anyio.to_thread.run_sync(_chat, messages, text, tower, vocabulary)
    elif wrong := [item for item in prompt if not isinstance(item, int) or isinstance(item, bool)]:
        raise RequestError(f"a token id is a whole number, not {wrong[0]!r}")
    else:
        found = Encoded([item for item in prompt if isinstance(item, int)])
        if outside := [item for item in found.ids if not 0 <= item < vocabulary]:
            raise RequestError(f"token id {outside[0]} is out of range: this model has ids from 0 to {vocabulary - 1}")
    if not found.ids:
        raise RequestError("the prompt is empty: give at least one token")
    return found


def _chat(messages: Sequence[Mapping[str, Any]], text: Text, tower: Tower | None, vocabulary: int) -> Encoded:
    """A conversation; each image or sound is read, and stands in the template as a part that has nothing but its type."""
    media: list[Media] = []
    plain = [_without_media(message, tower, media) for message in messages]
    ids = text.chat(plain, () if tower is None else (tower.kind,))
    if not media or tower is None:
        return Encoded(ids)
    prepared = [tower.prepare(one.data) for one in media]
    rows = [tower.rows(one) for one in prepared]
    ids, firsts = tower.place(ids, rows)
    items = tuple(
        Item(one.digest, ready, first, count, tower.both_ways)
        for one, ready, first, count in zip(media, prepared, firsts, rows, strict=True)
    )
    return Encoded(marked(ids, items, vocabulary), items)


def _without_media(message: Mapping[str, Any], tower: Tower | None, media: list[Media]) -> Mapping[str, Any]:
    content = message.get("content")
    if tower is None or not isinstance(content, Sequence) or isinstance(content, str):
        return message
    parts = []
    for part in content:
        kind = TYPES.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if kind is not None and kind != tower.kind:
            raise RequestError(f"this model takes no {kind}: leave the part out, or choose a model that does")
        if kind is not None:
            media.append(read_part(part))
        parts.append(part if kind is None else {"type": kind})
    return {**message, "content": parts}
