"""Layers against plain PyTorch, whole and split over ranks."""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError
from tests.parity.paged import BIT_STABLE
from workers.layers import linear
from workers.layers.attention import Heads
from workers.layers.embedding import OutputLayer, PositionEmbedding, VocabEmbedding
from workers.layers.linear import Activation, ColumnLinear, Part, RowLinear, onednn_packs
from workers.layers.mlp import MLP, GatedMLP
from workers.layers.norm import LayerNorm, RMSNorm
from workers.layers.stream import Stream
from workers.parallel import Group, Place
from workers.weights import Parameter

CPU = torch.device("cpu")
WHOLE = Place(CPU, torch.float32)
DTYPES = [torch.float32, torch.bfloat16]


def rank(i: int, size: int = 2) -> Place:
    """Rank i's place, in a group that does not communicate: the test adds or concatenates."""
    return Place(CPU, torch.float32, Group(size, i))


def fill(parameters: Iterable[Parameter], checkpoint: dict[str, Tensor]) -> None:
    for parameter in parameters:
        tensor = checkpoint[parameter.name]
        assert parameter.shape == tuple(tensor.shape)
        parameter.fill(tensor[parameter.cut])


@pytest.fixture(params=["packed", "plain"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's packed weights, and as on a machine without them."""
    if request.param == "plain":
        monkeypatch.setattr(linear, "onednn_packs", lambda dtype: False)


def test_onednn_packs_what_it_can() -> None:
    assert not onednn_packs(torch.float16)
    assert isinstance(onednn_packs(torch.float32), bool)


def test_a_wrong_product_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear._pointwise
    monkeypatch.setattr(linear, "_pointwise", lambda *a: right(*a) + 1)
    assert not linear.onednn_packs.__wrapped__(torch.float32)

    def absent(*_: object) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "_pointwise", absent)
    assert not linear.onednn_packs.__wrapped__(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("either_way")
def test_column_linear(activation: Activation, bias: bool, dtype: torch.dtype) -> None:
    part = Part("fc", 40, slice(0, 40))
    layer = ColumnLinear(Place(CPU, dtype), [part], 24, bias, activation)
    weight, b = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    fill(layer.parameters(), {"fc.weight": weight, "fc.bias": b})
    act: Callable[[Tensor], Tensor] = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[
        activation
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for rows in (0, 1, 2, 3, 8, 17, 33, 64, 100, 257):
        x = torch.randn(rows, 48).to(dtype)[:, 12:36]  # strided rows, as a slice of a product is
        expected = act(F.linear(x.double(), weight.double(), b.double() if bias else None))
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", BIT_STABLE)
@pytest.mark.parametrize("inputs", [768, 1024, 1040, 2816])
def test_no_bit_of_a_row_depends_on_the_others(inputs: int, dtype: torch.dtype) -> None:
    # Each product is exactly zero: what comes out is the rounding of its order of summation.
    order = torch.randperm(inputs)
    weight = torch.randn(256, inputs // 2).repeat(1, 2)[:, order]
    x = torch.randn(300, inputs // 2).to(dtype)
    x = torch.cat((x, -x), dim=1)[:, order]
    layer = RowLinear(Place(CPU, dtype), "fc", inputs, 256, bias=False)
    fill(layer.parameters(), {"fc.weight": weight})
    nothing = torch.zeros(300, 256, dtype=dtype)
    for product in (layer._product, lambda x: layer(x, nothing[: len(x)]).hidden):
        whole = product(x)
        assert whole.abs().max() < 1e-2 and whole.count_nonzero() > whole.numel() / 2
        for rows in (1, 2, 7, 8, 16, 33, 64, 128, 299):
            assert torch.equal(product(x[:rows]), whole[:rows])


def test_plain_weight_is_freed_once_packed() -> None:
    assert onednn_packs(torch.float32)
    parts = [Part("q", 40, slice(0, 40)), Part("k", 8, slice(0, 8))]
    merged, row = ColumnLinear(WHOLE, parts, 24, bias=False), RowLinear(WHOLE, "o", 24, 40, False)
    checkpoint = {
        f"{n}.weight": torch.randn(rows, 24) for n, rows in (("q", 40), ("k", 8), ("o", 40))
    }
    fill([*merged.parameters(), *row.parameters()], checkpoint)
    assert merged._product.weight is None and row._product.weight is None
    assert all(p._target is None for p in (*merged.parameters(), *row.parameters()))


def test_a_part_of_a_mapped_file_is_packed_without_a_copy() -> None:
    row, conversion = RowLinear(WHOLE, "o", 24, 40, False), torch.randn(40, 24).bfloat16()
    (parameter,) = row.parameters()
    target, part = parameter._target, torch.randn(40, 24)
    assert target is not None
    target.fill_(7.0)
    parameter.fill(part)
    assert (target == 7.0).all()
    x, nothing = torch.randn(3, 24), torch.zeros(3, 40)
    expected = row(x, nothing).hidden
    part.fill_(7.0)  # the file may go away once it is packed
    assert torch.equal(row(x, nothing).hidden, expected)
    other = RowLinear(WHOLE, "o", 24, 40, False)
    fill(other.parameters(), {"o.weight": conversion})
    torch.testing.assert_close(other(x, nothing).hidden, F.linear(x, conversion.float()))


@pytest.mark.usefixtures("either_way")
def test_merged_columns_and_rows_split_over_ranks() -> None:
    checkpoint = {
        "gate.weight": torch.randn(12, 10),
        "up.weight": torch.randn(12, 10),
        "gate.bias": torch.randn(12),
        "up.bias": torch.randn(12),
    }
    x = torch.randn(5, 10)
    gate = F.linear(x, checkpoint["gate.weight"], checkpoint["gate.bias"])
    up = F.linear(x, checkpoint["up.weight"], checkpoint["up.bias"])
    for i, cut in enumerate((slice(0, 6), slice(6, 12))):
        parts = [Part("gate", 12, cut), Part("up", 12, cut)]
        layer = ColumnLinear(rank(i), parts, 10, bias=True)
        fill(layer.parameters(), checkpoint)
        expected = torch.cat((gate[:, cut], up[:, cut]), dim=1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("either_way")
def test_row_bias_and_residual_are_added_once(bias: bool) -> None:
    checkpoint = {"fc.weight": torch.randn(8, 12), "fc.bias": torch.randn(8)}
    x, residual = torch.randn(5, 12), torch.randn(5, 8)
    total = torch.zeros(5, 8)
    for i, cut in enumerate((slice(0, 6), slice(6, 12))):
        layer = RowLinear(rank(i), "fc", 12, 8, bias)
        fill(layer.parameters(), checkpoint)
        total += layer(x[:, cut], residual).total()
    expected = F.linear(x, checkpoint["fc.weight"], checkpoint["fc.bias"] if bias else None)
    torch.testing.assert_close(total, expected + residual, rtol=1e-5, atol=1e-5)


def test_mlps_split_over_ranks() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    names = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    gated = {f"mlp.{n}.weight": torch.randn(shape) for n, shape in names.items()}
    plain = {"mlp.fc1.weight": torch.randn(12, 8), "mlp.fc2.weight": torch.randn(8, 12)}
    g, u, d = gated.values()
    expected = F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) + residual
    total = torch.zeros(5, 8)
    for i in range(2):
        mlp = GatedMLP(rank(i), "mlp", 8, 12, bias=False)
        fill(mlp.parameters(), gated)
        total += mlp(x, residual).total()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    expected = F.linear(F.relu(F.linear(x, plain["mlp.fc1.weight"])), plain["mlp.fc2.weight"])
    total = torch.zeros(5, 8)
    for i in range(2):
        relu = MLP(rank(i), "mlp", 8, 12, bias=False, activation="relu")
        fill(relu.parameters(), plain)
        total += relu(x, residual).total()
    torch.testing.assert_close(total, expected + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_split_over_ranks(tied: bool) -> None:
    table, head = torch.randn(10, 6), torch.randn(10, 6)
    checkpoint = {"embed.weight": table, "head.weight": table if tied else head}
    tokens, hidden = torch.tensor([0, 4, 5, 9, 5]), torch.randn(3, 6)
    found, logits = torch.zeros(5, 6), []
    for i in range(2):
        embedding = VocabEmbedding(rank(i), "embed", 10, 6)
        output = OutputLayer(rank(i), "head", 10, 6, embedding if tied else None)
        fill(embedding.parameters(), checkpoint)
        fill(output.parameters(), checkpoint)
        found += embedding(tokens)
        logits.append(output(hidden))
    assert torch.equal(found, table[tokens])
    expected = F.linear(hidden, checkpoint["head.weight"])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not divide vocab_size \(11\)"):
        VocabEmbedding(rank(0), "embed", 11, 6)


def test_positions_start_after_the_offset() -> None:
    table = torch.randn(9, 4)
    layer = PositionEmbedding(WHOLE, "positions", 7, 2, 4)
    fill(layer.parameters(), {"positions.weight": table})
    assert torch.equal(layer(torch.tensor([0, 6])), table[[2, 8]])


def test_norms() -> None:
    x, weight, bias = torch.randn(5, 24), torch.randn(24), torch.randn(24)
    rms = RMSNorm(WHOLE, "norm", 24, 1e-5)
    fill(rms.parameters(), {"norm.weight": weight})
    torch.testing.assert_close(
        rms(Stream(x)), F.rms_norm(x, (24,), weight, 1e-5), rtol=1e-5, atol=1e-5
    )
    layer = LayerNorm(WHOLE, "norm", 24, 1e-5, affine=True)
    fill(layer.parameters(), {"norm.weight": weight, "norm.bias": bias})
    expected = F.layer_norm(x, (24,), weight, bias, 1e-5)
    torch.testing.assert_close(layer(Stream(x)), expected, rtol=1e-5, atol=1e-5)
    bare = LayerNorm(WHOLE, "norm", 24, 1e-5, affine=False)
    assert not list(bare.parameters())
    torch.testing.assert_close(bare(Stream(x)), F.layer_norm(x, (24,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kv", "size", "expected"),
    [
        (4, 2, [slice(0, 2), slice(2, 4)]),
        (2, 2, [slice(0, 1), slice(1, 2)]),
        (2, 4, [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]),
        (1, 2, [slice(0, 1), slice(0, 1)]),
    ],
)
def test_heads_split(kv: int, size: int, expected: list[slice]) -> None:
    share = 8 // size
    for i in range(size):
        mine, shared = Heads(8, kv, 16).split(Group(size, i))
        assert mine == slice(i * share, (i + 1) * share)
        assert shared == expected[i]
        # Each query head finds the key-value head that it has in the whole model.
        group = 8 // kv
        for local, head in enumerate(range(mine.start, mine.stop)):
            per_kv = share // (shared.stop - shared.start)
            assert shared.start + local // per_kv == head // group


def test_heads_that_do_not_split_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"must be a divisor or a multiple .*key-value heads \(3\)"
    ):
        Heads(12, 3, 16).split(Group(4, 0))
    with pytest.raises(ConfigError, match=r"number of key-value heads \(3\)"):
        Heads(12, 3, 16).split(Group(2, 0))
