"""How weights come from a disk to their places: time, memory, and bytes of the disk.

python -m benchmarks.loading FOLDER [--rounds 3] [--sizes 1,2] [--warm] [--device cuda]

FOLDER gets checkpoints of random weights in shards, 8 GB in all, unless they are there. Each is
loaded by as many ranks as a size says, a process each, that begin together; the files are dropped
from the system's cache first, or with --warm read into it. What the ranks hold of files is the
system's cache, and shared; what is theirs is anonymous memory.
"""

import workers  # noqa: F401, I001  # before torch

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workers import weights
from workers.attention import choose_backends
from workers.checkpoint import load_config
from workers.models import Model, attention_shapes, build_model, read_traits
from workers.parallel import Group, Place, Stage

GIB, MIB = 2**30, 2**20
SHARD = 512 * MIB
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
EXPERTS = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 32000,
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA,
    "llama-1b-fp8": LLAMA | {"quantization_config": BLOCKS},
    "experts-1b": EXPERTS,
}


def build(folder: Path, device: torch.device, group: Group) -> Model:
    """A rank's part of the network, empty."""
    config = load_config(folder)
    traits = read_traits(config)
    place = Place(device, torch.bfloat16, group)
    backend = choose_backends(attention_shapes(traits, place, 16), "auto")
    return build_model(config, place, Stage.whole(traits.num_layers), backend, 1024)


def make(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of random weights, in the order and under the names of the network."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    shards: list[dict[str, torch.Tensor]] = []
    for parameter in build(folder, torch.device("meta"), Group()).network():
        kind = torch.bfloat16 if torch.bfloat16 in parameter.dtypes else parameter.dtypes[0]
        if sum(t.nbytes for t in tensors.values()) > SHARD:
            shards.append(tensors)
            tensors = {}
        values = torch.empty(parameter.shape).uniform_(-0.03, 0.03)
        tensors[parameter.name] = values.to(kind)
    shards.append(tensors)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    where = {tensor: name for name, s in zip(names, shards, strict=True) for tensor in s}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    os.sync()


def settle(folder: Path, warm: bool) -> None:
    """The files in the system's cache, or not."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and opened.read(MIB):
                pass


def memory(pid: int | str) -> tuple[int, int]:
    """(anonymous, of files) resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":") for line in text.splitlines())
    anonymous, files = (1024 * int(found[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, files


def rank(folder: Path, size: int, number: int, device: torch.device) -> None:
    """One rank's process: builds, waits for the word, loads, and says what it took."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    torch.ones(1, device=device)
    with torch.inference_mode():
        model = build(folder, device, Group(size, number))
        part = sum(parameter.nbytes for parameter in model.parameters())
    print("ready", flush=True)
    input()
    before = time.process_time()
    loaded = weights.load(model, folder)
    used = time.process_time() - before
    if device.type == "cuda":
        torch.cuda.synchronize()
    fields = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    disk = int(dict(fields)["read_bytes"])
    print(json.dumps([loaded.seconds, used, part, disk]), flush=True)


def load(folder: Path, size: int, warm: bool, device: str) -> Iterator[tuple[str, float]]:
    """What it took ``size`` ranks that begin together, by name; memory is of the worst of them."""
    command = [sys.executable, "-m", "benchmarks.loading", str(folder), "--device", device]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(number), "--sizes", str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]
    for process in ranks:
        assert process.stdout and process.stdout.readline() == "ready\n"
    settle(folder, warm)
    before = [memory(process.pid) for process in ranks]
    most = list(before)
    for process in ranks:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    while any(process.poll() is None for process in ranks):
        for i, process in enumerate(ranks):
            try:
                anonymous, files = memory(process.pid)
            except (OSError, KeyError):  # it has ended
                continue
            most[i] = max(most[i][0], anonymous), max(most[i][1], files)
        time.sleep(0.01)
    said = [json.loads(process.stdout.read()) for process in ranks if process.stdout]
    yield "seconds", max(seconds for seconds, *_ in said)
    yield "of a CPU", sum(used for _, used, *_ in said)
    yield "GiB of the disk", sum(disk for *_, disk in said) / GIB
    yield "MiB of a rank's part", max(part for _, _, part, _ in said) / MIB
    for column, name in enumerate(("anonymous", "of files")):
        grown = (m[column] - b[column] for m, b in zip(most, before, strict=True))
        yield f"most MiB {name}", max(grown) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=",".join(CHECKPOINTS))
    parser.add_argument("--rank", type=int)
    args = parser.parse_args()
    if args.rank is not None:
        return rank(args.folder, int(args.sizes), args.rank, torch.device(args.device))
    for name in args.only.split(","):
        folder = args.folder / name
        if not folder.is_dir():
            make(folder, CHECKPOINTS[name])
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB
        print(f"{name}: {files:.2f} GiB of files", flush=True)
        for size in map(int, args.sizes.split(",")):
            rounds = [dict(load(folder, size, args.warm, args.device)) for _ in range(args.rounds)]
            figures = {k: statistics.median(found[k] for found in rounds) for k in rounds[0]}
            words = (f"{value:.2f} {what}" for what, value in figures.items())
            print(f"  TP {size}:", ", ".join(words), flush=True)


if __name__ == "__main__":
    main()
