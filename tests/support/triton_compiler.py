"""Compiles Triton's kernels for GPUs that are not there, with the arguments that they are given."""

from collections.abc import Iterator
from contextlib import contextmanager
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
}
OPTIONS = {"num_warps", "num_stages"}


@contextmanager
def launches_are_compiled(arch: int, compiled: dict[str, Any]) -> Iterator[None]:
    """Each launch in the block compiles its kernel for the compute capability ``arch`` (90 is
    9.0), into ``compiled`` by the kernel's name and constants, and runs nothing."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in OPTIONS & given.keys()}
        assert given.keys() == set(kernel.arg_names), given.keys() ^ set(kernel.arg_names)
        signature, constants, aligned = {}, {}, {}
        for param in kernel.params:
            value = given[param.name]
            if param.is_constexpr:
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            signature[param.name] = "i32" if isinstance(value, int) else POINTERS[value.dtype]
            if isinstance(value, torch.Tensor) and not param.do_not_specialize_on_alignment:
                aligned[(param.num,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, aligned)
        name = f"{kernel.__name__} {constants}"
        compiled[name] = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield
