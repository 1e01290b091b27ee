"""What a store has acknowledged: sequences by name, and how many tokens of each are to be found again.

Events come from the process that uses the store, before what they tell of begins (`begun`, `released`) or after it is done
(`kept`). It refuses to know how the process ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aollm.maths.attention import BLOCK

from .sequences import Name


@dataclass(slots=True)
class Promises:
    """`kept` tokens by name; `known` are all names that were ever written to."""

    windowed: bool
    kept: dict[Name, int] = field(default_factory=dict)
    known: set[Name] = field(default_factory=set)

    def hear(self, events: Iterable[list[Any]]) -> None:
        """Take events in, in order."""
        for what, labels, tokens in (event for event in events if event[0] in ("begun", "kept", "released")):
            name: Name = tuple(labels)
            if what == "begun":
                self.known.add(name)
                if self.windowed:  # its window moves on, over blocks that it shares with others
                    self._release(name[:1], 0)
            elif what == "kept":
                self.kept[name] = max(tokens, self.kept.get(name, 0))
            else:
                self._release(name, tokens)

    def tell(self, event: list[Any]) -> None:
        """Take one event in."""
        self.hear([event])

    def _release(self, above: Name, tokens: int) -> None:
        for name in [name for name in self.kept if name[: len(above)] == above]:
            self.kept[name] = min(self.kept[name], 0 if self.windowed else tokens // BLOCK * BLOCK)  # of a window only the end is kept
            if not self.kept[name]:
                del self.kept[name]
