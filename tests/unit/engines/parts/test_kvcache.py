"""The cache's bookkeeping."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.engines.parts.kvcache import ROOT, BlockPool


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks for *tokens* as a sequence takes them: shared ones first, the full ones published."""
    blocks, node = pool.find(tokens)
    size = pool.block_size
    for start in range(len(blocks) * size, len(tokens), size):
        block = pool.allocate()
        assert block is not None
        blocks.append(block)
        if start + size <= len(tokens):
            node = pool.publish(node, tokens[start : start + size], block)
    return blocks


def test_equal_beginnings_share_blocks() -> None:
    pool = BlockPool(10, 2)
    first = fill(pool, [1, 2, 3, 4, 5])
    second = fill(pool, [1, 2, 3, 9, 5])
    assert second[0] == first[0]
    assert second[1] != first[1]


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = BlockPool(10, 2)
    fill(pool, [1, 2, 3, 4])
    assert len(pool.find([1, 2, 3, 4])[0]) == 1


def test_the_same_tokens_after_another_beginning_are_another_block() -> None:
    pool = BlockPool(10, 2)
    fill(pool, [1, 2, 3, 4, 0])
    assert pool.find([9, 9, 3, 4, 0])[0] == []


def test_unused_blocks_are_found_until_their_place_is_needed() -> None:
    pool = BlockPool(3, 2)
    pool.release(fill(pool, [1, 2, 3, 4, 5]))
    assert pool.available == 3
    found, _ = pool.find([1, 2, 3, 4, 5])
    assert len(found) == 2
    pool.release(found)
    assert all(pool.allocate() is not None for _ in range(3))
    assert pool.allocate() is None
    assert pool.find([1, 2, 3, 4, 5])[0] == []


def test_a_search_may_go_on_behind_what_is_known() -> None:
    pool = BlockPool(10, 2)
    blocks = fill(pool, [1, 2, 3, 4, 5, 6, 7])
    found, node = pool.find([1, 2, 3])
    assert pool.find([1, 2, 3, 4, 5, 6, 7], 2, node)[0] == blocks[1:3]
    assert found == blocks[:1]


def test_only_blocks_that_others_have_now_are_in_use() -> None:
    pool = BlockPool(10, 2)
    first, second = fill(pool, [1, 2, 3, 4, 5]), fill(pool, [1, 2, 9, 9, 5])
    assert pool.in_use([1, 2, 3, 4, 5]) == 2
    pool.release(first)
    assert pool.in_use([1, 2, 3, 4, 5]) == 1
    pool.release(second)
    assert pool.in_use([1, 2, 3, 4, 5]) == 0
    assert pool.available == 10


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(3, 1)
    pool.release(fill(pool, [1, 2, 3]))
    pool.allocate()
    assert len(pool.find([1, 2, 3, 4])[0]) == 2


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(3, 1, caching=False)
    pool.release(fill(pool, [1, 2, 3]))
    assert pool.find([1, 2, 3]) == ([], ROOT)


class Pool(RuleBasedStateMachine):
    """Whatever happens, a block holds what its users think it holds, and none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 2)
        self.running: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, tokens: list[int]) -> None:
        if -(-len(tokens) // 2) <= self.pool.available:
            self.running.append((tokens, fill(self.pool, tokens)))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            index = data.draw(st.integers(0, len(self.running) - 1))
            self.pool.release(self.running.pop(index)[1])

    @invariant()
    def blocks_are_shared_only_by_equal_beginnings(self) -> None:
        holds: dict[int, tuple[int, ...]] = {}
        for tokens, blocks in self.running:
            assert len(set(blocks)) == len(blocks)
            for index, block in enumerate(blocks):
                beginning = tuple(tokens[: 2 * index + 2])
                assert holds.setdefault(block, beginning) == beginning
        assert self.pool.available == 8 - len(holds)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30)
