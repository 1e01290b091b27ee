"""A script as one has it who comes from oLLM; of its lines only the import is another: python examples/from_ollm.py [model] [device]"""

import sys

from aollm import Inference, TextStreamer  # was: from ollm import Inference, TextStreamer

if {"-h", "--help"} & {*sys.argv}:
    print(__doc__)
    sys.exit()
model, device = (*sys.argv[1:], *["demo", "cpu"][len(sys.argv) - 1 :])
o = Inference(model, device=device, logging=False)
o.ini_model(models_dir="./models/", force_download=False)
o.offload_layers_to_cpu(layers_num=2)
past_key_values = o.DiskCache(cache_dir="./kv_cache/")
text_streamer = TextStreamer(o.tokenizer, skip_prompt=True, skip_special_tokens=False)

messages = [{"role": "system", "content": "You are a helpful assistant"}, {"role": "user", "content": "Tell me a story about a fox."}]
input_ids = o.tokenizer.apply_chat_template(
    messages, reasoning_effort="minimal", tokenize=True, add_generation_prompt=True, return_tensors="pt"
).to(o.device)
outputs = o.model.generate(input_ids=input_ids, past_key_values=past_key_values, max_new_tokens=40, streamer=text_streamer).cpu()
answer = o.tokenizer.decode(outputs[0][input_ids.shape[-1] :], skip_special_tokens=False)
print(f"\nonce more, from the ids: {answer}")
