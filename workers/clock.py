"""What a step computes for, on whatever device it does."""

import time

import torch


class StepClock:
    """Started when made. On CUDA it counts the device's time, not the host's; no stream waits."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None
        self._times: list[float] = []
        self.stop()

    def stop(self) -> None:
        """All work of the step was given to the device."""
        if self._events is None:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def seconds(self) -> float:
        """From the start to the stop; waits until the device is there."""
        if self._events is None:
            return self._times[1] - self._times[0]
        started, stopped = self._events
        stopped.synchronize()
        return float(started.elapsed_time(stopped)) / 1000
