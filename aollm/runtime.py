"""The handle: opens a model, owns the one task group, and turns prompts into streams of tokens."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
import torch
from anyio.abc import TaskGroup

from .buffers import Arena, size
from .checkpoint import Checkpoint
from .compute import Compute
from .disk.auto import open_disk
from .disk.base import Disk
from .embedding import Embedding
from .engine import Engine, Limits
from .errors import ConfigError, DiskError, RequestError, first_of
from .experts import ExpertCache
from .families.base import Family
from .kv import cache_state, open_cache
from .plan import RuntimePlan
from .port import Port
from .probe import drive_speed
from .prompt import Prompt, encode
from .reference import find
from .request import FinishReason, Request, Token
from .sampling import Sampler
from .session import Session
from .settings import GenerationConfig, RuntimeConfig
from .stores.cache import Cache
from .stream import Choice, Completion, TokenStream, Usage
from .survey import survey
from .sweep import Model
from .text import Text
from .towers import Towers
from .trace import Trace, profile
from .weights import Weights, check_shape, dtype_of


class Runtime:
    """One model, ready to answer many requests at once.

    async with Runtime.open("demo", memory="3GiB") as runtime:
        async for token in runtime.stream("Once upon a time"):
            print(token.text, end="", flush=True)
    """

    def __init__(self, config: RuntimeConfig, disk: Disk | None = None) -> None:
        """Use `Runtime.open`. `disk` takes the place of the one that `disk_backend` names."""
        self.config = config
        self.trace = Trace()
        self.drive_bytes_per_second: float | None = None
        self.plan: RuntimePlan
        self.text: Text
        self.engine: Engine
        self.cache: Cache
        self._opened = False
        self._port: Port | None = None
        self._given_disk = disk
        self._group: TaskGroup
        self._numbers = itertools.count()
        self._cleanup = AsyncExitStack()

    @classmethod
    def open(cls, model: RuntimeConfig | str | Path, *, disk: Disk | None = None, **fields: Any) -> Runtime:
        """A runtime for `model` (a folder, an alias such as `demo`, `org/repo[@rev]`, or a whole configuration); enter it with `async with`.

        A `disk` that is given takes the place of `disk_backend`, and stays open. `fields` are those of `RuntimeConfig`.
        Raises `ConfigError` here; on entering `ModelError`, `MemoryBudgetError` or `DiskError`, and then leaves nothing behind.
        """
        return cls(RuntimeConfig.of(model, fields), disk)

    async def __aenter__(self) -> Self:
        if self._port is not None:
            raise ConfigError("this runtime was opened before; ask Runtime.open for another one")
        try:
            self._port = await self._cleanup.enter_async_context(Port())
        except OSError as error:
            raise DiskError(f"no descriptor for the runtime's wake-ups: {error.strerror}; raise the limit on open files") from error
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        try:
            await self._open(self._port)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Cancel what is under way, wait for it, and give everything back."""
        if self._opened:
            self.engine.close()
            self._opened = False
        self._group.cancel_scope.cancel()
        own = error if not isinstance(error, Exception) else None  # an error of the caller's passes as it is, not in a group
        try:
            swallowed = await self._group.__aexit__(type(own) if own else None, own, trace if own else None)
        except BaseExceptionGroup as raised:
            if own is not None and first_of(raised) is first_of(own):
                return False
            raise first_of(raised) from raised
        finally:
            await self._cleanup.aclose()
        return bool(swallowed) and own is not None

    def stream(
        self, prompt: Prompt, generation: GenerationConfig | None = None, *, session: Session | None = None, **fields: Any
    ) -> TokenStream:  # fmt: skip
        """An answer token by token. `prompt` is text, token ids, or chat messages; `fields` are those of `GenerationConfig`.

        `session`: whose keys and values it goes on from (see `runtime.session`, which gives prompts of its own).
        Raises `RequestError` here for a malformed setting, and from the stream for a prompt that cannot be taken.
        """
        settings = GenerationConfig.of(generation, fields)
        sampling = settings.sampling

        async def submit() -> Request:
            if not self._opened:
                raise RequestError("the runtime is not open: ask it inside `async with Runtime.open(...) as runtime`")
            encoded = await encode(prompt, self.text, self._tower, self._family.vocabulary)
            ids = encoded.ids
            room = self.plan.max_context_tokens - len(ids)
            limit = settings.max_new_tokens if settings.context_shift != "stop" else min(settings.max_new_tokens, room)
            if room < 1:
                raise RequestError(
                    f"the prompt has {len(ids)} tokens and the context {self.plan.max_context_tokens}: shorten it, "
                    "or open the runtime with a larger max_context_tokens"
                )
            if encoded.items and settings.context_shift != "stop":
                raise RequestError("context_shift: a context with images or sound in it cannot be shifted; use stop")
            adapter = None if settings.adapter is None else self._adapters.index(settings.adapter)
            salt = settings.cache_salt if adapter is None else f"{settings.cache_salt}\0{self._adapters.digests[adapter]}"
            samplers = [Sampler(sampling, self._family.vocabulary, choice) for choice in range(settings.n)]
            decoders = [self.text.decoder(settings.stop) for _ in range(settings.n)]
            request = Request(
                next(self._numbers), ids, limit, self.text.stop_ids, samplers, decoders, self.engine.wake,
                salt, session, settings.context_shift, settings.keep_tokens, self.plan.max_context_tokens,
                encoded.items, adapter,
            )  # fmt: skip
            self.engine.submit(request)
            return request

        return TokenStream(submit, self._post, session.heard if session is not None else None)

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """A conversation, begun with `messages`, whose keys and values are kept from turn to turn.

        async with runtime.session() as session:
            async for token in session.stream("Who wrote it?"):
                print(token.text, end="")
        """
        return Session(self, messages)

    async def generate(self, prompt: Prompt, generation: GenerationConfig | None = None, **fields: Any) -> Completion:
        """The whole answer to `prompt`, and how it was made."""
        start = perf_counter()
        tokens: list[Token] = []
        async with self.stream(prompt, generation, **fields) as stream:
            async for token in stream:
                tokens.append(token)
            assert stream.request is not None
            prompt_tokens, count = len(stream.request.prompt), len(stream.request.answers)
        choices = tuple(_choice([token for token in tokens if token.choice == number]) for number in range(count))
        return Completion(
            choices[0].text, choices[0].token_ids, choices[0].finish_reason, Usage(prompt_tokens, len(tokens)), choices,
            await anyio.to_thread.run_sync(self.profile, start), self.cache_state(), self.plan,
        )  # fmt: skip

    def profile(self, start: float, end: float | None = None) -> dict[str, Any]:
        """The `native_runtime_profile` of an interval of `time.perf_counter()` seconds, up to now unless `end` is given."""
        until = perf_counter() if end is None else end
        return profile(self.trace.between(start, until), until - start, self.drive_bytes_per_second)

    def cache_state(self) -> dict[str, Any]:
        """Where KV is kept, and how much of it there is at this moment."""
        return cache_state(self.config, self.cache)

    def __repr__(self) -> str:
        if not self._opened:
            return f"<Runtime {self.config.model_reference}, not open>"
        return f"<Runtime {self.plan.family} on {self.plan.disk_backend}, {size(self.plan.streamed_nbytes_per_pass)} read a pass>"

    async def _open(self, port: Port) -> None:
        folder = await find(self.config.model_reference, self.config.models_dir, self.config.force_download)
        disk, reason = self._given_disk, "as given"
        if disk is None:
            disk, reason = open_disk(self.config.disk_backend, port, folder)
            self._cleanup.push_async_callback(_shielded, disk.aclose)
        compute = Compute(port, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
        self._cleanup.callback(compute.close)
        found = await survey(self.config, folder, disk, reason)
        self.text, self.plan, self._family, self._tower, self._adapters = found.text, found.plan, found.family, found.tower, found.adapters
        family, plan = found.family, found.plan
        weights = Weights(found.pieces, plan.pinned, plan.ring_nbytes, disk, self.trace)
        experts = ExpertCache(found.experts, plan.expert_slots, plan.expert_slot_nbytes, disk, self.trace)
        self._cleanup.callback(experts.forget)
        self.cache = await open_cache(self.config, plan, folder, family, found.checkpoint, disk, self.trace)
        self._cleanup.callback(self.cache.pool.forget)
        self._cleanup.push_async_callback(_shielded, self.cache.aclose)
        if weights.streamed:
            self.drive_bytes_per_second = await drive_speed(disk, weights.streamed_extents, weights.ring)
        self._cleanup.callback(weights.forget)
        await weights.pin()
        norm = await _read_norm(family, found.checkpoint, disk)
        embedding = Embedding(found.checkpoint[family.embedding], family, weights, disk, compute, self.trace)
        self._cleanup.callback(embedding.forget)
        if "pinned embedding" in plan.ledger:
            await embedding.pin()
        model = Model(family, weights, experts, norm, self.cache, found.adapters, plan.chunk_rows, self.trace, port.post)
        limits = Limits(plan.max_rows, plan.max_concurrent_requests, plan.max_answers, plan.max_context_tokens)
        towers = Towers(found.tower_pieces, plan.tower_kept_nbytes, disk, compute, self.trace)
        self._cleanup.callback(towers.forget)
        self.engine = Engine(model, embedding, towers, compute, limits)
        self._group.start_soon(self.engine.run)
        self._group.start_soon(self.cache.run)
        self._opened = True

    def _post(self, call: Callable[[], object]) -> None:
        if self._port is not None:
            self._port.post(call)


async def _read_norm(family: Family, checkpoint: Checkpoint, disk: Disk) -> torch.Tensor:
    entry = checkpoint[family.norm]
    check_shape(entry, (family.hidden,))
    arena = Arena(entry.extent.nbytes, huge=False)
    await disk.read_into([entry.extent], [arena.bytes[: entry.extent.nbytes]])
    return arena.tensor(0, dtype_of(entry), entry.shape).to(family.dtype)


def _choice(tokens: Sequence[Token]) -> Choice:
    reason = tokens[-1].finish_reason if tokens else None
    return Choice("".join(token.text for token in tokens), tuple(token.id for token in tokens), reason or FinishReason.CANCELLED)


async def _shielded(close: Callable[[], Awaitable[None]]) -> None:
    with anyio.CancelScope(shield=True):
        await close()
