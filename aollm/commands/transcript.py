"""A transcript: a conversation as a JSON file, `{"model": ..., "messages": [{"role": ..., "content": ...}]}`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ..errors import RequestError

Message = dict[str, str]


def save(path: Path, model: str, messages: list[Message]) -> None:
    """Write all of it or nothing: a new file takes the place of the old one when it is whole. Raises `RequestError`."""
    text = json.dumps({"model": model, "messages": messages}, ensure_ascii=False, indent=2) + "\n"
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


def load(path: Path) -> list[Message]:
    """The messages in `path`. Raises `RequestError` where it holds anything else."""
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
    return kept
