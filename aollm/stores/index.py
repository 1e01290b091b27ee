"""The index: which stored blocks begin as a prompt does, and which of them may go first.

Token ids are compared themselves; a digest only names a block. It refuses to know files and manifests. One thread may
look up while another adds and removes: lists are replaced, never changed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from .node import Node, common, digest, pack_ids

REMEMBERED = 65_536
"""Digests of removed nodes that are kept, 16 bytes each, to say of a miss that it was evicted."""
_by_ids = attrgetter("ids")


@dataclass(frozen=True, slots=True)
class Found:
    """The stored blocks that begin as the prompt does, the tokens they share with it, and why there are not more.

    The last of `nodes` may be matched only in its first part.
    """

    nodes: list[Node]
    tokens: int
    reason: str | None


class Index:
    """Nodes by digest and by parent; a whole block has `block_tokens` tokens."""

    def __init__(self, block_tokens: int = 1024) -> None:
        self.nbytes = 0
        self.tokens = 0
        self._block = block_tokens
        self._nodes: dict[bytes, Node] = {}
        self._children: dict[bytes, list[Node]] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def get(self, name: bytes) -> Node | None:
        """The node with this digest."""
        return self._nodes.get(name)

    def nodes(self) -> list[Node]:
        """All nodes, in the order in which they came."""
        return list(self._nodes.values())

    def children(self, parent: bytes) -> list[Node]:
        """The nodes that follow `parent` (a digest, or a root), sorted by their ids."""
        return list(self._children.get(parent, ()))

    def add(self, node: Node) -> None:
        """Have `node` be found; it takes the place of one with the same digest."""
        if (old := self._nodes.get(node.digest)) is not None:
            self._unlink(old)
        siblings = self._children.get(node.parent, [])
        at = bisect_left(siblings, node.ids, key=_by_ids)
        self._children[node.parent] = [*siblings[:at], node, *siblings[at:]]
        self._nodes[node.digest] = node
        self._evicted.pop(node.digest, None)
        self.nbytes += node.nbytes
        self.tokens += node.rows

    def remove(self, node: Node) -> None:
        """Have the node with this digest not be found any more; one that is not there is fine."""
        if (old := self._nodes.get(node.digest)) is None:
            return
        self._unlink(old)
        del self._nodes[old.digest]
        self._evicted[old.digest] = None
        if len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)

    def lookup(self, root: bytes, ids: Sequence[int], beside: Index | None = None) -> Found:
        """The longest stored prefix of `ids` under `root`; blocks that are not here may come from the index `beside`."""
        path: list[Node] = []
        tokens, parent = 0, root
        while tokens < len(ids):
            wanted = pack_ids(ids[tokens : tokens + self._block])
            best, alike = _nearest(self._children.get(parent, []), wanted)
            if beside is not None and (other := _nearest(beside._children.get(parent, []), wanted))[1] > alike:
                best, alike = other
            if best is not None and alike:
                path.append(best)
                tokens += alike
            if best is None or alike < best.rows:
                reason = None if tokens == len(ids) else self._reason(tokens, bool(path), best, digest(parent, wanted))
                return Found(path, tokens, reason)
            parent = best.digest
        return Found(path, tokens, None)

    def oldest(self, may_go: Callable[[Node], bool], held: Collection[bytes] = ()) -> list[Node]:
        """The nodes for which `may_go` is true, in the order in which they should go.

        It is asked leaf by leaf, least recently used first; a node becomes a leaf when all that follow it went. Pinned
        nodes, and those with a digest in `held`, are not asked for.
        """
        left = {node.digest: len(self._children.get(node.digest, ())) for node in self.nodes()}
        leaves = [(node.used, name) for name, count in left.items() if not count and (node := self._nodes.get(name)) is not None]
        heapq.heapify(leaves)
        going: list[Node] = []
        while leaves:
            _, name = heapq.heappop(leaves)
            node = self._nodes.get(name)
            if node is None or node.pinned or name in held or not may_go(node):
                continue
            going.append(node)
            if node.parent in left:
                left[node.parent] -= 1
                if not left[node.parent] and (parent := self._nodes.get(node.parent)) is not None:
                    heapq.heappush(leaves, (parent.used, parent.digest))
        return going

    def __repr__(self) -> str:
        return f"<Index {len(self)} blocks, {self.tokens} tokens, {self.nbytes / 1e9:.2f} GB>"

    def _unlink(self, node: Node) -> None:
        siblings = [other for other in self._children[node.parent] if other is not node]
        if siblings:
            self._children[node.parent] = siblings
        else:
            del self._children[node.parent]
        self.nbytes -= node.nbytes
        self.tokens -= node.rows

    def _reason(self, tokens: int, found: bool, best: Node | None, following: bytes) -> str:
        if following in self._evicted:
            return "evicted"
        if best is not None:
            return f"diverged at token {tokens}"
        return f"nothing is stored past token {tokens}" if found else "nothing is stored"


def _nearest(siblings: list[Node], wanted: bytes) -> tuple[Node | None, int]:
    """Of nodes sorted by their ids, the one that begins most as `wanted` does, and for how many tokens: it is next to `wanted`."""
    at = bisect_left(siblings, wanted, key=_by_ids)
    best, most = None, -1
    for node in siblings[max(at - 1, 0) : at + 1]:
        if (alike := common(node.ids, wanted)) > most:
            best, most = node, alike
    return best, most
