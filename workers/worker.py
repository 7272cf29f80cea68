"""One rank: a shard of the model, its tables and its KV blocks. It carries plans out."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor import Capacity, ModelFacts
from engine.plan import Admit, StepPlan, StepResult, TokenLogprobs, ints
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams
from workers import weights
from workers.attention import choose_backend
from workers.checkpoint import load_config, resolve_dtype
from workers.kv import KVCache
from workers.models import attention_shape, build_model, read_traits
from workers.parallel import Place, Stage
from workers.sampler import Sampled, Sampler, SamplingTable
from workers.slots import Slots
from workers.weights import Progress

GIB = 2**30
WARM_UP_TOKENS = 128
DEFAULT_BLOCK_SIZE = 16


def choose_device(option: str) -> torch.device:
    """The device of the option ``device``. Raises ConfigError if it is not there."""
    if option == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu: torch finds no CUDA device")
    if option == "auto":
        option = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(option, 0) if option == "cuda" else torch.device(option)


@dataclass
class Pending:
    """A step that was started; its tensors may still be on the way."""

    plan: StepPlan
    started: float
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
            seconds=time.perf_counter() - self.started,
        )


class Worker:
    """``load``, then ``reserve``, then ``run`` for each plan, in order."""

    def __init__(self, config: EngineConfig, path: Path) -> None:
        self.config = config
        self.path = path
        self.device = choose_device(config.device.device)

    def load(self, progress: Progress | None = None) -> ModelFacts:
        """Build the model and fill its weights. Raises CheckpointError or ConfigError."""
        options = self.config.model
        checkpoint = load_config(self.path)
        traits = self.traits = read_traits(checkpoint)
        dtype = resolve_dtype(options.dtype, checkpoint, self.device)
        place = Place(self.device, dtype)
        block_size = self.config.cache.block_size or DEFAULT_BLOCK_SIZE
        self.backend = choose_backend(
            attention_shape(traits, place, block_size), self.config.device.attention_backend
        )
        self.max_model_len = self.config.resolve_model_len(traits.max_position)
        stage = Stage.whole(traits.num_layers)
        self.model = build_model(checkpoint, place, stage, self.backend, self.max_model_len)
        loaded = weights.load(self.model, self.path, options.load_format, progress)
        return ModelFacts(
            architecture=str(checkpoint.get("architectures", [checkpoint.get("model_type")])[0]),
            vocab_size=traits.vocab_size,
            max_model_len=self.max_model_len,
            num_parameters=sum(math.prod(p.shape) for p in self.model.parameters()),
            weight_bytes=loaded.bytes,
            load_seconds=loaded.seconds,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
        )

    @torch.inference_mode()
    def reserve(self) -> Capacity:
        """Allocate slots and KV blocks, warm up, and measure what copies and tokens cost."""
        config, shape, max_model_len = self.config, self.backend.shape, self.max_model_len
        block_size, num_layers = shape.block_size, self.traits.num_layers
        block_bytes = num_layers * shape.block_elements * shape.dtype.itemsize
        num_slots = config.scheduler.max_num_seqs
        self.slots = Slots(num_slots, max_model_len, block_size, self.device)
        self.table = SamplingTable(num_slots, self.traits.vocab_size, self.slots.tokens)
        self.sampler = Sampler(self.table)
        num_device = config.cache.num_gpu_blocks_override
        if num_device is None:
            num_device = self._device_bytes() // block_bytes
            # More than every slot at full length could never be used but for cached prefixes.
            num_device = min(num_device, 4 * num_slots * -(-max_model_len // block_size))
        if num_device < 1:
            raise ConfigError(
                "gpu_memory_utilization leaves no memory for KV blocks; raise it, or set"
                " kv_cache_memory_bytes"
            )
        num_cpu = int(config.cache.swap_space * GIB) // block_bytes
        self.kv = KVCache(self.backend, num_layers, num_device, num_cpu, self.device)
        seconds_per_token = self._warm_up(num_device)
        out, in_ = self.kv.measure()
        return Capacity(
            num_device_blocks=num_device,
            num_cpu_blocks=num_cpu,
            block_size=block_size,
            block_bytes=block_bytes,
            attention_backend=type(self.backend).__name__,
            costs=MeasuredCosts(out, in_, seconds_per_token),
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Pending:
        """Start a step. On CUDA the work goes on after this returns."""
        started = time.perf_counter()
        for slot in plan.release.tolist():
            self.table.release(slot)
        for admit in plan.admits:
            self.table.admit(admit)
        self.slots.update(plan)
        if plan.copies:
            self.kv.copy(plan.copies)
        batch = self.slots.batch(plan)
        self.backend.begin(batch)
        hidden = self.model.forward(batch, self.kv.layers)
        return Pending(plan, started, *self._sample(plan, hidden, batch.query_starts))

    def _sample(
        self, plan: StepPlan, hidden: Tensor, query_starts: Tensor
    ) -> tuple[Sampled | None, dict[int, list[TokenLogprobs]]]:
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        rows = ints(np.flatnonzero(plan.wants))
        if not len(rows):
            return None, prompt_logprobs
        ends = query_starts[1:].long() - 1
        if len(rows) < len(plan.slots):
            ends = ends[self.slots.upload(rows)]
        logits = self.model.logits(hidden[ends] if len(hidden) > len(rows) else hidden)
        slots, positions = plan.slots[rows], (plan.starts + plan.counts)[rows]
        sampled = self.sampler.sample(logits, slots, positions)
        at = self.slots.upload(slots), self.slots.upload(positions)
        self.slots.tokens[at] = sampled.tokens
        return sampled, prompt_logprobs

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """Of rows whose request asks for them: entries for positions start + 1 of the prompt on."""
        found: dict[int, list[TokenLogprobs]] = {}
        if not self.table.any_prompt_logprobs:
            return found
        at = 0
        for row, (slot, start, count) in enumerate(
            zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True)
        ):
            asked, prompt_len = self.table.prompt_logprobs(slot)
            num = min(count, prompt_len - 1 - start)
            if asked is not None and num > 0:
                logits = self.model.logits(hidden[at : at + num])
                targets = self.slots.tokens[slot, start + 1 : start + 1 + num].long()
                found[row] = self.sampler.prompt_logprobs(logits, targets, asked)
            at += count
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
            used = total - free + self._activation_bytes()
            return int(total * (cache.gpu_memory_utilization or 0.9)) - used
        free, total = _host_memory()
        if cache.gpu_memory_utilization is not None:
            return int(total * cache.gpu_memory_utilization) - (total - free)
        return int(min(4 * GIB, 0.4 * free))

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


def _host_memory() -> tuple[int, int]:
    """(available, total) bytes of host memory."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
