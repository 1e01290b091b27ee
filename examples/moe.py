"""A mixture in less memory than its experts need: how many were asked for, how many were read, for each token.

python examples/moe.py [model [memory for experts]], such as: python examples/moe.py gpt-oss-20B 2GiB
Without arguments it asks a tiny mixture with random weights, whose answer means nothing.
"""

import sys
from tempfile import TemporaryDirectory
from time import perf_counter

import anyio
from transformers import MixtralConfig, MixtralForCausalLM, logging

from aollm import Runtime
from aollm.trace import READS

PROMPT = [11, 22, 33, 44]


def make(folder: str) -> str:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    logging.disable_progress_bar()
    MixtralForCausalLM(MixtralConfig(vocab_size=256, num_local_experts=8, **sizes)).save_pretrained(folder)
    return folder


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    with TemporaryDirectory() as folder:
        model, memory = (*sys.argv[1:], None)[:2] if sys.argv[1:] else (make(folder), "1MiB")
        async with Runtime.open(model, expert_memory=memory, max_context_tokens=256) as runtime:
            plan = runtime.plan
            print(f"{plan.expert_slots} of {plan.experts} experts have room, {plan.expert_slot_nbytes / 1e6:.1f} MB each")
            start = perf_counter()
            async for token in runtime.stream(PROMPT, max_new_tokens=12):
                events = [event for event in runtime.trace.between(start, perf_counter()) if event.end > start]
                asked = sum(event.rows for event in events if event.name == "experts_load")
                read = sum(" expert " in event.label for event in events if event.name in READS)
                nbytes = sum(event.nbytes for event in events if event.name in READS)
                print(f"token {token.id}: {asked} experts asked for, {read} read, {nbytes / 1e6:.2f} MB in all")
                start = perf_counter()


anyio.run(main)
