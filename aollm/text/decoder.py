"""Token ids to text as they come: never half a character, never a piece of a stop string.

What is given out adds up to what decoding all ids at once gives. A character is certain when its last byte is here; where
a tokenizer spells characters as byte tokens (`<0xF0>`), a run of those is certain when it ends, because one bad byte turns
the whole run into replacement characters. Knows no tokenizer: only a function that decodes a few ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

REPLACEMENT = "\ufffd"
CONTEXT = 4  # ids decoded before the fresh ones, so that spaces and joins come out as they do in the middle of a text
PATIENCE = 64  # fresh ids kept uncertain before looking for a place to cut


class Decoder:
    """Text of one answer. `stopped` turns True once one of `stop` has appeared; nothing of it is given out.

    `decode` gives the text of a few ids; those for which `hidden` holds are left out; `bytelike` are byte tokens.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        hidden: Callable[[int], bool] = lambda token_id: False,
        bytelike: Collection[int] = (),
    ) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._hidden = hidden
        self._bytelike = bytelike
        self._context: list[int] = []  # given out already, but for what `_shown` says
        self._fresh: list[int] = []
        self._shown = 0  # characters of decode(context + fresh) that are out
        self._pending = ""  # certain, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain; often none."""
        if self.stopped or self._hidden(token_id):
            return ""
        self._fresh.append(token_id)
        return self._give(self._settle(token_id))

    def finish(self) -> str:
        """What was held back, as it is. The decoder is done after it."""
        if self.stopped:
            return ""
        text = self._decode(self._context + self._fresh)
        out = self._give(text[self._shown :])
        if not self.stopped:
            out, self._pending = out + self._pending, ""
        self._context, self._fresh, self._shown = [], [], 0
        return out

    def _settle(self, last: int) -> str:
        """The characters that have become certain; moves the context up to them."""
        ids = self._context + self._fresh
        text = self._decode(ids)
        if last in self._bytelike:
            return self._cut_run(text) if len(self._fresh) > PATIENCE else ""
        if not text.endswith(REPLACEMENT):
            out = self._out(text)
            self._rest_on(ids[-CONTEXT:])
            return out
        if len(self._fresh) > PATIENCE:
            return self._cut(ids, text)
        return self._out(text[:-1])  # only the last character can still change: those before it have all their bytes

    def _cut(self, ids: list[int], text: str) -> str:
        """Splits replacement characters where both halves decode to what they are together: no character crosses there."""
        for count in range(1, 6):
            before, after = self._decode(ids[:-count]), self._decode(ids[-count:])
            if after and before + after == text:
                out, kept = self._out(before), self._fresh[-count:]
                self._rest_on(self._fresh[:-count])
                self._fresh = kept
                return out
        return ""

    def _cut_run(self, text: str) -> str:
        """Gives out a run of byte tokens that does not end: when it makes whole characters, or never will."""
        whole = not text.endswith(REPLACEMENT) or len(text) - self._shown < len(self._fresh)  # a bad run has one for each byte
        if not whole and len(self._fresh) <= PATIENCE + 4:
            return ""
        out = self._out(text)
        lengths = range(1, 5) if not text.endswith(REPLACEMENT) else [3 if whole else 1]  # U+FFFD itself is three bytes
        ends = (self._fresh[-count:] for count in lengths)
        self._rest_on(next((end for end in ends if self._decode(end) == text[-1:]), self._fresh))  # its last character
        return out

    def _out(self, certain: str) -> str:
        out = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        return out

    def _rest_on(self, context: list[int]) -> None:
        self._context, self._fresh = context, []
        self._shown = len(self._decode(context))

    def _give(self, text: str) -> str:
        """`text` with the stop strings taken into account. The one that is complete first wins; of two, the longer."""
        if not self._stop or not text:
            return text
        text = self._pending + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)[1]]
        held = max(beginning(text, stop) for stop in self._stop)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]

    def __repr__(self) -> str:
        return f"<Decoder {len(self._fresh)} ids and {len(self._pending)} characters held{', stopped' if self.stopped else ''}>"


def beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    return next((count for count in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:count])), 0)
