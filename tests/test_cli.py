"""The command line as a person or a script meets it: real processes, their output, their exit codes."""

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import anyio
import pytest

from aollm import Completion, GenerationConfig, Runtime, RuntimeConfig
from aollm.commands import chat
from aollm.commands.completion import commands
from aollm.options import GENERATION, MODELS, NO_OPTION, RUNTIME_GROUPS
from aollm.parser import COMMANDS, parse, parsers
from aollm.reference import ALIASES
from aollm.stores.presets import PRESETS

PROGRAM = [sys.executable, "-m", "aollm"]
PLAIN = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
PROMPT = "Once upon a time"
GREEDY = ["--max-new-tokens", "24", "--max-context-tokens", "256"]
# every token is as likely as another, so that the end is far
ENDLESS = [
    "--max-new-tokens",
    "4000",
    "--max-context-tokens",
    "4096",
    "--temperature",
    "100",
    "--seed",
    "1",
]  # every token as likely as another
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


def aollm(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], input=stdin, capture_output=True, text=True, timeout=60, env=PLAIN)


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["run", "--help"], ["chat", "--help"], ["--version"], ["run", "demo", "x", "--no"], ["completion", "zsh"]]
)
def test_help_and_mistakes_are_light(arguments: list[str]) -> None:
    found = subprocess.run([sys.executable, "-X", "importtime", "-m", "aollm", *arguments], capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in found.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "pydantic", "anyio", "asyncio", "rich", "typer", "tokenizers"}


def test_help_takes_less_than_300_ms() -> None:
    """Of the processor, which is all that it takes where nothing else runs."""
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "aollm demo" in aollm("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fly"], 2, "invalid choice: 'fly'"),
        (["pln"], 2, "did you mean plan?"),
        (["run"], 2, "PROMPT, behind MODEL where none is configured"),
        (["run", "a prompt alone"], 2, "model_reference: name a model"),
        (["run", "demo"], 2, "error: PROMPT is missing: aollm run demo PROMPT\n"),
        (["run", "--max-new-tokens", "3", "/"], 2, "error: PROMPT is missing: aollm run / PROMPT\n"),
        (["run", "a prompt " * 999], 2, "model_reference: name a model"),
        (["run", "demo", "x", "--disk-backend", "gds"], 2, "not in this build yet; use one of: auto, threads, uring, portable\n"),
        (["run", "demo", "two", "words"], 2, "these are 3; put a prompt in quotes"),
        (["chat", "--max-new-tokens", "3"], 2, "model_reference: name a model"),
        (["plan", "demo", "x"], 2, "'x' is more than aollm plan takes"),
        (["plan", "demo", "--quite"], 2, "did you mean --quiet? (see aollm plan --help)"),
        (["models", "inf"], 2, "did you mean info? (see aollm models --help)"),
        (["config", "shwo", "--jsn"], 2, "did you mean show?"),
        (["completion", "ksh"], 2, "invalid choice: 'ksh' (choose from 'bash', 'zsh', 'fish')"),
        (["run", "demo", "x", "--max-new-token", "3"], 2, "did you mean --max-new-tokens?"),
        (["run", "demo", "x", "--seed", "x"], 2, "--seed: invalid int value: 'x'"),
        (["run", "demo", "x", "--max-new-tokens", "0"], 2, "max_new_tokens: should be greater than or equal to 1"),
        (["run", "demo", "x", "--memory", "3 apples"], 2, "memory: a size such as '3GiB'"),
        (["run", "demo", "x", "--trace", "/no/such/folder/trace.json"], 2, "--trace /no/such/folder/trace.json cannot be written"),
        (["run", "nowhere", "x"], 1, "nowhere does not exist"),
        (["run", "demo", "x " * 99, "--max-context-tokens", "16"], 1, "the context 16"),
        (["plan", "demo", "--memory", "1MiB"], 1, "memory=1.0 MiB is too small"),
        (["chat", "nowhere"], 1, "nowhere does not exist"),
        (["run", "demo", "x", "--kv-cache-strategy", "pagd"], 2, "kv_cache_strategy: should be 'auto', 'resident', 'chunked'"),
        (["run", "demo", "x", "--kv-cache-strategy", "pagd"], 2, "or 'tiered-write-back'; did you mean paged?\n"),
        (["config", "show", "--device", "cpi", "--memory", "1GiB"], 2, "did you mean cpu?"),
        (["run", "demo", "x", "--device", "cuda:0", "--disk-backend", "thread"], 2, "or 'portable'; did you mean threads?\n"),
        (["run", "demo", "x", "--kv-cache-strategy", "zebra"], 2, "or 'tiered-write-back'\n"),
        (["plan", "demo", "--kv-cache-strategy", "resident", "--kv-cache-lifecycle", "persistent"], 2, "choose a strategy that writes"),
        (["run", "demo", "x", "--context-shift", "turn"], 2, "context_shift: should be 'stop', 'rotate' or 'prefill'\n"),
        (["run", "demo", "x", "--context-shift", "rotat"], 2, "or 'prefill'; did you mean rotate?\n"),
        (["export", "demo", "--output", "/proc/no"], 1, "it is missing or cannot be made: choose another --output\n"),
        (["run", "demo", "x", "--image", "/nope.png"], 1, "cannot be read (No such file or directory); give the path"),
        (["plan", "demo", "--kv-cache-strategy", "paged", "--kv-cache-memory", "9kB"], 1, "kv_cache_memory=8.8 KiB is too small"),
        (["chat", "demo", "--resume", "/no/talk.json"], 2, "--resume: /no/talk.json cannot be read: No such file or directory"),
        (["chat", "demo", "--save", "/no/talk.json"], 2, "--save /no/talk.json cannot be written: there is no such folder"),
        (["run", "demo", "x", "--kv-cache-strategy", "paged", "--cache-dir", "/proc/no"], 1, "cannot be made: choose another cache_dir\n"),
        (["run", "demo", "x", "--kv-cache-strategy", "paged", "--cache-dir", __file__], 1, "remove it, or choose another cache_dir\n"),
        (["cache"], 2, "required: ACTION"),
        (["cache", "list"], 2, "invalid choice: 'list' (choose from 'ls'"),
        (["cache", "verify", "--dorp"], 2, "did you mean --drop? (see aollm cache verify --help)"),
        (["cache", "purge"], 2, "say which: aollm cache purge NAME"),
        (["cache", "pin", "a", "--all"], 2, "either a or --all, not both"),
        (["cache", "ls", "--cache-dir", "/no/such"], 2, "--cache-dir: /no/such is missing"),
        (["cache", "ls", "--cache-dir", __file__], 2, f"--cache-dir: {__file__} is not a folder"),
    ],
)  # fmt: skip
def test_exit_codes(arguments: list[str], code: int, message: str) -> None:
    found = aollm(*arguments)
    assert found.returncode == code
    assert found.stdout == ""
    assert re.fullmatch(r"aollm: error: .*\n", found.stderr), found.stderr
    assert message in found.stderr


TREE = list(commands(parsers()[0]))


@pytest.mark.parametrize("path", [command.path for command in TREE], ids=lambda path: path or "aollm")
def test_every_help_can_be_read(path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "82")
    with pytest.raises(SystemExit):
        parse([*path.split(), "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: aollm {path}".strip())
    assert "SUPPRESS" not in shown and max(map(len, shown.splitlines())) <= 82
    (command,) = [each for each in TREE if each.path == path]
    for slot in command.slots:
        assert slot.help and all(flag in shown for flag in slot.flags)


def test_every_setting_can_be_typed() -> None:
    """Each has an option of its own name, or a reason not to; what it takes arrives under that name."""
    runtime = {name: option for group in RUNTIME_GROUPS for name, option in group.options.items()}
    assert runtime.keys() | NO_OPTION.keys() == RuntimeConfig.model_fields.keys() and not runtime.keys() & NO_OPTION.keys()
    assert GENERATION.options.keys() == GenerationConfig.model_fields.keys()
    fields = {**RuntimeConfig.model_fields, **GenerationConfig.model_fields}
    for name, option in {**runtime, **GENERATION.options}.items():
        flag = option.flag or f"--{name.replace('_', '-')}"
        if option.metavar:
            value = option.words[-1] if option.words else "7"
            want = [value] if option.many else option.type(value)
            assert parse(["config", "show", flag, value])[1][name] == want
        else:
            assert fields[name].annotation is bool
            assert [parse(["config", "show", typed])[1][name] for typed in (flag, flag.replace("--", "--no-"))] == [True, False]
        if get_origin(fields[name].annotation) is Literal:
            assert option.words == get_args(fields[name].annotation)
            assert (option.default or option.words[0]) == fields[name].default
        elif option.words:
            assert [RuntimeConfig.of("demo", {name: word}) for word in option.words]


def test_what_is_completed_is_what_there_is() -> None:
    assert set(MODELS) == set(ALIASES)
    takes: dict[str, set[bool]] = {}
    for command in TREE:
        for slot in command.options:
            for flag in slot.flags:
                takes.setdefault(flag, set()).add(bool(slot.takes))
    assert {flag for flag, both in takes.items() if len(both) > 1} == set()  # the script for bash knows a flag by its name alone
    assert {command.path.split()[0] for command in TREE if command.path} == set(COMMANDS)


@pytest.mark.parametrize(
    ("typed", "model", "prompt"),
    [
        (["demo", "x"], "demo", "x"),
        (["x"], None, "x"),
        (["demo", "--memory", "3GiB", "x"], "demo", "x"),
        (["--memory", "3GiB", "demo", "x"], "demo", "x"),
        (["--memory", "3GiB", "x"], None, "x"),
        (["demo", "x", "--no-stream"], "demo", "x"),
        (["demo", "-"], "demo", "-"),
        (["demo", "--seed", "1", "-"], "demo", "-"),
        (["demo", "--seed", "1", "-5"], "demo", "-5"),
        (["demo", "--seed", "1", "- one\n- two"], "demo", "- one\n- two"),
        (["demo", "--", "--x"], "demo", "--x"),
        (["demo", "--seed", "1", "--", "--x"], "demo", "--x"),
    ],
)
def test_words_of_run(typed: list[str], model: str | None, prompt: str) -> None:
    options = parse(["run", *typed])[1]
    assert (options.get("model"), options["prompt"]) == (model, prompt)


COMPLETED = {
    "aollm |": " ".join(COMMANDS),
    "aollm co|": "config completion",
    "aollm run --back|": "--backend",
    "aollm run --backend |": "auto optimized-native transformers-generic",
    "aollm run --backend = opt|": "optimized-native",
    "aollm run --backend =|": "auto optimized-native transformers-generic",
    "aollm run --memory 3GiB gem|": "gemma3-12B",
    "aollm run --memory |": "",
    "aollm run demo |": "",
    "aollm plan demo --kv-cache-strategy p|": "paged",
    "aollm models |": "ls info",
    "aollm models info fol|": "folder",
    "aollm chat --cache-dir f|": "folder",
    "aollm run --image f|": "file folder",
    "aollm cache verify --d|": "--drop",
    "aollm completion |": "bash zsh fish",
}


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    script = tmp_path / "script"
    script.write_text(aollm("completion", "bash").stdout)
    (tmp_path / "folder" / "script").write_text(
        'source "$1"; while read -r -d "" line; do IFS=" "; line="${line%|}"; COMP_WORDS=($line)\n'
        'if [[ $line == *" " ]]; then COMP_WORDS+=(""); fi; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _aollm\n'
        'IFS=" "; echo "${COMPREPLY[*]}"; done\n'
    )
    found = subprocess.run(
        ["bash", str(tmp_path / "folder" / "script"), str(script)], input="".join(f"{line}\0" for line in COMPLETED),
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert found.stderr == ""
    got = [" ".join(sorted(line.split())) for line in found.stdout.split("\n")[:-1]]
    assert dict(zip(COMPLETED, got, strict=True)) == {line: " ".join(sorted(words.split())) for line, words in COMPLETED.items()}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_script(shell: str, tmp_path: Path) -> None:
    script = aollm("completion", shell).stdout
    assert script.count("qwen3-next-80B") and script.count("full-history") == 0 and "bounded-window" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).stderr == b""


@pytest.fixture(scope="module")
def expected() -> dict[str, Completion]:
    """The runtime's own greedy answers: to the prompt as text, and as a message."""

    async def ask() -> dict[str, Completion]:
        async with Runtime.open("demo", max_context_tokens=256) as runtime:
            message = [{"role": "user", "content": PROMPT}]
            return {"text": await runtime.generate(PROMPT, max_new_tokens=24), "chat": await runtime.generate(message, max_new_tokens=24)}

    return anyio.run(ask)


def test_run_writes_the_answer(expected: dict[str, Completion]) -> None:
    answer = expected["text"]
    found = aollm("run", "demo", "-", *GREEDY, "--offload-cpu-layers", "1", stdin=PROMPT + "\n")
    assert (found.returncode, found.stdout) == (0, answer.text + "\n")
    assert found.stderr.startswith(f"{answer.usage.completion_tokens} tokens in ")
    assert found.stderr.count("\n") == 1
    assert "\x1b" not in found.stdout + found.stderr


def test_a_model_may_be_configured(expected: dict[str, Completion]) -> None:
    given = {**PLAIN, "AOLLM_RUNTIME__MODEL_REFERENCE": "demo", "AOLLM_RUNTIME__QUIET": "true"}
    found = subprocess.run([*PROGRAM, "run", *GREEDY, PROMPT], capture_output=True, text=True, timeout=60, env=given)
    assert (found.returncode, found.stdout, found.stderr) == (0, expected["text"].text + "\n", "")


def test_a_missing_package_is_named() -> None:
    found = subprocess.run(
        [sys.executable, "-S", "-m", "aollm", "run", "demo", "x"], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (1, "")
    assert re.fullmatch(r"aollm: error: \w+ is not installed: pip install aollm; .*aollm doctor.*\n", found.stderr)


def test_run_quietly_with_the_chat_template(expected: dict[str, Completion]) -> None:
    found = aollm("run", "demo", PROMPT, *GREEDY, "--chat", "--quiet")
    assert expected["chat"].token_ids != expected["text"].token_ids
    assert (found.returncode, found.stdout, found.stderr) == (0, expected["chat"].text.rstrip("\n") + "\n", "")


def test_run_json_and_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = aollm(
        "run", "demo", PROMPT, *GREEDY, "--json", "-n", "2", "--temperature", "1", "--seed", "3", "--stop", "zzzz", "--stop", "yyyy",
        "--offload-cpu-layers", "1", "--trace", str(trace), "--logprobs", "2",
    )  # fmt: skip
    answer = json.loads(found.stdout)
    assert len(answer["choices"]) == 2
    assert answer["tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])
    assert answer["text"] == answer["choices"][0]["text"] != answer["choices"][1]["text"]
    for choice in answer["choices"]:
        assert [len(each["likeliest"]) for each in choice["logprobs"]] == [2] * len(choice["token_ids"])
        for each in choice["logprobs"]:
            assert each["logprob"] <= each["likeliest"][0][1] <= 0 and each["likeliest"][1][1] <= each["likeliest"][0][1]
    assert answer["bytes_read"] >= answer["plan"]["streamed_nbytes_per_pass"] * (answer["passes"] - 1) > 0
    assert {event["cat"] for event in json.loads(trace.read_text())["traceEvents"]} >= {"safetensor_pread", "compute", "stall"}


def running(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN)


@pytest.mark.parametrize("placement", [[], ["--offload-cpu-layers", "1"]], ids=["in-memory", "streamed"])
def test_interrupt_keeps_what_was_written(placement: list[str]) -> None:
    with running("run", "demo", PROMPT, *ENDLESS, *placement) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(first + rest) > 1 and rest.endswith(b"\n")
    assert re.fullmatch(rb"\d+ tokens? in .*\n", told)
    assert int(told.split()[0]) < 4000


def test_closed_pipe_ends_quietly() -> None:
    with running("run", "demo", PROMPT, *ENDLESS) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["completion", "bash"], ["run", "demo", PROMPT, *GREEDY]])
def test_an_output_that_is_full_is_a_failure(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run([*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=PLAIN)
    assert (found.returncode, found.stderr.splitlines()[-1]) == (1, "aollm: error: the output cannot be written: No space left on device")
    assert "Traceback" not in found.stderr


def test_demo_runs_to_its_end() -> None:
    start = time.perf_counter()
    found = aollm("demo")
    assert time.perf_counter() - start < 20
    assert (found.returncode, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout
    assert "Once upon a time" in found.stdout
    for lane in ("reads", "compute", "stalls"):
        assert re.search(rf"^  {lane} .*[▁▂▃▄▅▆▇█].* +\d+%$", found.stdout, re.MULTILINE)
    speeds = re.findall(r"([\d.]+) tokens/s", found.stdout)
    assert len(speeds) == 2 and all(float(speed) > 0 for speed in speeds)
    assert re.search(r"[\d.]+ MB a pass", found.stdout)
    assert found.stdout.count("  · ") == 4


def test_plan_reads_no_weights() -> None:
    found = aollm("plan", "demo", "--offload-cpu-layers", "1", "--max-context-tokens", "256", "--json")
    plan = json.loads(found.stdout)
    assert plan["pinned_nbytes"] + plan["streamed_nbytes_per_pass"] == plan["weights_nbytes"]
    assert plan["predicted"]["drive_bytes_per_second"] > 0
    assert plan["kv_nbytes_per_context"] == 256 * plan["kv_nbytes_per_token"] == 256 * 1536
    assert sum(plan["ledger"].values()) <= plan["memory"]
    told = aollm("plan", "demo", "--offload-cpu-layers", "1", "--max-context-tokens", "256").stdout
    strip = next(line.strip() for line in told.splitlines() if "░░" in line)
    assert strip == "".join({"host": "█", "disk": "░"}[place] for place in plan["placement"])


def test_chat_over_a_pipe(tmp_path: Path) -> None:
    kept, broken = tmp_path / "talk.json", tmp_path / "broken.json"
    broken.write_text('{"messages": [{"role": 3}]}')
    lines = [
        "/stats", "hello", "", f"/save {kept}", "/stats", "/reset", "/stats", "/sing", "/save", f"/load {broken}", f"/load {tmp_path}/none",
        f"/load {kept}", "/stats", f"/save {kept}", "/help", "/quit", "never read",
    ]  # fmt: skip
    found = aollm("chat", "demo", "--max-new-tokens", "8", "--max-context-tokens", "512", "--system", "Be brief.", stdin="\n".join(lines))
    assert found.returncode == 0
    saved = json.loads(kept.read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["model"] == "demo"
    assert found.stdout == saved["messages"][2]["content"].rstrip("\n") + "\n"
    told = [line for line in found.stderr.splitlines() if not line.startswith(("/", "system:", "user:", "assistant:"))]
    assert [line.split(",")[0].split(" · ")[0] for line in told] == [
        "demo: type a message",
        "1 message",
        f"saved 3 messages in {kept}",
        "3 messages",
        "forgotten",
        "1 message",
        "aollm: error: there is no such command; there are /save",
        "aollm: error: give the name of a file",
        f"aollm: error: {broken} is no transcript: each message takes a role and a content",
        f"aollm: error: {tmp_path}/none cannot be read: No such file or directory",
        f"going on with 3 messages of {kept}",
        "3 messages",
        f"saved 3 messages in {kept}",
    ]
    none = [line.partition(" · ")[0] for line in told if line.endswith(" · there has been no answer yet")]
    assert none == ["1 message", "1 message", "3 messages"]  # before the first, after it was forgotten, of another conversation
    assert sorted(tmp_path.iterdir()) == [broken, kept]  # nothing half-written is left


def test_plan_tells_of_the_kv_cache(tmp_path: Path) -> None:
    disk = ["--kv-cache-strategy", "quantized-cold-tier", "--kv-cache-memory", "8MiB", "--cache-dir", str(tmp_path)]
    told = aollm("plan", "demo", *disk, "--kv-cache-lifecycle", "persistent", "--kv-cache-max-bytes", "2GiB").stdout
    assert re.search(r"kv cache +quantized-cold-tier, persistent: 1.54 kB a token, 5,461 tokens in memory\n", told)
    assert f"whole blocks go to {tmp_path}/kv_cache_quantized_cold_tier as int8-symmetric-per-tensor, 2.00 GiB at most\n" in told
    assert list(tmp_path.iterdir()) == []
    assert re.search(r"\n  context +131,072 tokens a request, 201 MB of keys and values\n", told) and "chosen by" not in told
    window = ["--kv-cache-strategy", "sliding-window-ring-buffer", "--kv-cache-window-tokens", "1000", "--cache-dir", str(tmp_path)]
    assert "131,072 tokens a request, 1.54 MB of keys and values\n" in aollm("plan", "demo", *window).stdout
    told = aollm("plan", "demo", "--max-context-tokens", "256", "--offload-cpu-layers", "99").stdout
    assert re.search(r"kv cache +resident, runtime-scoped: 1.54 kB a token, [\d,]+ tokens in memory for all requests together\n", told)
    known = r"[\d.]+ [MG]B of memory for keys and values, 393 kB for the 256 tokens that were asked for, [\d.]+ [MGT]B free on the drive"
    assert re.search(rf"\n +chosen by the rule balanced.fits: .*\n +from {known}: resident, else paged\n", told)
    assert re.search(r"cpu-offload: 12 of 14 pieces stay in memory: all 6 layers, of 99 asked for\n", told)
    told = aollm("plan", "demo", "--kv-cache-lifecycle", "persistent", "--offload-cpu-layers", "6").stdout
    assert re.search(r"\n +from .*, 201 MB for the 131,072 tokens that the model can have, .*: paged, else none\n", told)
    assert "cpu-offload: 12 of 14 pieces stay in memory\n" in told


LONG = " ".join([PROMPT, "there was a kind duck named Wilma. She lived in a green garden and was never afraid of the fox. " * 60])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a prompt of more than a block, left by two runs of which the second had it all."""
    folder = tmp_path_factory.mktemp("cache")
    kept = ["--kv-cache-strategy", "paged", "--kv-cache-lifecycle", "persistent", "--cache-dir", str(folder), "--max-new-tokens", "4"]
    first = json.loads(aollm("run", "demo", LONG, *kept, "--json").stdout)
    second = json.loads(aollm("run", "demo", LONG, *kept, "--json").stdout)
    assert first["cache_state"]["prefix_hit_tokens"] == 0
    assert second["cache_state"]["prefix_hit_tokens"] > 1024
    assert second["token_ids"] == first["token_ids"]
    other = aollm("run", "demo", LONG, *kept, "--cache-salt", "another")
    assert "0 of " in other.stderr and "came from the KV cache (nothing is stored" in other.stderr
    return folder


def cache(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of `aollm cache`, and what it found."""
    found = aollm("cache", *arguments, "--cache-dir", str(folder), "--json")
    assert found.stderr == ""
    return found.returncode, json.loads(found.stdout)


def test_a_cache_is_listed_pinned_and_purged(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stored, folder)
    code, (entry,) = cache(folder, "ls")
    assert (code, entry["strategy"], entry["in_use"], entry["pinned"], entry["error"]) == (0, "paged", False, 0, None)
    assert entry["tokens"] > 2048 and entry["disk_bytes"] >= entry["bytes"] > 2048 * 1536
    name = Path(entry["path"]).name
    told = aollm("cache", "ls", "--cache-dir", str(folder)).stdout
    assert re.search(rf"^{name[:12]}  {entry['identity'][:12]}  paged +{entry['blocks']} +{entry['tokens']:,} ", told, re.MULTILINE)
    assert cache(folder, "pin", name[:6])[1][0]["became"] == "pinned"
    assert cache(folder, "ls", entry["identity"][:4])[1][0]["pinned"] == entry["blocks"]
    assert cache(folder, "unpin", "--all")[1][0]["became"] == "unpinned"
    missing = aollm("cache", "purge", "zz", "--cache-dir", str(folder))
    assert (missing.returncode, missing.stdout) == (1, "") and "has a name that begins with 'zz'" in missing.stderr
    with open(Path(entry["path"]) / "LOCK") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cache(folder, "purge", name)[1][0]["became"] == "in use"
        assert [code for code, _ in (cache(folder, "purge", name), cache(folder, "pin", name))] == [1, 1]
        assert "in use" in aollm("cache", "ls", "--cache-dir", str(folder)).stdout
        assert cache(folder, "verify") == (0, [{**cache(folder, "verify")[1][0], "in_use": True, "bytes": 0}])
    left = folder / "kv_cache_paged" / "scratch-0123456789abcdef"
    left.mkdir(mode=0o700)
    (left / "data").write_bytes(bytes(4096))
    assert "left by a run that was ended" in aollm("cache", "ls", "--cache-dir", str(folder)).stdout
    code, gone = cache(folder, "purge", "--all")
    assert (code, [entry["became"] for entry in gone]) == (0, ["removed"] * 2)
    assert cache(folder, "ls") == (0, []) and not left.exists() and not Path(entry["path"]).exists()
    assert aollm("cache", "ls", "--cache-dir", str(folder)).stdout == f"nothing is stored in {folder}\n"


def test_damage_is_found_and_dropped(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stored, folder)
    code, (entry,) = cache(folder, "verify")
    assert (code, entry["good"], entry["damaged"], entry["error"]) == (0, entry["blocks"], 0, None)
    assert entry["bytes"] == cache(folder, "ls")[1][0]["bytes"]
    data = next(path for path in Path(entry["path"]).iterdir() if path.name not in ("LOCK", "manifest"))
    with open(data, "r+b") as file:
        file.seek(4096 + 100)
        byte = file.read(1)
        file.seek(4096 + 100)
        file.write(bytes([byte[0] ^ 1]))
    code, (found,) = cache(folder, "verify")
    assert (code, found["good"], found["damaged"], found["dropped"]) == (1, entry["blocks"] - 1, 1, 0)
    assert "checksum: a payload was damaged" in found["error"]
    told = aollm("cache", "verify", "--cache-dir", str(folder))
    assert told.returncode == 1 and "1 block cannot be used; --drop removes them" in told.stdout
    code, (found,) = cache(folder, "verify", "--drop")
    assert (code, found["damaged"]) == (0, 1) and found["dropped"] >= 1
    code, (left,) = cache(folder, "verify")
    assert (code, left["good"], left["blocks"]) == (0, entry["blocks"] - found["dropped"], entry["blocks"] - found["dropped"])


def test_one_unusable_folder_does_not_hide_the_others(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stored, folder)
    (folder / "kv_cache_chunked").symlink_to("/tmp")
    found = aollm("cache", "ls", "--cache-dir", str(folder))
    assert found.returncode == 1 and "paged" in found.stdout
    assert re.fullmatch(r"aollm: error: .*kv_cache_chunked is a symbolic link or not a folder; .*\n", found.stderr)


@pytest.mark.parametrize("strategy", ["auto", "pagd", *PRESETS])
def test_a_conversation_is_kept_by_all_that_writes(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {} if strategy == "resident" else {"kv_cache_lifecycle": "persistent"}
    monkeypatch.setitem(PRESETS, "another name", PRESETS.get(strategy, PRESETS["paged"]))
    for name in (strategy, "another name"):
        assert chat._defaults({"save": "talk.json", "kv_cache_strategy": name}, None) == kept


def test_a_conversation_goes_on_in_another_run(tmp_path: Path) -> None:
    talk, folder = tmp_path / "talk.json", ["--cache-dir", str(tmp_path / "cache"), "--max-new-tokens", "24"]
    lines = ["Hello, my name is Vera.", "The secret number of Mira is 4817.", "Tell me a story about a fox."]
    found = aollm("chat", "demo", *folder, "--save", str(talk), stdin="\n".join(lines))
    assert (found.returncode, "error" in found.stderr) == (0, False)
    saved = json.loads(talk.read_text())
    assert [message["content"] for message in saved["messages"]][::2] == lines
    assert saved["settings"] | {"cache_dir": ""} == {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent", "cache_dir": ""}

    again = aollm("chat", *folder, "--resume", str(talk), stdin="What is the secret number of Mira?\n/stats\n")  # the model's name is in it
    reused = re.search(r"^(\d+) of (\d+) prompt tokens came from the KV cache \(.*\)$", again.stderr, re.MULTILINE)
    assert reused is not None and int(reused[2]) > int(reused[1]) > int(reused[2]) - 20
    assert json.loads(talk.read_text()) == saved
    plain = aollm(
        "chat", "demo", *folder, "--resume", str(talk), "--kv-cache-strategy", "resident", stdin="What is the secret number of Mira?"
    )
    assert "0 of " in plain.stderr and "nothing is kept between runs" in plain.stderr
    assert plain.stdout == again.stdout

    elsewhere = aollm("chat", "demo", "--cache-dir", str(tmp_path / "other"), "--resume", str(talk), stdin="")
    assert f"its KV cache was kept with --cache-dir {tmp_path}/cache, not {tmp_path}/other" in elsewhere.stderr
    talk.write_text(json.dumps({**saved, "model": "another"}))
    other = aollm("chat", "demo", *folder, "--resume", str(talk), stdin="")
    assert "the transcript is of the model another: demo reads all of it anew" in other.stderr
    refused = aollm("chat", "demo", "--save", str(talk), stdin="hello")
    assert (refused.returncode, "is there already" in refused.stderr) == (2, True)


def test_chat_keeps_kv_between_turns_and_forgets_what_was_not_answered(tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    lines = ["Hello.", "/stats", "too long " * 300, f"/save {talk}", "What is 3 + 4?", "/stats"]
    found = aollm("chat", "demo", "--max-new-tokens", "16", "--max-context-tokens", "256", stdin="\n".join(lines))
    assert len(json.loads(talk.read_text())["messages"]) == 2
    stats = re.findall(r"(\d+) messages · .* · (\d+) of (\d+) prompt tokens came from the KV cache.* · KV resident: ", found.stderr)
    assert stats[0][:2] == ("2", "0") and stats[1][0] == "4"
    assert 0 < int(stats[1][1]) < int(stats[1][2])
    assert "aollm: error: the prompt has" in found.stderr


def test_an_answer_without_a_word_is_forgotten_with_its_question(tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    lines = ["Hello, my name is Vera.", f"/save {talk}", "What is 3 + 4?", f"/save {talk}"]
    found = aollm("chat", "demo", "--max-new-tokens", "16", "--max-context-tokens", "256", "--stop", "Hello", stdin="\n".join(lines))
    assert [f"saved {count} in {talk}" in found.stderr for count in ("0 messages", "2 messages")] == [True, True]
    assert json.loads(talk.read_text())["messages"][0]["content"] == "What is 3 + 4?"


class Typist:
    """A process with a terminal of its own, in which a person types."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._terminal, other = pty.openpty()
        opened = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(other)]  # who opens it first is who gets its Ctrl-C
        self.process = subprocess.Popen(
            [*opened, *PROGRAM, *arguments], env={**PLAIN, "TERM": "xterm", **environment}, start_new_session=True
        )
        self._other = other  # kept open, or reading would fail before the process has opened its own
        self.shown, self._seen = b"", 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.wait()

    def until(self, text: bytes, timeout_s: float = 30, press: bytes = b"") -> None:
        """Read until `text` is shown, behind what was waited for before; `press` a key each second, as one does.

        The line editor loses a Ctrl-C that comes just before it begins to wait for keys.
        """
        end, pressed = time.monotonic() + timeout_s, 0.0
        while (found := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end, self.shown
            if press and time.monotonic() > pressed + 1:
                self.type(press)
                pressed = time.monotonic()
            self._read(0.1)
        self._seen = found + len(text)

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def end(self) -> int:
        """Read what is left; the exit code."""
        code = self.process.wait(timeout=30)
        os.close(self._other)
        with contextlib.suppress(OSError):
            while self._read(1):
                pass
        os.close(self._terminal)
        return code

    def _read(self, timeout_s: float) -> bytes:
        got = os.read(self._terminal, 65536) if select.select([self._terminal], [], [], timeout_s)[0] else b""
        self.shown += got
        return got


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["colour", "no-colour", "dumb"])
def test_a_terminal_shows_a_status(environment: dict[str, str]) -> None:
    with Typist("run", "demo", PROMPT, *GREEDY, "--offload-cpu-layers", "1", **environment) as typist:
        assert typist.end() == 0, typist.shown
    assert bool(COLOUR.search(typist.shown)) == (not environment)
    assert (b"\x1b7" in typist.shown) == ("TERM" not in environment)
    assert (b"loading" in typist.shown) == ("TERM" not in environment)
    assert re.search(rb"24 tokens in .* tokens/s", typist.shown)


def test_chat_in_a_terminal_survives_interrupts() -> None:
    with Typist("chat", "demo", *ENDLESS, NO_COLOR="1") as typist:
        typist.until(b"> ")
        typist.type(b"half a li")
        typist.until(b"half a li")
        typist.until(b"/quit leaves", press=b"\x03")
        typist.until(b"> ")
        typist.type(b"hello\r")
        typist.until(b"tokens/s")
        typist.type(b"\x03")
        typist.until(b"what was said is kept")
        typist.until(b"> ")
        typist.type(b"/stats\r")
        typist.until(b"2 messages")
        typist.until(b"> ")
        typist.type(b"\x04")
        assert typist.end() == 0, typist.shown
