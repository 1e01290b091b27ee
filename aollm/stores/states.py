"""State that is not keys and values: what convolutions and recurrences carry from one token to the next.

A state has no history to cut, so snapshots are taken at block boundaries, as many as a budget allows; a sequence can go
back to those and nowhere else.
"""

from __future__ import annotations

from torch import Tensor

from ..maths.attention import BLOCK


class States:
    """The states of one sequence, layer by layer, after `tokens[layer]` tokens; tensors are never written in place."""

    def __init__(self, layers: int, budget_nbytes: int) -> None:
        self.tokens = [0] * layers
        self._budget_nbytes = budget_nbytes
        self._now: list[Tensor | None] = [None] * layers
        self._snapshots: dict[int, list[Tensor | None]] = {}

    def get(self, layer: int) -> Tensor | None:
        """The layer's state, or None at the beginning."""
        return self._now[layer]

    def put(self, layer: int, state: Tensor, tokens: int) -> None:
        """The layer's state after `tokens` tokens in all; kept as a snapshot at a block's end."""
        self._now[layer], self.tokens[layer] = state, tokens
        if tokens % BLOCK == 0:
            self._snapshots.setdefault(tokens, [None] * len(self._now))[layer] = state
            if self.nbytes > self._budget_nbytes:  # the oldest but the newest: a conversation goes back by a turn, rarely to its beginning
                del self._snapshots[min(self._snapshots)]

    def truncate(self, tokens: int) -> int:
        """Go back to the last snapshot at or before `tokens`; returns where that is."""
        if not self._now or all(at <= tokens for at in self.tokens):
            return tokens
        for at in [at for at in self._snapshots if at > tokens]:
            del self._snapshots[at]
        at = max((at for at, states in self._snapshots.items() if None not in states), default=0)
        self.restore(at, self._snapshots.get(at, [None] * len(self._now)))
        return at

    def restore(self, tokens: int, states: list[Tensor | None]) -> None:
        """Go on from `states`, which were stored at `tokens`."""
        self._now, self.tokens = list(states), [tokens] * len(states)
        if tokens:
            self._snapshots[tokens] = list(states)

    def snapshot(self, tokens: int) -> list[Tensor] | None:
        """The states at a block's end, if they are kept and whole."""
        found = self._snapshots.get(tokens, [None])
        whole = [state for state in found if state is not None]
        return whole if len(whole) == len(self._now) else None

    def fork(self) -> States:
        """The same states for another sequence."""
        twin = States(len(self._now), self._budget_nbytes)
        twin.tokens, twin._now = list(self.tokens), list(self._now)
        twin._snapshots = {at: list(states) for at, states in self._snapshots.items()}
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return sum(state.nbytes for states in self._snapshots.values() for state in states if state is not None)

    def __bool__(self) -> bool:
        return bool(self._now)
