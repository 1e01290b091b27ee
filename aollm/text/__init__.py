"""Text in, ids out and back: a model folder's tokenizer, chat template and end-of-answer ids.

The `tokenizers` library does the work where the folder has a `tokenizer.json`, mistral-common where it has a `tekken.json`;
transformers is imported only for folders that have another kind. Knows nothing of weights, and never imports torch itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RequestError
from .conversation import plain_messages
from .decoder import Decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .mistral import Mistral
    from .template import Template

__all__ = ["Decoder", "Text"]

OTHER_KINDS = ("tokenizer.model", "spiece.model", "tiktoken.model", "vocab.json", "vocab.txt")
STOP_STRINGS, STOP_LENGTH = 64, 1024
INSTEAD = "prompt with plain text or token ids"


class Text:
    """The text side of one model folder. Make it with `Text.load`; all methods are plain functions and thread-safe.

    `vocabulary` counts ids, added ones included (0 without a tokenizer); `stop_ids` end an answer; `special` are not shown.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], tokens: Mapping[str, str]) -> None:
        self.folder = folder
        self.vocabulary = 0
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.special: frozenset[int] = frozenset()
        self._config = config
        self._tokens = tokens  # bos_token and the like, by name
        self._encode: Callable[[str, bool], list[int]] | None = None
        self._decode: Callable[[list[int]], str] = lambda ids: ""
        self._known: Callable[[int], bool] = lambda id: id >= 0  # a model may have more rows than its tokenizer has ids
        self._bytelike: frozenset[int] = frozenset()
        self._template: Template | None = None
        self._mistral: Mistral | None = None

    @classmethod
    def load(cls, folder: Path) -> Text:
        """Reads `folder`; blocking. Raises `ModelError` for damaged files.

        A folder with no tokenizer gives a `Text` that serves token ids alone: `encode` and `chat` raise `ModelError`.
        """
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config = {**config, **read_json(folder / "special_tokens_map.json")}
        text = cls(folder, config, named_tokens(config))
        if (folder / "tokenizer.json").is_file():
            text._hold(load_tokenizer(folder / "tokenizer.json", config))
        elif (folder / "tekken.json").is_file():
            text._hold_mistral(folder / "tekken.json")
        elif any((folder / name).is_file() for name in OTHER_KINDS):
            text._load_with_transformers()
        text.stop_ids = stop_ids(folder) or frozenset([] if text.eos_id is None else [text.eos_id])
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special ids that the tokenizer puts around it. Raises `RequestError` for text that is none."""
        return self._ids(text, True)

    def chat(self, messages: Sequence[Mapping[str, Any]], kinds: Collection[str] = ()) -> list[int]:
        """Ids of a conversation, ready for the model's answer, as transformers' `apply_chat_template` gives them.

        Each message has a `role` and a `content`: text, or parts `{"type": "text", "text": ...}`; `kinds` are other types of
        parts that the template writes placeholders for. Raises `RequestError` for malformed messages, other parts, a missing
        template, or one that refuses or runs away.
        """
        if self._mistral is not None:
            return self._mistral.chat(plain_messages(messages, kinds))
        return self._ids(self.render(messages, kinds), False)

    def render(self, messages: Sequence[Mapping[str, Any]], kinds: Collection[str] = ()) -> str:
        """The text that `chat` encodes. Parts go to templates that walk them as they are, to others as one text."""
        self._present()
        plain = plain_messages(messages, kinds)
        if self._mistral is not None:
            return self._mistral.render(plain)
        if self._template is None:
            from .template import Template

            self._template = Template(template_source(self.folder, self._config))
        if not self._template.walks_parts:
            for message in plain:
                if isinstance(message["content"], list):
                    if any(part["type"] != "text" for part in message["content"]):
                        raise RequestError(f"the model's chat template has no place for images or audio: {INSTEAD}")
                    message["content"] = "".join(part["text"] for part in message["content"])
        variables = {**self._tokens, "messages": plain, "tools": None, "documents": None, "add_generation_prompt": True}
        return self._template.render(variables)

    def newlines(self) -> list[int]:
        """The ids of one newline, two in a row, and so on, as far as there is one id for them."""
        found: list[int] = []
        while self._encode is not None and len(ids := self._encode("\n" * (len(found) + 1), False)) == 1:
            found += ids
        return found

    def decoder(self, stop: Sequence[str] = (), skip: Collection[int] = ()) -> Decoder:
        """A decoder for one answer, which ends at the first of `stop` and shows neither special ids nor those in `skip`."""
        listed = isinstance(stop, Sequence) and not isinstance(stop, str) and len(stop) <= STOP_STRINGS
        if not listed or not all(isinstance(text, str) and 0 < len(text) <= STOP_LENGTH for text in stop):
            raise RequestError(f"stop takes a list of at most {STOP_STRINGS} texts of 1 to {STOP_LENGTH} characters")
        if stop:
            self._present()
        hidden = self.special.union(skip)
        return Decoder(self._decode, stop, lambda id: id in hidden or not self._known(id), self._bytelike)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all `ids` at once, special ids left out."""
        return self._decode(list(ids))

    def _present(self) -> Callable[[str, bool], list[int]]:
        if self._encode is None:
            raise ModelError(
                f"{self.folder} has no tokenizer (no tokenizer.json, nor {OTHER_KINDS[0]}): "
                "put the model's tokenizer files there, or prompt with a list of token ids"
            )
        return self._encode

    def _ids(self, text: str, special: bool) -> list[int]:
        encode = self._present()
        if not isinstance(text, str):
            raise RequestError(f"a prompt is text, token ids or messages, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text has half a character (a lone surrogate) at {error.start}: remove it") from error
        return encode(text, special)

    def _hold(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._encode = lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._known = lambda id: id >= 0 and tokenizer.id_to_token(id) is not None
        self.vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.bos_id, self.eos_id = (tokenizer.token_to_id(self._tokens.get(name, "")) for name in ("bos_token", "eos_token"))
        spelled = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        if spelled[0x41] is not None and tokenizer.decode([spelled[0x41]]) == "A":  # its decoder does take them for bytes
            self._bytelike = frozenset(id for id in spelled.values() if id is not None)

    def _hold_mistral(self, file: Path) -> None:
        from .mistral import Mistral

        self._mistral = found = Mistral(file)
        self._encode, self._decode, self._known = found.encode, found.decode, lambda id: 0 <= id < found.vocabulary
        self.vocabulary, self.special = found.vocabulary, found.special
        self.bos_id, self.eos_id = found.bos_id, found.eos_id

    def _load_with_transformers(self) -> None:
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.folder, use_fast=True, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
            raise ModelError(f"transformers cannot load the tokenizer in {self.folder}: {error}; add the model's tokenizer.json") from error
        self._tokens = dict(found.special_tokens_map)
        if found.is_fast:
            self._hold(found.backend_tokenizer)
            return
        self._encode = lambda text, special: list(found.encode(text, add_special_tokens=special))
        self._decode = lambda ids: str(found.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        self.vocabulary, self.special = len(found), frozenset(found.all_special_ids)
        self.bos_id, self.eos_id = found.bos_token_id, found.eos_token_id

    def __repr__(self) -> str:
        return f"<Text {self.vocabulary} ids, stop {sorted(self.stop_ids)}>" if self._encode else "<Text without a tokenizer>"


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file. Raises `ModelError` where it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}; download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; download it again")
    return found


def token_text(value: object) -> str | None:
    """A token as `tokenizer_config.json` writes it: a text, or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and whatever else is named like them."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    return {name: text for name, value in named.items() if name.endswith("_token") and (text := token_text(value)) is not None}


def load_tokenizer(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in `path`, with the tokens that `tokenizer_config.json` adds to it, as transformers adds them."""
    from tokenizers import AddedToken, Tokenizer

    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
        tokenizer.add_tokens([AddedToken(**{name: token[name] for name in fields if name in token}) for _, token in listed])
    except Exception as error:  # the library raises plain Exception for what it cannot parse
        raise ModelError(f"{path} cannot be loaded: {error}; download it again") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    wanted = [*named_tokens(config).values(), *(filter(None, map(token_text, extra)) if isinstance(extra, list) else ())]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(wanted) if text not in known])
    return tokenizer


def stop_ids(folder: Path) -> frozenset[int]:
    """Ids that end an answer: of `generation_config.json`, else of `config.json`, which is what transformers obeys."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    for source in (read_json(folder / "generation_config.json"), config, nested if isinstance(nested, dict) else {}):
        listed = source.get("eos_token_id")
        found = [id for id in (listed if isinstance(listed, list) else [listed]) if type(id) is int and id >= 0]
        if found:
            return frozenset(found)
    return frozenset()


def template_source(folder: Path, config: Mapping[str, Any]) -> str:
    """The chat template: `chat_template.jinja`, else `tokenizer_config.json`, else `chat_template.json`."""
    found: object = None
    try:
        if (folder / "chat_template.jinja").is_file():
            found = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'chat_template.jinja'} cannot be read: {error}; download it again") from error
    found = found or config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        names = sorted(map(str, found))
        found = found.get("default")
        if found is None:
            raise RequestError(f"the model has the chat templates {', '.join(names)} but no default: {INSTEAD}")
    if not isinstance(found, str):
        raise RequestError(f"the model has no chat template: {INSTEAD}, or put a chat_template.jinja into its folder")
    return found
