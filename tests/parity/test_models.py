"""Every network's forward pass against transformers: any mix of rows, ranks and stages."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import ConfigError
from tests.parity.paged import BIT_STABLE, Paged, build
from tests.parity.tiny_models import TINY_MODELS
from workers.attention.gather import GatherAttention
from workers.checkpoint import load_config
from workers.models import read_traits
from workers.parallel import Group, Stage

Checkpoint = Callable[..., Path]
Rows = list[tuple[int, int, int]]

NAMES = [model.name for model in TINY_MODELS]
SEQUENCES = [
    torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 40, 17, 70)
]
# Whole prompts, chunks and single tokens in one step; rows in any order; (sequence, start, count).
RAGGED: list[Rows] = [
    [(0, 0, 1), (1, 0, 13)],
    [(1, 13, 1), (2, 0, 17), (3, 0, 5)],
    [(3, 5, 40), (1, 14, 20)],
    [(3, 45, 1), (1, 34, 1)],
    [(1, 35, 5), (3, 46, 24)],
]
ALONE: list[Rows] = [[(i, 0, len(tokens))] for i, tokens in enumerate(SEQUENCES)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(name: str, tokens: list[int]) -> Tensor:
    """transformers' logits [len(tokens), vocab_size]."""
    model = next(m for m in TINY_MODELS if m.name == name).build()
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def one_by_one(name: str, tokens: list[int]) -> Tensor:
    """The same, each token fed as if it had been generated."""
    model = next(m for m in TINY_MODELS if m.name == name).build()
    past, rows = None, []
    with torch.no_grad():
        for token in tokens:
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, 0])
    return torch.stack(rows)


IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "vision"),
    [
        ("gemma3", "Gemma3", "siglip_vision_model"),
        ("gemma4", "Gemma4", "gemma4_vision"),
        ("ministral3", "Mistral3", "pixtral"),
        ("mistral", "Mistral3", "pixtral"),
        ("qwen3-5", "Qwen3_5", "qwen3_5_vision"),
        ("qwen3-5-moe", "Qwen3_5Moe", "qwen3_5_moe_vision"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_the_text_model_of_an_image_text_checkpoint(
    name: str,
    kind: str,
    vision: str,
    old: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import transformers

    text = next(m for m in TINY_MODELS if m.name == name).build()
    config = getattr(transformers, f"{kind}Config")(
        text_config=text.config.to_dict(),
        vision_config=IMAGES | {"model_type": vision},
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    config._attn_implementation = "eager"
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path, save_original_format=old)
    with caplog.at_level(logging.INFO, logger="manta"):
        ours = Paged([build(tmp_path)], SEQUENCES).logits(RAGGED)
    assert [r for r in caplog.messages if "the text model alone is served" in r]
    with torch.no_grad():
        expected = [whole(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]
    assert_close(ours, expected)


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "llama-dynamic"])
def test_ragged_chunks_equal_transformers(name: str, checkpoint: Checkpoint) -> None:
    ours = Paged([build(checkpoint(name))], SEQUENCES).logits(RAGGED)
    assert_close(ours, [reference(name, tokens) for tokens in SEQUENCES])


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2-sliding", "deepseek-v2", "opt-post-norm", "gpt-oss"],
)
def test_plain_attention_equals_transformers(name: str, checkpoint: Checkpoint) -> None:
    model = build(checkpoint(name), backend=GatherAttention, block_size=4)
    ours = Paged([model], SEQUENCES, block_size=4).logits(RAGGED)
    assert_close(ours, [reference(name, tokens) for tokens in SEQUENCES])


def test_dynamic_rope_beyond_the_original_length_is_as_generated(checkpoint: Checkpoint) -> None:
    ours = Paged([build(checkpoint("llama-dynamic"))], SEQUENCES).logits(RAGGED)
    assert_close(ours, [one_by_one("llama-dynamic", tokens) for tokens in SEQUENCES])
    # A prompt within the original length is the same whole or one by one.
    short = [i for i, tokens in enumerate(SEQUENCES) if len(tokens) <= 24]
    assert short
    assert_close(
        [ours[i] for i in short], [reference("llama-dynamic", SEQUENCES[i]) for i in short]
    )


@pytest.mark.parametrize("dtype", BIT_STABLE)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3-sliding",
        "olmo3",
        "gemma3",
        "qwen3-moe",
        "deepseek-v3",
        "glm4-moe",
        "qwen3-5-moe",
        "nemotron-h-experts",
        "opt",
        "opt-post-norm",
        "gpt-oss",
        "qwen3-5",
    ],
)
def test_no_bit_depends_on_the_batch(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    model = build(checkpoint(name), dtype=dtype)
    ragged = Paged([model], SEQUENCES).logits(RAGGED)
    for a, b in zip(ragged, Paged([model], SEQUENCES).logits(ALONE), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", BIT_STABLE)
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3-sliding", "olmo3", "granite", "mixtral", "qwen3-5", "nemotron-h", "opt"]
    + ["opt-post-norm"],
)
def test_outputs_alone_are_carried_to_the_end(
    name: str, cut: int, dtype: torch.dtype, checkpoint: Checkpoint
) -> None:
    """What is asked for has the same bits, and what later steps read has them too."""
    path = checkpoint(name)
    stages = [Stage(0, cut, 3), Stage(cut, 3, 3)] if cut < 3 else [Stage.whole(3)]
    models = [build(path, stage=stage, dtype=dtype) for stage in stages]
    whole, narrow = Paged(models, SEQUENCES), Paged(models, SEQUENCES)
    for rows in RAGGED:
        count = torch.tensor([count for _, _, count in rows])
        for outputs in (count.cumsum(0) - 1, torch.tensor([0])):
            got = narrow.step(rows, outputs)
            assert torch.equal(got, whole.step(rows)[outputs])


def test_bfloat16_is_as_close_as_bfloat16_can_be(checkpoint: Checkpoint) -> None:
    ours = Paged([build(checkpoint("qwen3"), dtype=torch.bfloat16)], SEQUENCES).logits(ALONE)
    model = next(m for m in TINY_MODELS if m.name == "qwen3").build().bfloat16()
    for tokens, logits in zip(SEQUENCES, ours, strict=True):
        exact = reference("qwen3", tokens)
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0].float()
        assert (logits - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean() + 1e-4


class _Ranks:
    """Groups of threads that add and concatenate for real, with a barrier on either side."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._slots[rank] = x.clone()
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone

    def run(self, work: Callable[[Group], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def rank(i: int) -> None:
            try:
                results[i] = work(_ThreadGroup(self, i))
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(i,)) for i in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


class _ThreadGroup(Group):
    def __init__(self, ranks: _Ranks, rank: int) -> None:
        super().__init__(ranks.size, rank)
        object.__setattr__(self, "ranks", ranks)

    ranks: _Ranks

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.ranks.exchange(self.rank, x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        everyone = torch.cat(self.ranks.exchange(self.rank, x), dim=-1)
        return everyone if self.rank == 0 else x


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", 2),
        ("llama", 4),  # 2 key-value heads: each is held twice
        ("llama-mqa", 2),
        ("llama-tied", 2),
        ("llama-biases", 2),
        ("qwen2-sliding", 2),
        ("qwen3-tied-biases", 4),
        ("phi3-long", 2),
        ("olmo2", 2),
        ("olmo3", 4),  # norms over all heads, of which two ranks hold the same ones
        ("granite", 2),
        ("ministral3", 2),
        ("gemma3-capped", 2),
        ("mixtral", 2),
        ("qwen3-moe-some", 4),
        ("deepseek-v2-no-q-rank", 2),
        ("deepseek-v3", 2),
        ("gemma4", 2),
        ("gemma4-alike", 2),
        ("gemma4-moe", 2),
        ("glm4-moe-dense-front", 2),
        ("gpt-oss", 2),
        ("minimax-m2", 4),
        ("qwen3-5", 2),
        ("qwen3-5-even", 4),
        ("qwen3-5-moe", 2),
        ("qwen3-next", 2),
        ("nemotron-h", 2),
        ("nemotron-h-experts", 2),
        ("opt", 2),
        ("opt-post-norm", 4),
    ],
)
def test_tensor_parallel_ranks_equal_one(name: str, size: int, checkpoint: Checkpoint) -> None:
    path = checkpoint(name)

    def work(group: Group) -> list[Tensor]:
        return Paged([build(path, group=group)], SEQUENCES).logits(RAGGED)

    whole = Paged([build(path)], SEQUENCES).logits(RAGGED)
    ranks = _Ranks(size).run(work)
    assert_close(ranks[0], whole)
    for logits in zip(*ranks, strict=True):  # the others have their share
        share = logits[1].shape[1]
        assert share == logits[0].shape[1] // size
        assert torch.equal(torch.cat((logits[0][:, :share], *logits[1:]), 1), logits[0])


@pytest.mark.parametrize("name", ["mixtral", "glm4-moe", "gpt-oss", "nemotron-h-experts"])
def test_ranks_with_some_experts_each_equal_one(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(name)

    def work(group: Group) -> tuple[list[Tensor], set[str]]:
        model = build(path, group=group, expert_parallel=True)
        names = {p.name for p in model[0].parameters() if ".experts." in p.name}
        return Paged([model], SEQUENCES).logits(RAGGED), names

    whole = Paged([build(path)], SEQUENCES).logits(RAGGED)
    (logits, first), (_, second) = _Ranks(2).run(work)
    assert_close(logits, whole)
    assert len(first) == len(second) and not first & second


def test_experts_that_cannot_be_given_to_ranks_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel: the model has no experts"):
        build(checkpoint("llama"), expert_parallel=True)
    message = (
        r"tensor_parallel_size=4 does not divide the number of experts \(6\); allowed: 1, 2, 3, 6"
    )
    with pytest.raises(ConfigError, match=message):
        build(checkpoint("qwen3-moe"), group=Group(4, 0), expert_parallel=True)


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama-tied", "phi3", "olmo3", "smollm3", "exaone4", "gemma3", "qwen3-moe-some",
        "glm4-moe-dense-front", "gpt-oss", "minimax-m2", "deepseek-v3", "gemma4-alike", "qwen3-5",
        "nemotron-h", "opt", "opt-post-norm", "opt-untied-gelu",
    ],
)  # fmt: skip
@pytest.mark.parametrize("cut", [1, 2])
def test_pipeline_stages_equal_the_whole(name: str, cut: int, checkpoint: Checkpoint) -> None:
    path = checkpoint(name)
    stages = [build(path, stage=Stage(0, cut, 3)), build(path, stage=Stage(cut, 3, 3))]
    ours = Paged(stages, SEQUENCES).logits(RAGGED)
    whole = Paged([build(path)], SEQUENCES).logits(RAGGED)
    for a, b in zip(ours, whole, strict=True):
        assert torch.equal(a, b)


def test_experts_of_nemotron_in_one_tensor(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """As transformers 5 holds them in memory, under names of its own."""
    name = "nemotron-h-experts"
    tiny = next(m for m in TINY_MODELS if m.name == name)
    path = tiny.save(tmp_path, save_original_format=False)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.1.mixer.experts.up_proj").get_shape() == [8, 48, 24]
    ours = Paged([build(path)], SEQUENCES).logits(ALONE)
    for a, b in zip(ours, Paged([build(checkpoint(name))], SEQUENCES).logits(ALONE), strict=True):
        assert torch.equal(a, b)


def test_a_size_that_does_not_divide_the_heads_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3 .*attention heads \(4\)"):
        build(checkpoint("llama"), group=Group(3, 0))


def test_stages_without_what_their_layers_need_are_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size must be 1: each layer"):
        build(checkpoint("gemma4"), stage=Stage(0, 3, 6))
    tiny = next(m for m in TINY_MODELS if m.name == "gemma4")
    path = replace(tiny, config={"hidden_size_per_layer_input": 0}).save(tmp_path)
    with pytest.raises(ConfigError, match="pipeline_partition: layer 3 shares .* of layer 1"):
        build(path, stage=Stage(2, 6, 6))
    stages = [build(path, stage=Stage(0, 1, 6)), build(path, stage=Stage(1, 6, 6))]
    assert [memory.unit_bytes == 0 for memory in stages[1][0].memories] == [False] * 2 + [True] * 3
    whole = Paged([build(path)], SEQUENCES).logits(RAGGED)
    assert_close(Paged(stages, SEQUENCES).logits(RAGGED), whole, 0.0)


def test_dummy_weights_do_not_depend_on_the_layout(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama-tied")

    def work(group: Group) -> list[Tensor]:
        model = build(path, group=group, load_format="dummy")
        return Paged([model], SEQUENCES).logits(ALONE)

    whole = Paged([build(path, load_format="dummy")], SEQUENCES).logits(ALONE)
    assert all(logits.isfinite().all() and logits.std() > 0 for logits in whole)
    assert_close(_Ranks(2).run(work)[0], whole)


def test_config_defaults_are_those_of_transformers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A config.json that says nothing means what transformers' config class means by nothing."""
    from transformers import AutoConfig

    from workers.models.registry import ARCHITECTURES

    for architecture, (kind, _) in ARCHITECTURES.items():
        bare, full = tmp_path / f"{architecture}-bare", tmp_path / f"{architecture}-full"
        for folder, values in ((bare, {}), (full, AutoConfig.for_model(kind).to_dict())):
            folder.mkdir()
            values = {k: v for k, v in values.items() if k not in ("architectures",)}
            values |= {"model_type": kind, "architectures": [architecture]}
            if kind == "deepseek_v2":  # which leaves it open
                values["num_experts_per_tok"] = 6
            values["id2label"] = {"0": "score"}  # of those that classify, one label is a score
            (folder / "config.json").write_text(json.dumps(values))
        assert read_traits(load_config(bare)) == read_traits(load_config(full))
