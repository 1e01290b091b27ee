"""`aollm demo`: the bundled model, most of it read from disk for every token, and what can be seen of that.

All figures are measured while it runs. It takes some seconds: what is slow is cut short.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import anyio
import psutil

from ..errors import first_of
from ..lanes import last_passes, picture
from ..meter import Meter, amount, count, memory, opening, rate, speed
from ..runtime import Runtime
from ..terminal import Row, Terminal

PROMPT = "Once upon a time"
PROMPTS = (
    "Once upon a time, in a small village,",
    "One rainy Sunday, a young girl named",
    "Once upon a time there was a brave fox",
    "Once upon a time, a clever boy named",
)
TOKENS, TOGETHER_TOKENS = 96, 48
TEMPERATURE, SEED = 0.5, 7
PART_S = 5.0
"""Each part ends after so many seconds, whatever the machine."""
ROOM = 128 << 20
"""Memory beyond what the libraries already hold: stream buffers, KV, activations and slack."""
STEP = 16 << 20
LIMITS = {"disk": "reading from the drive", "memory": "reading weights from memory", "compute": "computing"}
NEXT = (
    ('aollm run demo "Once upon a time there was"', "the same model, all in memory"),
    ("aollm chat demo", "talk with it (it is very small)"),
    ("aollm plan MODEL_FOLDER --memory 8GiB", "what a large model of yours would need"),
    ('aollm run MODEL_FOLDER "Dear Sir," --memory 8GiB', "run it, however large it is"),
)


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Show one answer being streamed, its passes as lanes, and four answers that share the passes."""
    limit = -(-(psutil.Process().memory_info().rss + ROOM) // STEP) * STEP
    try:
        anyio.run(_show, terminal, limit)
    except BaseExceptionGroup as raised:
        raise first_of(raised) from raised
    return 0


async def _show(terminal: Terminal, limit: int) -> None:
    runtime = Runtime.open("demo", memory=limit, offload_cpu_layers=1, max_context_tokens=1024, max_concurrent_requests=len(PROMPTS))
    terminal.status(lambda: opening(runtime))
    async with runtime:
        terminal.status(None)
        _introduce(terminal, runtime)
        one = await _write_one(terminal, runtime)
        _draw_passes(terminal, runtime)
        _tell_figures(terminal, runtime, one)
        await _write_together(terminal, runtime, one["tokens_per_second"])
    terminal.line()
    terminal.line([("  Next", "bold")])
    for command, meaning in NEXT:
        terminal.line([(f"    {command:<52}", "cyan"), (meaning, "dim")])


def _introduce(terminal: Terminal, runtime: Runtime) -> None:
    plan = runtime.plan
    streamed = plan.streamed_nbytes_per_pass
    terminal.line()
    terminal.line([("  aollm", "bold"), ("  a language model, read from disk as it writes", "")])
    terminal.line()
    way = "past the page cache, " if plan.disk_backend in ("threads", "uring") else ""
    told = (
        f"The bundled model has {amount(plan.weights_nbytes)} of weights and would fit, but here only one layer may stay in memory: "
        f"the other {amount(streamed)} ({streamed / plan.weights_nbytes:.0%}) are read again for every token, {way}"
        "just as a model larger than memory is."
    )
    for line in textwrap.wrap(told, min(terminal.width - 4, 98)):
        terminal.line([(f"  {line}", "dim")])
    terminal.line()


async def _write_one(terminal: Terminal, runtime: Runtime) -> dict[str, Any]:
    """One answer, as it comes; returns its figures."""
    meter, paragraph = Meter(runtime), Paragraph(terminal.width)
    stream = runtime.stream(PROMPT, max_new_tokens=TOKENS, temperature=TEMPERATURE, seed=SEED)
    terminal.text(paragraph.push(PROMPT))
    terminal.status(lambda: [(), meter.live(stream.progress)])
    async with stream:
        async for token in stream:
            meter.add()
            terminal.text(paragraph.push(token.text))
            if perf_counter() - meter.start > PART_S:
                break
    terminal.status(None)
    terminal.text(paragraph.push(" ") + "\n\n")
    return meter.figures()


def _draw_passes(terminal: Terminal, runtime: Runtime) -> None:
    """The last two passes, in which two tokens were made."""
    events = runtime.trace.between(0, perf_counter())
    bounds = last_passes(events, runtime.plan.pieces[0], 2)
    if bounds:
        terminal.line([("  The last passes over the weights: drive and processor at work at the same time", "bold")])
        for row in picture(events, bounds, min(terminal.width - 20, 80)):
            terminal.line(row)
        terminal.line()


def _tell_figures(terminal: Terminal, runtime: Runtime, one: Mapping[str, Any]) -> None:
    seconds, bound = one["seconds"], one["fraction_of_bound"] or 0.0
    read, a_pass = amount(one["bytes_read"]), amount(one["bytes_read"] / max(one["passes"], 1))
    rows = [
        ("speed", f"{speed(one['tokens_per_second'])}: {count(one['tokens'], 'token')} in {seconds:.1f} s"),
        ("read", f"{read} at {rate(one['bytes_read_per_second'])}, {a_pass} a pass, by {runtime.plan.disk_backend}"),
        ("stalled", f"{one['stall_share']:.0%} of the time, computing waited for the drive"),
        ("limit", f"{LIMITS[one['limiter']]}: that alone takes {bound * seconds:.1f} s, so this ran at {bound:.0%} of what can be had"),
        ("memory", memory(runtime).removeprefix("memory ") + f", of which {amount(runtime.plan.pinned_nbytes)} are weights that stay"),
    ]
    for name, value in rows:
        terminal.line([(f"  {name:<8}", ""), (value, "cyan")])
    terminal.line()


async def _write_together(terminal: Terminal, runtime: Runtime, alone: float) -> None:
    """Several answers at once; each pass over the weights serves them all."""
    meter = Meter(runtime)
    answers = list(PROMPTS)
    streams = [
        runtime.stream(prompt, max_new_tokens=TOGETHER_TOKENS, temperature=TEMPERATURE, seed=SEED + number)
        for number, prompt in enumerate(PROMPTS)
    ]

    async def write(number: int) -> None:
        async with streams[number] as stream:
            async for token in stream:
                meter.add()
                answers[number] += token.text

    def rows() -> list[Row]:
        tails = [" ".join(answer.split())[-terminal.width + 6 :] for answer in answers]
        return [*([("    ", ""), (tail, "")] for tail in tails), (), meter.live(max(stream.progress for stream in streams))]

    terminal.line([(f"  Now {len(PROMPTS)} answers at once: they share each pass, so the drive reads no more than for one", "bold")])
    terminal.status(rows)
    with anyio.move_on_after(PART_S):
        async with anyio.create_task_group() as group:
            for number in range(len(streams)):
                group.start_soon(write, number)
    found = meter.figures()
    terminal.status(None)
    for answer in answers:
        for line in textwrap.wrap(answer, min(terminal.width - 4, 100), initial_indent="  · ", subsequent_indent="    "):
            terminal.line([(line, "")])
    together, a_token = found["tokens_per_second"], found["bytes_read"] / max(found["tokens"], 1)
    terminal.line()
    terminal.line([("  together ", ""), (f"{speed(together)}, {together / alone:.1f} × one alone; {amount(a_token)} read a token", "cyan")])


class Paragraph:
    """Text that comes in bits, indented and broken between words."""

    def __init__(self, width: int) -> None:
        self._width = min(width - 2, 100)
        self._column, self._word = 0, ""

    def push(self, text: str) -> str:
        """What can be written now: all but the word that is not complete yet."""
        *words, self._word = re.split(r"(?=\s)", self._word + text)
        written = ""
        for word in words:
            word = word.replace("\n", " ")
            if not self._column or self._column + len(word) > self._width:
                written += ("\n  " if self._column else "  ") + word.lstrip()
                self._column = 2 + len(word.lstrip())
            else:
                written += word
                self._column += len(word)
        return written
