"""Settings: where each value comes from, what is refused and in which words, and that every one of them changes something."""

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import pytest
import tiny
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from safetensors.torch import save_file

from aollm import AollmError, Completion, ConfigError, GenerationConfig, ModelError, RequestError, Runtime, RuntimeConfig, TokenStream
from aollm.bench.__main__ import main as bench
from aollm.cli import main
from aollm.configuration import SECTIONS, file, quiet
from aollm.demo import MODEL
from aollm.settings import BenchmarkConfig

Settings = RuntimeConfig | GenerationConfig | BenchmarkConfig
KINDS: tuple[type[Settings], ...] = (RuntimeConfig, GenerationConfig, BenchmarkConfig)
HERE = "aollm.toml"


@pytest.fixture(autouse=True)
def nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and an environment that says nothing."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("AOLLM_")]:
        monkeypatch.delenv(name)


def say(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], toml: str | bytes = "") -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if toml:
        Path(HERE).write_bytes(toml if isinstance(toml, bytes) else toml.encode())


def made(kind: type[Settings], **values: Any) -> Any:
    """Settings of a kind, as a caller makes them."""
    if kind is RuntimeConfig:
        return RuntimeConfig.of("demo", values)
    return GenerationConfig.of(None, values) if kind is GenerationConfig else BenchmarkConfig.of(values)


# --- where values come from ---


@pytest.mark.parametrize(
    ("argument", "variable", "toml", "wanted"),
    [
        (None, None, None, 2),
        (None, None, 5, 5),
        (None, 6, None, 6),
        (None, 6, 5, 6),
        (7, None, None, 7),
        (7, None, 5, 7),
        (7, 6, 5, 7),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_who_goes_first(
    argument: int | None, variable: int | None, toml: int | None, wanted: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, {"AOLLM_RUNTIME__PREFETCH_DEPTH": str(variable)} if variable else {}, f"[runtime]\nprefetch_depth = {toml or 2}")
    if named:
        os.mkdir("elsewhere")
        os.rename(HERE, "elsewhere/mine.toml")
        Path(HERE).write_text("this is not read")
        monkeypatch.setenv("AOLLM_CONFIG_FILE", "elsewhere/mine.toml")
    values = {"prefetch_depth": argument} if argument else {}
    assert RuntimeConfig.of("demo", values).prefetch_depth == wanted
    assert Runtime.open("demo", **values).config.prefetch_depth == wanted
    whole = RuntimeConfig(model_reference="demo")
    assert RuntimeConfig.of(whole, values).prefetch_depth == (argument or 2)  # says all by itself


@pytest.mark.parametrize(
    ("kind", "name", "text", "wanted"),
    [
        (RuntimeConfig, "dense_projection_chunk_rows", "4096", 4096),
        (RuntimeConfig, "dense_projection_chunk_rows", "none", None),
        (RuntimeConfig, "memory", "3GiB", 3 << 30),
        (RuntimeConfig, "memory", "5000", 5000),
        (RuntimeConfig, "memory", "", None),
        (RuntimeConfig, "multimodal", "false", False),
        (RuntimeConfig, "multimodal", "0", False),
        (RuntimeConfig, "verbose", "Yes", True),
        (RuntimeConfig, "prefetch_depth", "", 2),
        (RuntimeConfig, "kv_cache_max_age_s", "NULL", None),
        (RuntimeConfig, "model_reference", "123", "123"),
        (RuntimeConfig, "adapter_dir", "/a/b", Path("/a/b")),
        (RuntimeConfig, "adapter_dir", '{"one": "/a", "two": "/b"}', {"one": Path("/a"), "two": Path("/b")}),
        (RuntimeConfig, "models_dir", "~/models", Path.home() / "models"),
        (RuntimeConfig, "kv_cache_strategy", "paged", "paged"),
        (GenerationConfig, "temperature", "0.5", 0.5),
        (GenerationConfig, "temperature", "1", 1.0),
        (GenerationConfig, "seed", "null", None),
        (GenerationConfig, "seed", "-3", -3),
        (GenerationConfig, "cache_salt", "123", "123"),
        (GenerationConfig, "cache_salt", "none", "none"),
        (GenerationConfig, "cache_salt", '["a"]', '["a"]'),
        (GenerationConfig, "adapter", "none", None),
        (GenerationConfig, "stop", '["a", "b"]', ("a", "b")),
        (GenerationConfig, "stop", "[INST]", ("[INST]",)),
        (GenerationConfig, "stop", "END", ("END",)),
        (GenerationConfig, "stop", "", ()),
        (BenchmarkConfig, "prompt_scale_tokens", "1,2, 3", (1, 2, 3)),
        (BenchmarkConfig, "prompt_scale_tokens", "[4, 5]", (4, 5)),
        (BenchmarkConfig, "record_history", "off", False),
        (BenchmarkConfig, "history_codebase_label", "none", None),
    ],
)
def test_text_of_the_environment(kind: type[Settings], name: str, text: str, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {f"AOLLM_{kind.section}__{name}".upper(): text})
    found = RuntimeConfig.of(None, {}) if name == "model_reference" else made(kind)
    assert getattr(found, name) == wanted
    assert type(getattr(found, name)) is type(wanted)


def test_a_file_with_all_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {"aollm_runtime__adapter_dir__two": "/b"}, """
        [runtime]
        model_reference = "demo"
        memory = "3GiB"
        kv_cache_max_age_s = 60
        kv_cache_strategy = "paged"
        kv_cache_lifecycle = "persistent"
        [generation]
        temperature = 1
        stop = ["a", "b"]
        [server]
        [benchmark]
        profile = "full"
        output_scale_tokens = [1, 2]
        output = "found.json"
    """)  # fmt: skip
    runtime = RuntimeConfig.of(None, {"kv_cache_max_age_s": 30.0})
    assert (runtime.model_reference, runtime.memory, runtime.kv_cache_max_age_s) == ("demo", 3 << 30, 30.0)
    assert runtime.adapter_dir == {"two": Path("/b")}
    assert GenerationConfig.of(None, {"stop": None}) == GenerationConfig(temperature=1.0)
    benchmark = BenchmarkConfig.of({"iterations": 9})
    assert (benchmark.profile, benchmark.output_scale_tokens, benchmark.iterations) == ("full", (1, 2), 9)
    assert benchmark.output == Path("found.json").absolute()


def test_the_model_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model_reference: name a model: .*AOLLM_RUNTIME__MODEL_REFERENCE.*\[runtime\] in aollm\.toml"):
        Runtime.open()
    say(monkeypatch, {}, '[runtime]\nmodel_reference = "one"')
    assert Runtime.open().config.model_reference == "one"
    say(monkeypatch, {"AOLLM_RUNTIME__MODEL_REFERENCE": "two"})
    assert Runtime.open().config.model_reference == "two"
    assert Runtime.open("three").config.model_reference == "three"


def test_the_file_is_read_each_time_and_a_runtime_keeps_what_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {}, "[generation]\nmax_new_tokens = 3")

    async def count() -> list[int]:
        async with Runtime.open("demo", max_context_tokens=64) as runtime:
            say(monkeypatch, {}, "[generation]\nmax_new_tokens = 4")
            asked = [{}, {"max_new_tokens": 2}, {"generation": GenerationConfig(max_new_tokens=5)}]
            found = [len((await runtime.generate([5, 6], **fields)).token_ids) for fields in asked]
            assert GenerationConfig.of(None, {}).max_new_tokens == 4
            say(monkeypatch, {}, "[generation]\nmax_new_tokens = 0")
            return [*found, len((await runtime.generate([5, 6])).token_ids)]

    assert anyio.run(count) == [3, 2, 5, 3]
    with pytest.raises(ConfigError, match=r"max_new_tokens: should be greater than or equal to 1 \(from aollm\.toml: /"):
        Runtime.open("demo")


def test_n_is_for_answers_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {"AOLLM_GENERATION__N": "2", "AOLLM_GENERATION__MAX_NEW_TOKENS": "2"})

    async def count() -> tuple[int, int]:
        async with Runtime.open("demo", max_context_tokens=64) as runtime, runtime.session() as session:
            return len((await runtime.generate([5, 6])).choices), len([token async for token in session.stream("hello")])

    assert anyio.run(count) == (2, 2)


# --- what is refused ---


@pytest.mark.parametrize(
    ("environment", "toml", "message"),
    [
        ({}, "[runtime]\nmemory = 3GiB", r"aollm\.toml is not TOML: .*line 2, column 11"),
        ({}, "[runtime]\n\nmemory =", r"is not TOML: .*line 3"),
        ({}, "[runtime]\nmemory = '3GiB", r"is not TOML: .*line 2"),
        ({}, "[runtime]\n[generation]\n[runtime]\n", r"is not TOML: .*line 3"),
        ({}, b"[runtime]\n# \xe4\nmemory = 3", r"is not TOML: it is not UTF-8 \(at line 2\)"),
        ({}, "x = " + "[" * 5000, "is not TOML: "),
        ({}, "x = " + "9" * 5000, "is not TOML: "),
        ({}, "memory = '3GiB'", r"memory is not a section; did you mean memory in \[runtime\]\? \(from aollm\.toml: /.*\)"),
        ({}, "colour = 3", "colour is not a section; write settings below their section, with one of the sections runtime, generation"),
        ({}, "runtime = 3", r"runtime: a section with settings, \[runtime\], not 3 \(from aollm\.toml: /"),
        ({}, "[runtme]\nmemory = 3", r"runtme is not a section; did you mean \[runtime\]\?"),
        ({}, "[runtime]\nmemroy = 3", r"memroy is not a setting of \[runtime\]; did you mean memory\? \(from aollm\.toml: /"),
        ({}, "[runtime]\nkv-cache-strategy = 'paged'", "did you mean kv_cache_strategy?"),
        ({}, "[runtime]\ntop_p = 1", r"did you mean top_p in \[generation\]\?"),
        ({}, "[benchmark]\nzzz = 1", r"zzz is not a setting of \[benchmark\]; there are profile, iterations"),
        ({}, "[server]\nport = 1", "server: this section has no settings yet; take port out"),
        ({}, "[runtime]\nmemory = 'much'", r"memory: a size such as '3GiB'.*, not 'much' \(from aollm\.toml: /"),
        ({}, "[runtime]\nmemory = '0.5'", r"memory: a size such as '3GiB'.*, not '0\.5' \(from aollm\.toml: /"),
        ({}, "[generation]\nstop = 5", r"stop: a text or a list of texts, not 5 \(from aollm\.toml: /"),
        ({}, "[generation]\nstop = {a = 1}", r"stop: a text or a list of texts, not \{'a': 1\} \("),
        ({}, "[runtime]\ndisk_backend = 'memory'", "disk_backend: should be 'auto', 'threads'"),
        ({}, "[runtime]\noffload_cpu_policy = 'prefix'", r"offload_cpu_policy: .*\(offload_cpu_policy is from aollm\.toml: /"),
        ({}, "[runtime]\nprefetch_depth = '4'", r"prefetch_depth: should be a valid integer \(from aollm\.toml: /"),
        ({}, "[runtime]\nmultimodal = 1", r"multimodal: should be a valid boolean \(from aollm\.toml: /"),
        ({}, "[runtime]\nmodels_dir = 1999-12-31", "models_dir: the path of a folder"),
        ({"AOLLM_RUNTIME__MEMORY": "much"}, "", r"memory: a size such as .*\(from AOLLM_RUNTIME__MEMORY='much'\)"),
        ({"AOLLM_RUNTIME__PREFETCH_DEPTH": "0"}, "", r"prefetch_depth: should be greater than or equal to 1 \(from AOLLM_RUNTIME__"),
        ({"AOLLM_RUNTIME__PREFETCH_DEPTH": "none"}, "", "prefetch_depth: should be a valid integer"),
        ({"AOLLM_RUNTIME__DISK_BACKEND": "fast"}, "", "disk_backend: should be 'auto', 'threads'"),
        ({"AOLLM_RUNTIME__MULTIMODAL": "perhaps"}, "", "multimodal: should be a valid boolean"),
        ({"AOLLM_RUNTIME__MEMORY__X": "1"}, "", "memory: a size such as"),
        ({"AOLLM_RUNTIME__MEMROY": "1"}, "", r"AOLLM_RUNTIME__MEMROY is not a setting; did you mean AOLLM_RUNTIME__MEMORY\?"),
        ({"AOLLM_RUNTIME_MEMORY": "1"}, "", r"AOLLM_RUNTIME_MEMORY is not a setting; did you mean AOLLM_RUNTIME__MEMORY\?"),
        ({"AOLLM_MEMORY": "1"}, "", r"AOLLM_MEMORY is not a setting; did you mean AOLLM_RUNTIME__MEMORY\?"),
        ({"AOLLM_RUNTIME__TEMPERATURE": "1"}, "", r"did you mean AOLLM_GENERATION__TEMPERATURE\?"),
        ({"AOLLM_RUNTIME": "{}"}, "", "AOLLM_RUNTIME is not a setting; write AOLLM_SECTION__SETTING"),
        ({"AOLLM_SERVER__PORT": "1"}, "", "server: this section has no settings yet"),
        ({"AOLLM_CONFIG_FILE": "nowhere.toml"}, "", "AOLLM_CONFIG_FILE: nowhere.toml is missing; name a TOML file"),
        ({"AOLLM_CONFIG_FILE": "/"}, "", "AOLLM_CONFIG_FILE: / is not a file"),
        ({"AOLLM_CONFIG_FILE": "a/" * 5000}, "", "cannot be read: File name too long"),
        ({}, "[generation]\ntop_p = 3", r"top_p=3 is not accepted: give a number from 0 to 1 \(off\) \(from aollm\.toml: /"),
        ({"AOLLM_GENERATION__TEMPERATURE": "-1"}, "", r"temperature=-1.0 is not accepted.*\(from AOLLM_GENERATION__TEMPERATURE\)"),
        ({"AOLLM_GENERATION__N": "17"}, "", r"n: should be less than or equal to 16 \(from AOLLM_GENERATION__N='17'\)"),
    ],
)  # fmt: skip
def test_what_is_said_wrongly(
    environment: dict[str, str], toml: str | bytes, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, environment, toml)
    with pytest.raises(ConfigError, match=message):  # whatever section is wrong
        Runtime.open("demo")
    assert main(["config", "show"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("aollm: error: "), err.count("\n")) == ("", True, 1)


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir(HERE)
    with pytest.raises(ConfigError, match=r"aollm\.toml is not a file"):
        RuntimeConfig.of("demo", {})
    monkeypatch.setenv("AOLLM_CONFIG_FILE", "/proc/self/mem")
    with pytest.raises(ConfigError, match="/proc/self/mem cannot be read: Input/output error"):
        RuntimeConfig.of("demo", {})


def test_a_wrong_argument_is_an_error_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {"AOLLM_GENERATION__TEMPERATURE": "0.5"})
    with pytest.raises(RequestError, match=r"^max_new_tokens: should be greater than or equal to 1$"):
        GenerationConfig.of(None, {"max_new_tokens": 0})
    with pytest.raises(RequestError, match=r"^stop: a text or a list of texts, not 5$"):
        GenerationConfig.of(None, {"stop": 5})
    with pytest.raises(ConfigError, match=r"^prefetch_depth: should be greater than or equal to 1$"):
        RuntimeConfig.of("demo", {"prefetch_depth": 0})
    with pytest.raises(ConfigError, match=r"^prompt_scale_tokens: a list of whole numbers, or a text such as 32,128,512, not 5$"):
        BenchmarkConfig.of({"prompt_scale_tokens": 5})


WINDOW = {"kv_cache_strategy": "sliding-window-ring-buffer", "kv_cache_window_tokens": 64}
KEPT = {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent"}


@pytest.mark.parametrize(
    ("values", "named", "without"),
    [
        ({"backend": "optimized-native", "use_specialization": False}, "use_specialization", "backend"),
        ({**WINDOW, "kv_cache_strategy": "paged"}, "kv_cache_window_tokens", "kv_cache_window_tokens"),
        ({**WINDOW, "kv_cache_window_tokens": None}, "kv_cache_window_tokens", "kv_cache_strategy"),
        ({**WINDOW, "kv_cache_strategy": "auto"}, "kv_cache_window_tokens", "kv_cache_window_tokens"),
        ({**KEPT, "kv_cache_strategy": "resident"}, "kv_cache_lifecycle", "kv_cache_lifecycle"),
        ({**KEPT, "use_cache": False}, "kv_cache_lifecycle", "use_cache"),
        ({"kv_cache_max_bytes": "1GiB"}, "kv_cache_max_bytes", "kv_cache_max_bytes"),
        ({"kv_cache_max_age_s": 60.0}, "kv_cache_max_age_s", "kv_cache_max_age_s"),
        ({"device": "cpu", "device_memory": "1GiB"}, "device_memory", "device"),
        ({"device": "cpu", "offload_gpu_layers": 3}, "offload_gpu_layers", "device"),
        ({"offload_cpu_policy": "suffix"}, "offload_cpu_policy", "offload_cpu_policy"),
        ({"offload_cpu_policy": "middle-band", "offload_gpu_layers": 1}, "offload_cpu_policy", "offload_cpu_policy"),
        ({"verbose": True, "quiet": True}, "verbose", "quiet"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], named: str, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}: "):
        RuntimeConfig.of("demo", values)
    with pytest.raises(ConfigError, match=rf"^{named}: "):
        RuntimeConfig.of(RuntimeConfig(model_reference="demo"), values)
    RuntimeConfig.of("demo", {name: value for name, value in values.items() if name != without})
    if (configured := values.pop(named, None)) is not None and named != "verbose":
        say(monkeypatch, {f"AOLLM_RUNTIME__{named.upper()}": str(configured)})
        with pytest.raises(ConfigError, match=rf"^{named}: .*{named} is from AOLLM_RUNTIME__{named.upper()}"):
            RuntimeConfig.of("demo", values)


def test_the_last_word_on_how_much_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {"AOLLM_RUNTIME__VERBOSE": "true"})
    found = RuntimeConfig.of("demo", {"quiet": True})
    assert (found.verbose, found.quiet, quiet()) == (False, True, False)
    monkeypatch.delenv("AOLLM_RUNTIME__VERBOSE")
    say(monkeypatch, {"AOLLM_RUNTIME__QUIET": "on"})
    found = RuntimeConfig.of("demo", {"verbose": True})
    assert (found.verbose, found.quiet, quiet()) == (True, False, True)


# --- aollm config show ---


def shown(*arguments: str, code: int = 0) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["config", "show", *arguments]) == code
    return out.getvalue()


def test_show_says_where_values_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {"AOLLM_RUNTIME__MEMORY": "3GiB", "AOLLM_BENCHMARK__ITERATIONS": "3"}, "[runtime]\nprefetch_depth = 4\nmemory = 5")
    found = json.loads(shown("--json", "--no-stream", "--kv-cache-strategy", "paged", "-n", "2"))
    assert found.pop("file") == str(file()) == str(Path(HERE).absolute())
    assert list(found) == list(SECTIONS)
    assert {section: list(entries) for section, entries in found.items()} == {
        **{kind.section: list(kind.model_fields) for kind in KINDS}, "server": []
    }  # fmt: skip
    rows = {name: tuple(entry.values()) for entries in found.values() for name, entry in entries.items()}
    assert rows["memory"] == (3 << 30, "AOLLM_RUNTIME__MEMORY", True)
    assert rows["prefetch_depth"] == (4, f"aollm.toml: {file()}", True)
    assert rows["kv_cache_strategy"] == ("paged", "--kv-cache-strategy", True)
    assert rows["n"] == (2, "-n", True)
    assert rows["stream"] == (False, "--no-stream", True)
    assert rows["iterations"] == (3, "AOLLM_BENCHMARK__ITERATIONS", False)
    assert rows["model_reference"] == (None, "default", False)
    assert rows["quiet"] == (False, "default", False)
    others = rows.keys() - {"memory", "prefetch_depth", "kv_cache_strategy", "n", "stream", "iterations"}
    assert {rows[name][1:] for name in others} == {("default", False)}


def test_the_table_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, {
        "AOLLM_RUNTIME__DENSE_PROJECTION_CHUNK_ROWS": "4096", "AOLLM_RUNTIME__MEMORY": "3GiB",
        "AOLLM_RUNTIME__CACHE_DIR": "/" + "long" * 40, "AOLLM_GENERATION__CACHE_SALT": "salt\n",
    })  # fmt: skip
    lines = shown().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "* memory                       3.00 GiB              AOLLM_RUNTIME__MEMORY" in lines
    assert "  device_memory                none                  default" in lines
    assert "* dense_projection_chunk_rows  4096   AOLLM_RUNTIME__DENSE_PROJECTION_CHUNK_ROWS" in lines
    assert [line[0] for line in lines if "AOLLM_" in line] == ["*", " ", "*", "*"]  # a long value's source is on a line of its own
    assert "".join(lines).count("long") >= 38
    assert lines[-1] == "* is not the default. There is no aollm.toml in this folder"


# --- every setting is read ---

PROMPT = "Once upon a time, there was a little girl"
LONG = [7 + number * number % 90 for number in range(126)]
CONTEXT = {"max_context_tokens": 128}
TOKENS = 4
ANY = object()


@dataclass(frozen=True)
class Ground:
    """A runtime on the bundled model with an adapter called `own`, in the folder `adapter`, open while this module is tested."""

    portal: BlockingPortal
    runtime: Runtime
    folder: Path
    greedy: tuple[int, ...]
    """Its answer to `PROMPT`."""


Look = Callable[[Ground, dict[str, Any]], Any]


@dataclass(frozen=True)
class Row:
    """What `look` sees with `base` differs from what it sees with `change` besides, which is `wanted` unless that may be `ANY`."""

    change: dict[str, Any]
    look: Look
    wanted: Any = ANY
    base: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    torch.manual_seed(0)
    name = "base_model.model.model.layers.2.self_attn.v_proj.lora"
    weights = {f"{name}_A.weight": torch.randn(2, 256), f"{name}_B.weight": torch.randn(64, 2)}
    (folder / "adapter").mkdir()
    save_file(weights, folder / "adapter/adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"], "layers_to_transform": [2]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(told))
    with start_blocking_portal() as portal:
        opened = portal.call(lambda: Runtime.open("demo", **CONTEXT, adapter_dir={"own": folder / "adapter"}))
        with portal.wrap_async_context_manager(opened) as runtime:
            found = portal.call(lambda: runtime.generate(PROMPT, max_new_tokens=TOKENS))
            yield Ground(portal, runtime, folder, found.token_ids)


def of(see: Callable[[Runtime], Any], model: str | Path = "demo") -> Look:
    """What is seen of a runtime, or the kind of error and what it names."""

    async def opened(fields: dict[str, Any]) -> Any:
        try:
            async with Runtime.open(model, **{**CONTEXT, **fields}) as runtime:
                return see(runtime)
        except AollmError as error:
            return type(error), str(error).partition(":")[0]

    def look(ground: Ground, fields: dict[str, Any]) -> Any:
        return ground.portal.call(opened, fields) if fields or model != "demo" else see(ground.runtime)

    return look


def plan(name: str) -> Look:
    return of(lambda runtime: getattr(runtime.plan, name))


def state(name: str) -> Look:
    return of(lambda runtime: runtime.cache_state()[name])


async def hit(stream: TokenStream) -> int:
    """Tokens of a prompt that were computed before."""
    async for _token in stream:
        pass
    assert stream.request is not None
    return stream.request.prefix_hit_tokens


def second_turn(ground: Ground, fields: dict[str, Any]) -> int:
    """Tokens of a second turn's prompt that were computed in the first."""

    async def turns() -> int:
        async with Runtime.open("demo", **CONTEXT, **fields) as runtime, runtime.session() as session:
            assert await hit(session.stream("hello", max_new_tokens=2)) == 0
            return await hit(session.stream("and then?", max_new_tokens=2))

    return ground.portal.call(turns)


def asked_again(ground: Ground, fields: dict[str, Any]) -> int:
    """Tokens of a prompt that another runtime finds 50 ms later, perhaps with another salt."""
    salt = {name: fields.pop(name) for name in list(fields) if name == "cache_salt"}

    async def asked(folder: str) -> int:
        kept = {**KEPT, "cache_dir": folder, **CONTEXT, **fields}
        async with Runtime.open("demo", **kept) as runtime:
            assert await hit(runtime.stream(LONG, max_new_tokens=1)) == 0
        await anyio.sleep(0.05)
        async with Runtime.open("demo", **kept) as runtime:
            assert runtime.cache is not None
            await runtime.cache.lifecycle.tend()
            return await hit(runtime.stream(LONG, max_new_tokens=1, **salt))

    with TemporaryDirectory() as folder:
        return ground.portal.call(asked, folder)


def with_experts(ground: Ground, fields: dict[str, Any]) -> Any:
    folder = ground.folder / "experts"
    if not folder.exists():
        tiny.save(folder, "qwen3_moe")
    return of(lambda runtime: runtime.plan.expert_slots, folder)(ground, fields)


def adapters(ground: Ground, fields: dict[str, Any]) -> Any:
    """Names of adapters, which are in the folder `ground`."""
    below = {name: {own: ground.folder / folder for own, folder in value.items()} for name, value in fields.items()}
    return of(lambda runtime: runtime.adapters)(ground, below)


def with_tower(ground: Ground, fields: dict[str, Any]) -> Any:
    from test_multimodal import save_gemma  # needs transformers' image processors

    folder = ground.folder / "tower"
    if not folder.exists():
        save_gemma(folder, 56, 4)
    return of(lambda runtime: "towers" in runtime.plan.ledger, folder)(ground, fields)


def of_the_hub(ground: Ground, fields: dict[str, Any]) -> Any:
    """What becomes of a model of the Hub that is in the folder `models`, without a network."""
    snapshot = Path("models/models--org--model/snapshots") / ("a" * 40)
    if not snapshot.exists():
        (snapshot.parents[1] / "refs").mkdir(parents=True)
        (snapshot.parents[1] / "refs/main").write_text("a" * 40)
        snapshot.parent.mkdir()
        snapshot.symlink_to(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", "/nonexistent")
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        found = of(lambda runtime: runtime.plan.model)(ground, {"model_reference": "org/model", **fields})
    return found if isinstance(found, str) else found[0]


class Pieces(io.StringIO):
    """Counts what is written to it."""

    count = 0

    def write(self, text: str) -> int:
        self.count += 1
        return super().write(text)


@cache
def ran(*said: tuple[str, str]) -> tuple[int, int]:
    """Pieces that `aollm run` writes an answer of four tokens in, and the lines that it says besides."""
    out, err = Pieces(), Pieces()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        say(patch, dict(said))
        assert main(["run", "demo", PROMPT, "--max-new-tokens", "4", "--max-context-tokens", "64"]) == 0
    return out.count, err.getvalue().count("\n")


def command(section: str, which: int) -> Look:
    return lambda ground, fields: ran(*((f"AOLLM_{section}__{name}".upper(), json.dumps(fields[name])) for name in fields))[which]


def answer(see: Callable[[Completion], Any], prompt: str | list[int] = PROMPT) -> Look:
    """What is seen of an answer of at most `TOKENS`."""

    def look(ground: Ground, fields: dict[str, Any]) -> Any:
        return see(ground.portal.call(lambda: ground.runtime.generate(prompt, **{"max_new_tokens": TOKENS, **fields})))

    return look


ids = answer(lambda found: found.token_ids)
DRAWN = {"temperature": 2.0, "seed": 1}


def likeliest(ground: Ground, fields: dict[str, Any]) -> bool:
    """Whether an answer is the greedy one."""
    return bool(ids(ground, fields) == ground.greedy)


def alternatives(ground: Ground, fields: dict[str, Any]) -> int:
    """Tokens of which the likelihood is told."""

    async def asked() -> int:
        return len((await anext(ground.runtime.stream(PROMPT, max_new_tokens=1, **fields))).top_logprobs)

    return ground.portal.call(asked)


LANE = """#!/bin/sh
printf '{"arguments": "%s", "values": {"decode": {"quiet": %s, "count": 3}}, "yardstick":' "$*" "${TOOK-1.0}"
printf '{"kind": "one", "seconds": 1.0, "drive_bytes_per_second": null}}\\n'
"""
"""In the place of a lane: says with what it was called, and that all took `TOOK` seconds."""


def benched(fields: dict[str, Any], took: str = "1.0") -> tuple[int, dict[str, Any]]:
    """The exit code of `python -m aollm.bench`, whose lanes measure nothing, and what it prints."""
    Path("lane").write_text(LANE)
    os.chmod("lane", 0o700)
    before, out = signal.getsignal(signal.SIGTERM), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(io.StringIO()):
        say(patch, {f"AOLLM_BENCHMARK__{name}".upper(): str(value) for name, value in fields.items()} | {"TOOK": took})
        code = bench([], [str(Path("lane").absolute())])
    signal.signal(signal.SIGTERM, before)
    return code, json.loads(out.getvalue())


def bench_says(see: Callable[[dict[str, Any]], Any]) -> Look:
    """What is seen of its result."""
    return lambda ground, fields: see(benched(fields)[1])


def lane_is_told(flag: str) -> Look:
    """What the lane `warm` is called with."""
    return bench_says(lambda found: found["lanes"]["warm"]["result"]["arguments"].partition(f"{flag} ")[2].partition(" ")[0])


def regressed(ground: Ground, fields: dict[str, Any]) -> int:
    """The exit code of a run that takes twice as long as the one before it."""
    assert benched({"history_dir": "earlier"})[0] == 0
    return benched({"history_dir": "earlier", **fields}, "2.0")[0]


ROWS: dict[type[Settings], dict[str, Row]] = {
    RuntimeConfig: {
        "model_reference": Row({"model_reference": str(MODEL)}, plan("model"), str(MODEL)),
        "backend": Row({"backend": "transformers-generic"}, plan("backend"), "transformers-generic"),
        "use_specialization": Row({"use_specialization": False}, plan("backend"), "transformers-generic"),
        "models_dir": Row({"models_dir": "models"}, of_the_hub, "org/model"),
        "force_download": Row({"force_download": True}, of_the_hub, ModelError, {"models_dir": "models"}),
        "memory": Row({"memory": "5GiB"}, plan("memory"), 5 << 30),
        "device": Row({"device": "cuda:77"}, of(lambda runtime: "open"), (ConfigError, "device")),
        "device_memory": Row({"device_memory": "1GiB"}, plan("device_reason")),
        "max_context_tokens": Row({"max_context_tokens": 100}, plan("max_context_tokens"), 100),
        "max_concurrent_requests": Row({"max_concurrent_requests": 3}, plan("max_concurrent_requests"), 3),
        "use_cache": Row({"use_cache": False}, second_turn, 0),
        "kv_cache_strategy": Row({"kv_cache_strategy": "chunked", "cache_dir": "kv"}, state("strategy_id"), "chunked"),
        "strategy_selector_profile": Row(
            {"strategy_selector_profile": "bounded-window"}, state("strategy_id"), "sliding-window-ring-buffer", {"cache_dir": "kv"}
        ),
        "kv_cache_adaptation_mode": Row({"kv_cache_adaptation_mode": "disabled"}, state("adaptation"), None),
        "kv_cache_lifecycle": Row({"kv_cache_lifecycle": "persistent"}, state("cache_lifecycle"), "persistent", {"cache_dir": "kv"}),
        "kv_cache_window_tokens": Row({"kv_cache_window_tokens": 65}, state("window_max_tokens"), 65, {**WINDOW, "cache_dir": "kv"}),
        "kv_cache_memory": Row({"kv_cache_memory": 300 * 1536}, plan("kv_tokens"), 300),
        "expert_memory": Row({"expert_memory": 1}, with_experts, 4),
        "multimodal": Row({"multimodal": False}, with_tower, False),
        "adapter_dir": Row({"adapter_dir": {"other": "adapter"}}, adapters, ("other",)),
        "kv_cache_max_bytes": Row(
            {"kv_cache_max_bytes": 1}, state("cache_lifecycle"), (ConfigError, "kv_cache_max_bytes"), {**KEPT, "cache_dir": "kv"}
        ),
        "kv_cache_max_age_s": Row({"kv_cache_max_age_s": 0.01}, asked_again, 0),
        "cache_dir": Row(
            {"cache_dir": "elsewhere"},
            of(lambda runtime: Path("elsewhere").exists()),
            True,
            {"kv_cache_strategy": "paged", "cache_dir": "kv"},
        ),
        "disk_backend": Row({"disk_backend": "portable"}, plan("disk_backend"), "portable"),
        "prefetch_depth": Row({"prefetch_depth": 9}, plan("ring_nbytes"), base={"offload_cpu_layers": 0}),
        "dense_projection_chunk_rows": Row({"dense_projection_chunk_rows": 33}, plan("chunk_rows"), 33),
        "offload_cpu_layers": Row({"offload_cpu_layers": 0}, plan("pinned"), frozenset()),
        "offload_cpu_policy": Row({"offload_cpu_policy": "prefix"}, plan("pinned"), frozenset({0, 1}), {"offload_cpu_layers": 1}),
        "offload_gpu_layers": Row({"offload_gpu_layers": 2}, plan("device_reason")),
        "verbose": Row({"verbose": True}, command("runtime", 1), 5),
        "quiet": Row({"quiet": True}, command("runtime", 1), 0),
    },
    GenerationConfig: {
        "max_new_tokens": Row({"max_new_tokens": 2}, answer(lambda found: found.usage.completion_tokens), 2),
        "temperature": Row({"temperature": 2.0}, likeliest, False, {"seed": 1}),
        "top_p": Row({"top_p": 0.0001}, likeliest, True, DRAWN),
        "top_k": Row({"top_k": 1}, likeliest, True, DRAWN),
        "min_p": Row({"min_p": 1.0}, likeliest, True, DRAWN),
        "repetition_penalty": Row({"repetition_penalty": 50.0}, answer(lambda found: len(set(found.token_ids)), [40] * 9)),
        "seed": Row({"seed": 2}, ids, base=DRAWN),
        "logprobs": Row({"logprobs": 3}, alternatives, 3),
        "n": Row({"n": 3}, answer(lambda found: len(found.choices)), 3),
        "stream": Row({"stream": False}, command("generation", 0), 2),
        "context_shift": Row({"context_shift": "prefill"}, answer(lambda found: len(found.token_ids), LONG), 4),
        "keep_tokens": Row({"keep_tokens": 100}, answer(lambda found: found.token_ids, LONG), base={"context_shift": "prefill", **DRAWN}),
        "cache_salt": Row({"cache_salt": "other"}, asked_again, 0),
        "adapter": Row({"adapter": "own"}, ids),
        "stop": Row({"stop": "a"}, answer(lambda found: "a" in found.text), False),
    },
    BenchmarkConfig: {
        "profile": Row({"profile": "full"}, bench_says(lambda found: "overlap-8" in found["lanes"]), True),
        "iterations": Row({"iterations": 5}, lane_is_told("--probe-iterations"), "5"),
        "prompt_scale_tokens": Row({"prompt_scale_tokens": "5,6"}, lane_is_told("--prompt-scale-tokens"), "5,6"),
        "output_scale_tokens": Row({"output_scale_tokens": [7, 8]}, lane_is_told("--output-scale-tokens"), "7,8"),
        "session_turns": Row({"session_turns": 2}, lane_is_told("--session-turns"), "2"),
        "session_max_new_tokens": Row({"session_max_new_tokens": 9}, lane_is_told("--session-max-new-tokens"), "9"),
        "history_dir": Row({"history_dir": "told"}, bench_says(lambda found: len(list(Path("told").glob("*.json")))), 1),
        "record_history": Row({"record_history": "no"}, bench_says(lambda found: found["recorded"]), None),
        "history_codebase_label": Row({"history_codebase_label": "mine"}, bench_says(lambda found: found["key"]["codebase"]), "mine"),
        "fail_on_regression": Row({"fail_on_regression": True}, regressed, 3),
        "output": Row({"output": "found.json"}, bench_says(lambda found: Path("found.json").exists()), True),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in kind.model_fields])
def test_a_setting_changes_something(kind: type[Settings], name: str, ground: Ground) -> None:
    row = ROWS[kind][name]  # "a setting that nothing reads is a defect": give it one
    assert name in row.change
    before, after = (row.look(ground, fields) for fields in ({**row.base}, {**row.base, **row.change}))
    assert before != after
    assert row.wanted is ANY or after == row.wanted


def test_no_row_is_left_over() -> None:
    assert {kind: set(rows) for kind, rows in ROWS.items()} == {kind: set(kind.model_fields) for kind in KINDS}
