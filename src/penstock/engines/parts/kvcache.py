"""Which blocks of the paged key/value cache belong to whom: allocation, sharing of equal prefixes, eviction.

Pure bookkeeping over block numbers; the tensors themselves belong to the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import psutil

from penstock.core.errors import ModelLoadError

#: How much of a memory the cache may take by default.
CACHE_SHARE = 0.25
#: Contexts are cut to multiples of this, and a model with less than one is not worth serving.
CONTEXT_STEP = 256

#: The node above every first block. Sequences that compute something else of the same tokens have others, below zero.
ROOT = 0


class BlockPool:
    """Reference-counted blocks of *block_size* tokens each.

    With *caching*, a full block stays findable by the tokens that lead to it after its last user has gone, until its
    place is needed (least recently used first). Blocks are found by comparing the tokens themselves, along a tree of
    prefixes: a hash could collide, and then one user would read another's context.
    """

    def __init__(self, blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.size = blocks
        self.block_size = block_size
        self.caching = caching
        self._free = list(range(blocks))  # a heap: the lowest is given out first, so that those in use stay together
        self._users = [0] * blocks
        # The tree: (parent node, the block's tokens) → (node, block). Node numbers are never used twice, so what hung
        # below an evicted block can no longer be found.
        self._nodes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._place: dict[int, tuple[int, tuple[int, ...]]] = {}  # block → its place in the tree
        self._idle: dict[int, None] = {}  # findable blocks without users, least recently used first
        self._last_node = ROOT

    @property
    def available(self) -> int:
        """How many blocks can still be allocated."""
        return len(self._free) + len(self._idle)

    def allocate(self) -> int | None:
        """A block with one user, or None when all are in use."""
        if self._free:
            block = heappop(self._free)
        elif self._idle:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._nodes[self._place.pop(block)]
        else:
            return None
        self._users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user off each block. The last blocks of a sequence are forgotten first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._place:
                    self._idle[block] = None
                else:
                    heappush(self._free, block)

    def publish(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Make a full *block*, whose prefix is *parent*, findable; its node. The first of equal blocks is kept."""
        if not self.caching:
            return ROOT
        place = (parent, tuple(tokens))
        known = self._nodes.get(place)
        if known is not None:
            return known[0]
        self._last_node += 1
        self._nodes[place] = (self._last_node, block)
        self._place[block] = place
        return self._last_node

    def find(self, tokens: Sequence[int], start: int = 0, node: int = ROOT) -> tuple[list[int], int]:
        """The blocks that hold the longest known prefix of *tokens* from *start* on, which is behind the block at
        *node*; each with one more user; and the last's node.

        At least one token is left out: the model must be run on something to give logits.
        """
        found: list[int] = []
        size = self.block_size
        for begin in range(start, len(tokens) - size, size):
            entry = self._nodes.get((node, tuple(tokens[begin : begin + size])))
            if entry is None:
                break
            node, block = entry
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1
            found.append(block)
        return found, node

    def in_use(self, tokens: Sequence[int], node: int = ROOT) -> int:
        """How many of the blocks that `find` would give have users now: those that take no place of their own."""
        found, _ = self.find(tokens, 0, node)
        count = sum(self._users[block] > 1 for block in found)
        self.release(found)
        return count


def fit_context(
    trained: int, wanted: int, slots: int, token_bytes: int, cache_gb: float = 0.0, memory: int | None = None
) -> int:
    """Tokens of each slot's context where every slot has a whole one of its own.

    *trained*: what the model was made for; *wanted*: what the operator asks for, 0 for as much as the cache holds.
    *token_bytes*: what one token takes in it. The cache may have *cache_gb* (GB), or a quarter of the *memory* (bytes;
    None: the machine's). Raises `ModelLoadError` where hardly anything fits.
    """
    if wanted:
        return min(wanted, trained)
    budget = cache_gb * 1e9 or (memory or psutil.virtual_memory().total) * CACHE_SHARE
    fitting = int(budget / (token_bytes * slots))
    if fitting >= trained:
        return trained
    if fitting < CONTEXT_STEP:
        raise ModelLoadError(
            f"A cache of {budget / 1e9:.1f} GB leaves each of {slots} slots a context of {fitting} tokens: give fewer "
            "slots, or raise the option cache_gb."
        )
    return fitting // CONTEXT_STEP * CONTEXT_STEP
