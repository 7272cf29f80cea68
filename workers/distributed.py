"""Groups of ranks over torch.distributed, and the pipeline between stages.

NCCL where every rank has a GPU of its own; else shared memory between ranks of one host (see
shared.py) and Gloo between hosts, with tensors of a GPU staged through the host. Nothing is global:
process groups are made from a store, each under its own prefix.
"""

import contextlib
import pickle
import socket
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from engine.addresses import address_family
from engine.errors import EngineError
from workers.channel import RingReceiver, RingSender, rings_work
from workers.kernels import has_triton
from workers.kernels.build import library
from workers.parallel import Group, Pipeline, Ranks
from workers.shared import PIPELINE_BYTES, SPINS, RingPipeline, SharedGroup, SharedMemory

dist: Any = torch.distributed  # its stores and groups have no types
# A rank that dies is seen by the executor, which ends the others; nothing waits for this.
_TIMEOUT = timedelta(days=7)
_MEET_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Grid:
    """Who is who: ranks are numbered stage by stage. ``hosts`` has each rank's address."""

    tensor: int
    pipeline: int
    hosts: tuple[str, ...]
    nccl: bool  # every rank has a GPU of its own

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, rank within it)."""
        return divmod(rank, self.tensor)


def open_store(host: str, port: int) -> Any:
    """Found the store by which ranks meet; port 0 takes a free one (``store.port``).

    Raises EngineError, naming the port, if it is taken.
    """
    try:
        # Bound here, lest the store fall back to another address.
        listener = socket.create_server((host, port), family=address_family(host), backlog=128)
    except OSError as error:
        raise EngineError(
            f"rendezvous_port={port}: cannot listen at {host}: {error.strerror}"
        ) from error
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=_MEET_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join(grid: Grid, rank: int, store_address: tuple[str, int], device: torch.device) -> Ranks:
    """This rank's group and pipeline; every rank of the grid must call it."""
    if len(grid.hosts) == 1:
        return Ranks()
    store = dist.TCPStore(*store_address, is_master=False, timeout=_MEET_TIMEOUT)
    stage, inner = grid.place(rank)

    def backend(name: str, rank: int, size: int) -> "_Backend":
        prefixed = dist.PrefixStore(name, store)
        if grid.nccl:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _TIMEOUT
            return _Backend(dist.ProcessGroupNCCL(prefixed, rank, size, options), staged=False)
        options = dist.ProcessGroupGloo._Options()
        host = grid.hosts[stage * grid.tensor + inner]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _TIMEOUT
        group = dist.ProcessGroupGloo(prefixed, rank, size, options)
        return _Backend(group, staged=device.type == "cuda")

    group = Group()
    pipeline: Pipeline | None = None
    if grid.tensor > 1:
        name = f"stage-{stage}"
        shared = None if grid.nccl else _share_group(grid, rank, dist.PrefixStore(name, store))
        if shared is not None:
            group = shared
        else:
            processes = backend(name, inner, grid.tensor)
            peers = None
            if grid.nccl:
                named = dist.PrefixStore(f"{name}-peers", store)
                peers = _peer_group(grid, rank, named, device, processes)
            group = peers or ProcessGroup(grid.tensor, inner, backend=processes)
    if grid.pipeline > 1:
        name = f"column-{inner}"
        if not grid.nccl:
            pipeline = _share_pipeline(grid, rank, dist.PrefixStore(name, store), device)
        if pipeline is None:
            pipeline = ProcessPipeline(backend(name, stage, grid.pipeline), stage, device)
    return Ranks(group, stage, grid.pipeline, pipeline)


def _share_group(grid: Grid, rank: int, store: Any) -> SharedGroup | None:
    """The group in shared memory, if all of its ranks can have that."""
    stage, inner = grid.place(rank)
    hosts = grid.hosts[stage * grid.tensor : (stage + 1) * grid.tensor]
    kernels = library() if len(set(hosts)) == 1 and rings_work() else None
    memory = None
    if kernels is not None and inner == 0:
        memory = SharedMemory(grid.tensor, inner)
    if inner == 0:
        store.set("path", memory.path if memory else "")
    elif (path := store.get("path").decode()) and kernels is not None:
        with contextlib.suppress(OSError):
            memory = SharedMemory(grid.tensor, inner, path)
    if not _all_have(memory is not None, inner, grid.tensor, store):
        return None
    assert memory is not None and kernels is not None
    return SharedGroup(grid.tensor, inner, memory=memory, library=kernels)


def _share_pipeline(grid: Grid, rank: int, store: Any, device: torch.device) -> RingPipeline | None:
    """The pipeline of this rank's column in rings, if all of its stages can have that."""
    stage, inner = grid.place(rank)
    possible = len(set(grid.hosts[inner :: grid.tensor])) == 1 and rings_work()
    before, after = None, None
    if possible and stage + 1 < grid.pipeline:
        after = RingSender(1, PIPELINE_BYTES)
        store.set(f"path-{stage}", after.path)
    if possible and stage > 0:
        with contextlib.suppress(OSError):
            before = RingReceiver(store.get(f"path-{stage - 1}").decode(), 0, SPINS)
    possible = possible and (before is not None or stage == 0)
    if not _all_have(possible, stage, grid.pipeline, store):
        return None
    return RingPipeline(before, after, device)


def _all_have(mine: bool, rank: int, size: int, store: Any) -> bool:
    store.set(f"has-{rank}", str(int(mine)))
    return all(store.get(f"has-{other}") == b"1" for other in range(size))


class _Backend:
    """A process group of torch.distributed; ``staged`` passes tensors through the host."""

    def __init__(self, group: Any, staged: bool) -> None:
        self.group = group
        self.staged = staged

    def all_reduce(self, x: Tensor) -> Tensor:
        y = x.cpu() if self.staged else x.contiguous()
        self.group.allreduce([y]).wait()
        return y.to(x.device)

    def all_gather(self, x: Tensor, size: int) -> list[Tensor]:
        y = x.cpu() if self.staged else x.contiguous()
        everyone = [torch.empty_like(y) for _ in range(size)]
        self.group.allgather([everyone], [y]).wait()
        return [part.to(x.device) for part in everyone]

    def broadcast(self, x: Tensor) -> Tensor:
        y = x.cpu() if self.staged else x.contiguous()
        self.group.broadcast(y, 0).wait()
        return y.to(x.device)


@dataclass(frozen=True)
class ProcessGroup(Group):
    """A tensor-parallel group over a process group of torch.distributed."""

    backend: _Backend = field(kw_only=True)

    @property
    def capturable(self) -> bool:
        return not self.backend.staged

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.backend.all_reduce(x)

    def gather(self, x: Tensor) -> Tensor:
        everyone = self.backend.all_gather(x, self.size)
        return torch.cat(everyone, -1) if self.rank == 0 else x

    def broadcast(self, x: Tensor) -> Tensor:
        return self.backend.broadcast(x)


@dataclass(frozen=True)
class PeerGroup(ProcessGroup):
    """A tensor-parallel group of GPUs that reach each other's memory, for the sums; see
    kernels/gpu/all_reduce.py. The rest goes over NCCL."""

    peers: Any = field(kw_only=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        reduced: Tensor = self.peers.all_reduce(x)
        return reduced


def _peer_group(
    grid: Grid, rank: int, store: Any, device: torch.device, backend: _Backend
) -> PeerGroup | None:
    """The group over the GPUs' own memory (CUDA IPC), if all of its ranks can have that."""
    stage, inner = grid.place(rank)
    hosts = grid.hosts[stage * grid.tensor : (stage + 1) * grid.tensor]
    possible = len(set(hosts)) == 1 and has_triton(device)
    memories: list[Tensor] = []
    if possible:
        from workers.kernels.gpu.all_reduce import Peers

        size = Peers.bytes_needed(grid.tensor)
        mine = torch.zeros(size, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        store.set(f"memory-{inner}", pickle.dumps(_handle(mine)))
        try:
            for other in range(grid.tensor):
                memories.append(mine if other == inner else _open(store, other, device))
        except RuntimeError:  # GPUs without a way to each other
            possible = False
    else:
        store.set(f"memory-{inner}", pickle.dumps(None))
    if not _all_have(possible, inner, grid.tensor, store):
        return None
    return PeerGroup(grid.tensor, inner, backend=backend, peers=Peers(inner, memories))


def _handle(memory: Tensor) -> Any:
    """By what another process of this host can open it."""
    return memory.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]


def _open(store: Any, rank: int, device: torch.device) -> Tensor:
    """Another rank's memory. Raises RuntimeError if this GPU has no way to it."""
    shared = pickle.loads(store.get(f"memory-{rank}"))
    if shared is None:
        raise RuntimeError("the other rank has no memory to share")
    # The first is the owner's number of its GPU; what counts is from where it is opened.
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *shared[1:])
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class ProcessPipeline(Pipeline):
    """Hidden states from stage to stage over a process group of torch.distributed."""

    def __init__(self, backend: _Backend, stage: int, device: torch.device) -> None:
        self._backend = backend
        self._stage = stage
        self._device = device
        self._sent: deque[tuple[Any, Tensor]] = deque()  # kept until they are gone

    def send(self, hidden: Tensor) -> None:
        while self._sent and (self._sent[0][0].is_completed() or len(self._sent) > 4):
            self._sent.popleft()[0].wait()
        x = hidden.cpu() if self._backend.staged else hidden.contiguous()
        self._sent.append((self._backend.group.send([x], self._stage + 1, 0), x))

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        device = torch.device("cpu") if self._backend.staged else self._device
        hidden = torch.empty(shape, dtype=dtype, device=device)
        self._backend.group.recv([hidden], self._stage - 1, 0).wait()
        return hidden.to(self._device)
