"""States: what recurrences carry along is right however rows are cut, packed, forked, taken back and stored.

The family is a toy made for this: two recurrences around one attention, compared with a plain loop over all tokens.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from aollm import Runtime, Token
from aollm.families import FAMILIES
from aollm.families.base import Angles, Attend, KvShape, Need, Params, Recall, Step, Work
from aollm.maths.attention import BLOCK
from aollm.stores.states import States
from aollm.stores.store import Store

pytestmark = pytest.mark.anyio

HIDDEN, VOCABULARY = 8, 64


def scan(decay: Tensor, rows: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """s = decay · s + row, row by row; returns every s, and the last one."""
    now, found = torch.zeros(HIDDEN) if state is None else state, []
    for row in rows[0]:
        now = decay * now + row
        found.append(now)
    return torch.stack(found), now


class Toy:
    """A family of one attention, or none, between two recurrences."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str) -> None:
        self.dtype, self.hidden, self.vocabulary, self.context, self.layers = dtype, HIDDEN, VOCABULARY, 1 << 14, 3
        self.embedding, self.head, self.norm = "embed_tokens.weight", "lm_head.weight", "norm.weight"
        attends = bool(config["attends"])
        self.kv = KvShape(int(attends), 1, HIDDEN, dtype, states=((HIDDEN,), (HIDDEN,)))
        self.steps: Sequence[Step] = (
            Step(0, "first", {"decay": Need((HIDDEN,), ("first.decay",))}, partial(self.recur, layer=0)),
            *([Step(1, "attention", {"scales": Need((3, HIDDEN), ("attention.scales",))}, self.attend, attends=0)] if attends else []),
            Step(2, "last", {"decay": Need((HIDDEN,), ("last.decay",))}, partial(self.recur, layer=1)),
        )

    def begin(self, x: Tensor) -> Tensor:
        return x

    def angles(self, positions: Tensor, length: int) -> Angles:
        return ()

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        return x * norm

    def activation_nbytes(self, rows: int) -> int:
        return rows * HIDDEN * 40

    def recur(self, w: Params, x: Tensor, angles: Angles, layer: int) -> Work:
        carried = yield Recall(layer, (x,), partial(scan, w["decay"].clone()))
        return x + carried.tanh()

    def attend(self, w: Params, x: Tensor, angles: Angles) -> Work:
        q, k, v = (x[:, None] * scale for scale in w["scales"])
        return x + (yield Attend(0, q, k, v, HIDDEN**-0.5))[:, 0]


class Plain:
    """The same model as one loop, and what it says."""

    def __init__(self, folder: Path, attends: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.w = {
            "embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
            "lm_head.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
            "norm.weight": torch.rand(HIDDEN, generator=generator) + 0.5,
            "first.decay": 1 - 0.01 * torch.rand(HIDDEN, generator=generator),
            "last.decay": 1 - 0.01 * torch.rand(HIDDEN, generator=generator),
        }
        if attends:
            self.w["attention.scales"] = torch.randn(3, HIDDEN, generator=generator)
        self.folder, self.attends = folder, attends
        save_file(self.w, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "attends": attends}))

    def logits(self, ids: Sequence[int]) -> Tensor:
        x = self.w["embed_tokens.weight"][list(ids)]
        x = x + scan(self.w["first.decay"], (x,), None)[0].tanh()
        if self.attends:
            q, k, v = (x * scale for scale in self.w["attention.scales"])
            later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
            x = x + (q @ k.T * HIDDEN**-0.5).masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + scan(self.w["last.decay"], (x,), None)[0].tanh()
        return self.w["lm_head.weight"] @ (x[-1] * self.w["norm.weight"])

    def agrees(self, ids: Sequence[int], tokens: Sequence[Token]) -> None:
        """Each token is the likeliest after those before, and as likely as the loop says."""
        said = list(ids)
        for token in tokens:
            wanted = self.logits(said).log_softmax(-1)
            assert token.logprob == pytest.approx(float(wanted.max()), abs=2e-3)
            assert token.id == int(wanted.argmax())
            said.append(token.id)


class Keeper:
    """Who keeps a store from turn to turn."""

    store: Store | None = None

    def heard(self, token: Token) -> None:
        """Nothing is kept of it."""


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Plain:
    monkeypatch.setitem(FAMILIES, "toy", Toy)
    (folder := tmp_path / "model").mkdir()
    return Plain(folder, getattr(request, "param", True))


def open_runtime(plain: Plain, **fields: Any) -> Runtime:
    return Runtime.open(plain.folder, **{"max_context_tokens": 4096, "cache_dir": plain.folder.parent / "cache", **fields})


def prompt(count: int, seed: int = 0) -> list[int]:
    return tiny.prompt(count, seed, VOCABULARY)


async def said(runtime: Runtime, plain: Plain, ids: list[int], count: int = 3, session: Any = None, **fields: Any) -> int:
    """Ask, compare, and return how many tokens did not have to be computed."""
    async with runtime.stream(ids, max_new_tokens=count, session=session, **fields) as stream:
        tokens = [token async for token in stream]
        assert stream.request is not None
        for choice in range(fields.get("n", 1)):
            plain.agrees(ids, [token for token in tokens if token.choice == choice])
        return stream.request.prefix_hit_tokens


# By themselves


def filled(budget: int, *ends: int) -> States:
    """Two layers of one number each, which is how many tokens there were."""
    states = States(2, budget)
    for end in ends:
        for layer in range(2):
            states.put(layer, torch.tensor([float(end)]), end)
    return states


def numbers(states: States) -> list[float | None]:
    return [None if state is None else float(state) for state in (states.get(0), states.get(1))]


@pytest.mark.parametrize(("cut", "at"), [(9000, 9000), (2500, 2500), (2499, 2048), (2048, 2048), (2047, 1024), (1023, 0), (0, 0)])
def test_states_go_back_to_the_last_snapshot(cut: int, at: int) -> None:
    states = filled(1 << 20, 500, 1024, 1500, 2048, 2500)
    assert states.truncate(cut) == at
    there = min(at, 2500)
    assert numbers(states) == ([float(there)] * 2 if there else [None, None])
    assert states.tokens == [there] * 2


def test_a_snapshot_that_not_all_layers_reached_is_none() -> None:
    states = filled(1 << 20, 1024)
    states.put(0, torch.tensor([2048.0]), 2048)
    assert states.snapshot(2048) is None and states.snapshot(1024) is not None and states.snapshot(3072) is None
    assert states.truncate(1500) == 1024 and numbers(states) == [1024.0] * 2


def test_the_oldest_snapshots_go_when_there_are_too_many() -> None:
    states = filled(3 * 2 * 4, *range(BLOCK, 10 * BLOCK, BLOCK))
    assert states.nbytes <= 3 * 2 * 4
    assert [at for at in range(0, 10 * BLOCK, BLOCK) if states.snapshot(at)] == [7 * BLOCK, 8 * BLOCK, 9 * BLOCK]
    assert states.truncate(6 * BLOCK) == 0 and numbers(states) == [None, None]


def test_twins_do_not_see_what_the_other_carries() -> None:
    first = filled(1 << 20, 1024, 1100)
    second = first.fork()
    first.put(0, torch.tensor([7.0]), 2048)
    assert second.truncate(1024) == 1024 and numbers(first) == [7.0, 1100.0]
    assert numbers(second) == [1024.0] * 2 and second.snapshot(2048) is None
    assert first.snapshot(1024) is not None


def test_no_states_are_cut_anywhere() -> None:
    assert States(0, 0).truncate(77) == 77 and not States(0, 0) and States(1, 0)


# In passes


@pytest.mark.parametrize("plain", [True, False], ids=["attention", "recurrent"], indirect=True)
@pytest.mark.parametrize("rows", [1, 7, 100, 512])
async def test_states_do_not_depend_on_how_rows_are_cut(rows: int, plain: Plain) -> None:
    async with open_runtime(plain, dense_projection_chunk_rows=rows) as runtime:
        for length in (1, 2, 50, 1023, 1024, 1025) if rows > 1 else (1, 40):
            await said(runtime, plain, prompt(length, length))


@pytest.mark.parametrize("strategy", ["resident", "paged"])
async def test_states_of_requests_side_by_side_do_not_mix(strategy: str, plain: Plain) -> None:
    async with open_runtime(plain, kv_cache_strategy=strategy, dense_projection_chunk_rows=64) as runtime:
        async with anyio.create_task_group() as group:
            for number, length in enumerate((1100, 3, 200, 64, 1024, 5)):
                group.start_soon(partial(said, runtime, plain, prompt(length, number), 6))


async def test_answers_to_one_prompt_share_its_state_and_go_on_alone(plain: Plain) -> None:
    async with open_runtime(plain) as runtime:
        await said(runtime, plain, prompt(1030), 4, n=4)
        tokens = [token async for token in runtime.stream(prompt(30), max_new_tokens=5, n=3, temperature=1.5, seed=1, logprobs=VOCABULARY)]
        answers = [[token for token in tokens if token.choice == choice] for choice in range(3)]
        assert len({tuple(token.id for token in answer) for answer in answers}) == 3
        for answer in answers:
            ids = prompt(30)
            for token in answer:
                wanted = plain.logits(ids).log_softmax(-1)
                assert all(value == pytest.approx(float(wanted[id]), abs=2e-3) for id, value in token.top_logprobs)
                ids.append(token.id)


@pytest.mark.parametrize("strategy", ["resident", "paged", "tiered-write-back"])
async def test_a_turn_goes_back_to_the_last_snapshot(strategy: str, plain: Plain) -> None:
    async with open_runtime(plain, kv_cache_strategy=strategy) as runtime:
        keeper, ids = Keeper(), prompt(2100)
        for asked, kept in ((ids, 0), (ids[:2060] + prompt(40, 1), 2048), (ids[:1500] + prompt(9, 2), 1024), (ids[:900], 0)):
            assert await said(runtime, plain, asked, session=keeper) == kept
            assert keeper.store is not None
        await keeper.store.aclose()


async def test_blocks_are_copied_by_the_thread_that_fills_them(plain: Plain) -> None:
    async with open_runtime(plain) as runtime:
        assert runtime.cache.compute == runtime.engine._compute.run


# For good


@pytest.mark.parametrize("strategy", ["chunked", "paged", "streamed-segmented", "log-structured-journal", "tiered-write-back"])
async def test_states_are_found_again_with_the_prefix(strategy: str, plain: Plain) -> None:
    fields = {"kv_cache_strategy": strategy, "kv_cache_lifecycle": "persistent"}
    ids = prompt(2300)
    async with open_runtime(plain, **fields) as runtime:
        assert await said(runtime, plain, ids) == 0
    for _ in range(2):
        async with open_runtime(plain, **fields) as runtime:
            state = runtime.cache_state()
            assert (state["persisted_tokens"], state["persisted_artifact_count"], state["persisted_layer_count"]) == (2048, 2, 1)
            for asked, found in ((ids, 2048), (ids[:2049], 2048), (ids[:1500] + prompt(9, 1), 1024), (ids[:500], 0), (prompt(9, 2), 0)):
                assert await said(runtime, plain, asked) == found


async def test_states_that_were_damaged_are_computed_again(plain: Plain) -> None:
    fields = {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent"}
    async with open_runtime(plain, **fields) as runtime:
        await said(runtime, plain, prompt(1100))
    for file in (plain.folder.parent / "cache").rglob("*"):
        if file.is_file() and file.name not in ("manifest", "LOCK", "identity.json"):
            data = bytearray(file.read_bytes())
            data[4096::4096] = bytes(byte ^ 1 for byte in data[4096::4096])
            file.write_bytes(data)
    for found in (0, 1024):  # what was computed again was stored again
        async with open_runtime(plain, **fields) as runtime:
            assert await said(runtime, plain, prompt(1100)) == found
