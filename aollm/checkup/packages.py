"""Packages: which are installed, against what aollm asks for. It imports none of them, so that it can tell when some are missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from .check import Check

REQUIREMENT = re.compile(r"(?P<name>[\w.\-]+)>=(?P<least>\d+(\.\d+)*)\s*(;(?P<marker>.*))?")
EXTRA, PLATFORM = re.compile(r"extra == ['\"]([\w\-]+)['\"]"), re.compile(r"sys_platform == ['\"](\w+)['\"]")
EXTRAS = {
    "generic": "transformers' tier for models larger than memory",
    "gds": "reads straight into a GPU's memory",
    "mxfp4": "four-bit weights at full speed",
    "server": "serving",
    "trio": "the event loop trio",
    "plots": "benchmarks as pictures",
    "images": "pictures in prompts",
    "audio": "sound in prompts",
}
"""What users may install besides, and what for."""
SHOWN = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package, its least version, and the extra that it belongs to, None for what is needed in any case."""

    name: str
    least: str
    extra: str | None


def required() -> list[Requirement] | None:
    """What aollm asks for on this platform; None where it is not installed but merely found."""
    try:
        return list(parse(requires("aollm") or ()))
    except PackageNotFoundError:
        return None


def parse(lines: Iterable[str]) -> Iterable[Requirement]:
    """Requirements as a package's metadata has them; those of other platforms are left out."""
    for line in lines:
        if (found := REQUIREMENT.fullmatch(line.strip())) is None:
            continue
        marker = found["marker"] or ""
        platform, extra = PLATFORM.search(marker), EXTRA.search(marker)
        if platform is None or platform[1] == sys.platform:
            yield Requirement(found["name"], found["least"], extra[1] if extra is not None else None)


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages(requirements: Sequence[Requirement] | None, version_of: Callable[[str], str | None] = installed) -> Check:
    """Whether all that is needed in any case is there, and new enough."""
    if requirements is None:
        return Check("packages", "unknown", "aollm is not installed, only found", "install it: pip install aollm")
    needed = [each for each in requirements if each.extra is None]
    have = {each.name: version_of(each.name) for each in needed}
    missing = [each.name for each in needed if have[each.name] is None]
    wrong = ([f"missing: {', '.join(missing)}"] if missing else []) + [told for each in needed if (told := _old(each, have[each.name]))]
    figures = {each.name: {"installed": have[each.name], "least": each.least} for each in needed}
    if wrong:
        return Check("packages", "problem", "; ".join(wrong), "pip install --upgrade aollm", figures)
    shown = ", ".join(f"{name} {have[name]}" for name in SHOWN if have.get(name))
    python = ".".join(map(str, sys.version_info[:3]))
    return Check("packages", "ok", f"all {len(needed)} as required; python {python}" + (f", {shown}" if shown else ""), None, figures)


def check_extras(requirements: Sequence[Requirement] | None, version_of: Callable[[str], str | None] = installed) -> Check:
    """Which of what may be installed besides is there."""
    if requirements is None:
        return Check("extras", "unknown", "aollm is not installed, only found")
    have, lack, old = list[str](), list[str](), list[str]()
    figures: dict[str, bool] = {}
    for extra, purpose in EXTRAS.items():
        wanted = [each for each in requirements if each.extra == extra]
        if not wanted:
            continue
        versions = {each: version_of(each.name) for each in wanted}
        old += (faults := [told for each, found in versions.items() if (told := _old(each, found))])
        here = None not in versions.values()
        figures[extra] = here and not faults
        if here:
            have.append(extra)
        else:
            lack.append(f"{extra} ({purpose})")
    told = ", ".join(have) or "none"
    if lack:
        told += f"; not installed: {', '.join(lack)}"
    if old:
        return Check("extras", "warning", "; ".join([told, *old]), "pip install --upgrade 'aollm[NAME]'", figures)
    return Check("extras", "ok", told, "what you need of it: pip install 'aollm[NAME]'" if lack else None, figures)


def _old(each: Requirement, have: str | None) -> str:
    """What there is to say of a version that is too old."""
    return f"{each.name} is {have}, {each.least} or newer is needed" if have is not None and _numbers(have) < _numbers(each.least) else ""


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at the end: 2.11 and 2.11.0 are one."""
    found = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in found[0].split(".")] if found is not None else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
