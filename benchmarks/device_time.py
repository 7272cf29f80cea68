"""Time on a GPU, of work that follows each other closely."""

from collections.abc import Callable, Sequence

import torch


def captured(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """``runs``, one after the other, as one graph."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def microseconds(work: Callable[[], object], times: int) -> float:
    """Of one of so many calls."""
    started, stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(times):
        work()
    stopped.record()
    torch.cuda.synchronize()
    return started.elapsed_time(stopped) * 1000 / times
