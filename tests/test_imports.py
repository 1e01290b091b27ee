"""The rooms of the house: imports go downward only, every module has a room, and the front door is light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import aollm

PACKAGE = Path(aollm.__file__).parent

# A room may import from rows above it, from itself, and in its own row from rooms to its left.
ROWS = [
    "errors trace port",
    "disk",
    "buffers ahead probe tensors fingerprint export checkpoint",
    "maths sampling compute cuda device",
    "families stores",
    "placement piece supply weights berths experts adapters item mixing towers embedding request batch itinerary drawing "
    "sweep gathering shift engine stream pace generic",
    "demo text media configuration values settings prompt download hub reference selector prediction room "
    "runtime_plan forecast fit blueprint survey kv passes adaptation outlook tiers planning session runtime inventory anatomy",
    "terminal options parser lanes meter client inference server bench checkup commands cli __main__",
]
ORDER = [room for row in ROWS for room in row.split()]
NEVER_MEET = {"families", "stores"}
LAST_ROW = ROWS[-1].split()


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports, anywhere in it; the lazy front door `aollm` counts as a room of its own, ``""``."""
    package = ("aollm", *path.relative_to(PACKAGE).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module]))) if node.level else str(node.module)
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "aollm" else {base}
    parts = [(name + ".").split(".") for name in names if name == "aollm" or name.startswith("aollm.")]
    return {part[1] if (PACKAGE / part[1]).is_dir() or (PACKAGE / f"{part[1]}.py").is_file() else "" for part in parts}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    room = room_of(path)
    assert room in ORDER, f"{room} has no row: give it one in ROWS, and in ARCHITECTURE.md"
    for target in imported_rooms(path) - {room}:
        if target == "":
            assert room in LAST_ROW, f"{room} imports the front door, aollm; name the module instead"
        else:
            assert ORDER.index(target) < ORDER.index(room), f"{room} imports {target}, which is not above it"
            assert {room, target} != NEVER_MEET, "families and stores never meet"


def test_every_exported_name_resolves() -> None:
    assert len(set(aollm.__all__)) == len(aollm.__all__)
    for name in aollm.__all__:
        assert getattr(aollm, name) is not None, name
    assert set(aollm.__all__) <= set(dir(aollm))


def test_every_module_imports() -> None:
    for path in modules():
        if path.name != "__main__.py":
            importlib.import_module(".".join(("aollm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"))


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, aollm; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
