"""A pool of KV blocks of one tier, with reference counts and a prefix cache.

A block is held (reference count over 0) or free. A free block may still be *cached*: its content
is known by a hash and can be taken back with ``share`` until ``take`` needs the block for
something else. Free blocks are reused in the order in which they were last used, blocks without
a hash first: least recently used content is evicted first.

Hashes chain: a block's hash covers its own tokens and, through its parent's hash, everything
before it, so that one lookup for each block finds the longest cached prefix (as vLLM's prefix
caching does).
"""

import hashlib
from array import array
from collections import OrderedDict

BlockHash = bytes
ROOT: BlockHash = b"manta"


def hash_block(parent: BlockHash, tokens: "array[int]") -> BlockHash:
    """The hash of a full block of ``tokens`` that follows ``parent``.

    A cryptographic hash: nobody can craft a prompt that is given another one's blocks.
    """
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()


class BlockPool:
    """Block numbers 0 to ``num_blocks - 1`` and who holds them. All operations are O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._cached: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that ``take`` could give, cached ones included."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    def references(self, block: int) -> int:
        return self._references[block]

    def hash_of(self, block: int) -> BlockHash | None:
        return self._hashes[block]

    def find(self, block_hash: BlockHash) -> int | None:
        """The block with this content, held or free, without taking it."""
        return self._cached.get(block_hash)

    def is_free(self, block: int) -> bool:
        return block in self._free

    def take(self) -> tuple[int, BlockHash | None]:
        """A free block, now held once, and the hash of the content that is evicted from it.

        The caller looks at ``num_free`` first.
        """
        block, _ = self._free.popitem(last=False)
        evicted = self.forget(block)
        self._references[block] = 1
        return block, evicted

    def share(self, block: int) -> None:
        """Hold a block once more; a free one is not free any longer."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Give up one hold. The last one frees the block, which stays cached if it has a hash."""
        count = self._references[block] - 1
        assert count >= 0, f"block {block} is released more often than it was taken"
        self._references[block] = count
        if count == 0:
            self._free[block] = None
            if self._hashes[block] is None:
                self._free.move_to_end(block, last=False)

    def publish(self, block: int, block_hash: BlockHash) -> bool:
        """Make a held block's content known. False if a block is known for it already."""
        assert self._references[block] > 0
        if block_hash in self._cached:
            return False
        assert self._hashes[block] is None, f"block {block} has other content"
        self._cached[block_hash] = block
        self._hashes[block] = block_hash
        return True

    def forget(self, block: int) -> BlockHash | None:
        """Drop a block from the prefix cache; the hash that it had."""
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block] = None
        return block_hash

    def age(self, block: int) -> None:
        """Let a free block be the next that is taken."""
        self._free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Empty the prefix cache; held blocks stay held."""
        for block in list(self._cached.values()):
            self.forget(block)

    def check(self) -> None:
        """Assert every invariant; O(blocks), for tests."""
        for block, count in enumerate(self._references):
            assert count >= 0 and (count == 0) == (block in self._free)
        assert all(self._hashes[b] == h for h, b in self._cached.items())
        assert len(self._cached) == sum(h is not None for h in self._hashes)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks hold ``num_tokens``."""
    return -(-num_tokens // block_size)
