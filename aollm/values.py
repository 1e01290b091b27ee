"""The kinds of values that settings take: a size, a path, a device, several texts or numbers; each read from what people write."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def nbytes(value: object) -> int:
    """Bytes from a whole number or a text such as `"3GiB"` or `"800 MB"`; `ValueError` says what is accepted."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", str(value).lower())
    if found is None or found[2] not in UNITS or not (count := int(float(found[1]) * UNITS[found[2]])):
        raise ValueError(f"a size such as '3GiB', '800MB' or a positive number of bytes, not {value!r}")
    return count


def _path(value: object, what: str) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"the path of a {what}, not {value!r}")
    return Path(os.path.abspath(os.path.expanduser(value)))


def _device(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError(f"auto, cpu, cuda or cuda:N, not {value!r}")
    return value


def _texts(value: object) -> object:
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"a text or a list of texts, not {value!r}")
    return tuple(value)


def _numbers(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", value):
            raise ValueError(f"whole numbers such as 32,128,512, not {value!r}")
        return tuple(int(number) for number in value.split(","))
    if not isinstance(value, list | tuple):
        raise ValueError(f"a list of whole numbers, or a text such as 32,128,512, not {value!r}")
    return tuple(value)


Size = Annotated[int, BeforeValidator(nbytes)]
Folder = Annotated[Path, BeforeValidator(lambda value: _path(value, "folder"))]
"""Absolute; `~` is the home folder."""
File = Annotated[Path, BeforeValidator(lambda value: _path(value, "file"))]
Device = Annotated[str, BeforeValidator(_device)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...], BeforeValidator(_texts)]
"""A list of texts, one text, or None for no text."""
Numbers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_numbers)]
"""A list of whole numbers, or a text as a command line has them: `32,128,512`."""
