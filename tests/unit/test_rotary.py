"""Rotary embeddings against transformers' own tables, frequencies and config classes."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from engine.errors import CheckpointError
from workers import kernels
from workers.checkpoint import Config
from workers.layers.rotary import Rope, Rotary, inverse_frequencies, read_rope
from workers.parallel import Place

CPU = Place(torch.device("cpu"), torch.float32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "high_freq_factor": 6.0, "low_freq_factor": 2.0},
    YARN,
    YARN | {"factor": 1.0},
    YARN | {"factor": None},
    YARN | {"beta_fast": 64.0, "beta_slow": 4.0},
    YARN | {"attention_factor": 0.7},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.4},
    YARN | {"mscale": 0.8},
    YARN | {"truncate": False},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 2.0},
    # Both ends of the ramp on one dimension.
    YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
]


def llama(scaling: dict[str, Any], theta: float = 10_000.0, **fields: Any) -> LlamaConfig:
    fields = {"head_dim": 64, "max_position_embeddings": 256} | fields
    return LlamaConfig(rope_parameters=scaling | {"rope_theta": theta}, **fields)


def rope_of(config: LlamaConfig) -> Rope:
    values = config.to_dict()
    return read_rope(Config(values), config.head_dim, config.max_position_embeddings)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_tables_are_those_of_transformers(scaling: dict[str, Any], theta: float) -> None:
    config = llama(scaling, theta)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(300)[None])
    rotary = Rotary(rope_of(config), 300, CPU)
    for ours, theirs in ((rotary.cos, cos), (rotary.sin, sin)):
        # At position 300 an angle's last bit in float32 is 3e-5.
        torch.testing.assert_close(ours, theirs[0, :, :32], rtol=0, atol=5e-5)


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=str)
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = llama(scaling)
    rope = rope_of(config)
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    torch.testing.assert_close(inverse_frequencies(rope, 1), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_dynamic_gives_each_position_the_frequencies_of_its_length() -> None:
    config = llama({"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=32)
    ours = inverse_frequencies(rope_of(config), 100)
    plain = inverse_frequencies(Rope(64, 10_000.0, 32), 100)
    for position in range(100):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=position + 1)
        torch.testing.assert_close(ours[position], expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours[:32], plain.expand(32, -1), rtol=1e-6, atol=0)
    assert (ours[99, 1:] < ours[31, 1:]).all()


def test_rotation_is_that_of_transformers() -> None:
    config = llama(YARN, head_dim=24)
    positions = torch.tensor([0, 5, 5, 290])
    q, k = torch.randn(4, 3, 24), torch.randn(4, 1, 24)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q.transpose(0, 1), k.transpose(0, 1), cos, sin)
    rotary = Rotary(rope_of(config), 300, CPU)
    kernels.rope(q, k, positions, rotary.cos, rotary.sin)
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_both_layouts_are_read_alike(scaling: dict[str, Any], key: str) -> None:
    kind = scaling["rope_type"]
    rest = {k: v for k, v in scaling.items() if k != "rope_type"}
    old = Config({"rope_theta": 5e5, "rope_scaling": {key: kind, **rest}})
    new = Config({"rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **rest}})
    assert read_rope(old, 64, 256) == read_rope(new, 64, 256)
    assert read_rope(new, 64, 256).theta == 5e5


def test_the_original_length_beside_the_scaling_wins() -> None:
    config = llama(LLAMA3, original_max_position_embeddings=32)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    values = llama(LLAMA3).to_dict() | {"original_max_position_embeddings": 32}
    ours = inverse_frequencies(read_rope(Config(values), 64, 256), 1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_null_scaling_is_none() -> None:
    config = Config({"rope_theta": 7.0, "rope_scaling": None})
    assert read_rope(config, 64, 256) == Rope(64, 7.0, 256)
    assert read_rope(Config({}), 64, 256) == Rope(64, 10_000.0, 256)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 2.5}, 640),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        (LLAMA3, 256),
        (YARN, 256),
        (YARN | {"original_max_position_embeddings": 256}, 1024),
    ],
)
def test_longest_context(scaling: dict[str, Any], longest: int) -> None:
    assert read_rope(Config({"rope_scaling": scaling}), 64, 256).longest == longest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"rope_type": "axial"}}, "rope_type='axial': allowed: default"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor=None: must be a list of 32"),
        ({"rope_scaling": {"type": "su"}}, "type='su': allowed"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor=None: is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor=-1: must be a positive"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "mscale=1: is not"),
        ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k[:3] != "low"}}, "low_freq"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters=.*one flat object"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate='no': must be true or false"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_"),
        ({"rope_theta": "big"}, "rope_theta='big': must be a positive number"),
    ],
)
def test_what_is_not_supported_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_rope(Config(values), 64, 256)


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match="head_dim.*even head size, not 15"):
        read_rope(Config({}), 15, 256)
