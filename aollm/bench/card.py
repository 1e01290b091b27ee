"""A result of `overlap` for people."""

from __future__ import annotations

from typing import Any

from ..buffers import size


def card(result: dict[str, Any]) -> str:
    """A dozen lines: what was run, what was reached, and against which bound."""
    plan, machine, late = result["plan"], result["machine"], result["loop_lateness_ms"]
    tokens = f"{result['prompt_tokens']} + {result['tokens']} tokens"
    cpu = "not told" if result["io_cpu_share"] is None else f"{result['io_cpu_share']:.0%} of a core"
    rss = "not told" if result["peak_rss_nbytes"] is None else size(result["peak_rss_nbytes"])
    beats = "not told"
    if late is not None:
        beats = f"median {late['p50']:.2f} ms, 99 % within {late['p99']:.2f} ms, at most {late['max']:.2f} ms"
    pass_s, nbytes, drive = result["seconds_per_pass"], result["bytes_per_pass"], result["drive_bytes_per_second"]
    rows = {
        "work": f"{result['requests']} at once, {tokens}, {len(result['by_round'])} rounds, disk {plan['disk_backend']}",
        "a pass": f"{pass_s:.3f} s: {_shares(result)}",
        "reads": f"{nbytes / 1e9:.3f} GB a pass at {nbytes / pass_s / 1e9:.2f} GB/s; the drive alone {drive / 1e9:.2f} GB/s",
        "bound": f"{result['bound_seconds_per_pass']:.3f} s ({result['limiter']}); {result['fraction_of_bound']:.1%} of it reached",
        "tokens": f"{result['tokens_per_second']:.2f} a second in all",
        "first token": f"{result['first_token_seconds']:.3f} s; bound {result['first_token_bound_seconds']:.3f} s",
        "reading threads": cpu,
        "event loop late": beats,
        "memory": f"{rss} at most, of {size(result['memory_nbytes'])}",
        "weights kept": f"{size(plan['pinned_nbytes'])} of {size(plan['weights_nbytes'])}, stream ring {size(plan['ring_nbytes'])}",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {size(machine['memory_nbytes'])}, load {machine['load_average']}",
    }
    return "\n".join([f"overlap: {result['model']}", *(f"  {name:<16} {text}" for name, text in rows.items())])


def _shares(result: dict[str, Any]) -> str:
    compute = 1 - result["stall_share"] - result["other_share"]
    return f"computing {compute:.0%}, stalled {result['stall_share']:.0%}, other {result['other_share']:.0%}"
