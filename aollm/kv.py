"""The KV cache of a runtime, put together from its preset, its plan and what the machine offers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio.to_thread

from . import fingerprint
from .checkpoint import Checkpoint, read_json
from .disk.auto import reads_directly
from .disk.base import Disk, Extent
from .errors import ConfigError, StoreError
from .families.base import Family
from .maths.attention import BLOCK
from .runtime_plan import KvShare, RuntimePlan, kv_share
from .settings import RuntimeConfig
from .stores.cache import Cache
from .stores.home import Home
from .stores.identity import Identity
from .stores.lifecycle import Lifecycle, RuntimeScoped
from .stores.persistent import Persistent
from .stores.pool import BlockPool
from .stores.presets import PRESETS, Preset
from .stores.record import VERSION, record_nbytes
from .stores.records import Records
from .stores.residency import spill_policy
from .stores.scratch import Scratch
from .stores.shape import Shape
from .stores.volume import Volume
from .trace import Trace


async def open_cache(
    config: RuntimeConfig, plan: RuntimePlan, folder: Path, family: Family, checkpoint: Checkpoint, disk: Disk, trace: Trace
) -> Cache:  # fmt: skip
    """The cache that `config` asks for, within what `plan` gives it; `run` and `aclose` are the caller's to call.

    Raises `StoreError` for a folder that cannot be used, `ConfigError` for a quota that no block fits into.
    """
    kv, preset = family.kv, PRESETS[config.kv_cache_strategy]
    direct = await anyio.to_thread.run_sync(reads_directly, folder)  # nothing is waited for once something was taken
    window = config.kv_cache_window_tokens
    shape = Shape(kv.layers, kv.heads, kv.head_dim, kv.dtype)
    records: Records | None = None
    lifecycle: Lifecycle = _scoped(config)
    if preset.layout is not None:
        record = _record_nbytes(preset, shape)
        if config.kv_cache_max_bytes is not None and config.kv_cache_max_bytes < record * kv.layers:
            raise ConfigError(
                f"kv_cache_max_bytes: {config.kv_cache_max_bytes} is less than the {record * kv.layers} bytes of one block "
                f"of {BLOCK} tokens of this model"
            )
        records, lifecycle = await _records(config, preset, folder, shape, family, checkpoint, disk, trace)
    share = plan.kv_tokens * kv.token_nbytes
    pool = BlockPool(plan.kv_tokens, plan.max_answers, plan.max_context_tokens, shape)
    policy = spill_policy(records.record_nbytes if records is not None else 1, share, direct, plan.state_snapshot_nbytes)
    return Cache(
        pool, records, preset.residency, lifecycle, policy, window,
        plan.kv_ring_nbytes, plan.kv_ring_nbytes // (config.prefetch_depth + 1), kv.states,
    )  # fmt: skip


async def open_home(
    config: RuntimeConfig, plan: RuntimePlan, folder: Path, family: Family, checkpoint: Checkpoint, disk: Disk, trace: Trace
) -> Home:  # fmt: skip
    """Where the cache of a runtime that was opened as `plan` says could move to be as `config` asks for, in the memory that it has.

    Raises `MemoryBudgetError` where that is too little, `StoreError` for a folder that cannot be used.
    """
    kv, preset = family.kv, PRESETS[config.kv_cache_strategy]
    direct = await anyio.to_thread.run_sync(reads_directly, folder)
    memory = plan.kv_tokens * kv.token_nbytes + plan.kv_ring_nbytes
    if preset.layout is None:
        policy = spill_policy(1, memory, direct, plan.state_snapshot_nbytes)
        return Home(None, preset.residency, policy, plan.kv_tokens, plan.max_rows)

    def within(nbytes: int) -> KvShare:
        fields = {"kv_cache_memory": max(nbytes, 1), "max_context_tokens": plan.max_context_tokens}
        return kv_share(config.model_copy(update=fields), family, memory)

    share = within(memory - within(memory).ring_nbytes)  # the ring's bytes are among those that a resident cache has
    shape = Shape(kv.layers, kv.heads, kv.head_dim, kv.dtype)
    records, _ = await _records(config, preset, folder, shape, family, checkpoint, disk, trace)
    tokens = min(share.tokens, plan.kv_tokens)
    policy = spill_policy(records.record_nbytes, tokens * kv.token_nbytes, direct, plan.state_snapshot_nbytes)
    rows = min(plan.max_rows, share.most_rows(kv.layers))
    rows = rows // plan.chunk_rows * plan.chunk_rows or rows
    return Home(records, preset.residency, policy, tokens, rows, share.ring_nbytes, share.ring_nbytes // (config.prefetch_depth + 1))


async def _records(
    config: RuntimeConfig, preset: Preset, folder: Path, shape: Shape, family: Family, checkpoint: Checkpoint, disk: Disk, trace: Trace
) -> tuple[Records, Lifecycle]:  # fmt: skip
    assert preset.layout is not None
    root = config.cache_dir / preset.root
    layout = preset.layout(_record_nbytes(preset, shape), config.kv_cache_window_tokens)
    if config.kv_cache_lifecycle == "runtime-scoped":
        scratch = await anyio.to_thread.run_sync(Scratch.open, root)
        return Records(disk, scratch, layout, preset.codec, shape, trace), _scoped(config)
    if family.kv.depends_on_length:
        raise ConfigError(
            "kv_cache_lifecycle: this model's keys depend on the prompt's length (its RoPE type), so prompts cannot share them; "
            "use runtime-scoped"
        )
    files = sorted({entry.extent.file for entry in checkpoint.tensors.values()})
    described = await read_json(folder / "config.json")

    def identity() -> Identity:
        parts = {
            "weights": checkpoint.fingerprint or fingerprint.weights(files), "tokenizer": fingerprint.tokenizer(folder),
            "configuration": fingerprint.configuration(described), "dtype": str(shape.dtype), "codec": preset.codec.representation or "raw",
            "block": str(BLOCK), "version": str(VERSION), "window": str(config.kv_cache_window_tokens or ""),
        }  # fmt: skip
        return Identity(parts)

    volume = await anyio.to_thread.run_sync(lambda: Volume.open(root, identity(), preset.persistence_format, BLOCK, shape.layers))
    try:
        for node in volume.index.nodes():
            for place in (*node.places, *node.states):
                name = os.path.basename(place.extent.file)
                layout.restore(Extent(name, place.extent.offset, place.extent.nbytes))
    except (StoreError, ValueError) as error:
        await anyio.to_thread.run_sync(volume.close)
        name = os.path.basename(volume.path)
        raise StoreError(f"{volume.path} cannot be continued: {error}; remove it with: aollm cache purge {name}") from error
    records = Records(disk, volume, layout, preset.codec, shape, trace)
    return records, Persistent(volume, records, config.kv_cache_max_bytes, config.kv_cache_max_age_s)


def _scoped(config: RuntimeConfig) -> RuntimeScoped:
    return RuntimeScoped() if config.use_cache else RuntimeScoped("nothing is taken from other prompts (use_cache is false)")


def _record_nbytes(preset: Preset, shape: Shape) -> int:
    return record_nbytes(preset.codec.payload_nbytes(BLOCK, shape.row_nbytes, shape.dtype.itemsize))


def cache_state(config: RuntimeConfig, cache: Cache) -> dict[str, Any]:
    """Where keys and values are at this moment, and what has happened to them since the runtime was opened."""
    preset, records, pool, writer = PRESETS[config.kv_cache_strategy], cache.records, cache.pool, cache.writer
    done = cache.tallies()
    rows = [pool.rows(layer) for layer in range(pool.layers)]
    in_memory = {"layer_count": sum(map(bool, rows)), "tokens": max(rows, default=0), "bytes": 2 * pool.row_nbytes * sum(rows)}
    hot = in_memory if preset.residency.mode == "tiered-write-back" else dict.fromkeys(in_memory, 0)
    kept, kept_tokens = cache.lifecycle.kept
    passing = [cell for cell in records.placed.values() if cell.stored is None] if records is not None else []
    stored = dict.fromkeys(range(pool.layers) if kept else (), kept_tokens)  # tokens by layer
    for cell in passing:
        if cell.place is not None:
            stored[cell.layer] = stored.get(cell.layer, 0) + cell.place.header.rows
    return {
        "strategy_id": preset.strategy_id,
        "policy_id": cache.policy.policy_id if records is not None else None,
        "persistence_format": preset.persistence_format,
        "residency_mode": preset.residency.mode,
        "window_policy": "sliding-window" if preset.windowed else "full-history",
        "window_max_tokens": cache.window,
        "eviction_policy": "drop-oldest" if preset.windowed else None,
        "eviction_count": cache.evictions,
        "evicted_tokens": cache.evicted_tokens,
        "cold_tier_encoding": preset.codec.name,
        "cold_tier_representation": preset.codec.representation or None,
        "cold_store_format": preset.persistence_format if preset.residency.mode == "tiered-write-back" else None,
        "cache_lifecycle": cache.lifecycle.name,
        "persisted_layer_count": len(stored),
        "persisted_tokens": max(stored.values(), default=0),
        "persisted_bytes": records.layout.nbytes if records is not None else 0,
        "persisted_artifact_count": kept + len(passing),
        "compaction_count": sum(tally.compactions for tally in done),
        "spill_count": sum(tally.spills for tally in done),
        "spilled_tokens": sum(tally.spilled_tokens for tally in done),
        **{f"resident_{name}": value for name, value in in_memory.items()},
        **{f"hot_{name}": value for name, value in hot.items()},
        "misses_corrupt": sum(tally.corrupt for tally in done),
        "misses_unreadable": sum(tally.unreadable for tally in done),
        "reserved_tokens": pool.reserved,
        "trouble": str(writer.trouble) if writer is not None and writer.trouble is not None else None,
    }
