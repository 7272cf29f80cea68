"""What Triton's kernels are launched with, and compiling them for GPUs that are not there."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def variant(self) -> str:
        """What it is compiled as: the kernel, its constants, its pointers' types and alignment."""
        types = list(self._signature.values())
        odd = [name for name in self._aligned if self.arguments[name].data_ptr() % 16]
        return f"{self.kernel.__name__} {self._constants} {types} {odd}"

    def compile(self, arch: int) -> Any:
        """The kernel for the compute capability ``arch``: 90 is 9.0."""
        number = {param.name: param.num for param in self.kernel.params}
        aligned = {(number[name],): [["tt.divisibility", 16]] for name in self._aligned}
        source = ASTSource(self.kernel, self._signature, self._constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)

    @property
    def _aligned(self) -> list[str]:
        """The pointers that kernels are compiled for by whether 16 divides them."""
        return [
            param.name
            for param in self.kernel.params
            if isinstance(self.arguments[param.name], torch.Tensor)
            and not param.do_not_specialize_on_alignment
        ]

    @property
    def _constants(self) -> dict[str, Any]:
        return {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}

    @property
    def _signature(self) -> dict[str, str]:
        types = {}
        for name in self.kernel.arg_names:
            value = self.arguments[name]
            number = "fp32" if isinstance(value, float) else "i32"
            types[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else number
        return types | dict.fromkeys(self._constants, "constexpr")


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches in the block, in order. None of them runs."""
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in OPTIONS & given.keys()}
        assert given.keys() == set(kernel.arg_names), given.keys() ^ set(kernel.arg_names)
        found.append(Launch(kernel, given, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield found


@contextmanager
def where_triton_compiles() -> Iterator[Callable[..., Any]]:
    """Calls a function with arguments in a process of its own, where the interpreter is off."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield lambda function, *args: pool.submit(function, *args).result()
