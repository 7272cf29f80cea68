"""Quantized checkpoints compute what the weights that they stand for do, of inputs that are rounded
where they say so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.paged import Paged, build
from tests.parity.test_models import ALONE, RAGGED, SEQUENCES, _Ranks
from tests.support.quantized_checkpoints import FORMATS, ROUNDED, quantize, rounded
from workers.kernels.gemm import has_gemm
from workers.parallel import Group

Checkpoint = Callable[..., Path]
CASES = [
    *(("llama", name) for name in FORMATS),
    ("opt", "gptq desc_act"),
    ("qwen3-moe", "compressed fp8 blocks"),
    ("mixtral", "awq"),
    ("gpt-oss", "mxfp4 experts"),
    ("deepseek-v3", "compressed fp8 blocks"),
    *(("phi3", name) for name in ("fp8 tensor", "compressed fp8 outputs", "gptq asymmetric")),
]


@pytest.fixture(scope="module")
def made(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """The quantized checkpoint of a tiny model in a format, and the one that it stands for."""
    folders: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(name: str, format: str) -> tuple[Path, Path]:
        if (name, format) not in folders:
            folder = tmp_path_factory.mktemp("quantized")
            folders[name, format] = quantize(checkpoint(name), folder, format)
        return folders[name, format]

    return get


def check(errors: Tensor, format: str) -> None:
    """Of each token. Where inputs are rounded, a last bit of float32 may decide to which code one
    goes, which the tokens behind it see."""
    assert (errors.median() if format in ROUNDED else errors.max()) < 1e-4


def logits_of(path: Path, group: Group | None = None) -> list[Tensor]:
    return Paged([build(path, group=group)], SEQUENCES).logits(RAGGED)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_log_probabilities_are_those_of_transformers(
    name: str, format: str, made: Callable[[str, str], tuple[Path, Path]]
) -> None:
    from transformers import AutoModelForCausalLM

    quantized, reference = made(name, format)
    theirs = AutoModelForCausalLM.from_pretrained(reference, attn_implementation="eager").eval()

    def errors() -> Tensor:
        """Of each token."""
        found = []
        for tokens, ours in zip(SEQUENCES, logits_of(quantized), strict=True):
            with torch.no_grad():
                expected = theirs(torch.tensor([tokens])).logits[0].float()
            found.append((ours.log_softmax(-1) - expected.log_softmax(-1)).abs().amax(-1))
        return torch.cat(found)

    plain = errors()
    for which, module in theirs.named_modules():
        if format in ROUNDED and isinstance(module, torch.nn.Linear) and ".layers." in which:
            module.register_forward_pre_hook(lambda _, x: (rounded(x[0], ROUNDED[format]),))
    check(errors(), format)
    assert format not in ROUNDED or plain.median() > 1e-2


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(
            ("llama", format)
            for format in ("compressed fp8 blocks", "fp8 tensor", "compressed int8",
                           "gptq desc_act", "awq", "pack-quantized asymmetric",
                           "pack-quantized actorder", "mxfp4")
        ),
        ("gpt-oss", "mxfp4 experts"),
        ("deepseek-v3", "compressed fp8 blocks"),
    ],
)  # fmt: skip
def test_ranks_have_their_part_of_codes_and_scales(
    name: str, format: str, made: Callable[[str, str], tuple[Path, Path]]
) -> None:
    """Also where they cut through blocks of scales."""
    quantized, _ = made(name, format)
    ranks = _Ranks(2).run(lambda group: logits_of(quantized, group))
    pairs = zip(ranks[0], logits_of(quantized), strict=True)
    check(torch.cat([(ours - whole).abs().amax(-1) for ours, whole in pairs]), format)


@pytest.mark.parametrize("format", ["fp8 blocks", "fp8 tensor", "gptq desc_act", "awq", "nvfp4"])
def test_dummy_codes_are_numbers(
    format: str, made: Callable[[str, str], tuple[Path, Path]]
) -> None:
    quantized, _ = made("llama", format)
    model = build(quantized, load_format="dummy")
    assert all(rows.isfinite().all() for rows in Paged([model], SEQUENCES).logits(RAGGED))


@pytest.mark.parametrize(
    ("name", "format"),
    [("llama", "awq"), ("opt-untied-gelu", "gptq"), ("gpt-oss", "mxfp4 experts")],
)
def test_codes_on_a_cpu_are_as_close_as_bfloat16_can_be(
    name: str, format: str, made: Callable[[str, str], tuple[Path, Path]]
) -> None:
    """Where the CPU has a kernel for them; then no bit depends on the batch, either."""
    quantized, reference = made(name, format)
    exact = logits_of(reference)

    def error(logits: list[Tensor]) -> float:
        return sum(float((a - b).abs().mean()) for a, b in zip(logits, exact, strict=True))

    codes, numbers = (build(path, dtype=torch.bfloat16) for path in (quantized, reference))
    kept = has_gemm(torch.bfloat16, 2)
    assert codes[0].place.quantization.in_words().endswith(", kept as codes") == kept
    ours = Paged([codes], SEQUENCES).logits(RAGGED)
    assert error(ours) < 1.2 * error(Paged([numbers], SEQUENCES).logits(RAGGED))
    for a, b in zip(ours, Paged([codes], SEQUENCES).logits(ALONE), strict=True):
        assert torch.equal(a, b) or not kept
