"""`aollm plan`: what a run would keep, stream, take and need; from headers, and short measurements of drive and processor."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import anyio

from ..buffers import size
from ..compute import BUSY, processors
from ..meter import LIMITERS, amount, duration, rate, speed
from ..outlook import Outlook
from ..planning import look
from ..runtime_plan import RuntimePlan
from ..selector import Inputs
from ..settings import RuntimeConfig
from ..stores.presets import PRESETS
from ..survey import Survey
from ..terminal import Terminal, spinner
from . import runtime_config

BLOCKS = {"host": "█", "device": "▓", "disk": "░"}


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the plan. Raises `AollmError` when the model cannot be used, or not in this memory."""
    config = runtime_config(options)
    load = os.getloadavg()[0]  # before anything of this is counted
    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), ("reading headers, measuring drive and processor", "dim")]])
    outlook = anyio.run(look, config)
    terminal.status(None)
    if options.get("json"):
        terminal.text(json.dumps(outlook.plan.as_dict()) + "\n")
    else:
        _print(terminal, outlook.found.config if outlook.found is not None else config, outlook, load)
    return 0


def _print(terminal: Terminal, config: RuntimeConfig, outlook: Outlook, load: float) -> None:
    plan = outlook.plan
    noisy = plan.predicted is not None and load > processors() * BUSY
    busy = [("load", f"{load:.1f} on {processors()} processors: others compute, and what was measured now is too low")] if noisy else []
    terminal.line()
    terminal.line([(f"  {plan.model}", "bold"), (f"  {plan.family}, {plan.dtype}, {amount(plan.weights_nbytes)} of weights", "")])
    terminal.line()
    width = min(terminal.width - 4, 80)
    strip = "".join(BLOCKS[place] for place in plan.placement)
    for at in range(0, len(strip), width):
        terminal.line([(f"  {strip[at : at + width]}", "cyan")])
    streamed = amount(plan.streamed_nbytes_per_pass)
    kept = "█ stays in memory" + (f", ▓ on {plan.device}" if "device" in plan.placement else "")
    terminal.line([(f"  {kept}: {amount(plan.pinned_nbytes)}   ░ is read in every pass: {streamed}", "dim")])
    terminal.line()
    for name, nbytes in plan.ledger.items():
        terminal.line([(f"  {name:<28}", ""), (f"{size(nbytes):>12}", "cyan")])
    terminal.line([(f"  {'memory, of at most':<28}", ""), (f"{size(sum(plan.ledger.values())):>12} of {size(plan.memory)}", "cyan")])
    terminal.line()
    wide = max(terminal.width - 15, 40) if terminal.interactive else 1 << 20  # in a file a line stays whole
    for name, value in (*_tier(plan), *_rows(config, plan, outlook.found), *_foretold(plan), *busy):
        for number, part in enumerate(textwrap.wrap(value, wide, break_on_hyphens=False)):
            terminal.line([(f"  {'' if number else name:<13}", ""), (part, "cyan")])
    terminal.line()


def _tier(plan: RuntimePlan) -> Iterator[tuple[str, str]]:
    """What answers, why it is not our own layers if it is not, and what is to be seen of those that are."""
    yield "tier", plan.backend
    if plan.specialization_reason is not None:
        yield "", f"{plan.specialization_state}: {plan.specialization_reason}"
    for number, planned in enumerate(plan.passes):
        yield "passes" if not number else "", f"{planned.id}: {planned.reason}"


def _rows(config: RuntimeConfig, plan: RuntimePlan, found: Survey | None) -> Iterator[tuple[str, str]]:
    """What is there besides layers, and how much fits."""
    if found is not None and not found.checkpoint.files:
        yield "weights", "not here: their sizes are those that config.json and the index make of them"
    if found is not None and plan.experts:
        counts, tops = _experts(found)
        yield "experts", f"{plan.expert_slots:,} of {plan.experts:,} have room, {max(tops)} of {max(counts)} are read a layer and token"
    if found is not None and found.tower is not None:
        yield found.tower.kind, f"{amount(sum(piece.read_nbytes for piece in found.tower_pieces))} of weights, read once for each"
    if found is not None and found.adapters.names:
        yield "adapters", ", ".join(found.adapters.names)
    full = f", {amount(plan.kv_nbytes_per_context)} of keys and values" if plan.kv_nbytes_per_context else ""
    yield "context", f"{plan.max_context_tokens:,} tokens a request{full}"
    yield from zip(("kv cache", ""), _kv(config, plan), strict=True)
    if (chosen := plan.selection) is not None:
        yield "", f"chosen by the rule {chosen.rule}: {chosen.text}"
        yield "", f"from {', '.join(_inputs(chosen.inputs))}: {', else '.join((chosen.choice, *(chosen.fallbacks or ('none',))))}"
        for tried in chosen.tried:
            yield "", f"not {tried.strategy}: {tried.reason}"
    yield "device", f"{plan.device}: {plan.device_reason}"
    for line, nbytes in plan.device_ledger.items() if plan.device_memory else ():
        yield "", f"{line} {size(nbytes)} of {size(plan.device_memory)}"
    yield "disk", plan.disk_reason


def _inputs(inputs: Inputs) -> Iterator[str]:
    """What is known of that by which the rule chose."""
    yield f"{amount(inputs.share_nbytes)} of memory for keys and values"
    whose = "that were asked for" if inputs.context_asked else "that the model can have"
    yield f"{amount(inputs.context_nbytes)} for the {inputs.context_tokens:,} tokens {whose}"
    if inputs.drive_bytes_per_second is not None:
        yield f"a drive of {rate(inputs.drive_bytes_per_second)}"
    if inputs.disk_free_nbytes is not None:
        yield f"{amount(inputs.disk_free_nbytes)} free on the drive"


def _foretold(plan: RuntimePlan) -> Iterator[tuple[str, str]]:
    """How fast it will be: one request and all that may ride, with short and long histories; and how soon answers begin."""
    if (predicted := plan.predicted) is None:
        streams = plan.streamed_nbytes_per_pass > 0
        yield "drive", "not measured: it is read layer by layer, none ahead" if streams else "nothing is read after opening"
        yield "foretold", "nothing: " + (f"{plan.device} was not measured" if plan.device_memory else "transformers' modules compute")
        return
    drive = predicted.drive_bytes_per_second
    yield "drive", "nothing is read after opening" if drive is None else f"{rate(drive)}, measured now"
    for number, found in enumerate(predicted.speeds):
        riders = "one request" if found.requests == 1 else f"{found.requests} together"
        reads = f", reads {amount(found.bytes_per_pass)}" if found.bytes_per_pass else ""
        took = f"a pass {found.seconds_per_pass:.3g} s{reads}; {LIMITERS[found.limiter]}"
        yield "" if number else "foretold", f"{riders} at {found.context:,}: {speed(found.tokens_per_second)} ({took})"
    first = " · ".join(f"{found.prompt_tokens:,} tokens {duration(found.seconds)}" for found in predicted.first_tokens)
    yield "first token", f"a prompt of {first}"
    if predicted.disk_nbytes:
        yield "on disk", f"{amount(predicted.disk_nbytes)} of keys and values, if all contexts are full"


def _experts(found: Survey) -> tuple[list[int], list[int]]:
    """How many experts each layer with experts has, and how many of them a token takes."""
    mixtures = [step.experts for step in found.family.steps if step.experts is not None]
    return [mixture.count for mixture in mixtures], [mixture.top for mixture in mixtures]


def _kv(config: RuntimeConfig, plan: RuntimePlan) -> tuple[str, str]:
    """What keeps keys and values, and how many of them where."""
    preset = PRESETS[plan.kv_cache_strategy]
    kept_by = "transformers" if plan.backend == "transformers-generic" else plan.kv_cache_strategy
    first = f"{kept_by}, {config.kv_cache_lifecycle}: {amount(plan.kv_nbytes_per_token)} a token, {plan.kv_tokens:,} tokens in memory"
    if preset.layout is None:
        return f"{first} for all requests together", "nothing of it is written to disk"
    window = config.kv_cache_window_tokens
    kept = f"blocks of the last {window:,} tokens of a request go to" if window else "whole blocks go to"
    coded = "" if not preset.codec.representation else f" as {preset.codec.representation}"
    quota = f", {size(config.kv_cache_max_bytes)} at most" if config.kv_cache_max_bytes else ""
    return first, f"{kept} {config.cache_dir / preset.root}{coded}{quota}"
