"""Text of folders with a `tekken.json`: Mistral's tokenizer and its own way of writing conversations, sounds included.

There is no chat template: mistral-common, which these models' makers keep, writes the ids. Knows nothing of sounds but how many
there are, and where.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, RequestError

AUDIO, BEGIN_AUDIO, BOS, EOS = "[AUDIO]", "[BEGIN_AUDIO]", "<s>", "</s>"
MISTAKES = (AssertionError, AttributeError, KeyError, TypeError, ValueError)  # what mistral-common raises beside its own errors


class Mistral:
    """The tokenizer in `file`. Raises `ModelError` where it is damaged, or mistral-common is not installed."""

    def __init__(self, file: Path) -> None:
        try:
            from mistral_common.exceptions import MistralCommonException
            from mistral_common.protocol.instruct.request import ChatCompletionRequest
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        except ImportError as error:
            raise ModelError(f"{file} is read by mistral-common, which is not installed: pip install 'aollm[audio]'") from error
        self._refusals = (MistralCommonException, *MISTAKES)
        self._request, self._policy = ChatCompletionRequest, SpecialTokenPolicy
        try:
            self._whole = MistralTokenizer.from_file(file)
            self._ids = self._whole.instruct_tokenizer.tokenizer
            self.vocabulary = self._ids.n_words
            self.special = frozenset(range(self._ids.num_special_tokens))
            self.bos_id, self.eos_id = self._ids.bos_id, self._ids.eos_id
        except (OSError, *self._refusals) as error:
            raise ModelError(f"{file} cannot be loaded: {error}; download it again") from error
        self._audio_id = self._ids.get_special_token(AUDIO) if self._ids.is_special(AUDIO) else None

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text`, with the id that begins all texts before them if `special`."""
        return [int(id) for id in self._ids.encode(text, bos=special, eos=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special ones left out."""
        return str(self._ids.decode(ids, special_token_policy=self._policy.IGNORE))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation; each part of type `audio` is one audio id behind the id that begins sounds.

        Raises `RequestError` for a conversation that mistral-common refuses.
        """
        try:
            request = self._request.from_openai([{**message, "content": _content(message["content"])} for message in messages])
            ids = self._whole.encode_chat_completion(request).tokens
        except ImportError as error:
            raise ModelError(f"mistral-common needs more for sounds ({error}): pip install 'aollm[audio]'") from error
        except self._refusals as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            raise RequestError(f"mistral-common refuses these messages ({reason}): mend them, or prompt with token ids") from error
        before = [None, *ids]
        return [int(id) for id, last in zip(ids, before, strict=False) if id != self._audio_id or last != self._audio_id]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of what `chat` gives, special ids by their names."""
        return str(self._ids.decode(self.chat(messages), special_token_policy=self._policy.KEEP))


def _content(content: Any) -> Any:
    """A message's content as mistral-common takes it: a moment of silence in the place of each sound."""
    if isinstance(content, str):
        return content
    return [{"type": "input_audio", "input_audio": _silence()} if part["type"] == "audio" else part for part in content]


def _silence() -> dict[str, str]:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
        writer.writeframes(bytes(320))
    return {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
