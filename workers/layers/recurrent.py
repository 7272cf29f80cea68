"""What recurrent layers have in common: a state's memory, the decay, and the short causal
convolutions in front, each channel's own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from workers.layers.memory import Memory
from workers.parallel import Place
from workers.sweep import Sweep
from workers.weights import Parameter


def state_memory(size: int, device: torch.device) -> Memory:
    """Of a layer whose state of a sequence is ``size`` elements, float32, zeros at first."""
    return Memory(
        lambda n: torch.zeros(n, size, dtype=torch.float32, device=device), 4 * size, state=True
    )


def make_decay(logarithm: Tensor) -> None:
    """-exp(A) of A, in place: what a token's time is multiplied by."""
    logarithm.exp_().neg_()


class CausalConvolution:
    """Channels of several parts side by side: ``names``, sizes (the whole ones) and cuts (this
    rank's) are the parts'. A channel's output is a sum over its last ``taps`` inputs, in float32,
    and in one order whatever shares the step.

    ``past_size`` are the elements of a sequence's state that hold its last taps - 1 inputs.
    """

    def __init__(
        self,
        place: Place,
        names: Sequence[str],
        sizes: Sequence[int],
        cuts: Sequence[slice],
        taps: int,
        bias: bool = False,
    ) -> None:
        self._taps = taps
        shares = [cut.stop - cut.start for cut in cuts]
        self.channels = sum(shares)
        self.past_size = (taps - 1) * self.channels

        self._kernel = place.floats(self.channels, taps)
        self._bias = place.floats(self.channels) if bias else None
        self._parameters: list[Parameter] = []
        for tensor, leaf in ((self._kernel, "weight"), (self._bias, "bias")):
            if tensor is None:
                continue
            rest = tensor.shape[1:]
            for name, size, cut, target in zip(
                names, sizes, cuts, tensor.split_with_sizes(shares), strict=True
            ):
                both = (cut, *(slice(None) for _ in rest))
                self._parameters.append(Parameter(f"{name}.{leaf}", (size, *rest), target, both))

    def parameters(self) -> Iterable[Parameter]:
        return self._parameters

    def __call__(self, x: Tensor, cache: Tensor, sweep: Sweep) -> Tensor:
        """x [T, channels] to as much; the past in ``cache`` [states, past_size] is moved on."""
        past = cache.view(-1, self._taps - 1, self.channels)
        lines = x.new_empty(len(x) + sweep.past.numel(), x.shape[1])
        lines[sweep.past] = past[sweep.states]
        lines[sweep.lines] = x
        past[sweep.states] = lines[sweep.next_past]
        y = x * self._kernel[:, -1]
        for tap in range(1, self._taps):
            y += lines[sweep.lines - tap] * self._kernel[:, -1 - tap]
        return y if self._bias is None else y.add_(self._bias)

    def with_silu_on_gpu(self, x: Tensor, cache: Tensor, sweep: Sweep) -> Tensor:
        """silu of the same, by Triton's kernel; x may be of another type."""
        from workers.kernels.gpu import convolution

        past = cache.view(-1, self._taps - 1, self.channels)
        return convolution.convolve(x, self._kernel, self._bias, past, sweep.starts, sweep.states)
