"""The handle: opens a model, owns the one task group, and turns prompts into streams of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from .buffers import size
from .checkpoint import read_json
from .compute import Compute, processors
from .device import Device
from .disk.auto import open_disk
from .disk.base import Disk
from .errors import ConfigError, DiskError, RequestError, SpecializationError, first_of
from .forecast import Forecast
from .outlook import NOT_PLANNED, turned_away, wants_native
from .port import Port
from .prompt import Prompt, encode
from .reference import find
from .request import FinishReason, Request, Token
from .runtime_plan import RuntimePlan
from .sampling import Sampler
from .session import Session
from .settings import GenerationConfig, RuntimeConfig
from .stores.cache import Cache
from .stream import Choice, Completion, TokenStream, Usage
from .survey import survey
from .text import Text
from .tiers import Carousel, Means, Tier, open_generic, open_native, shielded
from .trace import Trace, profile


class Runtime:
    """One model, ready to answer many requests at once.

    async with Runtime.open("demo", memory="3GiB") as runtime:
        async for token in runtime.stream("Once upon a time"):
            print(token.text, end="", flush=True)
    """

    def __init__(self, config: RuntimeConfig, disk: Disk | None = None, on: Device | None = None) -> None:
        """Use `Runtime.open`. `disk` takes the place of the one that `disk_backend` names, `on` that of `device`."""
        self.config = config
        self._generation = GenerationConfig.of(None, {})  # read once, not by each request
        self.trace = Trace()
        self.planned: RuntimePlan | None = None
        """How the model is about to be run, before the runtime is open."""
        self._tier: Tier
        self._opened = False
        self._port: Port | None = None
        self._given_disk, self._given_device = disk, on
        self._group: TaskGroup
        self._numbers = itertools.count()
        self._decoding = anyio.CapacityLimiter(1)  # images and sounds are large while they are decoded
        self._cleanup = AsyncExitStack()

    @property
    def plan(self) -> RuntimePlan:
        """How the model is run; after a move of its KV cache, as it is run since."""
        adaptation = self._tier.adaptation
        return self._tier.plan if adaptation is None else adaptation.plan

    @property
    def text(self) -> Text:
        """The model's tokenizer and chat template."""
        return self._tier.text

    @property
    def engine(self) -> Carousel:
        """What serves the requests."""
        return self._tier.engine

    @property
    def cache(self) -> Cache | None:
        """Keys and values; None where transformers keeps them."""
        return self._tier.cache

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may choose."""
        return self._tier.adapters.names if self._tier.adapters is not None else ()

    @property
    def forecast(self) -> Forecast | None:
        """Foretells how long answers will take; None for transformers' modules."""
        forecast = self._tier.forecast
        return None if forecast is None else replace(forecast, plan=self.plan)

    @property
    def drive_bytes_per_second(self) -> float | None:
        """What the drive was measured to give when the runtime opened; None if no weights are streamed."""
        return self._tier.drive_bytes_per_second

    @classmethod
    def open(cls, model: RuntimeConfig | str | Path | None = None, *, disk: Disk | None = None, on: Device | None = None, **fields: Any
    ) -> Runtime:  # fmt: skip
        """A runtime for `model`: a folder, an alias such as `demo`, `org/repo[@rev]`, or a whole configuration. Enter it with `async with`.

        A `disk` that is given takes the place of `disk_backend`, and stays open; `on` is a device in the place of `device`.
        `fields` are those of `RuntimeConfig`. What is not said here is as the environment and `aollm.toml` have it, the model
        too, unless it is a whole configuration.
        Raises `ConfigError` here; on entering `ModelError`, `MemoryBudgetError` or `DiskError`, and then leaves nothing behind.
        """
        return cls(RuntimeConfig.of(model, fields), disk, on)

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

        What neither `generation` nor `fields` say is as the environment and `aollm.toml` had it when the runtime was made; a
        `generation` says all.
        `session`: whose keys and values it goes on from (see `runtime.session`, which gives prompts of its own).
        Raises `RequestError` here for a malformed setting, and from the stream for a prompt that cannot be taken.
        """
        settings = GenerationConfig.of(self._generation if generation is None else generation, fields)
        sampling = settings.sampling

        async def submit() -> Request:
            if not self._opened:
                raise RequestError("the runtime is not open: ask it inside `async with Runtime.open(...) as runtime`")
            encoded = await encode(prompt, self.text, self._tier.tower, self.plan.vocabulary, self._decoding)
            ids = encoded.ids
            room = self.plan.max_context_tokens - len(ids)
            limit = settings.max_new_tokens if settings.context_shift != "stop" else min(settings.max_new_tokens, room)
            if room < 1:
                raise RequestError(
                    f"the prompt has {encoded.length} and the context {self.plan.max_context_tokens}: shorten it, "
                    "or open the runtime with a larger max_context_tokens"
                )
            if encoded.items and settings.context_shift != "stop":
                raise RequestError("context_shift: a context with images or sound in it cannot be shifted; use stop")
            adapter, salt = self._adapter(settings)
            samplers = [Sampler(sampling, self.plan.vocabulary, choice) for choice in range(settings.n)]
            decoders = [self.text.decoder(settings.stop) for _ in range(settings.n)]
            request = Request(
                next(self._numbers), ids, limit, self.text.stop_ids, samplers, decoders, self.engine.wake,
                salt, session if self.config.use_cache else None, settings.context_shift, settings.keep_tokens,
                self.plan.max_context_tokens, encoded.items, adapter,
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
        return await self.collect(self.stream(prompt, generation, **fields))

    async def collect(self, answer: TokenStream) -> Completion:
        """The whole of an answer of this runtime's, such as a session's turn, and how it was made."""
        start, first_s = perf_counter(), None
        tokens: list[Token] = []
        async with answer as stream:
            async for token in stream:
                tokens.append(token)
                first_s = first_s or perf_counter() - start
            request = stream.request
            assert request is not None
            prompt_tokens, count = len(request.prompt), len(request.answers)
        last_s = perf_counter() - start
        choices = tuple(_choice([token for token in tokens if token.choice == number]) for number in range(count))
        return Completion(
            choices[0].text, choices[0].token_ids, choices[0].finish_reason, Usage(prompt_tokens, len(tokens)), choices,
            await anyio.to_thread.run_sync(self.profile_of, request, start, first_s, last_s, len(tokens)),
            self.cache_state_of(request), self.plan,
        )  # fmt: skip

    def profile(self, start: float, end: float | None = None) -> dict[str, Any] | None:
        """The `native_runtime_profile` of an interval of `time.perf_counter()` seconds, up to now unless `end` is given.

        None for the generic tier, which has none.
        """
        if self.plan.backend == "transformers-generic":
            return None
        until = perf_counter() if end is None else end
        return profile(self.trace.between(start, until), until - start, self.drive_bytes_per_second)

    def profile_of(self, request: Request, start: float, first_s: float | None, last_s: float, tokens: int) -> dict[str, Any] | None:
        """The profile of the time since `start` in which `request` made `tokens` tokens, the first and the last after so many
        seconds, with what was `predicted` of it, given who rides now, and what was `achieved`."""
        if (found := self.profile(start, start + last_s)) is None or (forecast := self.forecast) is None:
            return found
        answers = len(request.answers)
        computed = len(request.prompt) - request.prefix_hit_tokens
        return found | forecast.compared(computed, tokens // answers, answers + self.engine.riders, first_s, last_s)

    def cache_state(self) -> dict[str, Any]:
        """Where KV is kept, how much of it there is at this moment, and whether it would be better kept otherwise; no more than
        `kv_cache_strategy` and `cache_mode` where transformers keeps it."""
        if (adaptation := self._tier.adaptation) is None:
            return {"kv_cache_strategy": self.plan.kv_cache_strategy, "cache_mode": self.plan.cache_mode}
        return adaptation.state()

    def cache_state_of(self, request: Request) -> dict[str, Any]:
        """The same when `request` ended, or now if it goes on, with what it found stored of its prompt."""
        state = request.cache_state or self.cache_state()
        return state | {"prefix_hit_tokens": request.prefix_hit_tokens, "prefix_miss_reason": request.prefix_miss_reason}

    def __repr__(self) -> str:
        if not self._opened:
            return f"<Runtime {self.config.model_reference}, not open>"
        return f"<Runtime {self.plan.family} on {self.plan.disk_backend}, {size(self.plan.streamed_nbytes_per_pass)} read a pass>"

    async def _open(self, port: Port) -> None:
        config = self.config
        folder = await find(config.model_reference, config.models_dir, config.force_download)
        disk, reason = self._given_disk, "as given"
        if disk is None:
            disk, reason = open_disk(config.disk_backend, port, folder)
            self._cleanup.push_async_callback(shielded, disk.aclose)
        compute = Compute(port, processors())
        self._cleanup.callback(compute.close)
        self._tier = await self._open_tier(Means(config, folder, disk, compute, port, self.trace), reason)
        self._group.start_soon(self.engine.run)
        if self._tier.cache is not None:
            self._group.start_soon(self._tier.cache.run)
        self._opened = True

    async def _open_tier(self, means: Means, reason: str) -> Tier:
        """The native tier where it can, else the generic one, unless that was ruled out."""
        described = await read_json(means.folder / "config.json")
        state, why = NOT_PLANNED
        if wants_native(self.config):
            try:
                async with AsyncExitStack() as attempt:
                    found = await survey(self.config, means.folder, means.disk, reason, on=self._given_device)
                    self.planned = found.plan
                    tier = await open_native(means, found, attempt)
                    self._cleanup.push_async_callback(attempt.pop_all().aclose)
                    return tier
            except SpecializationError as error:
                self.planned = None
                state, why = await turned_away(self.config, described, error)
        return await open_generic(means, described, why, state, self._cleanup)

    def _adapter(self, settings: GenerationConfig) -> tuple[int | None, str]:
        """The number of the adapter that was asked for, and what keeps its keys and values apart from others'."""
        if settings.adapter is None:
            return None, settings.cache_salt
        if (adapters := self._tier.adapters) is None:
            raise RequestError("adapter: this model runs through transformers, which has no adapters here")
        number = adapters.index(settings.adapter)
        return number, f"{settings.cache_salt}\0{adapters.digests[number]}"

    def _post(self, call: Callable[[], object]) -> None:
        if self._port is not None:
            self._port.post(call)


def _choice(tokens: Sequence[Token]) -> Choice:
    reason = tokens[-1].finish_reason if tokens else None
    return Choice("".join(token.text for token in tokens), tuple(token.id for token in tokens), reason or FinishReason.CANCELLED)
