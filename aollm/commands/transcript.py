"""A transcript: a conversation as a JSON file, with the model and the settings of the KV cache that it was held with.

`{"model": ..., "settings": {...}, "messages": [{"role": ..., "content": ...}]}`; a file with messages alone is one too.
It refuses to know what the settings mean.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Transcript:
    """`model` as it was named, None where the file does not say; `settings` texts and numbers by name."""

    model: str | None
    messages: list[Message]
    settings: dict[str, str | int] = field(default_factory=dict)


def save(path: Path, model: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, str | int]) -> None:
    """Write all of it or nothing: a new file takes the place of the old one when it is whole. Raises `RequestError`."""
    told = {"model": model, "settings": dict(settings), "messages": list(messages)}
    text = json.dumps(told, ensure_ascii=False, indent=2) + "\n"
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RequestError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def load(path: Path) -> Transcript:
    """The transcript in `path`. Raises `RequestError` where it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError(f'{path} is no transcript: it takes {{"messages": [{{"role": ..., "content": ...}}]}}')
    kept = [{name: message.get(name) for name in ("role", "content")} for message in messages]
    if not all(isinstance(value, str) for message in kept for value in message.values()):
        raise RequestError(f"{path} is no transcript: each message takes a role and a content, both text")
    model, settings = (found.get("model"), found.get("settings")) if isinstance(found, dict) else (None, None)
    plain = {name: value for name, value in settings.items() if type(value) in (str, int)} if isinstance(settings, dict) else {}
    return Transcript(model if isinstance(model, str) else None, kept, plain)
