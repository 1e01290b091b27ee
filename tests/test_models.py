"""The inventory and the anatomy: what is here, where downloads go, and what a model is without a weight being read."""

import json
import shutil
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from tiny import pack, save
from transformers import AutoModelForCausalLM, GPT2Config

from aollm.anatomy import Anatomy, anatomy, parameters
from aollm.cli import main
from aollm.commands import models
from aollm.demo import MODEL as DEMO
from aollm.disk.portable import PortableDisk
from aollm.errors import ModelError, SpecializationError
from aollm.export.opening import FOLDER
from aollm.families import FAMILIES
from aollm.inventory import Entry, disk_nbytes, inventory, native, whole
from aollm.reference import ALIASES
from aollm.settings import RuntimeConfig
from aollm.survey import build_family
from aollm.tensors import Checkpoint

A, B, C = "a" * 40, "b" * 40, "c" * 40
WEIGHTS = "model.safetensors"


def shelve(root: Path, name: str, commit: str, ref: str | None = "main", without: str = "") -> Path:
    """A snapshot of the bundled model as downloads are laid out; its files are links to blobs."""
    place = root / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir(exist_ok=True)
    for file in DEMO.iterdir():
        if file.is_file() and file.name != without:
            shutil.copy(file, place / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    if ref is not None:
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all sorts: whole, half downloaded, damaged, of several revisions, and not of the Hub."""
    root = tmp_path_factory.mktemp("models")
    shelve(root, "meta-llama/Llama-3.2-1B-Instruct", A)
    shelve(root, "openai/gpt-oss-20b", B, without=WEIGHTS)
    (root / "models--openai--gpt-oss-20b" / "blobs" / "0.incomplete").write_bytes(bytes(1_000_000))
    (root / "models--openai--gpt-oss-20b" / "blobs" / "1.incomplete").symlink_to("gone")  # as one that arrives meanwhile
    shelve(root, "org/two", A)
    (root / "models--org--two" / "refs" / "alpha").write_text(A)  # another name of what main is
    shelve(root, "org/two", B, "v2")
    shelve(root, "org/two", C, None)
    (root / "damaged").mkdir()
    (root / "damaged" / "config.json").write_text("{")
    (root / "not a model").mkdir()
    (root / "datasets--org--texts").mkdir()
    for name, kind in (("gpt2", "gpt2"), ("odd", "no-such-kind"), ("awq", "llama")):
        (root / name).mkdir()
        quantized = {"quantization_config": {"quant_method": "awq"}} if name == "awq" else {}
        (root / name / "config.json").write_text(json.dumps({"model_type": kind, "torch_dtype": "float16", **quantized}))
    return root


async def test_the_inventory(root: Path) -> None:
    found = {entry.reference: entry for entry in await inventory(root)}
    assert list(found)[: len(ALIASES)] == list(ALIASES)
    nbytes = disk_nbytes(DEMO)
    plain = dict(presence="here", nbytes=nbytes, model_type="llama", dtype="bfloat16", tier="optimized-native")
    demo, gpt_oss = found["demo"], found["gpt-oss-20B"]
    assert demo == Entry("demo", None, folder=DEMO, **plain)
    llama = root / "models--meta-llama--Llama-3.2-1B-Instruct" / "snapshots" / A
    assert found["llama3-1B-chat"] == Entry("llama3-1B-chat", "meta-llama/Llama-3.2-1B-Instruct", folder=llama, **plain)
    assert found["gemma3-12B"] == Entry("gemma3-12B", "google/gemma-3-12b-it", "absent")
    assert (gpt_oss.presence, gpt_oss.lacking) == ("incomplete", (WEIGHTS,))
    assert gpt_oss.nbytes == nbytes - (DEMO / WEIGHTS).stat().st_size + 1_000_000
    others = {name: found[name] for name in found if name not in ALIASES}
    assert others.keys() == {
        "org/two", "org/two@v2", f"org/two@{C}", *(str(root / name) for name in ("damaged", "gpt2", "odd", "awq"))
    }  # fmt: skip
    assert [others[name].folder.name for name in ("org/two", "org/two@v2", f"org/two@{C}")] == [A, B, C]
    assert "damaged/config.json cannot be used" in str(others[str(root / "damaged")].error)
    tiers = {name: (others[str(root / name)].tier, others[str(root / name)].dtype) for name in ("gpt2", "odd", "awq")}
    assert tiers == {"gpt2": ("transformers-generic", "float16"), "odd": (None, "float16"), "awq": ("transformers-generic", "awq")}


async def test_a_reference_of_the_inventory_means_what_it_lists(root: Path) -> None:
    for entry in await inventory(root):
        if entry.presence == "here" and entry.repository is not None:
            assert await whole(entry.reference, root) == entry.folder


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gemma3-12B", r"gemma3-12B \(google/gemma-3-12b-it\) is not on this machine, .* aollm run gemma3-12B PROMPT downloads it"),
        ("org/none", "org/none is not on this machine"),
        ("gpt-oss-20B", f"is here only in part, .* lacks {WEIGHTS}; aollm run gpt-oss-20B PROMPT downloads it"),
        ("nowhere", "nowhere does not exist"),
    ],
)
async def test_what_is_not_here_is_not_asked_for(reference: str, message: str, root: Path) -> None:
    with pytest.raises(ModelError, match=message):
        await whole(reference, root)


async def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing; name the folder where models are kept"):
        await inventory(tmp_path / "none")


@pytest.mark.parametrize("kind", [*FAMILIES, "bert", None, []], ids=str)
@pytest.mark.parametrize(
    "said", [None, {}, "mxfp4", "gptq", {"quant_method": "mxfp4"}, {"quant_method": "bitsandbytes"}, {"bits": 4}], ids=str
)
def test_what_is_native_by_its_configuration_is_what_a_run_takes(kind: Any, said: Any, tmp_path: Path) -> None:
    described = {"model_type": kind, "quantization_config": said}
    plain, packed = not said, said in ("mxfp4", {"quant_method": "mxfp4"})
    assert native(described) == (isinstance(kind, str) and kind in FAMILIES and (plain or (packed and kind == "gpt_oss")))
    with pytest.raises(ModelError) as raised:  # nothing is there: who takes it misses the embedding table
        build_family(described, Checkpoint(tmp_path, {}, (), 0))
    assert isinstance(raised.value, SpecializationError) != native(described)


@pytest.mark.parametrize(("kind", "counted"), [("gpt_oss", True), ("llama", False), ("bert", False)])
def test_what_nobody_here_reads_is_not_counted(kind: str, counted: bool) -> None:
    packed = {"model_type": kind, "quantization_config": {"quant_method": "mxfp4"}}
    nothing = Checkpoint(DEMO, {}, (), 0)
    assert (parameters(packed, nothing), parameters({"model_type": kind}, nothing)) == (0 if counted else None, 0)


class Closing(PortableDisk):
    """Takes a turn of the loop to close."""

    closed = False

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        await super().aclose()
        self.closed = True


async def test_an_interrupt_leaves_no_disk_open(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Closing()

    async def interrupted(folder: Path, disk: Any) -> None:
        scope.cancel()
        await anyio.sleep_forever()

    monkeypatch.setattr(models, "open_disk", lambda *given: (disk, ""))
    monkeypatch.setattr(models, "anatomy", interrupted)
    with anyio.CancelScope() as scope:
        await models._look(RuntimeConfig.of("demo", {}))
    assert scope.cancelled_caught and disk.closed


async def look(folder: Path, disk: PortableDisk | None = None) -> Anatomy:
    """The anatomy, by a disk that is closed again."""
    disk = disk or PortableDisk()
    try:
        return await anatomy(folder, disk)
    finally:
        await disk.aclose()


def numel(folder: Path) -> int:
    """Parameters, counted by transformers."""
    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())


EXPERT = 3 * 64 * 32


@pytest.mark.parametrize(
    ("kind", "options", "experts", "idle", "kv", "state"),
    [
        ("llama", {}, None, 0, 3 * 2 * 2 * 16 * 2, 0),
        ("gemma3_text", {}, None, 0, 7 * 2 * 2 * 16 * 2, 0),
        ("qwen3_moe", {}, (8, 2, 3), 3 * 6 * EXPERT, 3 * 2 * 2 * 16 * 2, 0),
        ("qwen3_next", {}, (8, 2, 4), 4 * 6 * EXPERT, 1 * 2 * 2 * 32 * 2, 3 * 4 * (128 * 3 + 4 * 16 * 16)),
    ],
)
async def test_the_anatomy_of_our_own_families(
    kind: str, options: dict[str, Any], experts: tuple[int, int, int] | None, idle: int, kv: int, state: int, tmp_path: Path
) -> None:
    folder = save(tmp_path, kind, torch.bfloat16, **options)
    whole = numel(folder)
    found = await look(folder)
    assert (found.tier, found.dtype, found.model_type, found.quantization) == ("optimized-native", "bfloat16", kind, None)
    assert (found.hidden, found.vocabulary, found.context) == (64, 256, 256)
    assert found.parameters == whole and found.weights_nbytes == 2 * whole
    tied = kind == "gemma3_text"
    assert found.active_parameters == whole - idle - (0 if tied else 256 * 64)  # an embedding is looked up, a head multiplied
    assert (found.experts and (found.experts.count, found.experts.top, found.experts.layers)) == experts
    assert (found.kv_nbytes_per_token, found.state_nbytes) == (kv, state)
    assert (found.tokenizer, found.chat_template, found.exported, found.towers) == (None, False, False, ())
    assert found.disk_nbytes == sum(found.files.values()) > found.weights_nbytes


async def test_packed_weights_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    folder = save(tmp_path, "gpt_oss", torch.bfloat16)
    count, before = numel(folder), await look(folder)
    after = await look(pack(folder))
    assert (before.parameters, before.active_parameters) == (after.parameters, after.active_parameters)
    assert before.parameters == count and after.weights_nbytes < 0.6 * before.weights_nbytes
    assert (before.quantization, after.quantization) == (None, "mxfp4")


async def test_the_anatomy_of_what_transformers_runs(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    found = await look(tmp_path)
    assert (found.tier, found.layers, found.hidden, found.vocabulary, found.context) == ("transformers-generic", 2, 64, 256, 1024)
    assert "'gpt2' is not known" in found.tier_reason
    assert (found.parameters, found.active_parameters, found.kv_nbytes_per_token) == (numel(tmp_path), None, 2 * 2 * 64 * 4)
    assert (found.tokenizer, found.chat_template) == ("tokenizer.json", True)


async def test_quantized_weights_are_not_guessed_at(tmp_path: Path) -> None:
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    found = await look(folder)
    assert (found.tier, found.parameters, found.active_parameters) == ("transformers-generic", None, None)
    assert "quantized by 'awq'" in found.tier_reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no-such-kind", "transformers has no model of type 'no-such-kind' that generates text"),
        (None, "config.json names no model_type"),
    ],
)
async def test_a_model_that_nobody_runs(kind: str | None, reason: str, tmp_path: Path) -> None:
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    found = await look(folder)
    assert (found.tier, found.layers, found.kv_nbytes_per_token) == (None, None, None)
    assert found.tier_reason == reason


async def test_headers_alone_are_read() -> None:
    class Counting(PortableDisk):
        nbytes = 0

        async def read_into(self, extents: Any, buffers: Any, *rest: Any) -> Any:
            self.nbytes += sum(extent.nbytes for extent in extents)
            return await super().read_into(extents, buffers, *rest)

    disk = Counting()
    assert (await look(DEMO, disk)).parameters == 3_411_200
    assert disk.nbytes < 16_384


async def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    with pytest.raises(ModelError, match="truncated"):
        await look(folder)


def test_an_export_is_described_by_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    assert main(["models", "info", str(folder), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["export", str(folder), "--quiet"]) == 0
    (folder / WEIGHTS).unlink()
    file = max((folder / FOLDER).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    file.write_bytes(b"\0" * file.stat().st_size)  # it would not pass, were it read
    capsys.readouterr()
    assert main(["models", "info", str(folder), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    same = ("parameters", "active_parameters", "weights_nbytes", "kv_nbytes_per_token", "layers", "tier")
    assert [after[name] for name in same] == [before[name] for name in same]
    assert (before["exported"], after["exported"]) == (False, True)


def test_the_list_and_the_description_as_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "ls", "--models-dir", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "TYPE", "TIER", "DTYPE", "SIZE"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-2]}
    assert rows["demo"] == ["llama", "native", "bfloat16", "6.98", "MB"]
    assert rows["gemma3-12B"] == ["not", "here:", "google/gemma-3-12b-it"]
    assert rows["gpt-oss-20B"][-2:] == ["lacks", WEIGHTS]
    assert rows[str(root / "odd")][1] == "none" and rows[str(root / "damaged")][2:5] == ["cannot", "be", "used:"]
    assert lines[-1].startswith("8 models here, ") and lines[-1].endswith(f"downloads are in {root}")
    assert main(["models", "info", "llama3-1B-chat", "--models-dir", str(root)]) == 0
    told = capsys.readouterr().out
    for expected in (
        "optimized-native",
        "131,072 tokens at most",
        "3.41 million\n",
        "1.54 kB a token, 201 MB for the whole",
        "model.safetensors",
    ):
        assert expected in told
    assert main(["models", "ls", "--models-dir", str(root), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(lines) - 3
    assert main(["models", "info", "gemma3-12B", "--models-dir", str(root)]) == 1
    assert capsys.readouterr().out == ""
