"""A question about a sound. Without arguments it asks a tiny model with random weights, whose answer means nothing.

python examples/audio.py [model speech.wav]      a model that hears, such as voxtral-small-24B, is a download of 48 GB
"""

import json
import sys
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import numpy as np
from transformers import VoxtralConfig, VoxtralForConditionalGeneration, logging

from aollm import Runtime

NAMES = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [PREFIX] [MIDDLE] \
[SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] [TRANSCRIBE] [BEGIN_AUDIO] [AUDIO]"
MELS = {"num_mel_bins": 16, "hop_length": 160, "window_size": 400}
SIZES = {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(folder: str) -> str:
    sizes = {"pattern": ".", "num_vocab_tokens": 256, "default_vocab_size": 275, "default_num_special_tokens": 19, "version": "v7"}
    audio = {"sampling_rate": 16_000, "frame_rate": 12.5, "chunk_length_s": 4.0, "audio_encoding_config": MELS}
    special = [{"rank": id, "token_str": name, "is_control": True} for id, name in enumerate(NAMES.split())]
    vocab = [{"rank": id, "token_bytes": b64encode(bytes([id])).decode(), "token_str": None} for id in range(256)]
    Path(folder, "tekken.json").write_text(json.dumps({"config": sizes, "vocab": vocab, "special_tokens": special, "audio": audio}))
    text = {**SIZES, "model_type": "llama", "vocab_size": 275, "hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32}
    ear = {**SIZES, "hidden_size": 32, "num_mel_bins": 16, "max_source_positions": 200}
    logging.disable_progress_bar()
    VoxtralForConditionalGeneration(VoxtralConfig(text_config=text, audio_config=ear, audio_token_id=18)).save_pretrained(folder)
    print("a tiny random model was made: its words mean nothing")
    return folder


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: python examples/audio.py [model speech.wav]")
    with TemporaryDirectory() as folder:
        model, sound = sys.argv[1:] or (make(folder), np.sin(np.arange(5 * 16_000) / 7).astype(np.float32))
        content = [{"type": "audio", "audio": sound, "sampling_rate": 16_000}, {"type": "text", "text": "What is said?"}]
        async with Runtime.open(model, max_context_tokens=4096) as runtime:
            answer = await runtime.generate([{"role": "user", "content": content}], max_new_tokens=40)
            print(f"{answer.text}\n{runtime}: {answer.usage.prompt_tokens} tokens read, {answer.usage.completion_tokens} written")


anyio.run(main)
