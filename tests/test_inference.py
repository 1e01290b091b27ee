"""What comes from oLLM: its script under another import, the ids of transformers' own generate, and whatever is set in between."""

import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import peft
import pytest
import tiny
import torch
from test_text import bytelevel, fallback
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers import TextStreamer as TheirStreamer

from aollm import (
    AutoInference,
    ConfigError,
    DiskCache,
    Inference,
    MemoryBudgetError,
    ModelError,
    RequestError,
    Runtime,
    TextStreamer,
    file_get_contents,
)
from aollm.demo import MODEL
from aollm.inference.inference import usable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]

NAME = "llama3-1B-chat"
VOCABULARY = 1408
TOKENS = 12
PROMPT = torch.tensor([tiny.prompt(9, vocabulary=VOCABULARY)])
PAD = 7
BATCH = torch.tensor([[PAD] * 4 + tiny.prompt(5, 1, VOCABULARY), tiny.prompt(9, 2, VOCABULARY), [PAD] + tiny.prompt(8, 3, VOCABULARY)])
MASK = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8])
SCRIPT = """
from aollm import Inference, file_get_contents, TextStreamer
o = Inference("llama3-1B-chat", device="cuda:0", logging=True)
o.ini_model(models_dir="./models/", force_download=False)
o.offload_layers_to_cpu(layers_num=2)
past_key_values = o.DiskCache(cache_dir="./kv_cache/")
text_streamer = TextStreamer(o.tokenizer, skip_prompt=True, skip_special_tokens=False)

messages = [{"role":"system", "content":"You are helpful AI assistant"}, {"role":"user", "content":"List planets"}]
input_ids = o.tokenizer.apply_chat_template(messages, reasoning_effort="minimal", tokenize=True, add_generation_prompt=True, return_tensors="pt").to(o.device)
outputs = o.model.generate(input_ids=input_ids,  past_key_values=past_key_values, max_new_tokens=12, streamer=text_streamer).cpu()
answer = o.tokenizer.decode(outputs[0][input_ids.shape[-1]:], skip_special_tokens=False)
print(answer)
print(outputs.tolist())
"""  # noqa: E501


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as oLLM lays it out: one tiny llama, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / NAME, vocab_size=VOCABULARY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / NAME / name)
    return folder


@pytest.fixture(scope="module")
def theirs(models: Path) -> Any:
    """The same model in transformers."""
    return tiny.load(models / NAME)


@pytest.fixture(scope="module")
def o(models: Path) -> Iterator[Inference]:
    with Inference(NAME, "cpu", logging=False) as o:
        o.ini_model(models)
        yield o


@pytest.fixture
def anyio_backend() -> str:
    raise AssertionError("nothing here has a loop")


def generated(model: Any, ids: torch.Tensor = PROMPT, **options: Any) -> list[list[int]]:
    """What transformers' own generate says; a mask is not left to be guessed unless it is to be."""
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" not in options else {}
    with torch.no_grad():
        return list(model.generate(ids, **{"do_sample": False, **mask, **options}).tolist())


def test_a_script_moves_over_by_its_import(models: Path, theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(models)
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    *_, ids = ran.stdout.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(models / NAME)
    messages = [{"role": "system", "content": "You are helpful AI assistant"}, {"role": "user", "content": "List planets"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    [expected] = generated(theirs, prompt, max_new_tokens=12, pad_token_id=0)
    assert ids == str([expected])
    text = tokenizer.decode(expected[prompt.shape[-1] :])
    assert ran.stdout == f"{text}\n{text}\n{ids}\n"
    assert "cuda:0 is not to be had here: the CPU computes" in ran.stderr
    assert "aollm: 12 tokens in " in ran.stderr.splitlines()[-1] and "read" in ran.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "kv_cache").iterdir()] == ["kv_cache_paged"]


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (PROMPT, {"max_new_tokens": TOKENS}),
        (PROMPT, {"max_new_tokens": 1}),
        (PROMPT, {}),  # as many as transformers takes when nobody says
        (PROMPT, {"max_length": PROMPT.shape[1] + 5}),
        (PROMPT, {"max_new_tokens": TOKENS, "repetition_penalty": 1.7}),
        (PROMPT, {"max_new_tokens": TOKENS, "do_sample": True, "top_k": 1}),
        (PROMPT, {"max_new_tokens": TOKENS, "do_sample": True, "top_p": 1e-6, "top_k": 0, "temperature": 3.0}),
        (PROMPT, {"max_new_tokens": TOKENS, "num_beams": 1, "use_cache": True, "return_dict_in_generate": False}),
        (BATCH, {"max_new_tokens": TOKENS, "attention_mask": MASK, "pad_token_id": PAD}),
        (BATCH, {"max_new_tokens": TOKENS, "attention_mask": None, "pad_token_id": PAD}),
        (BATCH[1:2], {"max_new_tokens": 3, "attention_mask": MASK[1:2].bool()}),
    ],
)
def test_the_ids_are_those_of_transformers(o: Inference, theirs: Any, ids: torch.Tensor, options: dict[str, Any]) -> None:
    found = o.model.generate(ids, **options)
    assert (found.dtype, found.tolist()) == (torch.long, generated(theirs, ids, **options))


@pytest.mark.parametrize("ids", [PROMPT, BATCH[1:2].repeat(2, 1)], ids=["one", "two"])
def test_a_prompt_has_one_answer_whatever_is_configured(
    o: Inference, theirs: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    o.client()
    monkeypatch.setenv("AOLLM_GENERATION__N", "2")
    assert o.model.generate(ids, max_new_tokens=6).tolist() == generated(theirs, ids, max_new_tokens=6)


@pytest.mark.parametrize("pad", [PAD, None])
def test_answers_that_end_are_padded(o: Inference, theirs: Any, pad: int | None) -> None:
    """The ids that end an answer are taken from the middle of what would be said without them."""
    plain = generated(theirs, BATCH, attention_mask=MASK, pad_token_id=PAD, max_new_tokens=TOKENS)
    ends = [plain[0][-7], plain[2][-4]]
    options = {"attention_mask": MASK, "max_new_tokens": TOKENS, "eos_token_id": ends, "pad_token_id": pad}
    found = o.model.generate(input_ids=BATCH, **options).tolist()
    assert found == generated(theirs, BATCH, **options)
    assert len({row.index(ends[0]) if ends[0] in row else None for row in found}) > 1
    [alone], end = generated(theirs, max_new_tokens=TOKENS), generated(theirs, max_new_tokens=4)[0][-1]
    first = alone.index(end, PROMPT.shape[1])
    assert o.model.generate(PROMPT, max_new_tokens=TOKENS, eos_token_id=end).tolist() == [alone[: first + 1]]


async def idle(runtime: Runtime) -> int:
    """The engine's passes, one of them made here, once nobody rides and no pass is under way."""
    while runtime.engine.riders:  # noqa: ASYNC110  figures are no events
        await anyio.sleep(0.001)
    await runtime.generate([1], max_new_tokens=1)
    return runtime.engine.passes


def test_a_batch_rides_in_the_same_passes(o: Inference) -> None:
    before = o.client().run(idle)
    o.model.generate(BATCH, attention_mask=MASK, max_new_tokens=TOKENS)
    assert o.client().run(idle) - before == TOKENS + 1


def test_what_the_models_files_say_of_generation_holds(models: Path, theirs: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / NAME, tmp_path / "other"))
    ends = generated(theirs, max_new_tokens=9)[0][-3]
    (folder / "generation_config.json").write_text(
        f'{{"do_sample": true, "top_k": 1, "max_new_tokens": 9, "eos_token_id": [{VOCABULARY - 1}, {ends}]}}'
    )
    with AutoInference(folder, device="cpu", logging=False) as o:
        found = o.model.generate(PROMPT).tolist()
        assert found == generated(tiny.load(folder), do_sample=True)
        assert found[0][-1] == ends and len(found[0]) < PROMPT.shape[1] + 9
        assert o.model.generate(PROMPT, max_new_tokens=2, do_sample=False).tolist() == generated(theirs, max_new_tokens=2)


def test_what_is_drawn_hangs_on_torchs_generator_or_a_seed(o: Inference) -> None:
    def draw(**options: Any) -> list[list[int]]:
        return list(o.model.generate(BATCH, attention_mask=MASK, do_sample=True, temperature=5.0, max_new_tokens=8, **options).tolist())

    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    assert draw() == first != draw()
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)


class Kept(TextStreamer):
    """Keeps what it would print."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)


@pytest.mark.parametrize("options", [{"skip_prompt": True}, {}, {"skip_prompt": True, "skip_special_tokens": True}], ids=str)
def test_streamers_print_what_transformers_does(o: Inference, capsys: pytest.CaptureFixture[str], options: dict[str, Any]) -> None:
    printed = []
    for kind in (TheirStreamer, TextStreamer):
        streamer = kind(o.tokenizer, **options)
        for _ in range(2):  # it begins anew with each answer
            o.model.generate(PROMPT, max_new_tokens=TOKENS, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("\n") >= 2


def test_an_iterator_streamer_is_read_beside(o: Inference) -> None:
    streamer = TextIteratorStreamer(o.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=o.model.generate, args=(PROMPT,), kwargs={"max_new_tokens": TOKENS, "streamer": streamer})
    thread.start()
    found = "".join(streamer)
    thread.join()
    assert found == o.tokenizer.decode(o.model.generate(PROMPT, max_new_tokens=TOKENS)[0, PROMPT.shape[1] :])


@pytest.mark.parametrize("build", [bytelevel, fallback])
def test_no_half_characters_are_printed(build: Callable[[], Tokenizer]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build())
    ids = tokenizer.encode("the cat 🙂 naïve 你好\n€ the end", add_special_tokens=False)
    streamer = Kept(tokenizer)
    for id in ids:
        streamer.put(torch.tensor([id]))
    streamer.end()
    assert "".join(streamer.pieces) == tokenizer.decode(ids)
    assert len(streamer.pieces) > 8 and not any("\ufffd" in piece for piece in streamer.pieces)


def test_a_streamer_that_fails_ends_the_request(o: Inference) -> None:
    class Breaks(Kept):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.pieces) > 2:
                raise BrokenPipeError

    client = o.client()
    with pytest.raises(BrokenPipeError):
        o.model.generate(PROMPT, max_new_tokens=200, do_sample=True, temperature=50.0, seed=1, streamer=Breaks(o.tokenizer))

    before = client.run(idle)
    assert o.model.generate(PROMPT, max_new_tokens=TOKENS).shape == (1, PROMPT.shape[1] + TOKENS)
    assert client.run(idle) == before + TOKENS + 1


def test_settings_made_later_take_effect(models: Path, theirs: Any, tmp_path: Path) -> None:
    expected = generated(theirs, max_new_tokens=4)
    with Inference(NAME, "cpu", logging=False, max_context_tokens=128) as o:
        o.ini_model(models)
        o.offload_layers_to_cpu(layers_num=1, policy="suffix")

        def ask(cache: DiskCache | None = None) -> tuple[Any, dict[str, Any], set[str]]:
            assert o.model.generate(PROMPT, past_key_values=cache, max_new_tokens=4).tolist() == expected
            client = o.client(cache)
            plan = client.describe_plan()
            kept = {piece for piece, place in zip(plan["pieces"], plan["placement"], strict=True) if place == "host"}
            return client, client.runtime.cache_state(), kept

        first, state, kept = ask()
        assert {piece.split()[1] for piece in kept if piece.startswith("layer")} == {"2"}
        assert first.config.max_context_tokens == 128
        assert ask()[0] is first
        cache = o.DiskCache(tmp_path / "kv", "chunked")
        second, state, _ = ask(cache)
        assert (state["strategy_id"], state["cache_mode"]) == ("chunked", "disk-kv")
        assert [path.name for path in (tmp_path / "kv").iterdir()] == ["kv_cache_chunked"]
        assert second is not first and ask(cache)[0] is second
        with pytest.raises(RequestError, match="closed"):
            first.prompt([1])
        o.offload_layers_to_gpu_cpu(gpu_layers_num=1, cpu_layers_num=1)  # of a CPU's memory, both
        third, _, kept = ask(cache)
        assert third is not second and len({piece.split()[1] for piece in kept if piece.startswith("layer")}) == 2
        o.close()
        assert ask()[0] is not third


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        ("cpu", [(2, None), (3, None), (1, None), (2, None), (2, None), (0, None)]),
        ("cuda:0", [(2, None), (2, 1), (0, 1), (0, 2), (2, 0), (0, 0)]),
    ],
)
def test_layers_of_one_memory_leave_those_of_the_other(
    device: str, wanted: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Of the host and of the device; a CPU has one memory for both."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    o, found = Inference(NAME, device), []
    for keep, numbers in (
        (o.offload_layers_to_cpu, {"layers_num": 2, "policy": "prefix"}),
        (o.offload_layers_to_gpu, {"layers_num": 1}),
        (o.offload_layers_to_cpu, {"layers_num": 0}),
        (o.offload_layers_to_gpu_cpu, {"gpu_layers_num": 2}),
        (o.offload_layers_to_gpu_cpu, {"gpu_layers_num": 0, "cpu_layers_num": 2}),
        (o.offload_layers_to_cpu, {"layers_num": 0}),
    ):
        keep(**numbers)
        with pytest.raises(ConfigError, match="should be greater than or equal to 0"):
            o.offload_layers_to_gpu(-1)
        found.append((o._fields["offload_cpu_layers"], o._fields.get("offload_gpu_layers")))
    assert found == wanted


def test_another_model_takes_the_place_of_the_first(models: Path, theirs: Any, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / NAME, "qwen2", vocab_size=VOCABULARY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, other / name)
    first, second = generated(theirs, max_new_tokens=4), generated(tiny.load(other), max_new_tokens=4)
    assert first != second
    with Inference(NAME, "cpu", logging=False) as o:
        o.ini_model(models)
        client, tokenizer = o.client(), o.tokenizer
        o.ini_model(models)  # the same again
        assert o.client() is client and o.tokenizer is tokenizer
        assert o.model.generate(PROMPT, max_new_tokens=4).tolist() == first
        o.processor = tokenizer
        o.ini_model(tmp_path)
        assert o.model.generate(PROMPT, max_new_tokens=4).tolist() == second
        assert (o.tokenizer.name_or_path, o.processor.name_or_path) == (str(other), str(other))


def test_a_window_and_a_lifecycle_may_be_asked_for(o: Inference, tmp_path: Path) -> None:
    window = o.DiskCache(tmp_path, "sliding-window-ring-buffer", cache_window_tokens=64)
    assert window is not None and window.fields["kv_cache_window_tokens"] == 64
    kept = o.DiskCache(tmp_path, cache_lifecycle="persistent")
    assert kept == DiskCache(tmp_path, "paged", "persistent")


def test_what_runs_through_transformers_keeps_its_cache_in_memory(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / NAME, tmp_path / "other"))
    tiny.edit(folder, lambda config: config.update(model_type="gpt2"))
    with pytest.warns(UserWarning, match="gpt2 runs through transformers, which keeps keys and values in memory"):
        assert AutoInference(folder, device="cpu").DiskCache() is None


def test_an_adapter_is_in_use(models: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    adapted = peft.get_peft_model(tiny.load(models / NAME), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "checkpoint-20")
    with AutoInference(models / NAME, adapter_dir=tmp_path / "checkpoint-20", device="cpu", multimodality=False, logging=False) as o:
        found = o.model.generate(PROMPT, max_new_tokens=TOKENS).tolist()
    assert found == generated(adapted, max_new_tokens=TOKENS)
    assert found != generated(tiny.load(models / NAME), max_new_tokens=TOKENS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inputs": None}, r"a tensor of ids \[B, T\] is wanted"),
        ({"inputs": [[1, 2]]}, "not list"),
        ({"inputs": torch.tensor([1, 2])}, r"not a tensor \[2\]"),
        ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, r"not a tensor \[1, 0\]"),
        ({"inputs": torch.ones(1, 2)}, "of torch.float32"),
        ({"inputs": torch.tensor([[1, VOCABULARY]])}, "out of range"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask"),
        ({"attention_mask": torch.zeros_like(PROMPT)}, "row 0 of input_ids is nothing but padding"),
        ({"inputs": BATCH, "streamer": object()}, "for one prompt, not 3"),
        ({"past_key_values": {}}, r"what DiskCache\(\) returns, or None, not a dict"),
        ({"pixel_values": torch.zeros(1)}, "Runtime.stream the messages"),
        ({"num_beams": 4}, "num_beams: generate does not know"),
        ({"max_new_token": 4}, "max_new_token: generate does not know"),
        ({"max_length": 3}, "the prompt has 9 tokens; give max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"eos_token_id": "x"}, "a token id is a whole number"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_done_is_refused_by_name(o: Inference, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        o.model.generate(**{"inputs": PROMPT, **options})


def test_a_batch_has_no_text_streamer(o: Inference) -> None:
    with pytest.raises(RequestError, match="prints one answer, not 3"):
        TextStreamer(o.tokenizer).put(BATCH)


def test_bad_settings_are_refused_at_once(o: Inference, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gpu0' is none; give cpu, cuda or cuda:N"):
        Inference(NAME, device="gpu0")
    with pytest.raises(ConfigError, match="did you mean memory"):
        Inference(NAME, device="cpu", memry="1GiB")
    fresh = Inference(NAME, device="cpu")
    with pytest.raises(RequestError, match="call ini_model"):
        _ = fresh.model
    with pytest.raises(ConfigError, match="offload_cpu_layers"):
        fresh.offload_layers_to_cpu(layers_num=-1)
    with pytest.raises(ConfigError, match="offload_cpu_policy"):
        fresh.offload_layers_to_cpu(policy="last")
    with pytest.raises(ConfigError, match="kv_cache_strategy"):
        o.DiskCache(tmp_path, "pagd")
    with pytest.raises(ModelError, match="did you mean llama3-1B-chat"):
        Inference("llama3-1B-chap", device="cpu").ini_model(tmp_path)
    with pytest.raises(ModelError):
        AutoInference(tmp_path / "nothing", device="cpu")
    bare = Path(shutil.copytree(models / NAME, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    for part in ("tokenizer", "processor"):
        with pytest.raises(ModelError, match=f"transformers cannot load the {part}"):
            getattr(AutoInference(bare, device="cpu"), part)
    small = Inference(NAME, device="cpu", logging=False, memory="1MiB")
    small.ini_model(models)
    for _ in range(2):
        with pytest.raises(MemoryBudgetError):
            small.model.generate(PROMPT)
    with pytest.raises(RequestError, match="cannot be read"):
        file_get_contents(tmp_path / "nothing")
    (tmp_path / "text").write_text("naïve")
    assert file_get_contents(tmp_path / "text") == "naïve"


def test_a_device_that_is_here_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [str(usable(device)) for device in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for away in ("cuda:2", "mps"):
        with pytest.warns(UserWarning, match=f"{away} is not to be had here"):
            assert usable(away).type == "cpu"
