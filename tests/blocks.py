"""The blocks of code on a page, and what is done with each: run, parsed, loaded, or compared with what was printed.

    python tests/blocks.py README.md      runs a page's blocks in their order, in the working folder; one line of JSON for each

A comment in the line above a block may say of it
`<!-- continues -->`        it has the names of the Python block before it, or the settings of the TOML above
`<!-- parsed: why -->`      its commands are only parsed
`<!-- fails -->`            its commands end with 1 or 2
`<!-- varies -->`           what is printed depends on the machine: only what its lines begin with is compared
In what is printed, numbers stand for any numbers, `…` for anything, and a line of it for any lines. But what a Python block prints
has its counts and ids: whole numbers without a unit are compared, and `…` stands where one varies.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import random
import re
import runpy
import shlex
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
OTHERS = ["CONTRIBUTING.md", "benchmarks/README.md"]
"""Pages of which only the commands are parsed."""
STARTS = ("aollm ", "make ", "pip ", "python ")
"""How commands begin."""
STOOD_FOR = re.compile(r"[A-Z][A-Z0-9_]+|~/.*|org/.*|.*-(chat|[0-9]+B)")
"""Words that stand for others, and models that nobody has downloaded."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where it stands, its language, what is said of it above, and its lines."""

    line: int
    language: str
    mark: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found: list[Block] = []
    lines = iter(enumerate((ROOT / page).read_text().splitlines(), 1))
    before = ""
    for number, line in lines:
        if fence := re.match(r"( *)(```+)(\w*)", line):
            indent, ticks, language = fence.groups()
            text = []
            for _, inner in lines:
                if inner.strip() == ticks:
                    break
                text.append(inner.removeprefix(indent))
            mark = re.fullmatch(r"\s*<!-- (.*) -->", before)
            found.append(Block(number, language, mark[1] if mark else "", "\n".join(text)))
        before = line
    return found


def spans(page: str) -> Iterator[tuple[int, str]]:
    """Commands that stand within the text of a page, and their lines."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), (ROOT / page).read_text())
    for number, line in enumerate(text.splitlines(), 1):
        for span in re.findall(r"`([^`]+)`", line):
            if span.startswith(STARTS) and "…" not in span:
                yield number, span


class Page:
    """What the blocks of one page leave for those after them."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {}
        self._printed: str | None = None
        self._settings = ""

    def check(self, block: Block) -> None:
        """Do with a block what is done with its language. Raises what goes wrong, `AssertionError` for an unknown language."""
        if not block.mark.startswith("continues") or block.language == "python":
            self._settings = ""
        does: dict[str, Callable[[Block], str | None]] = {
            "python": self._python, "text": self._text, "console": self._console, "sh": self._sh, "toml": self._toml, "json": self._json,
        }  # fmt: skip
        assert block.language in does, f"nothing checks a block of the language {block.language!r}"
        self._printed = does[block.language](block)

    def _python(self, block: Block) -> str:
        if block.mark != "continues":
            self._names = {"__name__": "__main__"}
        code = compile(block.text, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        with printed() as out:
            if code.co_flags & inspect.CO_COROUTINE:
                import anyio

                async def run() -> None:
                    await eval(code, self._names)

                anyio.run(run)
            else:
                exec(code, self._names)
        return out.getvalue()

    def _text(self, block: Block) -> None:
        assert self._printed is not None, "a text is what the Python block before it prints"
        compare(block.text, self._printed, block.mark, counts=True)

    def _console(self, block: Block) -> None:
        shown: list[tuple[str, list[str]]] = []
        for line in block.text.splitlines():
            if line.startswith("$ "):
                shown.append((line[2:], []))
            else:
                shown[-1][1].append(line)
        with self._file():
            for command, output in shown:
                compare("\n".join(output), check_command(command, block.mark) or "", block.mark)

    def _sh(self, block: Block) -> None:
        with self._file():
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.strip():
                    check_command(line, block.mark)

    def _toml(self, block: Block) -> None:
        tomllib.loads(block.text)
        self._settings = block.text
        with self._file():
            from aollm.settings import BenchmarkConfig, GenerationConfig, RuntimeConfig

            assert RuntimeConfig.said() | GenerationConfig.said() | BenchmarkConfig.said(), "it says nothing"
            RuntimeConfig.of("demo", {})
            GenerationConfig.of(None, {})
            BenchmarkConfig.of({})

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    @contextmanager
    def _file(self) -> Iterator[None]:
        file = Path("aollm.toml")
        if self._settings:
            file.write_text(self._settings)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def check_command(line: str, mark: str) -> str | None:
    """Parse a command line, and run it here if it is one of ours that can be; what it printed then."""
    words, typed = shlex.split(line, comments=True), "Hello!"
    if words[:1] == ["echo"] and "|" in words:
        typed, words = words[1], words[words.index("|") + 1 :]
    said = dict(word.split("=", 1) for word in words[: next((n for n, word in enumerate(words) if "=" not in word), 0)])
    command, *arguments = words[len(said) :]
    arguments = [re.sub(r"\bN\b", "3", word) for word in arguments]
    runs = not mark.startswith("parsed") and not any(STOOD_FOR.fullmatch(word) for word in arguments)
    with variables(said):
        match command, arguments:
            case "make", targets:
                made = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
                assert set(targets) <= {*made}, f"{line}: make makes {', '.join(made)}"
            case "aollm", _:
                from aollm.cli import main
                from aollm.parser import parse

                parse([word for word in arguments if word not in ("--help", "--version")])
                return called(line, typed, mark, lambda: main(arguments)) if runs else None
            case "python", ["-m", "aollm.bench", *rest]:
                from aollm.bench.__main__ import main as measure
                from aollm.bench.arguments import parser

                parser().parse_args(rest)
                return called(line, typed, mark, lambda: measure(rest)) if runs else None
            case "python", [script, *rest] if script.startswith("benchmarks/"):
                check_script(ROOT / script, rest)
            case "python", [script, *_] if script.startswith("examples/"):
                assert (ROOT / script).is_file(), f"{script} is missing"
            case "python", ["-m", "asyncio" | "pytest", *_]:
                pass
            case "pip", ["install", *packages]:
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                asked = [extra for package in packages for found in re.findall(r"\[(.*)\]", package) for extra in found.split(",")]
                assert set(asked) <= set(extras), f"{line}: the extras are {', '.join(extras)}"
            case _:
                raise AssertionError(f"nothing checks the command {line!r}")
    return None


def called(line: str, typed: str, mark: str, main: Callable[[], int]) -> str:
    """What a command prints, on stdout and on stderr; raises `AssertionError` if it fails and should not, or should and does not."""
    with printed() as out:
        stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(typed.encode() + b"\n"))
        try:
            code = main()
        except SystemExit as end:  # of --help and --version
            code = int(end.code or 0)
        finally:
            sys.stdin = stdin
    wanted = (1, 2) if mark == "fails" else (0, 1) if "doctor" in line else (0,)  # its 1: the machine has a problem
    assert code in wanted, f"{line} ended with {code}:\n{out.getvalue()}"
    return out.getvalue()


class _Parsed(Exception):
    pass


def check_script(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as far as it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parse(parser, list(arguments))
        raise _Parsed

    argparse.ArgumentParser.parse_args = stop
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
        raise AssertionError(f"{script.name} parses nothing")
    except _Parsed:
        pass
    finally:
        argparse.ArgumentParser.parse_args = parse
        sys.path.remove(str(script.parent))


def compare(shown: str, real: str, mark: str, counts: bool = False) -> None:
    """Raises `AssertionError` unless the lines that are shown are among those that were printed, in this order and, but for lines
    of `…`, without any between them; with `counts`, whole numbers without a unit are the same."""
    if mark.endswith("varies"):
        shown, real = labels(shown), labels(real)
    printed = [line for line in real.splitlines() if line.strip()]
    at, loose = 0, True
    for line in shown.splitlines():
        if line.strip() == "…":
            loose = True
        elif line.strip():
            wanted = re.compile(".*".join(re.escape(part) for part in normal(line, counts).split("…")))
            rest = range(at, len(printed) if loose else min(at + 1, len(printed)))
            found = next((number for number in rest if wanted.fullmatch(normal(printed[number], counts))), None)
            assert found is not None, f"{line!r} was not printed {'after' if at else 'in'}:\n" + "\n".join(printed[at : at + 40])
            at, loose = found + 1, False


def labels(text: str) -> str:
    """What lines begin with, but for those that go on with the one before, and without a word on how good it is; `…` between."""
    begun = [re.sub(r"^(ok|warning|problem) +", "", line.strip()) for line in text.splitlines() if len(line) - len(line.lstrip()) < 12]
    return "\n…\n".join(re.split(r"  +|[:(,\d]", line)[0] for line in begun)


def normal(line: str, counts: bool = False) -> str:
    """`line` with `0` for numbers, whatever their unit of size or time, one sign for bars, and single blanks. With `counts`, whole
    numbers without a unit, `times`, a point or a separator of thousands stay."""
    line = re.sub(r"[█▇▆▅▄▃▂▁░]+", "█", line)
    number = r"[-−]?\d+(,\d+)*(\.\d+)?(e[+-]?\d+)?( ?([kKMGT]i?)?B\b| ?[mµn]?s\b| ?%| times\b)?"
    line = re.sub(number, lambda found: found[0] if counts and found[0].isdigit() else "0", line)
    return " ".join(line.split())


@contextmanager
def printed() -> Iterator[io.StringIO]:
    """What is written to stdout and stderr meanwhile."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        yield out


@contextmanager
def variables(said: dict[str, str]) -> Iterator[None]:
    """The environment with what was `said`."""
    before = dict(os.environ)
    os.environ.update(said)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(name: str) -> None:
    """Check a page's blocks, and the commands in its text; for each a line of JSON with where it stands and what went wrong."""
    # one thread: of several, each would wait after every operation for the slowest, which on a busy machine takes far longer
    if sys.platform == "linux":
        os.sched_setaffinity(0, {random.choice([*os.sched_getaffinity(0)])})
    page, found, commands = Page(), blocks(name), [*spans(name)]
    if name in OTHERS:
        shown = [(block.line, line.removeprefix("$ ")) for block in found for line in block.text.replace("\\\n", " ").splitlines()]
        commands, found = [*commands, *((line, text) for line, text in shown if text.startswith(STARTS))], []
    work: list[tuple[int, Callable[[], object]]] = [(block.line, lambda block=block: page.check(block)) for block in found]
    work += [(line, lambda command=command: check_command(command, "parsed")) for line, command in commands]
    for line, check in work:
        wrong = None
        try:
            check()
        except (Exception, SystemExit):  # whatever it is, it is told of
            wrong = traceback.format_exc(limit=-4)
        print(json.dumps([line, wrong]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
