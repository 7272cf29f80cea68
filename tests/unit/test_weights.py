"""Checkpoint folders, good and bad: files, names, shapes, slices, configs."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from tests.support.checkpoints import configure
from tests.support.users import unprivileged
from workers.attention import choose_backends
from workers.checkpoint import (
    Config,
    load_config,
    load_generation_config,
    resolve,
    resolve_dtype,
)
from workers.models import Model, attention_shapes, build_model, read_traits
from workers.parallel import Group, Place, Stage
from workers.tensor_files import find_files
from workers.weights import Loaded, Progress, load

CPU = torch.device("cpu")
Checkpoint = Callable[..., Path]


def build(path: Path, group: Group | None = None, stage: Stage | None = None) -> Model:
    config = load_config(path)
    traits = read_traits(config)
    place = Place(CPU, torch.float32, group or Group())
    backend = choose_backends(attention_shapes(traits, place, 16))
    return build_model(config, place, stage or Stage.whole(traits.num_layers), backend, 64)


def fill(
    path: Path,
    load_format: str = "auto",
    progress: Progress | None = None,
    **where: Any,
) -> tuple[dict[str, Tensor], Loaded]:
    """What each parameter was filled with, from ``path``."""
    model = build(path, **where)
    parameters = model.parameters()
    for parameter in parameters:
        parameter._adopt = False  # so that what is read goes where the test can see it
    targets = {p.name: p._target for p in parameters if p._target is not None}
    loaded = load(model, path, load_format, progress)
    assert all(p.full for p in parameters)
    return targets, loaded


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def as_pickle(path: Path, shards: int = 1, **options: Any) -> None:
    """The same checkpoint as pytorch_model.bin, or as that many shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin", **options)
        return
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {k: tensors[k] for k in list(tensors)[i::shards]}
        torch.save(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_shards(path: Path, shards: int = 3) -> list[Path]:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {k: tensors[k] for k in list(tensors)[i::shards]}
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [path / name for name in sorted(set(weight_map.values()))]


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "one file": lambda path: None,
    "sharded": as_shards,
    "pickle": as_pickle,
    "sharded pickle": lambda path: as_pickle(path, 2),
    "pickle of old torch": lambda path: as_pickle(path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama-biases", "opt-post-norm"])
def test_every_layout_fills_every_parameter(
    name: str, layout: str, copy: Callable[[str], Path]
) -> None:
    path = copy(name)
    expected = load_file(path / "model.safetensors")
    LAYOUTS[layout](path)
    seen: list[tuple[str, int]] = []
    targets, loaded = fill(path, progress=lambda name, size: seen.append((name, size)))
    assert targets.keys() == expected.keys()
    for tensor_name, target in targets.items():
        assert torch.equal(target, expected[tensor_name]), tensor_name
    assert loaded.tensors == len(expected) == len(seen)
    assert loaded.bytes == sum(4 * t.numel() for t in expected.values())
    assert sorted(seen) == sorted((n, 4 * t.numel()) for n, t in expected.items())
    assert loaded.seconds > 0


def test_what_layers_share_or_nothing_computes_may_be_in_a_checkpoint(
    copy: Callable[[str], Path],
) -> None:
    shared, draft = copy("gemma4"), copy("deepseek-v3")

    def add(name: str) -> Callable[[dict[str, Tensor]], object]:
        return lambda tensors: tensors.update({name: torch.zeros(3)})

    for part in ("k_proj", "v_proj", "k_norm"):
        change(shared, add(f"model.layers.5.self_attn.{part}.weight"))
    change(draft, add("model.layers.3.eh_proj.weight"))
    for path in (shared, draft):
        fill(path)
    change(shared, add("model.layers.5.self_attn.w_proj.weight"))
    change(draft, add("model.layers.4.eh_proj.weight"))
    for path, name in ((shared, "5.self_attn.w_proj"), (draft, "4.eh_proj")):
        with pytest.raises(CheckpointError, match=f"does not know: model.layers.{name}"):
            fill(path)


@pytest.mark.parametrize("layout", ["one file", "pickle"])
def test_ranks_read_their_own_part(layout: str, copy: Callable[[str], Path]) -> None:
    path = copy("llama-biases")
    whole = load_file(path / "model.safetensors")
    LAYOUTS[layout](path)
    ranks = [fill(path, group=Group(2, i)) for i in range(2)]
    for name, tensor in whole.items():
        first, second = (targets[name] for targets, _ in ranks)
        if "norm" in name:
            assert torch.equal(first, tensor) and torch.equal(second, tensor)
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(first, tensor) and second.numel() == 0
        else:
            by_inputs = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert torch.equal(torch.cat((first, second), dim=int(by_inputs)), tensor)
    everything = sum(4 * tensor.numel() for tensor in whole.values())
    repeated = sum(4 * tensor.numel() for name, tensor in whole.items() if "norm" in name)
    assert sum(loaded.bytes for _, loaded in ranks) == everything + repeated


def test_a_rank_reads_no_more_than_the_rows_that_its_slices_are_in(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama")
    by_inputs = sum(
        4 * tensor.numel()
        for name, tensor in load_file(path / "model.safetensors").items()
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    )
    sizes: list[int] = []
    preadv = os.preadv

    def spy(handle: int, buffers: Any, offset: int) -> int:
        sizes.append(preadv(handle, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", spy)
    _, loaded = fill(path, group=Group(4, 3))
    assert sum(sizes) == loaded.bytes + by_inputs - by_inputs // 4


def test_stages_read_their_own_layers(checkpoint: Checkpoint) -> None:
    path = checkpoint("opt-post-norm")
    whole = load_file(path / "model.safetensors")
    first, _ = fill(path, stage=Stage(0, 1, 3))
    last, _ = fill(path, stage=Stage(1, 3, 3))
    # The embeddings are tied, so that the last stage needs them too.
    assert first.keys() & last.keys() == {"model.decoder.embed_tokens.weight"}
    assert first.keys() | last.keys() == whole.keys()
    assert "model.decoder.project_in.weight" in first
    assert "model.decoder.project_out.weight" in last


def test_tensors_are_converted_one_by_one(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    change(path, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    targets, loaded = fill(path)
    tensors = load_file(path / "model.safetensors")
    assert loaded.bytes == sum(2 * t.numel() for t in tensors.values())
    assert all(torch.equal(targets[k], v.float()) for k, v in tensors.items())


def _rename(tensors: dict[str, Tensor], edit: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[edit(name)] = tensors.pop(name)


HARMLESS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "computed frequencies": (
        "llama",
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    ),
    "a repeated tied head": (
        "llama-tied",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    ),
    "a tied head alone": (
        "llama-tied",
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    ),
    "names of the bare decoder": ("opt", lambda t: _rename(t, lambda n: n.removeprefix("model."))),
    "metaseq's mark": ("opt", lambda t: t.update({"model.decoder.version": torch.ones(1)})),
    "OPT's repeated head": (
        "opt",
        lambda t: t.update({"lm_head.weight": t["model.decoder.embed_tokens.weight"].clone()}),
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_known_oddities_are_harmless(
    case: str, checkpoint: Checkpoint, copy: Callable[[str], Path]
) -> None:
    name, edit = HARMLESS[case]
    path = copy(name)
    change(path, edit)
    ours, expected = fill(path)[0], fill(checkpoint(name))[0]
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


NORM = "model.norm.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "missing": ("llama", lambda t: t.pop(K_PROJ), f"1 tensors .* lacks: {K_PROJ}$"),
    "missing, many": (
        "llama",
        lambda t: [t.pop(k) for k in list(t) if "layers.2" in k],
        r"9 tensors .* lacks: (\S+, ){4}\S+ and 4 more$",
    ),
    "missing head": ("llama", lambda t: t.pop("lm_head.weight"), "lacks: lm_head.weight$"),
    "extra": ("llama", lambda t: t.update(other=torch.ones(2)), "does not know: other$"),
    "a layer too many": (
        "llama",
        lambda t: t.update({K_PROJ.replace(".1.", ".3."): torch.ones(2)}),
        "does not know: model.layers.3.self_attn",
    ),
    "misshapen": (
        "llama",
        lambda t: t.update({NORM: torch.ones(63), K_PROJ: torch.ones(64, 32)}),
        rf"2 tensors have the wrong shape: {K_PROJ} \[64, 32\], not \[32, 64\], {NORM} \[63\]",
    ),
    "quantised": (
        "llama",
        lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}),
        f"{NORM} is torch.int8; allowed: float32",
    ),
    "untied after all": (
        "llama-tied",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "tie_word_embeddings is true but tensor lm_head.weight differs",
    ),
    "twice": (
        "opt",
        lambda t: t.update({"decoder.final_layer_norm.bias": torch.ones(64)}),
        "holds tensor model.decoder.final_layer_norm.bias more than once",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_tensors_are_named(case: str, copy: Callable[[str], Path]) -> None:
    name, edit, message = BROKEN[case]
    path = copy(name)
    change(path, edit)
    with pytest.raises(CheckpointError, match=message):
        fill(path)


def test_a_tensor_in_two_shards_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    first, second, _ = as_shards(path)
    tensors, repeated = load_file(second), load_file(first)
    save_file(tensors | {NORM: torch.ones(64)} | repeated, second)
    with pytest.raises(CheckpointError, match="more than once"):
        fill(path)


@pytest.mark.parametrize("keep", [0, 7, 300, -1000])
@pytest.mark.parametrize("layout", ["one file", "pickle", "pickle of old torch"])
def test_truncated_files_are_named(layout: str, keep: int, copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    LAYOUTS[layout](path)
    (file,) = find_files(path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        fill(path)


_READ = """
import sys
from pathlib import Path
from engine.errors import CheckpointError
from workers.checkpoint import load_config, resolve
from workers.tensor_files import find_files, open_file
for folder in sys.argv[1:]:
    try:
        load_config(resolve(folder))
        with open_file(find_files(Path(folder))[0]):
            print("open")
    except CheckpointError as error:
        print(error)
"""


def test_what_may_not_be_read_is_not_called_damaged(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = copy("llama")
    names = ("model.safetensors", "pytorch_model.bin", "config.json", "")
    folders = [Path(shutil.copytree(whole, tmp_path / f"copy{i}")) for i in range(len(names))]
    as_pickle(folders[1])
    for folder, name in zip(folders, names, strict=True):
        (folder / name).chmod(0)
    run = subprocess.run(
        [*unprivileged(), sys.executable, "-c", _READ, str(whole), *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
    )
    opened, *errors = run.stdout.splitlines()
    assert opened == "open"
    for folder, name, error in zip(folders, names, errors, strict=True):
        assert error.startswith(f"cannot read {folder / name}") and "Permission denied" in error


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code in a checkpoint was run",)


def test_a_pickle_with_code_is_refused(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy("llama")
    (path / "model.safetensors").unlink()
    for save in (
        lambda file: torch.save({"a": _Evil()}, file),
        lambda file: file.write_bytes(pickle.dumps({"a": _Evil()})),
    ):
        save(path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="pytorch_model.bin is damaged, .* unsafe"):
            fill(path)
    torch.save({"state": {"a": torch.ones(1)}}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold a dict of tensors"):
        fill(path)
    assert "was run" not in capsys.readouterr().out


def test_files_are_found_as_transformers_finds_them(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    torch.save({}, path / "pytorch_model.bin")
    (path / "consolidated.safetensors").touch()
    assert [f.name for f in find_files(path)] == ["model.safetensors"]
    assert [f.name for f in find_files(path, "pt")] == ["pytorch_model.bin"]
    shards = as_shards(path)
    assert find_files(path) == find_files(path, "safetensors") == shards
    shards[1].unlink()
    with pytest.raises(
        CheckpointError, match=f"index.json names files .* missing: {shards[1].name}"
    ):
        find_files(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        find_files(path)
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read .*index.json"):
        find_files(path)


def test_a_folder_without_weights_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights: neither model.safetensors nor pytorch"):
        fill(path)
    as_pickle(copy("opt"))
    with pytest.raises(
        CheckpointError, match="no weights: neither model.safetensors, nor an index"
    ):
        fill(path.parent / "opt", "safetensors")
    with pytest.raises(ConfigError, match="load_format='npz': allowed are auto, safetensors, pt"):
        fill(path, "npz")


def test_dummy_weights_need_no_file(copy: Callable[[str], Path]) -> None:
    path = copy("llama-biases")
    (path / "model.safetensors").unlink()
    first, loaded = fill(path, "dummy")
    again, _ = fill(path, "dummy")
    assert loaded.bytes == sum(4 * t.numel() for t in first.values())
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert (tensor - int("norm" in name)).abs().max() <= 0.0301
        assert tensor.std() > 0.01
    part, _ = fill(path, "dummy", group=Group(2, 1))
    assert torch.equal(part[K_PROJ], first[K_PROJ][16:])
    assert not torch.equal(first[K_PROJ], first[K_PROJ.replace("k_proj", "v_proj")])


def fuse_experts(tensors: dict[str, Tensor]) -> None:
    """As transformers 5 holds them in memory: one tensor of gates and ups, one of downs."""
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{stem}.{i}.{part}_proj.weight") for i in range(6)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{stem}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), 1)
        tensors[f"{stem}.down_proj"] = parts["down"]


def split_fused(tensors: dict[str, Tensor]) -> None:
    """As Llama names them: q, k, v and gate, up apart."""
    for layer in range(3):
        stem = f"model.layers.{layer}"
        qkv = tensors.pop(f"{stem}.self_attn.qkv_proj.weight").split([64, 32, 32])
        halves = tensors.pop(f"{stem}.mlp.gate_up_proj.weight").chunk(2)
        for part, tensor in zip("qkv", qkv, strict=True):
            tensors[f"{stem}.self_attn.{part}_proj.weight"] = tensor.clone()
        for part, tensor in zip(("gate", "up"), halves, strict=True):
            tensors[f"{stem}.mlp.{part}_proj.weight"] = tensor.clone()


@pytest.mark.parametrize(("name", "edit"), [("qwen3-moe", fuse_experts), ("phi3", split_fused)])
@pytest.mark.parametrize("pickled", [False, True])
def test_parameters_may_share_a_tensor(
    name: str,
    edit: Callable[[dict[str, Tensor]], None],
    pickled: bool,
    copy: Callable[[str], Path],
) -> None:
    path = copy(name)
    where = {"group": Group(2, 1), "stage": Stage(1, 3, 3)}
    before, _ = fill(path, **where)
    change(path, edit)
    if pickled:
        as_pickle(path)
    after, _ = fill(path, **where)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_layers_that_predict_further_tokens_are_skipped(copy: Callable[[str], Path]) -> None:
    path = copy("glm4-moe")
    change(path, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(2)}))
    fill(path)
    change(path, lambda tensors: tensors.update({"model.layers.4.eh_proj.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"does not know: model\.layers\.4\.eh_proj\.weight"):
        fill(path)


def test_a_missing_expert_is_named(copy: Callable[[str], Path]) -> None:
    path = copy("glm4-moe")
    change(path, lambda tensors: tensors.pop("model.layers.2.mlp.experts.7.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks: model\.layers\.2\.mlp\.experts\.7\.up_proj"):
        fill(path)


def test_a_shared_tensor_of_the_wrong_shape_is_named(copy: Callable[[str], Path]) -> None:
    path = copy("qwen3-moe")
    change(path, fuse_experts)
    name = "model.layers.1.mlp.experts.down_proj"
    change(path, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    message = rf"1 tensors have the wrong shape: {name} \[5, 64, 48\], not \[6, 64, 48\]"
    with pytest.raises(CheckpointError, match=message):
        fill(path)
    change(path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"lacks: model.layers.1.mlp.experts.0.down_proj"):
        fill(path)


def test_config_json_must_be_there_and_an_object(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_config(tmp_path)
    for text in ("[]", "{", "\xff", '{"a":' * 100_000 + "1" + "}" * 100_000):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match="config.json"):
            load_config(tmp_path)


def test_resolve_local_folders(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint("llama")
    assert resolve(str(path)) == path
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(str(path / "config.json"))
    for missing in (str(tmp_path / "absent"), "./absent", "../absent/model", "~/no/such"):
        with pytest.raises(CheckpointError, match=r"no folder .*absent|no folder ~/no/such"):
            resolve(missing)


def test_resolve_hub_ids_from_the_cache(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoint("llama"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert resolve("someone/tiny") == snapshot
    assert resolve("someone/tiny", revision="main") == snapshot
    assert resolve("someone/tiny", load_format="dummy") == snapshot
    for model, revision in (("someone/other", None), ("someone/tiny", "v2")):
        with pytest.raises(CheckpointError, match=f"no folder {model}, and the hub"):
            resolve(model, revision)


@pytest.mark.parametrize(
    ("option", "fields", "expected"),
    [
        ("auto", {"dtype": "bfloat16"}, torch.bfloat16),
        ("auto", {"torch_dtype": "float32"}, torch.float32),
        ("auto", {"torch_dtype": "float16"}, torch.bfloat16),
        ("auto", {}, torch.float32),
        ("auto", {"dtype": "torch.bfloat16"}, torch.bfloat16),
        ("bfloat16", {"dtype": "float32"}, torch.bfloat16),
        ("float", {"dtype": "bfloat16"}, torch.float32),
    ],
)
def test_dtype(option: str, fields: dict[str, str], expected: torch.dtype) -> None:
    assert resolve_dtype(option, Config(fields), CPU) == expected


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="dtype='int8': allowed are auto, float32"):
        resolve_dtype("int8", Config({}), CPU)
    with pytest.raises(ConfigError, match="dtype='half' is not supported on a CPU"):
        resolve_dtype("half", Config({}), CPU)
    with pytest.raises(CheckpointError, match="torch_dtype='float8_e4m3fn': is not supported"):
        resolve_dtype("auto", Config({"torch_dtype": "float8_e4m3fn"}), CPU)
    cuda = torch.device("cuda")
    assert resolve_dtype("half", Config({}), cuda) == torch.float16
    assert resolve_dtype("auto", Config({"dtype": "float16"}), cuda) == torch.float16


def test_generation_config(tmp_path: Path) -> None:
    config = Config({"eos_token_id": 2, "bos_token_id": 1})
    bare = load_generation_config(tmp_path, config)
    assert (bare.eos_token_ids, bare.bos_token_id, bare.defaults) == ((2,), 1, {})
    values = {
        "eos_token_id": [5, 2, 5],
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_k": None,
        "max_length": 9,
    }
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(values))
    given = load_generation_config(tmp_path, config)
    assert given.eos_token_ids == (5, 2)
    assert (given.bos_token_id, given.pad_token_id) == (1, 0)
    assert given.defaults == {"temperature": 0.6}
    assert load_generation_config(tmp_path / "no", Config({})).eos_token_ids == ()
    file.write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(CheckpointError, match="eos_token_id=.*must be an integer or a list"):
        load_generation_config(tmp_path, config)
    file.write_text(json.dumps({"eos_token_id": 10**30}))
    with pytest.raises(CheckpointError, match="eos_token_id=.*below 2"):
        load_generation_config(tmp_path, config)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(
    copy: Callable[[str], Path],
) -> None:
    path = copy("llama")
    sizes = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_attention_heads": 1 << 10}
    configure(path, **sizes, num_key_value_heads=1 << 10, head_dim=None)
    with pytest.raises(CheckpointError, match="config.json: .* takes .* GiB on each rank; there"):
        build(path)
