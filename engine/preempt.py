"""What a preemption costs, and so whom and how to preempt.

A victim's KV is either copied to CPU blocks and back (swap) or freed and computed again
(recompute). Both costs are known from measurements: at start-up, then kept current by what the
steps are seen to take.
"""

from dataclasses import dataclass

from engine.plan import CopyTimes

_SMOOTHING = 0.1  # weight of a new observation
_LEAST_BLOCKS = 4  # copies of fewer tell more of their fixed cost than of the bandwidth


@dataclass(frozen=True)
class MeasuredCosts:
    """What the workers measured at start-up."""

    seconds_per_block_out: float
    seconds_per_block_in: float
    seconds_per_prefill_token: float


class Costs:
    """Current estimates, in seconds."""

    def __init__(self, measured: MeasuredCosts) -> None:
        self.block_out = measured.seconds_per_block_out
        self.block_in = measured.seconds_per_block_in
        self.token = measured.seconds_per_prefill_token

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step that computed ``num_tokens``, nearly all of them prefill, took ``seconds``."""
        self.token += _SMOOTHING * (seconds / num_tokens - self.token)

    def observe_copies(self, seen: CopyTimes) -> None:
        """Copies between the tiers ended."""
        if seen.blocks_out >= _LEAST_BLOCKS:
            self.block_out += _SMOOTHING * (seen.seconds_out / seen.blocks_out - self.block_out)
        if seen.blocks_in >= _LEAST_BLOCKS:
            self.block_in += _SMOOTHING * (seen.seconds_in / seen.blocks_in - self.block_in)

    def swap(self, blocks_out: int, blocks_in: int) -> float:
        return blocks_out * self.block_out + blocks_in * self.block_in

    def recompute(self, num_tokens: int) -> float:
        return num_tokens * self.token

    def promotion_pays(self, block_size: int) -> bool:
        """Whether copying a block in is cheaper than computing its tokens."""
        return self.block_in < self.recompute(block_size)
