"""README and docs: every block of code is run or parsed, links lead somewhere, and nothing that can be set is left out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import OTHERS, PAGES, ROOT, Block, Page, blocks, check_command, compare

import aollm
import aollm.errors
from aollm.parser import COMMANDS
from aollm.settings import BenchmarkConfig, GenerationConfig, RuntimeConfig
from aollm.stores.presets import PRESETS

MOST_PAGES, MOST_LINES = 6, 200
FOLDERS = ("aollm", "benchmarks", "docs", "examples", "tests")
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}


@pytest.mark.timeout(300)  # seconds where nothing else runs, a minute for a page where much does
@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_blocks(page: str, tmp_path: Path) -> None:
    """In a process and a home of its own: what a page may use of memory is what it says, and it leaves nothing behind."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AOLLM_")}
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    (work := tmp_path / "work").mkdir()
    ran = subprocess.run([sys.executable, ROOT / "tests/blocks.py", page], cwd=work, env=environ, capture_output=True, text=True)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    wrong = [f"{page}:{line}\n{told}" for line, told in found if told]
    assert (ran.returncode, wrong) == (0, []), "\n".join([*wrong, ran.stderr])
    assert page in OTHERS or {line for line, _ in found} >= {block.line for block in blocks(page)}


def test_sizes() -> None:
    assert len(PAGES) - 1 <= MOST_PAGES
    assert len(TEXTS["README.md"].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Links to files and headings; and files of the repository that are named."""
    text = re.sub(r"(?ms)^```.*?^```$", "", TEXTS[page])
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match("https?://", target):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text()), target
    for named in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[^` ]*)", text):
        assert (ROOT / named).exists(), named


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, by GitHub and by mkdocs alike: they are plain."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("settings of the runtime", RuntimeConfig.model_fields),
        ("settings of an answer", GenerationConfig.model_fields),
        ("settings of the benchmark", BenchmarkConfig.model_fields),
        ("names of the library", aollm.__all__),
        ("errors", [name for name, found in vars(aollm.errors).items() if isinstance(found, type) and issubclass(found, Exception)]),
        ("presets", PRESETS),
        ("passes", ["disk-cache", "cpu-offload", "gpu-offload", "mlp-chunking", "moe-routing", "attention-replacement"]),
        ("commands", [f"aollm {name}" for name in COMMANDS]),
        ("examples", [path.stem + ".py" for path in (ROOT / "examples").glob("*.py")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_left_out(what: str, names: list[str]) -> None:
    text = "\n".join(TEXTS.values())
    assert [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []


def test_pages_are_built_and_need_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert not re.search("^WARNING", built.stderr, re.M)
    pages = [path for path in tmp_path.glob("*.html") if path.name != "404.html"]
    assert len(pages) == len(PAGES) - 1
    for page in pages:
        html = page.read_text()
        loads = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\s\">]+)|<link\b[^>]*\bhref=\"?([^\s\">]+)", html)
        for target in {source or link for source, link in loads}:
            assert not re.match(r"(https?:)?//", target), f"{page.name} loads {target}"
            assert (tmp_path / target.partition("?")[0]).exists(), f"{page.name} loads {target}"


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("", "x", "nothing checks a block of the language ''"),
        ("yaml", "x: 1", "'yaml'"),
        ("python", "import aollm\naollm.Runtme", "Runtme"),
        ("python", "assert 1 + 1 == 3, 3", "3"),
        ("text", "said by nobody", "what the Python block before it prints"),
        ("console", "$ aollm --version\naollm, version 1.2", "was not printed"),
        ("console", "$ aollm models info demo --jsn", "did you mean --json"),
        ("sh", "aollm run MODEL Hello --memroy 3GiB", "did you mean --memory"),
        ("sh", "aollm models info ./nowhere", "ended with 1"),
        ("sh", "make dinner", "make makes"),
        ("sh", "rm -rf build", "nothing checks the command"),
        ("sh", "pip install 'aollm[telepathy]'", "the extras are"),
        ("sh", "python examples/nothing.py", "is missing"),
        ("sh", "python benchmarks/cancel.py DIR --memry 3GiB", "2"),
        ("sh", "python -m aollm.bench overlap DIR --tokns 3", "2"),
        ("toml", "[runtime]\nmemroy = '3GiB'", "did you mean memory"),
        ("toml", "[runtime\n", "line 1"),
        ("toml", "# nothing\n", "it says nothing"),
        ("json", "{'a': 1}", "double quotes"),
    ],
)
def test_what_is_wrong_is_noticed(language: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, SystemExit), match=re.escape(message)):
        Page().check(Block(1, language, "", text))


@pytest.mark.parametrize(
    ("shown", "mark", "matches"),
    [
        ("a 1.5 GiB\nb 3 ms", "", True),
        ("a 700 KiB\nb 1e-3 s", "", True),
        ("b 3", "", True),
        ("…\nb 3 ms", "", True),
        ("a …", "", True),
        ("a ██░", "", False),
        ("b 3\na 1", "", False),
        ("a 1.5 GiB\nc", "", False),
        ("a 1\nc 2", "", False),
        ("a 1\n…\nc 2 and no more", "", True),
        ("a  9 lives", "varies", True),
        ("warning  a  9 lives\nc: 1", "varies", True),
        ("b  9 lives\n                   and more\nc", "varies", True),
        ("c\nb", "varies", False),
        ("d  1", "varies", False),
    ],
)
def test_what_is_shown_is_compared(shown: str, mark: str, matches: bool) -> None:
    real = "a 2 GiB\nb 14.1 µs\nc 3 and no more\n"  # with `varies` the same, as a table has it
    if mark:
        real = "ok  a  2 GiB\nok  b  14.1 µs\nc  3 and no more\n"
    if matches:
        compare(shown, real, mark)
    else:
        with pytest.raises(AssertionError, match="was not printed"):
            compare(shown, real, mark)


@pytest.mark.parametrize(
    ("shown", "matches"),
    [("length 4 [12, 12], 3 ms, 7 times, 9 %, 2,048", True), ("length 5 [12, 12], …", False), ("length … [12, 12], …", True)]
    + [("length 4 [12, 13], …", False), ("length 4 [12, 12], 3, …", False), ("length 4.0 …", False)],
)
def test_counts_are_exact_where_python_printed_them(shown: str, matches: bool) -> None:
    real = "length 4 [12, 12], 14.1 µs, 8 times, 10%, 1,024"
    if matches:
        compare(shown, real, "", counts=True)
    else:
        with pytest.raises(AssertionError, match="was not printed"):
            compare(shown, real, "", counts=True)


def test_commands_see_the_environment_they_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "AOLLM_RUNTIME__MEMORY" in str(check_command("AOLLM_RUNTIME__MEMORY=3GiB aollm config show", ""))
    assert "AOLLM_RUNTIME__MEMORY" not in os.environ
