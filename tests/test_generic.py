"""The generic tier says what transformers says, in any company; nobody is hurt by who is cancelled, fails or does not fit."""

import copy
import gc
import json
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Blip2Config,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    T5Config,
)

from aollm.checkpoint import open_checkpoint, read_json
from aollm.compute import Compute
from aollm.disk.threads import ThreadsDisk
from aollm.errors import AollmError, CheckpointError, MemoryBudgetError, ModelError, RequestError
from aollm.generic import Generic, GenericPlan, Limits, Loaded, load, make_plan
from aollm.generic.kind import Kind, kind_of
from aollm.generic.plan import build, keep, parts_of
from aollm.port import Port
from aollm.request import OUTBOX, Request, Token
from aollm.sampling import Sampler, Sampling

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

IDS = 64
KV = 1 << 20
NONE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TEXT: dict[str, Any] = {
    "vocab_size": IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2, "sliding_window": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, Any]] = {
    "t5": (AutoModelForSeq2SeqLM, T5Config(
        vocab_size=IDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, initializer_factor=2.0,
        **{**NONE, "pad_token_id": 0},
    )),
    "bart": (AutoModelForSeq2SeqLM, BartConfig(
        vocab_size=IDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.2,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=256, decoder_start_token_id=2, num_beams=3,
        forced_eos_token_id=None, **{**NONE, "pad_token_id": 1},
    )),
    "gpt2": (AutoModelForCausalLM, GPT2Config(
        vocab_size=IDS, n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=0.2, **NONE
    )),
    "opt": (AutoModelForCausalLM, OPTConfig(
        vocab_size=IDS, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256, init_std=0.2,
        word_embed_proj_dim=32, **{**NONE, "pad_token_id": 1},
    )),
    "phi": (AutoModelForCausalLM, PhiConfig(**{**TEXT, "num_key_value_heads": 4}, **NONE)),
    "gemma2": (AutoModelForCausalLM, Gemma2Config(**TEXT, **{**NONE, "pad_token_id": 0})),
    "mixtral": (AutoModelForCausalLM, MixtralConfig(**TEXT, num_local_experts=4, **NONE)),
    "mamba": (AutoModelForCausalLM, MambaConfig(
        vocab_size=IDS, hidden_size=32, state_size=8, num_hidden_layers=3, initializer_range=0.2, use_mambapy=False, **NONE
    )),
    "gemma3": (AutoModelForImageTextToText, Gemma3Config(
        text_config={**TEXT, **NONE, "pad_token_id": 0}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=60, **NONE
    )),
    "llava": (AutoModelForImageTextToText, LlavaConfig(
        text_config={"model_type": "llama", **{key: TEXT[key] for key in TEXT if key != "sliding_window"}, **NONE},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16}, image_token_index=60, image_seq_length=4, **NONE,
    )),
}  # fmt: skip


class Decoder:
    """Ids as text."""

    stopped = False

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def finish(self) -> str:
        return ""


class Models:
    """Tiny random models by the names in `CONFIGS`: their folders, plans and transformers' answers, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._plans: dict[str, GenericPlan] = {}
        self._models: dict[str, Any] = {}
        self._answers: dict[Any, tuple[list[int], torch.Tensor]] = {}

    def folder(self, name: str) -> Path:
        folder = self._root / name
        if not folder.exists():
            torch.manual_seed(3)
            kind, config = CONFIGS[name]
            model = kind.from_config(copy.deepcopy(config))
            with torch.no_grad():
                for part, parameter in model.named_parameters():
                    if parameter.ndim > 1:  # small vectors, so that a model with one table for both does not repeat what it reads
                        parameter.normal_(0, 0.05 if any(word in part for word in ("embed", "wte", "wpe", "shared")) else 0.4)
            model.save_pretrained(folder)
        return folder

    async def plan(self, name: str) -> GenericPlan:
        if name not in self._plans:
            self._plans[name] = await plan_of(self.folder(name))
        return self._plans[name]

    def loaded(self, name: str, plan: GenericPlan, cache: Path) -> Loaded:
        """The whole model, the same for all who ask."""
        if name not in self._models:
            self._models[name] = load(self.folder(name), plan, cache).model
        return Loaded(self._models[name], plan, None)

    async def answer(self, name: str, prompt: list[int], count: int = 8, **inputs: Any) -> tuple[list[int], torch.Tensor]:
        """Greedy ids, and log-probabilities [T, vocabulary], of transformers' own generate."""
        key = (name, *prompt, count)
        if key not in self._answers:
            folder = self.folder(name)
            self._answers[key] = await anyio.to_thread.run_sync(lambda: generated(folder, name, prompt, count, inputs))
        return self._answers[key]


def generated(folder: Path, name: str, prompt: list[int], count: int, inputs: Mapping[str, Any]) -> tuple[list[int], torch.Tensor]:
    model: Any = CONFIGS[name][0].from_pretrained(folder).eval()
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, num_beams=1, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **inputs,
        )  # fmt: skip
    return out.sequences[0, -count:].tolist(), torch.cat(out.logits).float().log_softmax(-1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


async def plan_of(folder: Path, memory: int = 1 << 30, in_use: int = 0, **options: Any) -> GenericPlan:
    async with Port() as port:
        disk = ThreadsDisk(port, threads=2)
        try:
            described, checkpoint = await read_json(folder / "config.json"), await open_checkpoint(folder, disk)
        finally:
            await disk.aclose()
    options = {"answers": 16, "context": 128, **options}
    return await anyio.to_thread.run_sync(lambda: make_plan(folder, described, checkpoint, memory, in_use, **options))


async def streamed_plan(folder: Path, share: float = 0.5) -> GenericPlan:
    """The plan in memory that is too small for `share` of the weights."""
    whole = await plan_of(folder, kv_nbytes=KV)
    return await plan_of(folder, sum(whole.ledger.values()) - int(whole.weights_nbytes * share), kv_nbytes=KV)


class House:
    """A carousel that goes round, and requests to it."""

    def __init__(self, generic: Generic, loaded: Loaded, port: Port) -> None:
        self.generic, self.loaded, self.port = generic, loaded, port
        self.layers: list[int] = []
        self.at_layer: Callable[[int], object] = lambda count: None
        self._hooks = [layer.register_forward_pre_hook(self._count) for layer in generic._layers]

    def forget(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, *arguments: object) -> None:
        self.layers.append(0)
        self.at_layer(len(self.layers))

    def request(
        self, prompt: list[int], count: int = 8, n: int = 1, sampling: Sampling | None = None, inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Request:  # fmt: skip
        sampling = sampling or Sampling(logprobs=IDS)
        samplers = [Sampler(sampling, self.loaded.plan.vocabulary, choice) for choice in range(n)]
        stops = options.pop("stop_ids", frozenset())
        request = Request(0, prompt, count, stops, samplers, [Decoder() for _ in range(n)], self.generic.wake, **options)
        self.generic.submit(request, inputs)
        return request

    async def tokens(self, *arguments: Any, **options: Any) -> list[Token]:
        return await taken(self.request(*arguments, **options))

    async def ids(self, *arguments: Any, **options: Any) -> list[int]:
        return [token.id for token in await self.tokens(*arguments, **options)]


async def taken(request: Request) -> list[Token]:
    found = []
    while (token := await request.take()) is not None:
        found.append(token)
    return found


@asynccontextmanager
async def serving(load: Callable[[], Loaded], requests: int = 16) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(Port())
        compute = Compute(port, 1)
        stack.callback(compute.close)
        loaded = await anyio.to_thread.run_sync(load)
        stack.callback(loaded.close)
        generic = Generic(loaded, compute, Limits(requests, 16))
        async with anyio.create_task_group() as group:
            group.start_soon(generic.run)
            house = House(generic, loaded, port)
            stack.callback(house.forget)
            yield house
            generic.close()
            group.cancel_scope.cancel()


@asynccontextmanager
async def opened(models: Models, name: str, cache: Path, requests: int = 16, **changes: Any) -> AsyncIterator[House]:
    """Serve the model called `name`; `changes` are to its plan."""
    plan = replace(await models.plan(name), **changes)
    async with serving(lambda: models.loaded(name, plan, cache), requests) as house:
        yield house


def logprobs(tokens: list[Token]) -> torch.Tensor:
    rows = torch.full((len(tokens), IDS), torch.nan)
    for row, token in zip(rows, tokens, strict=True):
        for number, value in token.top_logprobs:
            row[number] = value
    return rows


def prompt(length: int = 20, seed: int = 0) -> list[int]:
    return tiny.prompt(length, seed, 59)


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not holds():  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.002)


# What transformers says


@pytest.mark.parametrize("name", CONFIGS)
async def test_tokens_and_their_probabilities_are_those_of_transformers(name: str, models: Models, tmp_path: Path) -> None:
    wanted, rows = await models.answer(name, prompt())
    async with opened(models, name, tmp_path) as house:
        tokens = await house.tokens(prompt())
    assert [token.id for token in tokens] == wanted and len(set(wanted)) > 1
    assert [token.index for token in tokens] == list(range(8))
    assert [token.finish_reason for token in tokens] == [None] * 7 + ["length"]
    torch.testing.assert_close(logprobs(tokens), rows, atol=1e-4, rtol=1e-4)
    assert [token.logprob for token in tokens] == pytest.approx([float(row[token.id]) for row, token in zip(rows, tokens)], abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "gemma3"])
@pytest.mark.parametrize("rows", [1, 7, 20])
async def test_a_prompt_fed_in_parts_says_the_same(name: str, rows: int, models: Models, tmp_path: Path) -> None:
    wanted, probabilities = await models.answer(name, prompt())
    async with opened(models, name, tmp_path, chunk_rows=rows) as house:
        tokens = await house.tokens(prompt())
        assert house.generic.passes == -(-20 // rows) + 7
    assert [token.id for token in tokens] == wanted
    torch.testing.assert_close(logprobs(tokens), probabilities, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "mamba"])
async def test_who_takes_prompts_whole_is_not_fed_in_parts(name: str, models: Models) -> None:
    assert (await models.plan(name)).chunk_rows is None


@pytest.mark.parametrize("name", ["gemma3", "llava"])
async def test_images_go_into_the_first_forward(name: str, models: Models, tmp_path: Path) -> None:
    ids = [5, 60, 60, 60, 60, *prompt(6)]
    given: dict[str, Any] = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
    if name == "gemma3":
        given["token_type_ids"] = torch.tensor([[int(number == 60) for number in ids]])
    wanted, rows = await models.answer(name, ids, **given)
    async with opened(models, name, tmp_path, chunk_rows=4) as house:
        tokens = await house.tokens(ids, inputs=given)
        twins = await house.tokens(ids, n=2, inputs=given)
        other = await house.tokens(ids, inputs={**given, "pixel_values": -given["pixel_values"]})
    assert [token.id for token in tokens] == wanted
    torch.testing.assert_close(logprobs(tokens), rows, atol=1e-4, rtol=1e-4)
    assert [[token.id for token in twins if token.choice == choice] for choice in (0, 1)] == [wanted, wanted]
    assert not torch.allclose(logprobs(other)[0], rows[0], atol=1e-2)


# Draws


@pytest.mark.parametrize("name", ["t5", "gpt2", "mamba"])
async def test_seeded_answers_depend_on_seed_and_number_alone(name: str, models: Models, tmp_path: Path) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    async with opened(models, name, tmp_path) as house:
        alone = [token.id for token in await house.tokens(prompt(), sampling=sampling)]
        assert alone == await house.ids(prompt(), sampling=sampling)
        assert alone != await house.ids(prompt(), sampling=replace(sampling, seed=6))
        tokens = await house.tokens(prompt(), n=3, sampling=sampling)
    answers = [[token.id for token in tokens if token.choice == choice] for choice in range(3)]
    assert answers[0] == alone and len({tuple(answer) for answer in answers}) == 3


@pytest.mark.parametrize("name", ["t5", "gpt2", "mamba", "gemma2"])
async def test_greedy_answers_to_one_prompt_are_equal(name: str, models: Models, tmp_path: Path) -> None:
    wanted, _ = await models.answer(name, prompt(), 12)
    async with opened(models, name, tmp_path) as house:
        tokens = await house.tokens(prompt(), 12, n=3)
        assert house.generic.passes == 1 + 3 * 11
    assert [[token.id for token in tokens if token.choice == choice] for choice in range(3)] == [wanted] * 3


async def test_a_stop_id_ends_an_answer(models: Models, tmp_path: Path) -> None:
    wanted, _ = await models.answer("t5", prompt())
    last = next(index for index in range(1, 8) if wanted[index] not in wanted[:index])
    async with opened(models, "t5", tmp_path) as house:
        tokens = await house.tokens(prompt(), stop_ids=frozenset({wanted[last]}))
    assert [token.id for token in tokens] == wanted[: last + 1]
    assert (tokens[-1].finish_reason, tokens[-1].text) == ("stop", "")


# Company


@pytest.mark.parametrize("name", ["t5", "gpt2", "gemma3"])
async def test_many_at_once_get_what_each_gets_alone(name: str, models: Models, tmp_path: Path) -> None:
    prompts = [prompt(3 + 5 * seed, seed) for seed in range(8)]
    async with opened(models, name, tmp_path, chunk_rows=8) as house:
        alone = [await house.ids(ids) for ids in prompts]
        requests = [house.request(ids) for ids in prompts]
        assert [[token.id for token in await taken(request)] for request in requests] == alone
        await until(lambda: house.generic.riders == 0)


async def test_a_long_answer_does_not_hold_up_a_short_one(models: Models, tmp_path: Path) -> None:
    async with opened(models, "gpt2", tmp_path) as house:
        long = house.request(prompt(), 60)
        short = house.request(prompt(5), 4)
        await taken(short)
        assert long.answers[0].produced <= 6
        assert len(await taken(long)) == 60


async def test_who_does_not_fit_waits(models: Models, tmp_path: Path) -> None:
    async with opened(models, "gpt2", tmp_path, kv_tokens=60) as house:
        first, second = house.request(prompt(), 20), house.request(prompt(), 20)
        await first.take()
        assert (house.generic.riders, house.generic.waiting) == (1, 1)
        assert [token.id for token in await taken(first)] == [token.id for token in await taken(second)][1:]
        with pytest.raises(RequestError, match="room for 60"):
            house.request(prompt(), 50)
        with pytest.raises(RequestError, match="at most 128 an answer"):
            house.request(prompt(129), 1)


async def test_a_slow_reader_pauses_only_itself(models: Models, tmp_path: Path) -> None:
    async with opened(models, "gpt2", tmp_path) as house:
        slow = house.request(prompt(5), 100)
        await until(lambda: not slow.has_room)
        assert slow.answers[0].produced == OUTBOX
        assert len(await house.ids(prompt(6), 20)) == 20
        assert slow.answers[0].produced == OUTBOX
        assert len(await taken(slow)) == 100


@pytest.mark.parametrize("shift", ["rotate", "prefill"])
async def test_a_full_context_is_shifted(shift: str, models: Models, tmp_path: Path) -> None:
    async with opened(models, "gpt2", tmp_path, max_context_tokens=32) as house:
        found = await house.ids(prompt(), 40, shift=shift, keep_tokens=4, context=32)
        assert len(found) == 40
        history = [*prompt(), *found[:13]]  # 32 tokens are in the cache, and one is to come
        kept = [*history[:4], *history[4 + 14 :]]
        assert found[13:23] == await house.ids(kept, 10)
    async with opened(models, "t5", tmp_path, max_context_tokens=32) as house:
        with pytest.raises(RequestError, match="context_shift"):
            house.request(prompt(), 40, shift=shift)


# Leaving


@pytest.mark.parametrize("name", ["t5", "gpt2", "gemma3"])
@pytest.mark.parametrize("at", [1, 2, 5, 9])
async def test_a_cancelled_request_leaves_at_the_next_layer(name: str, at: int, models: Models, tmp_path: Path) -> None:
    async with opened(models, name, tmp_path) as house:
        wanted = await house.ids(prompt())
        house.layers.clear()
        request = house.request(prompt(), 100)

        def cancel(count: int) -> None:
            if count == at:
                left = threading.Event()
                house.port.post(lambda: (request.cancel(), left.set()))
                left.wait(5)

        house.at_layer = cancel
        await request.ended()
        assert len(house.layers) == at
        assert house.generic.riders == 0
        assert await house.ids(prompt()) == wanted


async def test_a_request_that_is_cancelled_in_line_never_rides(models: Models, tmp_path: Path) -> None:
    async with opened(models, "gpt2", tmp_path, requests=1) as house:
        first, second = house.request(prompt(), 30), house.request(prompt(), 30)
        await first.take()
        second.cancel()
        await second.ended()
        assert await second.take() is None and not second.answers[0].produced
        assert len(await taken(first)) == 29


@pytest.mark.parametrize("fails", [False, True])
async def test_what_a_request_held_is_freed_when_it_leaves_or_fails(fails: bool, models: Models, tmp_path: Path) -> None:
    async with opened(models, "gpt2", tmp_path) as house:
        request = house.request(prompt(), 100, n=2)
        await request.take()
        held = [weakref.ref(strand) for strand in house.generic._riders[0].strands.values()]
        assert len(held) == 2

        def fail(count: int) -> None:
            raise ValueError("no more")

        if fails:
            house.at_layer = fail
        else:
            request.cancel()
        await request.ended()
        await until(lambda: not house.generic.riders)
        assert isinstance(request.error, ModelError) is fails
        gc.collect()
        assert [strand() for strand in held] == [None, None]


@pytest.mark.parametrize("name", ["t5", "gpt2"])
async def test_closing_ends_the_forward_under_way_and_tells_everybody(name: str, models: Models, tmp_path: Path) -> None:
    async with opened(models, name, tmp_path, requests=1) as house:
        riding, waiting = house.request(prompt(), 100), house.request(prompt(), 100)
        closed = threading.Event()

        def close(count: int) -> None:
            if count == 2:
                house.port.post(lambda: (house.generic.close(), closed.set()))
                closed.wait(5)

        house.at_layer = close
        await riding.ended()
        assert len(house.layers) == 2
        with pytest.raises(RequestError, match="closed"):
            house.request(prompt())
    for request in (riding, waiting):
        with pytest.raises(RequestError, match="closed"):
            await request.take()
    assert house.generic.riders == house.generic.waiting == 0


# Failures


async def test_weights_that_are_not_numbers_fail_one_request_alone(models: Models, tmp_path: Path) -> None:
    plan = await models.plan("gpt2")

    def spoiled() -> Loaded:
        loaded = load(models.folder("gpt2"), plan, tmp_path)
        words = loaded.model.transformer.wte
        words.weight = torch.nn.Parameter(words.weight.detach().clone())  # the head stays as it is
        with torch.no_grad():
            words.weight[59] = torch.nan
        return loaded

    async with serving(spoiled) as house:
        wanted = await house.ids(prompt(), 12)
        good, bad = house.request(prompt(), 12), house.request([*prompt(), 59], 12, n=2)
        with pytest.raises(ModelError, match="NaN"):
            await taken(bad)
        assert [token.id for token in await taken(good)] == wanted
        assert await house.ids(prompt(), 12) == wanted


@pytest.mark.parametrize("name", ["t5", "gpt2"])
async def test_a_forward_that_fails_fails_its_request_alone(name: str, models: Models, tmp_path: Path) -> None:
    async with opened(models, name, tmp_path) as house:
        wanted = await house.ids(prompt(), 12)
        good, bad = house.request(prompt(), 12), house.request([*prompt(), IDS + 9], 12)
        with pytest.raises(ModelError, match="could not be computed") as raised:
            await taken(bad)
        assert isinstance(raised.value.__cause__, IndexError)
        assert [token.id for token in await taken(good)] == wanted


# Disk


@pytest.mark.parametrize("name", ["t5", "gpt2", "phi", "mixtral", "gemma3"])
@pytest.mark.parametrize("share", [0.2, 0.6])
async def test_what_does_not_fit_is_read_from_disk_and_says_the_same(name: str, share: float, models: Models, tmp_path: Path) -> None:
    wanted, rows = await models.answer(name, prompt())
    plan = await streamed_plan(models.folder(name), share)
    assert plan.streamed and plan.streamed_nbytes_per_pass >= share * plan.weights_nbytes
    assert sum(plan.ledger.values()) <= plan.memory
    async with serving(lambda: load(models.folder(name), plan, tmp_path)) as house:
        assert set(house.loaded.model.hf_device_map.values()) == {"cpu", "disk"} or plan.pinned_nbytes == 0
        request = house.request(prompt(), 100)
        await request.take()
        request.cancel()
        await request.ended()
        tokens = await house.tokens(prompt())
        in_memory = sum(
            tensor.untyped_storage().nbytes() for tensor in {id(each): each for each in house.loaded.model.parameters()}.values()
            if tensor.device.type != "meta"
        )  # fmt: skip
        assert in_memory <= plan.pinned_nbytes + 64
    assert [token.id for token in tokens] == wanted
    torch.testing.assert_close(logprobs(tokens), rows, atol=1e-4, rtol=1e-4)
    assert not list((tmp_path / "generic").iterdir())


async def test_a_plan_says_where_everything_is(models: Models) -> None:
    whole, part = await models.plan("t5"), await streamed_plan(models.folder("t5"), 0.2)
    assert (whole.kind, whole.architecture, whole.dtype) == (Kind.SEQ2SEQ, "T5ForConditionalGeneration", "float32")
    assert set(whole.placement.values()) == {"host"} and set(part.placement.values()) == {"host", "disk"}
    assert whole.passes == () and whole.cache_mode == "transformers-dynamic" and whole.vocabulary == IDS
    stored = sum(file.stat().st_size for file in models.folder("t5").glob("*.safetensors"))
    assert stored - 16384 < whole.weights_nbytes <= stored
    assert whole.kv_nbytes_per_token == 2 * 2 * 32 * 4
    assert part.placement["decoder.block.0"] == "host" and part.placement["encoder.block.1"] == "disk"
    assert json.loads(json.dumps(whole.as_dict()))["ledger"] == whole.ledger


@pytest.mark.parametrize("name", ["t5", "gpt2", "gemma3", "mixtral"])
async def test_no_memory_for_the_largest_layer_is_refused(name: str, models: Models) -> None:
    whole = await plan_of(models.folder(name), kv_nbytes=KV)
    with pytest.raises(MemoryBudgetError, match="is too small: this model needs at least"):
        await plan_of(models.folder(name), sum(whole.ledger.values()) - whole.weights_nbytes, kv_nbytes=KV)
    with pytest.raises(MemoryBudgetError, match="raise memory"):
        await plan_of(models.folder(name), 1 << 20)


async def test_context_is_cut_to_what_memory_holds(models: Models) -> None:
    assert (await plan_of(models.folder("gpt2"), context=None)).max_context_tokens == 256
    assert 64 <= (await plan_of(models.folder("t5"), 80 << 20, context=None)).max_context_tokens < 2048


@pytest.mark.parametrize(("name", "rebuilt"), [("t5", False), ("gpt2", False), ("gemma3", False), ("mixtral", True)])
async def test_experts_are_rebuilt_and_no_file_stays_mapped(name: str, rebuilt: bool, models: Models, tmp_path: Path) -> None:
    plan = await models.plan(name)
    assert plan.rebuilt is rebuilt
    loaded = load(copied(models.folder(name), tmp_path / "model", lambda config: None), plan, tmp_path)
    if rebuilt and sys.platform == "linux":
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    loaded.close()


async def test_what_a_module_uses_from_outside_is_always_kept() -> None:
    config = Blip2Config(
        vision_config=VISION, text_config=CONFIGS["opt"][1], image_token_index=60, num_query_tokens=4,
        qformer_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": IDS},
    )  # fmt: skip
    model = build(Kind.IMAGE_TEXT, config, torch.float32)
    names = {name for part in keep(parts_of(model), 0) for name in part.names}
    assert any(name.endswith("query_tokens") for name in names)
    everything = {name for part in parts_of(model) for name in part.names}
    modules = dict(model.named_modules())
    assert {name for name in everything if name not in modules} <= names


# Loading


@pytest.mark.parametrize(
    ("described", "kind"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, Kind.SEQ2SEQ),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, Kind.SEQ2SEQ),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"], "is_encoder_decoder": False}, Kind.CAUSAL),
        ({"model_type": "bart", "is_encoder_decoder": True}, Kind.SEQ2SEQ),
        ({"model_type": "gpt2"}, Kind.CAUSAL),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, Kind.IMAGE_TEXT),
        ({"model_type": "llama4", "architectures": ["Llama4ForCausalLM"]}, Kind.CAUSAL),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, None),
        ({"model_type": "no such"}, None),
        ({"model_type": ["t5"]}, None),
        ({}, None),
    ],
)
async def test_the_kind_follows_from_the_configuration(described: dict[str, Any], kind: Kind | None) -> None:
    assert kind_of(described) is kind


def copied(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tiny.edit(to, change)
    return to


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda config: config.update(model_type="nonsense"), ModelError, "no model of type 'nonsense'"),
        (lambda config: config.update(n_layer=5), CheckpointError, "are missing"),
        (lambda config: config.update(n_embd=64), ModelError, "cannot load it"),
        (lambda config: config.update(n_head=5), ModelError, "cannot build"),
        (lambda config: config.update(n_head="many"), ModelError, "config.json"),
    ],
)
async def test_a_folder_that_lies_is_a_model_error(
    change: Callable[[dict[str, Any]], object], error: type[AollmError], message: str, models: Models, tmp_path: Path
) -> None:
    folder = copied(models.folder("gpt2"), tmp_path / "model", change)
    with pytest.raises(error, match=message):
        load(folder, await plan_of(folder), tmp_path)


async def test_code_in_the_folder_is_not_run(models: Models, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    folder = copied(models.folder("gpt2"), tmp_path / "model", change)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    plan = await plan_of(folder)
    async with serving(lambda: load(folder, plan, tmp_path)) as house:
        assert len(await house.ids(prompt())) == 8
    assert not (tmp_path / "ran").exists()


async def test_without_accelerate_it_says_what_to_install(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = await streamed_plan(models.folder("gpt2"))
    monkeypatch.setattr("aollm.generic.loaded.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'aollm\[generic\]'"):
        load(models.folder("gpt2"), plan, tmp_path)
    assert not (tmp_path / "generic").exists()


async def test_the_dtype_is_the_stored_one_unless_said_otherwise(models: Models, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(models.folder("gpt2"), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    half, full = await plan_of(tmp_path / "half"), await plan_of(tmp_path / "half", dtype=torch.float32)
    assert (half.dtype, full.dtype) == ("bfloat16", "float32")
    assert full.weights_nbytes == 2 * half.weights_nbytes
    async with serving(lambda: load(tmp_path / "half", half, tmp_path)) as house:
        assert {parameter.dtype for parameter in house.loaded.model.parameters()} == {torch.bfloat16}
        assert len(await house.ids(prompt())) == 8


async def test_settings_in_the_folder_do_not_change_how_it_answers(models: Models, tmp_path: Path) -> None:
    folder = copied(models.folder("t5"), tmp_path / "model", lambda config: None)
    settings: dict[str, Any] = {
        "num_beams": 4, "min_length": 56, "max_length": 5, "temperature": 0.3, "no_repeat_ngram_size": 2, "cache_implementation": "static",
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps({**settings, "decoder_start_token_id": 0, "pad_token_id": 0}))
    wanted, _ = await models.answer("t5", prompt())
    plan = await plan_of(folder)
    async with serving(lambda: load(folder, plan, tmp_path)) as house:
        assert await house.ids(prompt()) == wanted
