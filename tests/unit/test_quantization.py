"""Quantized weights: in layers as codes, in configs, and what is wrong with them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from tests.parity.paged import build
from tests.support.checkpoints import configure
from tests.support.quantized_checkpoints import FORMATS, compressed, quantize, rounded
from workers.checkpoint import Config, load_config
from workers.kernels.gpu import coded
from workers.layers.expert_products import LoopedExperts, StackedExperts
from workers.layers.experts import ExpertTraits
from workers.layers.linear import ColumnLinear, Part, RowLinear
from workers.layers.routing import Routing
from workers.models.base import Layer
from workers.parallel import Group, Place
from workers.quantization.codes import Coded
from workers.quantization.config import read_quantization, with_quantization
from workers.quantization.kv_cache import keeps_fp8
from workers.quantization.quantization import PLAIN
from workers.quantization.rounding import Rounder, Rounding

CPU = torch.device("cpu")
COLUMNS = [Part("model.layers.0.q", 48, slice(16, 32), torch.arange(16).flip(0)),
           Part("model.layers.0.k", 16, slice(8, 16))]  # fmt: skip


def fill(layer: Layer, tensors: dict[str, Tensor]) -> None:
    for parameter in layer.parameters():
        if parameter.name in tensors:
            parameter.fill(tensors[parameter.name][parameter.cut])
        else:
            parameter.absent()


def read(settings: dict[str, Any]) -> Any:
    return read_quantization(Config({"quantization_config": settings}, "config.json"))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_that_stay_are_the_same_numbers(format: str) -> None:
    """Of a rank's part of linears that are computed together, and of one cut by its inputs."""
    torch.manual_seed(0)
    to_codes, settings = FORMATS[format]
    quantization = replace(read(settings), keeps=lambda kind, grouping: True)
    place = Place(CPU, torch.float32, Group(2, 1), quantization=quantization)
    tensors, values = {}, {}
    for name, rows in (("q", 48), ("k", 16), ("o", 40)):
        stored, values[name] = to_codes(torch.randn(rows, 192))
        for leaf, tensor in stored.items():
            tensors[quantization.canonical(f"model.layers.0.{name}.{leaf}")] = tensor
    columns = ColumnLinear(place, COLUMNS, 192, bias=False)
    row = RowLinear(place, "model.layers.0.o", 192, 40, bias=False)
    expected = (
        torch.cat((values["q"][16:32].flip(0), values["k"][8:16])), values["o"][:, 96:]
    )  # fmt: skip
    for layer, numbers in zip((columns, row), expected, strict=True):
        fill(layer, tensors)
        weight = layer._product.weight
        assert isinstance(weight, Coded)
        assert weight.nbytes < numbers.nbytes / 1.5
        assert torch.equal(coded.decoded(weight), numbers)


def test_linears_computed_together_are_numbers_if_one_is_not_quantized() -> None:
    to_codes, settings = FORMATS["fp8 blocks"]
    settings = settings | {"modules_to_not_convert": ["model.layers.0.k"]}
    place = Place(
        CPU, torch.float32, quantization=replace(read(settings), keeps=lambda kind, grouping: True)
    )
    parts = [Part("model.layers.0.q", 48, slice(0, 48)), Part("model.layers.0.k", 16, slice(0, 16))]
    layer, plain = ColumnLinear(place, parts, 24, bias=False), torch.randn(16, 24)
    stored, values = to_codes(torch.randn(48, 24))
    fill(layer, {f"model.layers.0.q.{leaf}": t for leaf, t in stored.items()}
         | {"model.layers.0.k.weight": plain})  # fmt: skip
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), x @ torch.cat((values, plain)).t())


Q = "model.layers.1.self_attn.q_proj"
BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "scales missing": (
        "fp8 blocks",
        lambda t: t.pop(f"{Q}.weight_scale_inv"),
        f"1 tensors .* lacks: {Q}.weight_scale_inv$",
    ),
    "scales of other blocks": (
        "fp8 blocks",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 4)}),
        rf"wrong shape: {Q}.weight_scale_inv \[2, 4\], not \[3, 4\]",
    ),
    "not quantized": (
        "fp8 blocks",
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}),
        rf"{Q}.weight is torch.float32; allowed: float8_e4m3fn",
    ),
    "groups of another size": (
        "gptq",
        lambda t: t.update({f"{Q}.scales": torch.ones(2, 64)}),
        rf"wrong shape: {Q}.scales \[2, 64\], not \[4, 64\]",
    ),
    "an order that the config denies": (
        "gptq",
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].flip(0)}),
        f"{Q}.g_idx is not in order, which desc_act=false says it is",
    ),
    "no such group": (
        "gptq desc_act",
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] + 1}),
        f"{Q}.g_idx must hold groups from 0 to 3",
    ),
    "order missing": (
        "gptq desc_act", lambda t: t.pop(f"{Q}.g_idx"), f"lacks: {Q}.g_idx$"
    ),
    "zeros missing": (
        "pack-quantized asymmetric",
        lambda t: t.pop(f"{Q}.weight_zero_point"),
        f"lacks: {Q}.weight_zero_point$",
    ),
    "a bias that adds something": (
        "gptq",
        lambda t: t.update({f"{Q}.bias": torch.ones(64)}),
        f"does not know: {Q}.bias$",
    ),
    "zeros that the config denies": (
        "pack-quantized",
        lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}),
        f"does not know: {Q}.weight_zero_point$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_tensors_are_named(
    case: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    format, edit, message = BROKEN[case]
    path, _ = quantize(checkpoint("llama"), tmp_path, format)
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        build(path)


def _floats(**more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float"} | more


def _packed(**weights: Any) -> dict[str, Any]:
    return compressed("pack-quantized", {"num_bits": 4, "type": "int", "group_size": 32} | weights)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
WRONG: list[tuple[Any, str]] = [
    ("fp8", "quantization_config='fp8': must be an object"),
    ({"bits": 4}, "quantization_config: quant_method=None: is not supported; allowed: fp8, gptq"),
    ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': is not supported"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2': is not supported; allowed: e4m3"),
    (
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size=\[128\]: must be two",
    ),
    ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme='none'"),
    (
        {"quant_method": "fp8", "modules_to_convert": ["embed"]},
        "modules_to_convert=.*not supported",
    ),
    (
        {"quant_method": "fp8", "modules_to_not_convert": ["("]},
        r"modules_to_not_convert=.*'\(' is no regular expression",
    ),
    (GPTQ | {"bits": 3}, "bits=3: is not supported; allowed: 4, 8"),
    (GPTQ | {"group_size": 0}, "group_size=0: must be a positive integer"),
    (
        GPTQ | {"checkpoint_format": "marlin"},
        "checkpoint_format='marlin': .*allowed: gptq, gptq_v2",
    ),
    (GPTQ | {"modules_in_block_to_quantize": ["q"]}, "modules_in_block_to_quantize=.*must be"),
    (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic=.*: is not supported: every linear"),
    ({"quant_method": "awq", "bits": 8}, "bits=8: is not supported; allowed: 4"),
    ({"quant_method": "awq", "version": "gemv"}, "version='gemv': is not supported; allowed: gemm"),
    ({"quant_method": "awq", "zero_point": False}, "zero_point=False: must be true"),
    (_packed(num_bits=2), "group_0.weights: num_bits=2: is not supported in pack-quantized"),
    (_packed(strategy="tensor"), "strategy='tensor': .*allowed: channel, group"),
    (_packed(actorder="odd"), "actorder='odd': must be group, weight or null"),
    (_packed(type="float"), "type='float': is not supported; allowed: int"),
    (_packed(dynamic=True), "dynamic=True: must be false"),
    (compressed("marlin-24", {}), "format='marlin-24': is not supported; allowed: float-quantized"),
    (
        compressed(
            "float-quantized", {"type": "float"}, input_activations=_floats(strategy="token")
        ),
        "input_activations: strategy='token': must be tensor where dynamic is false",
    ),
    (
        compressed("float-quantized", {"type": "float", "strategy": "token"}),
        "strategy='token': is not supported; allowed: tensor, channel, group, block",
    ),
    (
        compressed("nvfp4-pack-quantized", {"type": "float", "num_bits": 4, "group_size": 32}),
        "group_size=32: must be 16 in nvfp4-pack-quantized",
    ),
    (
        _packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config=.*: is not supported",
    ),
    (_packed() | {"config_groups": {"g": {"targets": ["Linear"]}}}, "g: weights=None: is missing"),
    (_packed() | {"ignore": "lm_head"}, "ignore='lm_head': must be a list of names"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_is_not_supported_is_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(settings)


def test_a_group_that_does_not_divide_the_inputs_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, _ = quantize(checkpoint("llama"), tmp_path, "gptq")
    configure(path, quantization_config=GPTQ | {"group_size": 48})
    with pytest.raises(CheckpointError, match="group_size=48 does not divide the 64 inputs of"):
        build(path)


def test_linears_that_share_a_scale_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, _ = quantize(checkpoint("phi3"), tmp_path, "fp8 blocks")
    with pytest.raises(CheckpointError, match="k_proj begins at output 64 .* a multiple of 24"):
        build(path)


def test_ranks_do_not_share_a_word_of_codes() -> None:
    place = Place(CPU, torch.float32, Group(4, 0), quantization=read(GPTQ))
    with pytest.raises(ConfigError, match="cuts the 16 inputs of model.layers.0.o into parts of 4"):
        RowLinear(place, "model.layers.0.o", 16, 32, bias=False)


@pytest.mark.parametrize(
    ("settings", "quantized", "plain"),
    [
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1", "down_proj"]},
            ["model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj"],
            ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head",
             "model.layers.0.mlp.gate"],
        ),
        (
            {"quant_method": "fp8", "ignored_layers": ["model.language_model.layers.0"]},
            ["model.layers.1.mlp.up_proj"],
            ["model.layers.0.mlp.up_proj"],
        ),
        (
            GPTQ | {"lm_head": True},
            ["lm_head", "model.decoder.layers.0.fc1"],
            ["model.decoder.project_in"],
        ),
        (
            GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"],
            ["model.layers.0.self_attn.k_proj", "lm_head"],
        ),
        (
            _packed() | {"ignore": ["re:.*self_attn", "lm_head"]},
            ["model.layers.0.mlp.up_proj"],
            ["model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"],
        ),
    ],
)  # fmt: skip
def test_which_linears_are_quantized(
    settings: dict[str, Any], quantized: list[str], plain: list[str]
) -> None:
    format_of = read(settings).format_of
    assert all(format_of(name) is not None for name in quantized)
    assert all(format_of(name) is None for name in plain)


def test_the_closest_group_of_compressed_tensors_counts() -> None:
    settings = _packed()
    groups = settings["config_groups"]
    for name, bits, targets in (
        ("down", 8, ["re:.*down_proj"]),
        ("one", 4, ["model.layers.0.mlp.down_proj"]),
    ):
        weights = {"num_bits": bits, "type": "int", "group_size": 16}
        groups[name] = {"targets": targets, "weights": weights}
    format_of = read(settings).format_of
    found = [
        format_of(f"model.layers.{name}_proj") for name in ("1.mlp.up", "1.mlp.down", "0.mlp.down")
    ]
    assert [(format.bits, format.group) for format in found] == [(4, 32), (8, 16), (4, 16)]


def test_fp8_is_made_of_other_weights_for_the_option(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    made = with_quantization(load_config(path), "fp8")
    place = Place(CPU, torch.float32, Group(2, 1), quantization=read_quantization(made))
    row = RowLinear(place, "model.layers.0.o", 64, 40, bias=False)
    weight = torch.randn(40, 64)
    (parameter,) = row.parameters()
    parameter.fill(weight[parameter.cut])
    scales = weight.abs().amax(1, keepdim=True) / 448
    expected = (weight / scales).to(torch.float8_e4m3fn).float() * scales
    x = torch.randn(3, 32)
    torch.testing.assert_close(row.share(x), rounded(x, None) @ expected[:, 32:].t())
    configure(path, quantization_config=made.get("quantization_config"))
    assert "fp8 made of other weights" in build(path)[0].place.quantization.in_words()


def test_the_option_and_the_checkpoint_must_agree(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, _ = quantize(checkpoint("llama"), tmp_path, "gptq")
    config = load_config(path)
    assert with_quantization(config, "gptq") is with_quantization(config, None) is config
    with pytest.raises(
        ConfigError, match="quantization='fp8': the checkpoint is quantized already"
    ):
        with_quantization(config, "fp8")
    with pytest.raises(ConfigError, match="quantization='awq': the checkpoint has no quant"):
        with_quantization(load_config(checkpoint("llama")), "awq")


@pytest.mark.parametrize(
    ("format", "whole"),
    [("compressed fp8 blocks", False), ("gptq desc_act", False), ("mxfp4", True)],
)
def test_experts_in_codes_are_those_in_numbers(format: str, whole: bool) -> None:
    """By the kernels of a GPU: a rank's part of each expert, or some of them ``whole``."""
    torch.manual_seed(0)
    to_codes, settings = FORMATS[format]
    quantization = replace(read(settings), keeps=lambda kind, grouping: True)
    place = Place(CPU, torch.float32, Group(2, 1), whole, quantization=quantization)
    traits = ExpertTraits(4, 192, Routing(2))
    layers = [
        StackedExperts(p, "model.layers.0.mlp.experts", 96, traits)
        for p in (place, replace(place, quantization=PLAIN))
    ]
    tensors = {}
    for parameter in layers[1].parameters():
        stored, values = to_codes(torch.randn(parameter.shape) / 10)
        parameter.fill(values[parameter.cut])
        module = parameter.name.removesuffix("weight")
        tensors |= {quantization.canonical(module + leaf): t for leaf, t in stored.items()}
    fill(layers[0], tensors)
    assert isinstance(layers[0]._down, Coded) == (format != "gptq desc_act")
    x, weights = torch.randn(5, 96), torch.rand(5, 2)
    chosen = torch.rand(5, 4).topk(2).indices.int()
    found, expected = (layer(x, weights, chosen, None) for layer in layers)
    torch.testing.assert_close(found, expected)


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_a_checkpoint_may_ask_for_keys_and_values_of_8_bits() -> None:
    settings: dict[str, Any] = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}
    asks = Config({"quantization_config": settings}, "config.json")
    integers = Config({"quantization_config": {"kv_cache_scheme": SCHEME | {"type": "int"}}}, "c")
    none = Config({}, "config.json")
    assert keeps_fp8("auto", asks, torch.bfloat16)
    assert not keeps_fp8("auto", integers, torch.bfloat16)
    assert not keeps_fp8("auto", none, torch.bfloat16)
    assert keeps_fp8("fp8_e4m3", none, torch.bfloat16)
    assert not keeps_fp8("bfloat16", asks, torch.bfloat16)
    with pytest.raises(ConfigError, match="kv_cache_dtype='bfloat16': allowed are auto, fp8 and f"):
        keeps_fp8("bfloat16", asks, torch.float32)


@pytest.mark.parametrize(
    "scale", ["self_attn.k_scale", "self_attn.attn.v_scale", "self_attn.k_proj.output_scale"]
)
def test_scales_of_keys_and_values_mean_nothing(scale: str) -> None:
    quantization = read({"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME})
    assert quantization.canonical(f"model.layers.0.{scale}") is None


@pytest.mark.parametrize("format", ["fp8 128 × 128", "fp8 blocks", "fp8 tensor"])
def test_experts_round_their_inputs_alike_one_by_one_and_in_codes(format: str) -> None:
    torch.manual_seed(0)
    to_codes, settings = FORMATS[format]
    quantization = replace(read(settings), keeps=lambda kind, grouping: True)
    place = Place(CPU, torch.float32, quantization=quantization)
    loaded = replace(place, quantization=read(settings))
    plain = replace(place, quantization=PLAIN)
    name, traits = "model.layers.0.mlp.experts", ExpertTraits(3, 192, Routing(2))
    codes, numbers = (kind(p, name, 96, traits) for kind, p in
                      ((StackedExperts, place), (LoopedExperts, loaded)))  # fmt: skip
    unrounded, tensors = LoopedExperts(plain, name, 96, traits), {}
    for parameter in unrounded.parameters():
        stored, values = to_codes(torch.randn(parameter.shape) / 10)
        parameter.fill(values)
        module = parameter.name.removesuffix("weight")
        tensors |= {quantization.canonical(module + leaf): t for leaf, t in stored.items()}
    fill(codes, tensors)
    fill(numbers, tensors)
    x, weights = torch.randn(5, 96), torch.rand(5, 2)
    chosen = torch.rand(5, 3).topk(2).indices.int()
    found, expected, other = (layer(x, weights, chosen, None) for layer in
                              (codes, numbers, unrounded))  # fmt: skip
    # A last bit of float32 may decide to which code an input goes.
    assert (found - expected).norm() < 5e-3 * expected.norm() < 0.3 * (found - other).norm()


def test_a_rounder_by_hand() -> None:
    """A token's groups, of which the first is a part; the nearest code, of two the even one."""
    rounder = Rounder(Rounding(4, powers=True), CPU, offset=3)
    codes, scales = rounder.codes(torch.tensor([[-7.0, 448.0, 17.0, 19.0, 0.01, 0.0]]))
    assert scales.tolist() == [[2**-6, 1.0, 2**-42]]
    assert codes.float().tolist() == [[-448.0, 448.0, 16.0, 20.0, 0.009765625, 0.0]]
    static = Rounder(Rounding(static=True), CPU)
    for scale in (0.5, 2.0, 1.0):
        static.learn(torch.tensor([scale]))
    assert static.values(torch.tensor([[1000.0, 2.1]])).tolist() == [[896.0, 2.0]]


INPUTS: list[tuple[dict[str, Any], Rounding | None]] = [
    ({"quant_method": "fp8"}, Rounding()),
    ({"quant_method": "fp8", "activation_scheme": "static"}, Rounding(static=True)),
    ({"quant_method": "fp8", "weight_block_size": [128, 64]}, Rounding(64)),
    (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        Rounding(128, powers=True),
    ),
    ({"quant_method": "fp8", "is_checkpoint_fp8_serialized": False}, Rounding()),
    (GPTQ, None),
    *(
        (compressed("float-quantized", {"type": "float"}, input_activations=inputs), rounding)
        for inputs, rounding in (
            ({"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}, Rounding()),
            ({"num_bits": 8, "type": "float", "dynamic": True, "strategy": "tensor"}, Rounding()),
            ({"type": "float", "dynamic": True, "strategy": "group", "group_size": 128},
             Rounding(128)),
            ({"num_bits": 8, "type": "float"}, Rounding(static=True)),
            ({"num_bits": 8, "type": "int", "dynamic": True}, None),
            ({"num_bits": 4, "type": "float", "dynamic": True}, None),
            (None, None),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "rounding"), INPUTS)
def test_how_inputs_are_rounded(settings: dict[str, Any], rounding: Rounding | None) -> None:
    quantization = read(settings)
    name = "model.layers.0.mlp.up_proj"
    assert quantization.format_of(name).rounding == rounding
    known = quantization.canonical(f"{name}.input_scale") is not None
    assert known == (rounding is not None and rounding.static)
