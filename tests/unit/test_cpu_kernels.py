"""The compiled kernels and their PyTorch equivalents, both against exact maths; and the build."""

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers import kernels
from workers.attention import AttentionShape, Prologue
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention
from workers.batch import Batch
from workers.kernels import build, delta, mamba2, plain
from workers.sweep import Sweep

DTYPES = [torch.float32, torch.bfloat16]
BOTH = pytest.mark.parametrize("module", [kernels, plain], ids=["compiled", "plain"])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
SIZES = pytest.mark.parametrize("rows, width", [(1, 64), (3, 50), (200, 768)])


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def close(result: Tensor, exact: Tensor) -> None:
    """Within two roundings of the result's type."""
    assert exact.dtype == torch.float64
    relative, absolute = (1e-5, 1e-5) if result.dtype == torch.float32 else (2**-7, 1e-3)
    torch.testing.assert_close(result.double(), exact, rtol=relative, atol=absolute)


def strided(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A slice of wider rows, as of a fused projection."""
    return torch.randn(rows, width + 24, dtype=dtype)[:, 8 : 8 + width]


def exact_rms(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


@BOTH
@EACH_DTYPE
@SIZES
def test_rms_norm(module: Any, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = strided(rows, width, dtype), torch.randn(width, dtype=dtype)
    close(module.rms_norm(x, weight, 1e-6), exact_rms(x, weight))


@BOTH
@EACH_DTYPE
def test_rms_norm_of_heads(module: Any, dtype: torch.dtype) -> None:
    x, weight = strided(5, 6 * 32, dtype).unflatten(1, (6, 32)), torch.randn(32, dtype=dtype)
    close(module.rms_norm(x, weight, 1e-6), exact_rms(x, weight))


def test_rms_norm_with_a_weight_in_float32_rounds_once() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(96, eps=1e-5)
    norm.weight.data.normal_()
    x = torch.randn(64, 4, 96).bfloat16()
    ours = kernels.rms_norm(x, 1 + norm.weight.data, 1e-5)
    assert ours.dtype == x.dtype
    assert (ours == norm(x)).float().mean() > 0.99  # else by order of summation
    torch.testing.assert_close(ours, norm(x).detach(), rtol=2**-8, atol=1e-6)


@EACH_DTYPE
def test_rms_norm_rounds_as_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(64, 96, dtype=dtype)
    ours, theirs = kernels.rms_norm(x, norm.weight.data, 1e-5), norm(x).detach()
    assert (ours == theirs).float().mean() > 0.99 or dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6,
                               atol=1e-6)  # fmt: skip


@BOTH
@EACH_DTYPE
@SIZES
def test_layer_norm(module: Any, dtype: torch.dtype, rows: int, width: int) -> None:
    x = strided(rows, width, dtype) + 3
    weight, bias = torch.randn(2, width, dtype=dtype)
    y = module.layer_norm(x, weight, bias, 1e-5)
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    close(y, exact)


@BOTH
@EACH_DTYPE
@SIZES
def test_silu_mul(module: Any, dtype: torch.dtype, rows: int, width: int) -> None:
    x = strided(rows, 2 * width, dtype) * 10
    x[0, :4] = torch.tensor([-100, 100, 0, -60])
    gate, up = x.double().chunk(2, dim=-1)
    close(module.silu_mul(x), F.silu(gate) * up)


@BOTH
@EACH_DTYPE
@pytest.mark.parametrize("tokens", [1, 400])
@pytest.mark.parametrize("half", [32, 10])
def test_rope(module: Any, dtype: torch.dtype, tokens: int, half: int) -> None:
    heads, kv_heads, dim = 4, 2, 64
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q, k, v = (
        x.unflatten(1, (-1, dim))
        for x in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    )
    positions = torch.randint(0, 1000, (tokens,))
    angle = torch.outer(torch.arange(1000.0), 10000 ** -(torch.arange(half) / half))
    cos, sin = angle.cos(), angle.sin()
    exact = []
    for x in (q, k):
        turned = torch.view_as_complex(
            torch.stack([x[..., :half], x[..., half : 2 * half]], dim=-1).double()
        ) * torch.polar(torch.ones_like(angle), angle)[positions][:, None].to(torch.complex128)
        exact.append(torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], dim=-1))
    kept = v.clone()
    module.rope(q, k, positions, cos, sin)
    close(q, exact[0])
    close(k, exact[1])
    assert torch.equal(v, kept)


@BOTH
@EACH_DTYPE
@pytest.mark.parametrize("rows, width", [(1, 7), (3, 8192), (5, 50257)])
def test_argmax_lse(module: Any, dtype: torch.dtype, rows: int, width: int) -> None:
    logits = strided(rows, width, dtype) * 8
    logits[:, 3] = logits[:, 5] = logits[:, -1] = 60  # ties: the first wins
    logits[:, 1] = -torch.inf
    index, lse, finite = module.argmax_lse(logits)
    assert index.tolist() == [3] * rows and index.dtype == torch.int64
    assert finite.tolist() == [True] * rows
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-5)


@EACH_DTYPE
def test_argmax_is_torch_argmax(dtype: torch.dtype) -> None:
    logits = torch.randn(33, 20000, dtype=dtype)  # many ties in bf16
    assert torch.equal(kernels.argmax_lse(logits)[0], logits.float().argmax(-1))


@BOTH
@EACH_DTYPE
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_argmax_lse_says_what_is_not_finite(module: Any, dtype: torch.dtype, value: float) -> None:
    logits = torch.randn(3, 20000, dtype=dtype)
    if value == -torch.inf:
        logits[1] = value
    else:
        logits[1, 17011] = value
    assert module.argmax_lse(logits)[2].tolist() == [True, False, True]


@EACH_DTYPE
@pytest.mark.parametrize(
    "kernel",
    [
        lambda x: kernels.rms_norm(x, torch.ones(64, dtype=x.dtype), 1e-6),
        lambda x: kernels.layer_norm(x, *torch.ones(2, 64, dtype=x.dtype), 1e-6),
        lambda x: kernels.silu_mul(torch.cat([x, torch.ones_like(x)], dim=1)),
    ],
)
def test_nan_is_not_lost(kernel: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, dtype=dtype)
    x[1, 40] = torch.nan
    assert kernel(x).isnan().any(1).tolist() == [False, True, False]


# ---------------------------------------------------------------- the build


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1; exit; fi\n{script}')
    path.chmod(0o755)
    return path


OUTPUT = 'while [ "$1" != -o ]; do shift; done; '


def test_build_appears_whole_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = OUTPUT + 'printf half > "$2"; sleep 0.2; printf whole > "$2"; echo x >> calls'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "new" / "cache"
    built: list[str] = []
    workers = [
        threading.Thread(target=lambda: built.append(build.build([folder]).read_text()))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert built == ["whole"] * 3
    calls = (tmp_path / "calls").read_text()
    assert build.build([folder]).read_text() == "whole"
    assert (tmp_path / "calls").read_text() == calls  # not compiled again
    assert [p.suffix for p in folder.iterdir()] == [".so"]  # nothing is left behind
    assert build.build([folder], "-march=other") != build.build([folder])


def test_a_folder_that_cannot_be_written_to_is_looked_at_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = OUTPUT + 'printf whole > "$2"'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    (tmp_path / "file").touch()
    built = build.build([tmp_path / "file" / "cache", tmp_path / "other"])
    assert built.parent == tmp_path / "other"
    assert build.build([tmp_path / "none", tmp_path / "other"]) == built
    with pytest.raises(OSError):
        build.build([tmp_path / "file" / "cache"])


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake_compiler(tmp_path, OUTPUT + 'printf half > "$2"; echo broken >&2; exit 1')
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(subprocess.CalledProcessError):
        build.build([tmp_path / "cache"])
    assert list((tmp_path / "cache").iterdir()) == []


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_without_a_compiler(tmp_path: Path) -> None:
    result = run_python(
        """
import torch
from workers import kernels
from workers.attention import AttentionShape, choose_backend
for _ in range(2):
    shape = AttentionShape(2, 2, 32, 1.0, 16, torch.float32, torch.device("cpu"))
    print(type(choose_backend(shape)).__name__)
    print(kernels.rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 0.0).tolist())
""",
        CXX="/nowhere/g++",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert result.stdout.split("\n")[:2] == ["GatherAttention", "[[1.0, 1.0, 1.0, 1.0]]"]
    assert result.stderr.count("\n") == 1
    assert "apt install g++" in result.stderr and "/nowhere/g++" in result.stderr


def test_threads_are_torchs_own() -> None:
    result = run_python(
        """
import os, torch
from workers import kernels
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(4000, 512)
idle = count()
torch.relu(x)
before = count()
kernels.rms_norm(x, torch.ones(512), 1e-6)
print(before - idle, count() - before)
"""
    )
    assert result.stdout.split() == ["2", "0"]


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> build.Library:
    """Built in a fresh folder, for the plainest processor: the code paths without intrinsics."""
    folder = tmp_path_factory.mktemp("fresh") / "kernels"
    arm = platform.machine() in ("aarch64", "arm64")
    return build.Library(build.build([folder], "-mcpu=generic" if arm else "-march=x86-64"))


@EACH_DTYPE
@pytest.mark.parametrize("window, fp8", [(None, False), (90, False), (90, True)])
def test_generic_attention(
    generic: build.Library, dtype: torch.dtype, window: int | None, fp8: bool
) -> None:
    shape = AttentionShape(8, 2, 80, 80**-0.5, 16, dtype, torch.device("cpu"), fp8=fp8)
    rows = [(1, 33), (40, 40), (700, 700)]  # queries, context
    queries, contexts = torch.tensor(rows).T
    tables = torch.randperm(3 * 44).int().view(3, 44)
    positions = [torch.arange(c - n, c) for n, c in rows]
    cells = [tables[r][p // 16].long() * 16 + p % 16 for r, p in enumerate(positions)]
    tokens = int(queries.sum())
    batch = Batch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.cat(positions),
        query_starts=F.pad(queries.cumsum(0), (1, 0)).int(),
        slots=torch.arange(len(contexts)),
        context_lens=contexts.int(),
        block_tables=tables,
        cells=torch.cat(cells),
        max_context_len=700,
    )
    qkv = torch.randn(tokens, (8 + 2 + 2) * 80, dtype=dtype)
    ours, reference = CpuAttention(shape), GatherAttention(shape)
    ours.kernel = generic.functions["attend", dtype]
    results = []
    for backend in (ours, reference):
        begun = replace(batch, attention=backend.begin(batch, ()))
        cache = backend.allocate(3 * 44).zero_()
        results.append(backend.attend(begun, cache, qkv, Prologue(window=window)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@EACH_DTYPE
def test_generic_rows(
    generic: build.Library, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: generic)
    for rows, width in [(3, 50), (200, 96)]:
        test_silu_mul(kernels, dtype, rows, width)
        test_rms_norm(kernels, dtype, rows, width)
        test_layer_norm(kernels, dtype, rows, width)
        test_argmax_lse(kernels, dtype, rows, width)
    test_nan_is_not_lost(lambda x: kernels.rms_norm(x, torch.ones(64, dtype=x.dtype), 0.0), dtype)


TOKENS = 40


def make_sweep() -> Sweep:
    """Rows of 3, 1, 0 and 36 tokens, whose states are four of six."""
    starts, slots = (
        torch.tensor([0, 3, 4, 4, TOKENS], dtype=torch.int32),
        torch.tensor([5, 0, 3, 2]),
    )
    batch = Batch(
        tokens=torch.zeros(TOKENS), positions=slots, cells=slots, slots=slots, query_starts=starts,
        context_lens=starts[1:], block_tables=slots, max_context_len=0, states=slots,
    )  # fmt: skip
    return Sweep(batch, 4)


def check_recurrence(
    kernel: ModuleType, x: Tensor, rest: Tensor, states: Tensor, heads: object
) -> None:
    """Outputs and states are those of the PyTorch code; states that no row has stay as they are."""
    sweep, before, expected_states = make_sweep(), states.clone(), states.clone()
    y = kernel.recur(x, rest, states[:, 3:], heads, sweep)
    expected = kernel._plain(x, rest, expected_states[:, 3:], heads, sweep.turns)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=1e-5)
    idle = [1, 3, 4]
    assert torch.equal(states[idle], before[idle]) and not torch.equal(states[5], before[5])


@pytest.mark.parametrize("keys, values, key_size, value_size", [(2, 6, 12, 20), (1, 1, 64, 128)])
@pytest.mark.parametrize("machine", ["this", "any"])
def test_delta_net(
    machine: str,
    keys: int,
    values: int,
    key_size: int,
    value_size: int,
    generic: build.Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The heads of a gated delta net are those of the PyTorch code, for rows of any length; states
    that no row has stay as they are."""
    if machine == "any":
        monkeypatch.setattr(delta, "library", lambda: generic)
    heads = delta.Heads(
        keys, values, key_size, value_size,
        decay=-torch.rand(values), dt=torch.randn(values), norm=torch.randn(value_size), eps=1e-6,
    )  # fmt: skip
    qkv = torch.randn(TOKENS, 2 * keys * key_size + values * value_size)
    rest = torch.randn(TOKENS, values * (value_size + 2) + 7)[:, 7:]
    states = torch.randn(6, values * key_size * value_size + 3)
    check_recurrence(delta, qkv, rest, states, heads)


@pytest.mark.parametrize("groups, shared, size, state_size", [(2, 3, 20, 12), (1, 2, 64, 128)])
@pytest.mark.parametrize("machine", ["this", "any"])
def test_mamba2(
    machine: str,
    groups: int,
    shared: int,
    size: int,
    state_size: int,
    generic: build.Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The heads of Mamba-2 are those of the PyTorch code, for rows of any length."""
    if machine == "any":
        monkeypatch.setattr(mamba2, "library", lambda: generic)
    count = groups * shared
    heads = mamba2.Heads(
        groups, count, size, state_size, decay=-torch.rand(count), dt=torch.randn(count),
        skip=torch.randn(count), norm=torch.randn(count * size), eps=1e-5,
    )  # fmt: skip
    xbc = torch.randn(TOKENS, count * size + 2 * groups * state_size)
    rest = torch.randn(TOKENS, count * (size + 1) + 7)[:, 7:]
    states = torch.randn(6, count * state_size * size + 3)
    check_recurrence(mamba2, xbc, rest, states, heads)
