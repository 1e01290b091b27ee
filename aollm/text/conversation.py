"""Conversations as callers give them, checked and rebuilt from plain JSON types. Knows no template and no tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import RequestError

MESSAGE_DEPTH = 32


def plain_messages(messages: object, kinds: Collection[str]) -> list[dict[str, Any]]:
    """Copies of `messages` made of plain JSON types, or `RequestError`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError('messages takes a list of at least one {"role": ..., "content": ...}')
    return [plain_message(message, index, kinds) for index, message in enumerate(messages)]


def plain_message(message: object, index: int, kinds: Collection[str]) -> dict[str, Any]:
    """A copy of `message` made of plain JSON types, its role and content checked; parts may be text or of `kinds`."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f'{where} is a {type(message).__name__}: give {{"role": ..., "content": ...}}')
    plain: dict[str, Any] = plain_value({name: value for name, value in message.items() if value is not None}, where, 0)
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise RequestError(f"{where}.role takes a text such as user, assistant or system")
    content = plain.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in kinds:
                continue
            if isinstance(kind, str) and kind != "text":
                known = " and ".join(("text", *kinds)) if kinds else "text only"
                raise RequestError(f"{where}.content[{number}] is of type {kind[:40]!r}: this model takes {known}")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f'{where}.content[{number}] takes {{"type": "text", "text": ...}}')
    elif not isinstance(content, str):
        raise RequestError(f'{where}.content takes a text or a list of parts {{"type": "text", "text": ...}}')
    return plain


def plain_value(value: object, where: str, depth: int) -> Any:
    """`value` rebuilt from str, int, float, bool, None, list and dict: a template sees nothing that has methods of its own."""
    if depth > MESSAGE_DEPTH:
        raise RequestError(f"{where} is nested more than {MESSAGE_DEPTH} deep")
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {str.__str__(name): plain_value(item, where, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}: give JSON values only")
