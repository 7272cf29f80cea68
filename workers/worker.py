"""One rank: a shard of the model, its tables and its KV blocks. It carries plans out."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor import Capacity, ModelFacts
from engine.plan import Admit, CopyTimes, Ints, StepPlan, StepResult, TokenLogprobs, ints
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams
from workers import weights
from workers.attention import choose_backend
from workers.checkpoint import load_config, resolve_dtype
from workers.clock import StepClock
from workers.host_memory import host_memory
from workers.kernels.memory import Prefault
from workers.kv import KVCache
from workers.messages import Blocks
from workers.models import attention_shape, build_model, read_traits
from workers.parallel import Group, Place, Ranks, Stage
from workers.sampler import Sampled, Sampler, SamplingTable
from workers.slots import Slots
from workers.weights import Progress

GIB = 2**30
WARM_UP_TOKENS = 128
CUDA_CONTEXT_BYTES = 700 << 20  # what a process takes on a GPU before it allocates anything
DEFAULT_BLOCK_SIZE = 16
LONGEST_STEP, IDLE_AFTER = 60.0, 0.05  # seconds, for what waits until there are no steps


def choose_device(option: str) -> torch.device:
    """The device of the option ``device``. Raises ConfigError if it is not there."""
    if option == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu: torch finds no CUDA device")
    if option == "auto":
        option = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(option, 0) if option == "cuda" else torch.device(option)


def check_split(config: EngineConfig, path: Path) -> None:
    """Raise ConfigError, with the allowed sizes, if the model does not split as ``config`` asks."""
    parallel = config.parallel
    checkpoint = load_config(path)
    traits = read_traits(checkpoint)
    block_size = config.cache.block_size or DEFAULT_BLOCK_SIZE
    meta = torch.device("meta")
    dtype = resolve_dtype(config.model.dtype, checkpoint, meta)
    place = Place(meta, dtype, Group(parallel.tensor_parallel_size, 0))
    backend = choose_backend(attention_shape(traits, place, block_size), "gather")
    size = parallel.pipeline_parallel_size
    for stage in Stage.split(traits.num_layers, size, parallel.partition):
        build_model(checkpoint, place, stage, backend, 1)


class PromptRow(NamedTuple):
    """A row that prompt_logprobs are asked of: at the step's tokens ``at : at + num``, of each next
    token and the ``asked`` likeliest ones."""

    row: int
    at: int
    num: int
    asked: int


@dataclass
class Pending:
    """A step that was started; its tensors may still be on the way."""

    plan: StepPlan
    clock: StepClock
    copied: CopyTimes
    sampled: Sampled | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]

    def result(self) -> StepResult:
        if self.sampled is None:
            tokens, failed, logprobs = ints(), np.zeros(0, np.bool_), {}
        else:
            host = self.sampled.to_host()
            tokens, failed, logprobs = host.tokens, host.failed, host.logprobs
        return StepResult(
            step=self.plan.step,
            slots=self.plan.slots[self.plan.wants == 1],
            tokens=tokens,
            failed=failed,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            seconds=self.clock.seconds(),
            copied=self.copied,
        )


class Worker:
    """``load``, then ``reserve`` what ``measure`` said fits, then ``run`` for each plan, in order.

    All ranks do the same at the same time, each on its part of the model. ``ranks`` are this one's
    ways to the others; ``neighbours`` is how many of them share this machine or its GPU, and so its
    memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        device: torch.device | None = None,
        ranks: Ranks | None = None,
        neighbours: int = 1,
    ) -> None:
        self.config = config
        self.path = path
        self.device = device or choose_device(config.device.device)
        self.ranks = ranks or Ranks()
        self.neighbours = neighbours
        self._prefault: Prefault | None = None

    def load(self, progress: Progress | None = None) -> ModelFacts:
        """Build the model and fill its weights. Raises CheckpointError or ConfigError."""
        options = self.config.model
        checkpoint = load_config(self.path)
        traits = self.traits = read_traits(checkpoint)
        dtype = resolve_dtype(options.dtype, checkpoint, self.device)
        self.place = place = Place(self.device, dtype, self.ranks.group)
        block_size = self.config.cache.block_size or DEFAULT_BLOCK_SIZE
        self.backend = choose_backend(
            attention_shape(traits, place, block_size), self.config.device.attention_backend
        )
        self.max_model_len = self.config.resolve_model_len(traits.max_position)
        parallel = self.config.parallel
        stages = Stage.split(traits.num_layers, self.ranks.num_stages, parallel.partition)
        self.stage = stages[self.ranks.stage]
        self.model = build_model(checkpoint, place, self.stage, self.backend, self.max_model_len)
        loaded = weights.load(self.model, self.path, options.load_format, progress)
        return ModelFacts(
            architecture=str(checkpoint.get("architectures", [checkpoint.get("model_type")])[0]),
            vocab_size=traits.vocab_size,
            max_model_len=self.max_model_len,
            num_parameters=sum(math.prod(p.shape) for p in self.model.whole().parameters()),
            weight_bytes=loaded.bytes,
            load_seconds=loaded.seconds,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
        )

    def measure(self) -> Blocks:
        """How many blocks of each tier there is memory for on this rank.

        Raises ConfigError if there is none for the device's.
        """
        config = self.config
        num_device = config.cache.num_gpu_blocks_override
        if num_device is None:
            block_size = self.backend.shape.block_size
            num_device = self._device_bytes() // self._block_bytes
            # More than every slot at full length could never be used but for cached prefixes.
            most = config.scheduler.max_num_seqs * -(-self.max_model_len // block_size)
            num_device = min(num_device, 4 * most)
        if num_device < 1:
            raise ConfigError(
                "gpu_memory_utilization leaves no memory for KV blocks; raise it, or set"
                " kv_cache_memory_bytes"
            )
        return Blocks(num_device, int(config.cache.swap_space * GIB) // self._block_bytes)

    @torch.inference_mode()
    def reserve(self, blocks: Blocks) -> Capacity:
        """Allocate slots and KV blocks, warm up, and measure what copies and tokens cost."""
        shape, num_layers = self.backend.shape, self._num_layers
        num_slots = self.config.scheduler.max_num_seqs
        self.slots = Slots(num_slots, self.max_model_len, shape.block_size, self.device)
        self.table = SamplingTable(num_slots, self.traits.vocab_size, self.slots.tokens)
        samples = self.stage.last and self.ranks.group.rank == 0
        self.sampler = Sampler(self.table) if samples else None
        self.kv = KVCache(self.backend, num_layers, blocks.device, blocks.cpu, self.device)
        seconds_per_token = self._warm_up(blocks.device)
        out, in_ = self.kv.measure()
        if self.config.cache.prefault_kv_cache and self.device.type == "cpu":
            self._prefault = Prefault(self.kv.layers)
        return Capacity(
            num_device_blocks=blocks.device,
            num_cpu_blocks=blocks.cpu,
            block_size=shape.block_size,
            block_bytes=self._block_bytes,
            attention_backend=type(self.backend).__name__,
            costs=MeasuredCosts(out, in_, seconds_per_token),
        )

    @property
    def _num_layers(self) -> int:
        return self.stage.stop - self.stage.start

    @property
    def _block_bytes(self) -> int:
        shape = self.backend.shape
        return self._num_layers * shape.block_elements * shape.dtype.itemsize

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens: Ints | None = None) -> Pending:
        """Start a step. On CUDA the work goes on after this returns.

        ``tokens`` [n, 3] are (slot, position, token) of what the last stage sampled meanwhile,
        for the first stage; of the rows before ``plan``.
        """
        if self._prefault is not None:
            self._prefault.pause(LONGEST_STEP)
        if tokens is not None and len(tokens):
            self.slots.learn(tokens)
        for slot in plan.release.tolist():
            self.table.release(slot)
        for admit in plan.admits:
            self.table.admit(admit)
        self.slots.update(plan)
        if plan.copies:
            self.kv.copy(plan.copies)
        copied = self.kv.copied()
        prompt_rows = self._prompt_rows(plan)
        batch = self.slots.batch(plan, whole=bool(prompt_rows) or not self.stage.last)
        self.backend.begin(batch)
        hidden = None
        pipeline = self.ranks.pipeline
        if pipeline is not None and not self.stage.first:
            shape = plan.num_tokens, self.traits.hidden_size
            hidden = pipeline.receive(shape, self.place.dtype)
        clock = StepClock(self.device)
        hidden = self.model.forward(batch, self.kv.layers, hidden)
        found: tuple[Sampled | None, dict[int, list[TokenLogprobs]]] = None, {}
        if pipeline is not None and not self.stage.last:
            pipeline.send(hidden)
        else:
            found = self._sample(plan, hidden, prompt_rows)
        clock.stop()
        if self._prefault is not None:
            self._prefault.pause(IDLE_AFTER)
        return Pending(plan, clock, copied, *found)

    def _sample(
        self, plan: StepPlan, hidden: Tensor, prompt_rows: list[PromptRow]
    ) -> tuple[Sampled | None, dict[int, list[TokenLogprobs]]]:
        """Rank 0 of the last stage samples; where the first stage is the last, the others of the
        group are told, for they look the tokens up in the next step."""
        group = self.ranks.group
        prompt_logprobs = self._prompt_logprobs(plan, hidden, prompt_rows)
        rows = ints(np.flatnonzero(plan.wants))
        if not len(rows):
            return None, prompt_logprobs
        if len(hidden) > len(rows):  # it was all carried to the end, for prompt_logprobs
            hidden = hidden[self.slots.sampled_after(plan)]
        logits = self.model.logits(hidden)
        slots, positions = plan.slots[rows], (plan.starts + plan.counts)[rows]
        sampled = None
        if self.sampler is not None:
            sampled = self.sampler.sample(logits, slots, positions)
            tokens = sampled.tokens
        elif self.stage.first:
            tokens = self.slots.tokens.new_empty(len(rows))
        else:
            return None, prompt_logprobs
        if self.stage.first:
            tokens = group.broadcast(tokens)
        at = self.slots.upload(slots), self.slots.upload(positions)
        self.slots.tokens[at] = tokens
        return sampled, prompt_logprobs

    def _prompt_rows(self, plan: StepPlan) -> list[PromptRow]:
        """The rows of ``plan`` that prompt_logprobs are asked of."""
        found: list[PromptRow] = []
        if not self.table.any_prompt_logprobs:
            return found
        at = 0
        for row, (slot, start, count) in enumerate(
            zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True)
        ):
            asked, prompt_len = self.table.prompt_logprobs(slot)
            num = min(count, prompt_len - 1 - start)
            if asked is not None and num > 0:
                found.append(PromptRow(row, at, num, asked))
            at += count
        return found

    def _prompt_logprobs(
        self, plan: StepPlan, hidden: Tensor, rows: list[PromptRow]
    ) -> dict[int, list[TokenLogprobs]]:
        """By row: entries for positions start + 1 of the prompt on."""
        found: dict[int, list[TokenLogprobs]] = {}
        for row, at, num, asked in rows:
            logits = self.model.logits(hidden[at : at + num])
            if self.sampler is not None:
                slot, start = int(plan.slots[row]), int(plan.starts[row])
                targets = self.slots.tokens[slot, start + 1 : start + 1 + num].long()
                found[row] = self.sampler.prompt_logprobs(logits, targets, asked)
        return found

    # ---- start-up ----

    def _device_bytes(self) -> int:
        """Bytes for device KV blocks."""
        cache = self.config.cache
        if cache.kv_cache_memory_bytes is not None:
            return cache.kv_cache_memory_bytes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            used = total - free
            if self.neighbours > 1:  # the others' memory is not this rank's business
                used = torch.cuda.memory_reserved(self.device) + CUDA_CONTEXT_BYTES
            share = int(total * (cache.gpu_memory_utilization or 0.9)) // self.neighbours
            return share - used - self._activation_bytes()
        free, total = host_memory()
        if cache.gpu_memory_utilization is not None:
            share = int(total * cache.gpu_memory_utilization) - (total - free)
            return share // self.neighbours
        return int(min(4 * GIB, 0.4 * free / self.neighbours))

    def _activation_bytes(self) -> int:
        """The most that a step's activations take, from the widest of them."""
        tokens = self.config.scheduler.max_num_batched_tokens
        seqs = self.config.scheduler.max_num_seqs
        widest = 12 * self.traits.hidden_size * self.backend.shape.dtype.itemsize
        return 2 * tokens * widest + 7 * seqs * self.traits.vocab_size * 4

    def _warm_up(self, num_blocks: int) -> float:
        """Run a prefill and a decode twice, so that kernels are there; seconds per token."""
        max_model_len, block_size = self.max_model_len, self.backend.shape.block_size
        num = min(WARM_UP_TOKENS, max_model_len - 1, num_blocks * block_size - 1)
        num = max(1, min(num, self.config.scheduler.max_num_batched_tokens))
        blocks = np.arange(-(-(num + 1) // block_size), dtype=np.int32)
        blocks = np.minimum(blocks, num_blocks - 1)
        cells = np.stack([np.zeros_like(blocks), np.arange(len(blocks)), blocks], 1)
        greedy = SamplingParams(temperature=0, max_tokens=1)
        admit = Admit(0, np.zeros(num, np.int32), num, greedy, seed=0)
        seconds: list[float] = []
        for _ in range(2):
            prefill = StepPlan(
                -1, ints([0]), ints([0]), ints([num]), ints([1]), ints(cells), (admit,)
            )
            seconds.append(self.run(prefill).result().seconds)
            if num + 1 < max_model_len:
                decode = StepPlan(-1, ints([0]), ints([num]), ints([1]), ints([1]), ints(), ())
                self.run(decode).result()
        self.table.release(0)
        return seconds[-1] / num
