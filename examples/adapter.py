"""One question to a model and to each of its LoRA adapters, all in the same passes.

python examples/adapter.py [model adapters]      adapters: a folder as PEFT saves it, or one with such folders in it
Without arguments it makes an adapter of random numbers for the bundled model, which garbles what it writes.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import torch
from safetensors.torch import save_file

from aollm import Runtime
from aollm.demo import MODEL

PROMPT = "Once upon a time"


def make(folder: Path) -> Path:
    sizes = json.loads((MODEL / "config.json").read_text())
    hidden, wide, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    at = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    factors = {at.format(n, "A"): torch.randn(4, hidden) for n in range(layers)}
    factors |= {at.format(n, "B"): torch.randn(wide, 4) * 0.05 for n in range(layers)}
    (folder / "garbler").mkdir()
    save_file(factors, folder / "garbler" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "garbler" / "adapter_config.json").write_text(json.dumps(config))
    print("a random adapter was made: its words mean nothing")
    return folder


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: python examples/adapter.py [model adapters]")
    with TemporaryDirectory() as made:
        model, folder = sys.argv[1:] or ("demo", make(Path(made)))
        async with Runtime.open(model, adapter_dir=folder) as runtime:

            async def ask(name: str | None) -> None:
                answer = await runtime.generate(PROMPT, max_new_tokens=24, adapter=name)
                print(f"{name or 'the model alone'}: {PROMPT}{answer.text}")

            async with anyio.create_task_group() as group:
                for name in (None, *runtime.adapters):
                    group.start_soon(ask, name)


anyio.run(main)
