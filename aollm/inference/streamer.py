"""Text on stdout as it is generated: what `generate` takes as `streamer`, beside transformers' own.

What is printed is never half a character, and adds up to what decoding all ids at once gives. It refuses to know models.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..errors import RequestError
from ..text.decoder import Decoder


class Tokenizer(Protocol):
    """What is asked of one of transformers' tokenizers."""

    def decode(self, token_ids: Any, **options: Any) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...


class TextStreamer:
    """Prints an answer as it comes; have `on_finalized_text` do something else with it in a subclass.

    o.model.generate(input_ids, streamer=TextStreamer(o.tokenizer, skip_prompt=True, skip_special_tokens=True))
    """

    def __init__(self, tokenizer: Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        """`skip_prompt`: say nothing of what is put first. `decode_kwargs` are those of the tokenizer's `decode`."""
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        spelled = {f"<0x{byte:02X}>" for byte in range(256)}
        self._bytelike = frozenset(id for token, id in tokenizer.get_vocab().items() if token in spelled)
        self._prompt_is_next = True
        self._decoder = self._fresh()

    def put(self, value: Tensor) -> None:
        """Ids [T] or [1, T]: first those of the prompt, then each that was generated. Raises `RequestError` for a batch."""
        if value.dim() > 1 and len(value) > 1:
            raise RequestError(f"a TextStreamer prints one answer, not {len(value)}: give a batch no streamer")
        if self._prompt_is_next:
            self._prompt_is_next = False
            if self.skip_prompt:
                return
        if text := "".join(map(self._decoder.push, value.flatten().tolist())):
            self.on_finalized_text(text)

    def end(self) -> None:
        """Print what was held back, and a newline; the next `put` is another prompt."""
        self.on_finalized_text(self._decoder.finish(), stream_end=True)
        self._prompt_is_next = True
        self._decoder = self._fresh()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """More of the answer; `stream_end` with the last of it."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _fresh(self) -> Decoder:
        return Decoder(lambda ids: str(self.tokenizer.decode(ids, **self.decode_kwargs)), bytelike=self._bytelike)

    def __repr__(self) -> str:
        return f"<TextStreamer {self._decoder}>"
