"""What is said of settings besides by the caller: in variables of the environment, and in a file, `aollm.toml`.

The file is read each time, and nothing is remembered. Which settings there are, and what they accept, is what `settings` knows;
here they are names in sections, and values with the place where they stand. It imports nothing heavy until something was said.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from .errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

FILE, PREFIX, BETWEEN = "aollm.toml", "AOLLM_", "__"
NAMED_BY = f"{PREFIX}CONFIG_FILE"
"""The variable that names another file; that one has to be there."""
SECTIONS = ("runtime", "generation", "server", "benchmark")
NOTHING = ("", "none", "null")

Known = Mapping[str, Collection[str]]
"""The settings of each section."""


@dataclass(frozen=True, slots=True)
class Said:
    """A setting's value, and its source: `default`, `AOLLM_RUNTIME__MEMORY`, `aollm.toml: /home/me/aollm.toml`, `--memory`.

    `text`: it stands in the environment, and is yet to be read as what the setting takes.
    """

    section: str
    name: str
    value: Any
    source: str
    text: bool = False


def read() -> Iterator[Said]:
    """All that the file says, then all that the environment does, whether there are such settings or not; the later goes first.

    Raises `ConfigError` for a file that cannot be read or is not TOML, with the line.
    """
    path = file()
    ours = [name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() != NAMED_BY]
    if path is None and not ours:
        return
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, TomlConfigSettingsSource  # takes 0.2 s

    class Sections(BaseSettings):
        model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter=BETWEEN)
        runtime: dict[str, Any] = {}
        generation: dict[str, Any] = {}
        server: dict[str, Any] = {}
        benchmark: dict[str, Any] = {}

    if path is not None:
        try:
            tables = TomlConfigSettingsSource(Sections, path).toml_data
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not TOML: {_told(error, path)}") from None
        yield from _of_file(path, tables)
    whole = tuple(f"{PREFIX}{section}{BETWEEN}".upper() for section in SECTIONS)
    for variable in ours:
        if not variable.upper().startswith(whole):
            yield Said("", variable[len(PREFIX) :].lower(), os.environ[variable], variable.upper(), True)
    well_formed = [name for name in ours if name.upper().startswith(whole)]
    for section, values in EnvSettingsSource(Sections)().items() if well_formed else ():
        for name, value in values.items():
            yield Said(section, name, value, _variable(section, name), True)


def section(name: str, settings: type[BaseModel], known: Known) -> dict[str, Said]:
    """What is said of the `settings` of one section. Raises `ConfigError` for names that are not `known`, in any section, and for
    text of the environment that the setting cannot be read from."""
    found: dict[str, Said] = {}
    for said in read():
        _check(said, known)
        if said.section == name:
            value = said if not said.text else _parsed(settings.model_fields[said.name], said)
            found.pop(said.name, None)
            if value is not None:
                found[said.name] = value
    return found


def quiet() -> bool:
    """Whether `quiet` is said; for who wants to know before all settings are loaded. What is wrong besides is told later."""
    said = {said.name: said.value for said in read() if said.section == "runtime"}
    if "quiet" not in said:
        return False
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(bool).validate_python(said["quiet"])
    except ValidationError:
        return False


def file() -> Path | None:
    """The file that is read: the one that `AOLLM_CONFIG_FILE` names, or `aollm.toml` in the working folder; None if there is none.

    Raises `ConfigError` for one that is named and missing, or no file.
    """
    named = os.environ.get(NAMED_BY)
    path = Path(named or FILE).expanduser()
    try:
        if path.is_file():
            return Path(os.path.abspath(path))
        missing = not path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if named or not missing:
        begin = f"{NAMED_BY}: " if named else ""
        raise ConfigError(f"{begin}{path} is {'missing' if missing else 'not a file'}; name a TOML file, or take it away")
    return None


def _told(error: ValueError | RecursionError, file: Path) -> str:
    """Why a file is not TOML, always with a line."""
    if isinstance(error, RecursionError):
        return "values are nested too deep"
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"it is not UTF-8 (at line {line})"
    return str(error).replace("at end of document", f"at line {len(file.read_bytes().splitlines())}, the end of the file")


def _of_file(file: Path, tables: Mapping[str, Any]) -> Iterator[Said]:
    source = f"{FILE}: {file}"
    for section, values in tables.items():
        if section not in SECTIONS:
            yield Said("", section, values, source)
        elif not isinstance(values, dict):
            raise ConfigError(f"{section}: a section with settings, [{section}], not {values!r} (from {source})")
        else:
            yield from (Said(section, name, value, source) for name, value in values.items())


def _variable(section: str, name: str) -> str:
    return f"{PREFIX}{section}{BETWEEN}{name}".upper()


def _check(said: Said, known: Known) -> None:
    """Raises `ConfigError`, with the nearest name, for what is not a setting."""
    if said.name in known.get(said.section, ()):
        return
    if said.section and not known[said.section]:
        raise ConfigError(f"{said.section}: this section has no settings yet; take {said.name} out (from {said.source})")
    if said.text:
        where, what = "", f"{said.source} is not a setting"
    else:
        where, what = f" (from {said.source})", f"{said.name} is not a " + (f"setting of [{said.section}]" if said.section else "section")
        if not said.section and (near := difflib.get_close_matches(said.name, SECTIONS, 1)):
            raise ConfigError(f"{what}; did you mean [{near[0]}]?{where}")
    if found := _nearest(said.section, said.name, known):
        offered = _variable(*found) if said.text else f"{found[1]} in [{found[0]}]" if found[0] != said.section else found[1]
        raise ConfigError(f"{what}; did you mean {offered}?{where}")
    if said.section:
        raise ConfigError(f"{what}; there are {', '.join(known[said.section])}{where}")
    form = f"write {PREFIX}SECTION{BETWEEN}SETTING" if said.text else "write settings below their section"
    raise ConfigError(f"{what}; {form}, with one of the sections {', '.join(SECTIONS)}{where}")


def _nearest(section: str, name: str, known: Known) -> tuple[str, str] | None:
    """The setting that was probably meant: of the same name in another section, or else of a similar one, best in this section."""
    if not section:  # a variable with too few underscores
        section = next((each for each in SECTIONS if name.startswith(f"{each}_")), "")
        name = name.removeprefix(f"{section}_").strip("_") if section else name
    order = sorted(known, key=lambda each: each != section)
    for each in order:
        if name in known[each]:
            return each, name
    for each in order:
        if near := difflib.get_close_matches(name, known[each], 1):
            return each, near[0]
    return None


def _parsed(field: FieldInfo, said: Said) -> Said | None:
    """The same with the value that its text stands for; None for an empty text where there has to be a value.

    Raises `ConfigError` with what is accepted.
    """
    from pydantic import TypeAdapter, ValidationError

    kinds = {field.annotation, *get_args(field.annotation)}
    value = said.value
    if isinstance(value, str) and value.strip().lower() in NOTHING:
        if NoneType in kinds:
            return replace(said, value=None, text=False)
        if not value.strip():
            return None
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") and not kinds <= {str, NoneType}:
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a text may well begin so
    try:
        return replace(said, value=TypeAdapter(field.rebuild_annotation()).validate_python(value), text=False)
    except ValidationError as error:
        told = "; ".join(problem["msg"].removeprefix("Value error, ").removeprefix("Input ") for problem in error.errors())
        raise ConfigError(f"{said.name}: {told} (from {said.source}={said.value!r})") from None
