"""Where the time of one request went: waiting for the drive, computing, and what it would have been at best.

python examples/profile_request.py [model]
"""

import sys

import anyio

from aollm import Runtime


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    model = (sys.argv[1:] or ["demo"])[0]
    async with Runtime.open(model, offload_cpu_layers=0) as runtime:  # 0: read all layers from disk, as for a model beyond memory
        await runtime.generate("Once upon a time", max_new_tokens=2)  # the first run is slower: it warms up
        completion = await runtime.generate("Once upon a time", max_new_tokens=24)
    profile = completion.profile
    if profile is None:
        print(f"{model} runs through {completion.plan.backend}, which is not profiled")
        return
    print(f"{completion.usage.completion_tokens} tokens after {completion.usage.prompt_tokens}: {completion.text!r}\n")
    print(f"{'event':<18} {'times':>6} {'total ms':>9} {'median ms':>10} {'p95 ms':>8} {'bytes':>12}")
    for name, event in sorted(profile["events"].items(), key=lambda item: -item[1]["total_ms"]):
        times = f"{event['count']:>6.0f} {event['total_ms']:>9.1f} {event['median_ms']:>10.2f} {event['p95_ms']:>8.2f}"
        print(f"{name:<18} {times} {event['bytes'] or '':>12}")
    print("\nreads overlap each other and compute; a stall is compute waiting for one")
    drive = profile["drive_bytes_per_second"]
    print(f"read {profile['bytes_read'] / 1e6:.1f} MB" + (f"; the drive gives {drive / 1e9:.2f} GB/s" if drive else ""))
    print(f"limited by {profile['limiter']}; {profile['fraction_of_bound']:.0%} of what that allows was reached")
    for name in ("predicted", "achieved"):
        if found := profile.get(name):
            print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, float)))


anyio.run(main)
