"""Every family against transformers: any cutting of its rows, any company, any store, again after a restart, forked and branched.

One table of families; a row is a tiny model with random weights. The largest error of each is printed at the end.
"""

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from aollm import Runtime
from aollm.demo import MODEL
from aollm.families.base import Params
from aollm.families.gpt_oss import GptOss
from aollm.maths.attention import BLOCK
from aollm.maths.mxfp4 import dequantize
from aollm.stores.presets import PRESETS

pytestmark = pytest.mark.anyio
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")

TOLERANCE = 1e-4
"""Of the largest logit, in float32."""
CONTEXT = 8192
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
PACKED = "gpt_oss in MXFP4"

# name: kind, options of the model's config
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {"sliding_window": 40}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3_text": ("gemma3_text", {}),
    "qwen3_next": ("qwen3_next", {}),
    "gpt_oss": ("gpt_oss", {}),
    PACKED: ("gpt_oss", {}),
    "olmo2": ("olmo2", {}),
}
NEAR = {"mistral", "mixtral"}
"""Families that look back no further than a window in any layer."""
CARRIES = {"qwen3_next"}
"""Families whose layers carry states, which are kept at the ends of blocks."""
ALL_PRESETS = {*CARRIES, "gpt_oss"}
"""Families that are tried with every store: states, and layers that see differently far."""


@dataclass(frozen=True)
class Made:
    """A model in a folder, and transformers' one from it, in float32."""

    folder: Path
    theirs: PreTrainedModel

    @property
    def layers(self) -> int:
        """Those that attend."""
        kinds = getattr(self.theirs.config, "layer_types", None) or [FULL] * self.theirs.config.num_hidden_layers
        return len(kinds) - kinds.count(LINEAR)

    @property
    def token_nbytes(self) -> int:
        """Keys and values of one token."""
        return int(self.layers * 2 * 4 * self.theirs.config.num_key_value_heads * self.theirs.config.head_dim)

    async def replay(self, ids: list[int], found: list[int]) -> tiny.Answer:
        return await anyio.to_thread.run_sync(tiny.replay, self.theirs, ids, found)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The model of a name and options, made once."""
    known: dict[str, Made] = {}

    async def get(name: str, **more: Any) -> Made:
        def make() -> Made:
            kind, options = FAMILIES[name]
            folder = tiny.save(tmp_path_factory.mktemp("model"), kind, **{"max_position_embeddings": CONTEXT, **options, **more})
            if name == PACKED:
                tiny.pack(folder)
            return Made(folder, tiny.load(folder).float())  # four bits come as bfloat16, which has all of their numbers

        key = f"{name} {more}"
        if key not in known:
            known[key] = await anyio.to_thread.run_sync(make)
        return known[key]

    return get


@pytest.fixture(scope="session")
def errors(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """The largest error of each family, relative to its largest logit; printed when all are done."""
    found: dict[str, float] = {}
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\nparity with transformers: largest error of a log-probability, of the largest logit")
        for name in filter(found.__contains__, FAMILIES):
            print(f"  {name:<18}{found[name]:10.1e}")


def close(ours: tiny.Answer, theirs: tiny.Answer, tolerance: float = TOLERANCE) -> float:
    """Check that tokens and log-probabilities are theirs; returns the error."""
    assert ours.ids == theirs.ids
    error = float((ours.logprobs - theirs.logprobs).abs().max()) / theirs.most
    assert error <= tolerance
    return error


def same(ours: tiny.Answer, theirs: tiny.Answer) -> None:
    assert ours.ids == theirs.ids
    assert torch.equal(ours.logprobs, theirs.logprobs)


async def settled(runtime: Runtime) -> None:
    """Wait until nobody rides, and check that then nothing is held."""
    assert runtime.cache is not None
    pool = runtime.cache.pool
    with anyio.fail_after(30):
        while runtime.engine.riders or runtime.engine.waiting or pool.reserved or pool.all_rows:  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)


# Options


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral without a window": ("mixtral", {"sliding_window": None, "num_experts_per_tok": 3}),
    "mixtral, one expert a row": ("mixtral", {"num_experts_per_tok": 1}),
    "mixtral, all experts": ("mixtral", {"num_experts_per_tok": 8}),
    "qwen3_moe, gates as they are": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3_moe, some layers dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe, every other layer": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3_moe, biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe, a window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma3_text, untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3_text, linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2345.0},
            }
        },
    ),
    "gemma3_text, layer types": ("gemma3_text", {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]}),
    "gemma3_text, another scale": ("gemma3_text", {"query_pre_attn_scalar": 3, "head_dim": 20}),
    "qwen3_next, as many heads": ("qwen3_next", {"linear_num_key_heads": 4}),
    "qwen3_next, wide values": ("qwen3_next", {"linear_value_head_dim": 24, "linear_key_head_dim": 8, "linear_conv_kernel_dim": 3}),
    "qwen3_next, gates as they are": ("qwen3_next", {"norm_topk_prob": False}),
    "qwen3_next, some layers dense": ("qwen3_next", {"mlp_only_layers": [1], "attention_bias": True}),
    "qwen3_next, layer types": ("qwen3_next", {"num_hidden_layers": 3, "layer_types": [FULL, LINEAR, FULL]}),
    "qwen3_next, no attention": ("qwen3_next", {"num_hidden_layers": 2, "layer_types": [LINEAR] * 2}),
    "qwen3_next, half of a head turns": (
        "qwen3_next",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}},
    ),
    "gpt_oss, no biases": ("gpt_oss", {"attention_bias": False}),
    "gpt_oss, clamped": ("gpt_oss", {"swiglu_limit": 0.3, "swiglu_alpha": 2.5}),
    "gpt_oss, layer types": ("gpt_oss", {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}),
    "gpt_oss, tied": ("gpt_oss", {"tie_word_embeddings": True}),
}  # fmt: skip


@ONE_LOOP
@pytest.mark.parametrize("name", OPTIONS)
async def test_every_option_gives_the_logits_of_transformers(made: Any, name: str) -> None:
    kind, options = OPTIONS[name]
    model: Made = await made(kind, **options)
    ids = tiny.prompt(50)
    async with Runtime.open(model.folder, backend="optimized-native", max_context_tokens=128) as runtime:
        ours = await tiny.ours(runtime, ids, 8)
    close(ours, await model.replay(ids, ours.ids))


@ONE_LOOP
@pytest.mark.parametrize("name", FAMILIES)
async def test_token_by_token_as_transformers_generates(made: Any, name: str) -> None:
    """Its own cache and, where it has them, its recurrences row by row."""
    model: Made = await made(name)
    ids = tiny.prompt(67, 3)
    theirs = await anyio.to_thread.run_sync(tiny.answer, model.theirs, ids)
    async with Runtime.open(model.folder, backend="optimized-native", max_context_tokens=128) as runtime:
        close(await tiny.ours(runtime, ids), theirs)


# Pieces and company


CUTS: dict[str, tuple[int | None, int | None]] = {
    "whole": (None, None), "chunks": (None, 0), "passes of 37": (37, 37), "passes of 69": (69, 23),
}  # fmt: skip
"""Rows of a pass, and of a chunk; 0 for as many as chance says."""


def fields_of(model: Made, name: str, how: str) -> dict[str, Any]:
    """Settings that cut rows so. With keys and values on disk, how many a pass has follows from the memory that these may have."""
    rows, chunk = CUTS[how]
    chunk = Random(name).choice([1, 2, 3, 5, 7, 11, 13, 33]) if chunk == 0 else chunk
    fields: dict[str, Any] = {"dense_projection_chunk_rows": chunk, "max_context_tokens": 512}
    if rows is not None:
        fields |= {"kv_cache_strategy": "paged", "kv_cache_memory": (512 + -(-16 * rows // model.layers)) * model.token_nbytes}
    return fields


async def accompany(model: Made, cache: Path, fields: dict[str, Any], rows: int | None) -> float:
    """Have five requests of all lengths ride together, of which one decodes when the others come; returns the largest error."""
    lengths, counts = (150, 9, 40, 70), (40, 30, 20, 64)
    found: dict[int, tiny.Answer] = {}
    begun = anyio.Event()
    most = 0
    async with Runtime.open(model.folder, backend="optimized-native", cache_dir=cache, **fields) as runtime:

        async def ride(seed: int) -> None:
            found[seed] = await tiny.ours(runtime, tiny.prompt(lengths[seed], seed), counts[seed])

        async def begin() -> None:
            async for _ in runtime.stream(tiny.prompt(5), max_new_tokens=80):
                begun.set()

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, runtime.engine.riders)
                await anyio.sleep(0.002)

        async with anyio.create_task_group() as watching:
            watching.start_soon(watch)
            async with anyio.create_task_group() as group:
                group.start_soon(begin)
                await begun.wait()
                for seed in range(4):
                    group.start_soon(ride, seed)
            watching.cancel_scope.cancel()
        assert most == 5
        assert rows is None or runtime.plan.max_rows == rows
        await settled(runtime)
    return max([close(ours, await model.replay(tiny.prompt(lengths[seed], seed), ours.ids)) for seed, ours in found.items()])


@ONE_LOOP
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", FAMILIES)
async def test_any_pieces_in_any_company_give_the_logits_of_transformers(
    made: Any, errors: dict[str, float], tmp_path: Path, name: str, how: str
) -> None:  # fmt: skip
    model: Made = await made(name)
    error = await accompany(model, tmp_path, fields_of(model, name, how), CUTS[how][0])
    errors[name] = max(errors.get(name, 0.0), error)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
async def test_company_on_either_loop(made: Any, tmp_path: Path, name: str) -> None:
    model: Made = await made(name)
    await accompany(model, tmp_path, fields_of(model, name, "passes of 37"), 37)


# Stores


CHUNK = 32
LONG = BLOCK + 250


def presets_for(name: str) -> list[str]:
    """Those on disk that a family is tried with for every change: all where layers carry states or see differently far, else
    `paged`, the one with codes, and one more, another for each family. A store knows nothing of families; `make soak` tries all."""
    on_disk = [strategy for strategy, preset in PRESETS.items() if preset.layout is not None]
    if name in ALL_PRESETS:
        return on_disk
    fixed = ["paged", "quantized-cold-tier"]
    others = [strategy for strategy in on_disk if strategy not in fixed]
    return [*fixed, others[list(FAMILIES).index(name) % len(others)]]


@asynccontextmanager
async def stored(model: Made, cache: Path, strategy: str, **fields: Any) -> AsyncIterator[Runtime]:
    """A runtime whose keys and values have hardly more memory than a block, unless they are to be in memory."""
    if strategy != "resident":
        fields = {"kv_cache_memory": (BLOCK + -(-128 // model.layers)) * model.token_nbytes, **fields}
    if PRESETS[strategy].windowed:
        fields["kv_cache_window_tokens"] = CONTEXT
    how = {"dense_projection_chunk_rows": CHUNK, "max_context_tokens": 2048, "max_concurrent_requests": 1, **fields}
    async with Runtime.open(model.folder, backend="optimized-native", kv_cache_strategy=strategy, cache_dir=cache, **how) as runtime:
        yield runtime


@ONE_LOOP
@pytest.mark.parametrize(
    ("name", "strategies"),
    [
        *(pytest.param(name, presets_for(name), id=name) for name in FAMILIES),
        *(pytest.param(name, list(PRESETS), id=f"{name}, all", marks=pytest.mark.soak) for name in FAMILIES if name not in ALL_PRESETS),
    ],
)
async def test_every_store_gives_the_bits_of_a_resident_one(
    made: Any, errors: dict[str, float], tmp_path: Path, name: str, strategies: list[str]
) -> None:
    model: Made = await made(name)
    ids = tiny.prompt(LONG)
    async with stored(model, tmp_path, "resident") as runtime:
        wanted = await tiny.ours(runtime, ids, 4)
    errors[name] = max(errors.get(name, 0.0), close(wanted, await model.replay(ids, wanted.ids)))
    for strategy in strategies:
        preset = PRESETS[strategy]
        if preset.layout is None:
            continue
        async with stored(model, tmp_path, strategy) as runtime:
            ours = await tiny.ours(runtime, ids, 4)
            events = {event.name for event in runtime.trace.between(0, float("inf"))}
            assert {"kvload", "kvsave"} <= events, strategy
            if not preset.codec.representation:
                same(ours, wanted)
            else:
                error = (ours.logprobs[0] - wanted.logprobs[0]).abs().max()
                assert error <= 0.1 * wanted.logprobs[0].abs().max()
                assert error > 0 or name in NEAR  # codes were read
            await settled(runtime)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@ONE_LOOP
@pytest.mark.parametrize("name", FAMILIES)
async def test_a_prompt_is_found_after_a_restart(made: Any, tmp_path: Path, name: str) -> None:
    model: Made = await made(name)
    ids = tiny.prompt(LONG)
    longer = [*ids, *tiny.prompt(100, 1)]
    hits: list[list[int]] = []
    answers: list[list[list[int]]] = []
    for _ in range(2):
        hits.append([])
        answers.append([])
        async with stored(
            model, tmp_path, "paged", kv_cache_lifecycle="persistent", kv_cache_memory="16MiB", dense_projection_chunk_rows=256
        ) as runtime:
            assert runtime.cache is not None
            for prompt in (ids, longer):
                async with runtime.stream(prompt, max_new_tokens=6) as stream:
                    answers[-1].append([token.id async for token in stream])
                    assert stream.request is not None
                    hits[-1].append(stream.request.prefix_hit_tokens)
                    await stream.ended()
                await runtime.cache.flush()
    for prompt, found in zip((ids, longer), answers[0], strict=True):
        assert (await model.replay(prompt, found)).ids == found
    assert answers[1] == answers[0]
    assert hits == ([[0, BLOCK], [BLOCK, BLOCK]] if name in CARRIES else [[0, LONG], [LONG - 1, len(longer) - 1]])


@ONE_LOOP
@pytest.mark.parametrize("name", FAMILIES)
async def test_answers_fork_from_one_prompt(made: Any, tmp_path: Path, name: str) -> None:
    model: Made = await made(name)
    ids = tiny.prompt(LONG, 4)
    drawn: list[list[tuple[int, ...]]] = []
    for strategy in ("resident", "paged"):
        async with stored(model, tmp_path, strategy, kv_cache_memory="16MiB", dense_projection_chunk_rows=256) as runtime:
            answer = await runtime.generate(ids, n=3, max_new_tokens=5)
            greedy = [list(choice.token_ids) for choice in answer.choices]
            assert greedy == [(await model.replay(ids, greedy[0])).ids] * 3
            answer = await runtime.generate(ids, n=3, max_new_tokens=20, temperature=1.0, seed=5)
            drawn.append([choice.token_ids for choice in answer.choices])
            await settled(runtime)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


@ONE_LOOP
@pytest.mark.parametrize("name", FAMILIES)
async def test_turns_and_branches_answer_as_the_whole_conversation_does(made: Any, tmp_path: Path, name: str) -> None:
    model: Made = await made(name, vocab_size=1408)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, model.folder)
    first = (MODEL / "heldout.txt").read_text()[:4500]
    async with (
        stored(model, tmp_path, "paged", kv_cache_memory="16MiB", max_concurrent_requests=4, dense_projection_chunk_rows=256) as runtime,
        runtime.session() as session,
    ):
        runtime.text.stop_ids = frozenset()

        async def turn(session: Any, message: str) -> int:
            """Checks the turn's tokens; returns how many of its prompt's were not computed again."""
            async with session.stream(message, max_new_tokens=12) as stream:
                ids = [token.id async for token in stream]
                assert stream.request is not None
                hit = int(stream.request.prefix_hit_tokens)
                await stream.ended()
                assert ids == (await model.replay(stream.request.prompt, ids)).ids and len(stream.request.prompt) > BLOCK
            return hit

        assert await turn(session, first) == 0
        assert await turn(session, "And then?") >= BLOCK
        async with session.branch() as twin:
            assert await turn(twin, "Who was it?") >= BLOCK
            assert await turn(session, "When was that?") >= BLOCK
            assert await turn(twin, "Why?") >= BLOCK
        assert session.messages[:4] == twin.messages[:4] and session.messages[4:] != twin.messages[4:]


# Four bits


async def test_packed_experts_are_those_of_transformers(made: Any) -> None:
    """Weights bit for bit, products within rounding."""
    model: Made = await made(PACKED)
    folder = model.folder
    tensors = await anyio.to_thread.run_sync(lambda: load_file(folder / "model.safetensors"))
    described = model.theirs.config.to_dict()
    described["quantization_config"] = {"quant_method": "mxfp4"}
    family = GptOss(described, torch.float32)
    rows = torch.randn(5, family.hidden, generator=torch.Generator().manual_seed(1))
    for layer in range(family.layers):
        at, theirs = f"model.layers.{layer}.mlp.experts", model.theirs.get_submodule(f"model.layers.{layer}.mlp.experts")
        for name in ("gate_up_proj", "down_proj"):
            weights = dequantize(tensors[f"{at}.{name}_blocks"], tensors[f"{at}.{name}_scales"], torch.bfloat16)
            assert torch.equal(weights.float(), theirs.get_parameter(name).transpose(1, 2))
        beside = Params({f"{name}_bias": tensors[f"{at}.{name}_proj_bias"] for name in ("gate_up", "down")})
        for number in range(family.experts):
            own = {name: tensors[need.tensors[0]][need.row] for name, need in family._expert_params(at, number).items()}
            ours = family.expert(rows, Params(own), number, beside)
            wanted = theirs(rows, torch.full((5, 1), number), torch.ones(5, 1)).detach()
            assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


HALF = 0.06
"""Tolerance in bfloat16, of the largest logit: its numbers have 8 bits, and what they are rounded to goes through all layers.
It is for the median of the positions: where two experts are as good, rounding may choose either."""


@ONE_LOOP
@pytest.mark.parametrize("name", FAMILIES)
async def test_bfloat16_is_as_near_as_that_of_transformers(made: Any, tmp_path: Path, name: str) -> None:
    kind, options = FAMILIES[name]

    def make() -> tuple[PreTrainedModel, PreTrainedModel]:
        tiny.save(tmp_path, kind, torch.bfloat16, **options)
        if name == PACKED:
            tiny.pack(tmp_path)
        return tiny.load(tmp_path, torch.bfloat16), tiny.load(tmp_path).float()

    half, whole = await anyio.to_thread.run_sync(make)
    ids = tiny.prompt(70)
    async with Runtime.open(tmp_path) as runtime:
        ours = await tiny.ours(runtime, ids, 32)
    theirs, exact = [await anyio.to_thread.run_sync(tiny.replay, model, ids, ours.ids) for model in (half, whole)]

    def error(one: tiny.Answer, other: tiny.Answer) -> float:
        return float((one.logprobs - other.logprobs).abs().amax(-1).median()) / exact.most

    assert error(ours, theirs) <= HALF
    assert error(ours, exact) <= 2 * error(theirs, exact)
