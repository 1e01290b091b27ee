"""The bytes of an image or a sound: of a path, a data URI or bytes. Nothing is fetched, and nothing that is no file is read."""

from __future__ import annotations

import base64
import os
import stat
import struct
import wave
import zlib
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from ..errors import RequestError

MOST_NBYTES = {"image": 64 << 20, "audio": 512 << 20}
REMOTE = ("http", "https", "ftp", "s3", "gs", "hf")

# What decoders raise for bytes that are not what they say; all that is known, since each has its own.
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError, AssertionError,
    MemoryError, Warning, struct.error, zlib.error, wave.Error,
)  # fmt: skip


def content(source: Any, kind: str, files: bool) -> bytes:
    """The bytes of `source`; `files` says whether it may name a file. Raises `RequestError` for what has none, or too many."""
    most = MOST_NBYTES[kind]
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, os.PathLike):
        data = read_file(os.fsdecode(source), most, files)
    elif not isinstance(source, str):
        raise RequestError(f"an {kind} is a path, bytes, a data URI or a numpy array, not {type(source).__name__}")
    elif source[:5].lower() == "data:":
        head, comma, text = source.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError(f"{short(source)} is no data URI that can be read; write it as data:{kind}/…;base64,…")
        data = decode(text, most)
    else:
        data = read_file(source, most, files)
    if not data:
        raise RequestError(f"the {kind} is empty, 0 bytes; send a whole file")
    if len(data) > most:
        raise RequestError(f"the {kind} is larger than the {most} bytes that are taken; make it smaller")
    return data


def decode(text: str, most: int) -> bytes:
    """The bytes of base64 text that may have line breaks."""
    if len(text) > most * 3 // 2:
        raise RequestError(f"the base64 text has {len(text)} characters, more than {most} bytes can have; make the file smaller")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        refuse("the base64 text cannot be decoded", error, "send standard base64 with its padding")


def read_file(name: str, most: int, files: bool) -> bytes:
    """The bytes of a regular file; where it has more than `most`, one more than that."""
    scheme, colon, rest = name.partition("://")
    if colon and scheme.lower() in REMOTE:
        raise RequestError(f"{short(name)} is not fetched; download it first, and give its path, its bytes or a data URI")
    if not files:
        raise RequestError(f"{short(name)} is no data URI, and no files of this machine are read for this request; send data:…;base64,…")
    path = unquote(rest.removeprefix("localhost")) if colon and scheme.lower() == "file" else name
    try:
        handle = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # else a pipe would wait for a writer
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if stat.S_ISREG(found.st_mode):
                return file.read(min(found.st_size, most) + 1)
    except (OSError, ValueError, RuntimeError) as error:
        refuse(f"{short(path)} cannot be read", error, "give the path of a file, or a data URI")
    raise RequestError(f"{short(path)} is a device or a pipe; give the path of a file")


def short(value: object) -> str:
    """As much of a value as a message can hold."""
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def refuse(what: str, error: BaseException, do: str) -> NoReturn:
    """Raise `RequestError` for a foreign `error`."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {str(error)[:200]}"
    raise RequestError(f"{what} ({why}); {do}") from error
