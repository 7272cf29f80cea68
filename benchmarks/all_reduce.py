"""All-reduce between two ranks of one machine: through shared memory and over Gloo.

python -m benchmarks.all_reduce [--hidden 768] [--repeats 300]

bf16, [rows, hidden] as after a row-parallel linear; a thread for each rank; median microseconds.
"""

import workers  # noqa: F401, I001  # before torch

import argparse
import statistics
import subprocess
import sys
import time

import torch

from workers.distributed import Grid, join, open_store

HOST = "127.0.0.1"
ROWS = (1, 8, 32, 128, 512, 2048)
# Ranks that say that they are on different hosts share no memory.
WAYS = {"shared memory": (HOST, HOST), "Gloo": (HOST, "127.0.0.2")}


def serve(rank: int, port: int, way: str, hidden: int, repeats: int) -> None:
    """A rank; the first one prints a figure for each number of rows."""
    torch.set_num_threads(1)
    grid = Grid(2, 1, WAYS[way], nccl=False)
    group = join(grid, rank, (HOST, port), torch.device("cpu")).group
    for rows in ROWS:
        x = torch.ones(rows, hidden, dtype=torch.bfloat16)
        times = []
        for _ in range(repeats + 20):
            begun = time.perf_counter()
            total = group.all_reduce(x.clone())
            times.append(time.perf_counter() - begun)
            assert total[0, 0] == 2 and total[-1, -1] == 2
        if rank == 0:
            print(statistics.median(times[20:]) * 1e6, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        rank, port, way = args.serve
        serve(int(rank), int(port), way, args.hidden, args.repeats)
        return
    columns = []
    for way in WAYS:
        store = open_store(HOST, 0)
        command = [sys.executable, "-m", "benchmarks.all_reduce", "--hidden", str(args.hidden)]
        command += ["--repeats", str(args.repeats), "--serve"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(store.port), way], stdout=subprocess.PIPE, text=True
            )
            for rank in (0, 1)
        ]
        out, _ = ranks[0].communicate()
        ranks[1].wait()
        columns.append([float(line) for line in out.split()])
    print(f"| rows of {args.hidden} | {' | '.join(WAYS)} |\n| --- | --- | --- |")
    for rows, *figures in zip(ROWS, *columns, strict=True):
        print(f"| {rows} | {' | '.join(f'{figure:.0f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
