"""A question about a picture. Without arguments it asks a tiny model with random weights, whose answer means nothing.

python examples/image.py [model picture.png]      a model that sees, such as gemma3-12B, is a download of 24 GB
"""

import sys
from tempfile import TemporaryDirectory

import anyio
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast, logging

from aollm import Runtime

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"boi_token_index": 256, "eoi_token_index": 257, "image_token_index": 258}
TEMPLATE = "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endfor %}"


def make(folder: str) -> str:
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<image>", "</image>", "<patch>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    eye = {**SIZES, "image_size": 84, "patch_size": 14, "vision_use_head": False}
    config = Gemma3Config(text_config={**SIZES, "vocab_size": 264}, vision_config=eye, mm_tokens_per_image=9, **IDS)
    logging.disable_progress_bar()
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    print("a tiny random model was made: its words mean nothing")
    return folder


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: python examples/image.py [model picture.png]")
    with TemporaryDirectory() as folder:
        model, picture = sys.argv[1:] or (make(folder), np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
        async with Runtime.open(model, max_context_tokens=4096) as runtime:
            answer = await runtime.generate([{"role": "user", "content": content}], max_new_tokens=40)
            print(f"{answer.text}\n{runtime}: {answer.usage.prompt_tokens} tokens read, {answer.usage.completion_tokens} written")


anyio.run(main)
