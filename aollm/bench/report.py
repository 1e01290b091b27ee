"""A run of the benchmark for people: a line for each lane as it ends, and what the comparison says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..buffers import size
from ..terminal import Row
from .lane import Outcome

WIDTH = 26


def told(name: str, outcome: Outcome) -> str:
    """A lane's card, or why there is nothing to tell."""
    state = {"measured": "", "partial": f"  (in part: {outcome.reason})", "unavailable": f"unavailable: {outcome.reason}"}[outcome.state]
    return card(name, outcome.result or {}) + state


def card(name: str, result: Mapping[str, Any]) -> str:
    """`warm  first token 8.3 ms, 145 tokens/s`."""
    return f"  {name:<{WIDTH}} {'; '.join(_figures(result))}"


def summary(result: Mapping[str, Any]) -> Iterator[Row]:
    """What was run on what, and what is known of memory."""
    machine = result["machine"]
    requests = [request for point in _points(result) for request in point["requests"]]
    peaks = [request["peak_rss_nbytes"] for request in requests if request["peak_rss_nbytes"] is not None]
    facts = f"{result['profile']} profile of {result['model']}, {len(requests)} requests in {result['seconds']:.0f} s"
    yield [(f"  {facts}" + (f"; at most {size(max(peaks))} resident" if peaks else ""), "bold")]
    yield [(f"  {machine['cpu']}, {machine['cores']} cores, {size(machine['memory_nbytes'])}, load {machine['load_average']}", "dim")]
    if result["interrupted"]:
        yield [("  interrupted: this is what was measured until then, and it is not kept in the history", "yellow")]


def compared(comparison: Mapping[str, Any]) -> Iterator[Row]:
    """What is slower or faster than before, and how sure that is."""
    if not comparison["subjects"]:
        yield [(f"  {comparison['verdict']}: {comparison['reason']}", "dim")]
        return
    runs = f"{comparison['earlier_runs']} earlier run{'' if comparison['earlier_runs'] == 1 else 's'}"
    style = {"regression": "red", "no regression": "green"}.get(comparison["verdict"], "yellow")
    yield [(f"  against {runs}: {comparison['verdict']}", style)]
    for subject in comparison["subjects"]:
        twice = (subject["first_change"], subject["second_change"])
        again = "" if twice[1] is None else f"; {twice[0]:+.0%}, measured again {twice[1]:+.0%}"
        line = f"    {subject['subject']:<{WIDTH - 2}} {subject['change']:+.1%} (told from {subject['threshold']:.0%}{again})"
        yield [(line, "red" if subject["verdict"] == "regression" else "")]


def _points(result: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for lane in result["lanes"].values():
        yield from ((lane["result"] or {}).get("points") or {}).values()


def _figures(found: Mapping[str, Any]) -> Iterator[str]:
    if found.get("bench") == "overlap":
        yield f"{found['fraction_of_bound']:.0%} of the bound ({found['limiter']}), stalled {found['stall_share']:.0%}"
        yield f"{found['tokens_per_second']:.1f} tokens/s of {found['requests']}"
        return
    if (plan := found.get("values", {}).get("plan")) is not None:
        yield f"{plan['p50'] * 1e3:.1f} ms a plan, the first one {found['first_seconds'] * 1e3:.0f} ms ({found['plan']['backend']})"
    if unsteady := [name for name, value in found.get("values", {}).items() if value.get("steady") is False]:
        yield f"too busy a machine to compare {', '.join(unsteady)}"
    if (cache := found.get("page_cache")) is not None:
        yield f"opened in {found['open_seconds']:.2f} s" if cache["cold"] else f"NOT COLD ({cache['reason']})"
    for name, point in found.get("points", {}).items():
        yield _point(name, point)


def _point(name: str, point: Mapping[str, Any]) -> str:
    median = point["median"]
    first = f"first token {median['ttft_seconds'] * 1e3:.1f} ms" if "ttft_seconds" in median else "no token"
    rest = f", {median['output_tokens_per_second']:.0f} tokens/s" if "output_tokens_per_second" in median else ""
    if "turn" in point:
        last = point["requests"][-1]
        return f"turn {name}: {first} ({last['prefix_hit_tokens']} of {last['prompt_tokens']} there)"
    if "tokens" in point:
        return f"{name}: {median['ttft_seconds'] * 1e3:.1f} ms{rest}" if "ttft_seconds" in median else f"{name}: no token"
    return first + rest
