"""The commands of `aollm`, one module each, with a `main(terminal, options)` that returns the exit code.

`options` are those that were given, by the names of the settings. Settings are imported when they are read, and torch with
them: a command that has none is answered at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RequestError
from ..options import known

if TYPE_CHECKING:
    from ..settings import GenerationConfig, RuntimeConfig


def runtime_config(options: Mapping[str, Any]) -> RuntimeConfig:
    """The runtime's settings among `options`, and those that are configured. Raises `ConfigError`."""
    from ..settings import RuntimeConfig

    given = {name: value for name, value in options.items() if name in RuntimeConfig.model_fields}
    try:
        return RuntimeConfig.of(options.get("model"), given)
    except ConfigError as error:
        raise ConfigError(f"{error}{_meant(options, str(error))}") from None


def generation_config(options: Mapping[str, Any]) -> GenerationConfig:
    """The answer's settings among `options`, and those that are configured.

    Raises `ConfigError`: they were typed, so a wrong one is bad use.
    """
    from ..settings import GenerationConfig

    try:
        config = GenerationConfig.of(None, {name: value for name, value in options.items() if name in GenerationConfig.model_fields})
        _ = config.sampling  # has ranges of its own
    except RequestError as error:
        raise ConfigError(f"{error}{_meant(options, str(error))}") from None
    return config


def _meant(options: Mapping[str, Any], problem: str) -> str:
    """The word that is nearest to the one that `problem` is about."""
    for name, value in options.items():
        option = known(name) if f"{name}: " in problem else None
        if option is not None and value not in option.words and (near := difflib.get_close_matches(str(value), option.words, 1)):
            return f"; did you mean {near[0]}?"
    return ""
