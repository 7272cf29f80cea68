"""Matrix products on CUDA whose rows do not depend on the size of their batch, not in one bit.

cuBLASLt sums a row's products in one order as long as it does not split the sum over programs
(split-K), which it does only where it has a workspace and leave to. Both are settings of the
process, read when CUDA's libraries start: a worker on CUDA is a process of its own, which calls
``set_up`` first. Measured on an H200 and an H100: 25 weight shapes of 25 the same in every bit at
any number of rows, at 0.95 to 1.03 of the default's time (benchmarks/README.md).
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from workers import kernels

ROWS = (1, 3, 16, 33, 64, 129, 256, 777)  # of which a product is compared with the whole of 1024


def set_up(invariant: bool) -> None:
    """Before anything is computed on CUDA in this process."""
    matmul = torch.backends.cuda.matmul
    if not invariant:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"
    # No sums in 16 bits, no split-K.
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.preferred_blas_library("cublaslt")


@torch.inference_mode()
def varying(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Which of the named weights have products whose bits depend on the number of rows, as
    "name (N × K)"; of weights of one shape the first is tried. They are [N, K], or of experts
    [experts, N, K], of which the first one is tried."""
    seen: set[tuple[int, ...]] = set()
    found: list[str] = []
    for name, weight in weights:
        if weight.shape in seen:
            continue
        seen.add(weight.shape)
        generator = torch.Generator(weight.device).manual_seed(0)
        shape = max(ROWS) + 247, weight.shape[-1]
        x = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
        product = kernels.product if weight.dim() == 2 else _first_experts
        whole = product(x, weight)
        if not all(torch.equal(product(x[:n], weight), whole[:n]) for n in ROWS):
            found.append(f"{name} ({weight.shape[-2]} × {weight.shape[-1]})")
    return found


def _first_experts(x: Tensor, weight: Tensor) -> Tensor:
    """All rows of x [T, K] by the first of [experts, N, K], in tiles of so many rows."""
    from workers.kernels.gpu import experts

    chosen = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
    return experts.product(x, weight[:1], experts.sort(chosen, 0, 1, 1), 1)
