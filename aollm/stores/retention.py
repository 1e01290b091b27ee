"""Retention: which stored blocks are too many or too old. Arithmetic only; it removes nothing."""

from __future__ import annotations

from collections.abc import Collection

from .index import Index
from .node import Node


def excess(index: Index, max_bytes: int | None, max_age_s: float | None, now: float, held: Collection[bytes] = ()) -> list[Node]:
    """Nodes to drop, in this order, so that at most `max_bytes` remain and nothing was stored more than `max_age_s` before `now`.

    Leaves go first, the least recently used before others; an old block stays while a younger one follows it. Pinned
    nodes, those with a digest in `held`, and what these follow never go, so more than `max_bytes` may remain.
    """
    over = 0 if max_bytes is None else max(index.nbytes - max_bytes, 0)
    expired: list[Node] = []
    if max_age_s is not None:
        expired = index.oldest(lambda node: node.stored_at < now - max_age_s, held)
        over -= sum(node.nbytes for node in expired)
    if over <= 0:
        return expired
    old = {node.digest for node in expired}

    def may_go(node: Node) -> bool:
        nonlocal over
        if node.digest in old:
            return True
        if over <= 0:
            return False
        over -= node.nbytes
        return True

    return index.oldest(may_go, held)
