"""One rank: a shard of the model, its tables and its KV blocks. It carries plans out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor import Capacity, ModelFacts
from engine.log import get_logger
from engine.matcher import grammars_of
from engine.plan import Admit, CopyTimes, Ints, StepPlan, StepResult, TokenLogprobs, ints
from engine.pooling import Vector
from engine.preempt import MeasuredCosts
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from workers import kernels, products, sizes, weights
from workers.attention import choose_backends
from workers.attention.several import backends_of
from workers.attention.triton import TritonAttention
from workers.batch import Batch
from workers.checkpoint import resolve_dtype
from workers.clock import StepClock
from workers.grammar_table import GrammarTable
from workers.graphs import Graphs, Size
from workers.hidden import HiddenReader, HiddenRows, Seen
from workers.host_memory import host_memory
from workers.kernels.memory import Prefault
from workers.kv import KVCache
from workers.messages import Units
from workers.models import attention_shapes, build_model, read_traits
from workers.parallel import Group, Place, Ranks, Stage
from workers.pooling import longest_text, read_pooling, served_config
from workers.pooling_table import PoolingTable
from workers.quantization.config import with_quantization
from workers.quantization.kv_cache import keeps_fp8
from workers.sampler import HostCopy, HostSampled, Sampled, Sampler, SamplingTable
from workers.slot_tables import Learn, LogitsTable, SlotTable
from workers.slots import HostRows, Slots
from workers.staging import Staging
from workers.thinking_table import ThinkingTable
from workers.weights import Progress

log = get_logger("worker")

WARM_UP_TOKENS = 128
CUDA_CONTEXT_BYTES = 700 << 20  # what a process takes on a GPU before it allocates anything
DEFAULT_BLOCK_SIZE = 16
NOTHING = StepPlan(-1, slots=ints(), starts=ints(), counts=ints(), wants=ints(), cells=ints())
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
    checkpoint = served_config(path, config.model.pooling)
    checkpoint = with_quantization(checkpoint, config.model.quantization)
    traits = read_traits(checkpoint)
    block_size = config.cache.block_size or DEFAULT_BLOCK_SIZE
    meta = torch.device("meta")
    dtype = resolve_dtype(config.model.dtype, checkpoint, meta)
    group = Group(parallel.tensor_parallel_size, 0)
    place = Place(meta, dtype, group, parallel.enable_expert_parallel)
    fp8 = keeps_fp8(config.cache.kv_cache_dtype, checkpoint, dtype)
    backend = choose_backends(attention_shapes(traits, place, block_size, fp8), "gather")
    size = parallel.pipeline_parallel_size
    for stage in Stage.split(traits.num_layers, size, parallel.partition):
        build_model(checkpoint, place, stage, backend, 1)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step as its computation finds it: tensors on the device, of int32, and what of it is known
    on the host without looking at them."""

    slots: Tensor  # [R]
    contexts: Tensor  # [R]
    starts: Tensor  # [R + 1]
    token_slots: Tensor  # [T]
    positions: Tensor  # [T]
    outputs: Tensor | None  # [n]; None: every token
    sampled_slots: Tensor  # [n]
    sampled_positions: Tensor  # [n]
    attention: tuple[Tensor, ...]
    max_context_len: int


@dataclass
class Pending:
    """A step that was started; its tensors may still be on the way."""

    plan: StepPlan
    clock: StepClock
    copied: CopyTimes
    sampled: HostCopy[HostSampled] | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    vectors: HostCopy[dict[int, Vector]] | None
    learn: Sequence[Learn] = ()

    def result(self) -> StepResult:
        """Waits for this step, and for none after it."""
        forced: dict[int, list[int]] = {}
        if self.sampled is None:
            tokens, failed, logprobs = ints(), np.zeros(0, np.bool_), {}
        else:
            host = self.sampled.result()
            tokens, failed, logprobs = host.tokens, host.failed, host.logprobs
            for learn in self.learn:
                forced |= learn(tokens, forced)
        return StepResult(
            step=self.plan.step,
            rows=ints(np.flatnonzero(self.plan.wants)) if self.sampled is not None else ints(),
            tokens=tokens,
            failed=failed,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            seconds=self.clock.seconds(),
            copied=self.copied,
            vectors={} if self.vectors is None else self.vectors.result(),
            forced=forced,
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
        checkpoint = served_config(self.path, options.pooling)
        checkpoint = with_quantization(checkpoint, options.quantization)
        traits = self.traits = read_traits(checkpoint)
        self.pooling = read_pooling(self.path, checkpoint, traits, options.pooling, self._token_ids)
        dtype = resolve_dtype(options.dtype, checkpoint, self.device)
        parallel = self.config.parallel
        self.place = place = Place(
            self.device, dtype, self.ranks.group, parallel.enable_expert_parallel
        )
        block_size = self.config.cache.block_size or DEFAULT_BLOCK_SIZE
        sizes.check(self.config.cache, traits.recurrent, block_size)
        fp8 = keeps_fp8(self.config.cache.kv_cache_dtype, checkpoint, dtype)
        self.backend = choose_backends(
            attention_shapes(traits, place, block_size, fp8),
            self.config.device.attention_backend,
        )
        longest = longest_text(self.path) or traits.max_position
        longest = min(longest, traits.max_position)
        self.max_model_len = self.config.resolve_model_len(longest)
        if not traits.causal:
            self.config = self.config.with_whole_prompts(self.max_model_len)
        stages = Stage.split(traits.num_layers, self.ranks.num_stages, parallel.partition)
        self.stage = stages[self.ranks.stage]
        self.model = build_model(checkpoint, place, self.stage, self.backend, self.max_model_len)
        loaded = weights.load(self.model, self.path, options.load_format, progress)
        invariant = self._is_invariant()
        return ModelFacts(
            architecture=str(checkpoint.get("architectures", [checkpoint.get("model_type")])[0]),
            vocab_size=traits.vocab_size,
            max_model_len=self.max_model_len,
            num_parameters=loaded.num_parameters,
            weight_bytes=loaded.bytes,
            load_seconds=loaded.seconds,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
            batch_invariant=invariant,
            generates=traits.generates,
            pooling=self.pooling,
            vector_size=traits.hidden_size,
            causal=traits.causal,
            quantization=self.model.place.quantization.in_words(),
        )

    def _is_invariant(self) -> bool:
        """Whether rows are the same in every bit in any batch. What is not is logged, by name.

        Raises ConfigError if batch_invariance is on and there is any.
        """
        wanted = self.config.device.batch_invariance
        if self.device.type != "cuda":
            return True
        if wanted == "off":
            return False
        found = products.varying(self.place.products)
        if not self._on_triton:
            found.append(f"attention ({self._attention_name})")
        if self.traits.recurrent and not kernels.has_triton(self.device):
            found.append("recurrent layers")
        if self.traits.latent is not None:
            found.append("the heads' products of latents")
        if found and wanted == "on":
            raise ConfigError(
                f"batch_invariance must be auto or off on {torch.cuda.get_device_name()}: what"
                f" depends on the batch here is {', '.join(found)}"
            )
        if found:
            log.warning("Not batch-invariant on this GPU: %s", ", ".join(found))
        return not found

    def measure(self) -> Units:
        """How many blocks, and states, of each tier there is memory for on this rank.

        Raises ConfigError if there is none for the device's.
        """
        num_seqs = self.config.scheduler.max_num_seqs
        # More than every slot at full length could never be used but for cached prefixes.
        most = num_seqs * -(-self.max_model_len // self.backend.shape.block_size)
        return sizes.fit(
            self.config.cache,
            self.model.memories,
            self._device_bytes,
            4 * most,
            4 * num_seqs if self.traits.recurrent else 0,
        )

    @torch.inference_mode()
    def reserve(self, units: Units) -> Capacity:
        """Allocate slots and KV blocks, warm up, and measure what copies and tokens cost."""
        shape = self.backend.shape
        self._make_tables(units)
        seconds_per_token = self._warm_up(units.blocks)
        out, in_ = self.kv.measure()
        if self._graphs is not None:
            started, before = time.perf_counter(), torch.cuda.memory_reserved()
            self._capture(self._graphs, self._graphs.sizes)
            log.info(
                "Captured %s, in %.1f s and %.2f GiB",
                self._graphs,
                time.perf_counter() - started,
                (torch.cuda.memory_reserved() - before) / sizes.GIB,
            )
        if kernels.has_triton(self.device):
            log.info("Triton: %s", kernels.compiled())
        if self.config.cache.prefault_kv_cache and self.device.type == "cpu":
            self._prefault = Prefault(self.kv.layers)
        return Capacity(
            num_device_blocks=units.blocks,
            num_cpu_blocks=units.cpu_blocks,
            block_size=shape.block_size,
            block_bytes=sizes.unit_bytes(self.model.memories, state=False),
            attention_backend=self._attention_name,
            costs=MeasuredCosts(out, in_, seconds_per_token),
            kv_cache_dtype="fp8" if shape.fp8 else str(shape.dtype).removeprefix("torch."),
            num_states=units.states,
            num_cpu_states=units.cpu_states,
            state_bytes=sizes.unit_bytes(self.model.memories, state=True),
        )

    def _make_tables(self, units: Units) -> None:
        """Slots, KV blocks (one of which is spare) and whatever is as large as a step."""
        num_slots = self.config.scheduler.max_num_seqs
        block_size = self.backend.shape.block_size
        spare = units.blocks
        # First what is largest: there may be no room for it.
        allocated = replace(units, blocks=spare + 1)
        self.kv = KVCache(self.model.memories, allocated, self.device)
        self.slots = Slots(num_slots, self.max_model_len, block_size, spare, self.device)
        self.table = SamplingTable(num_slots, self.traits.vocab_size, self.slots.tokens)
        samples = self.stage.last and self.ranks.group.rank == 0
        self.sampler = Sampler(self.table) if samples else None
        self._on_logits: tuple[LogitsTable, ...] = ()
        if samples:
            # No method of this worker: its memory would stay until a cycle is collected.
            options, size = self.config.model, self.traits.vocab_size
            tokenizer = options.tokenizer or str(self.path)
            grammars = partial(grammars_of, tokenizer, options.revision, size)
            self._on_logits = (
                GrammarTable(size, self.device, grammars),
                ThinkingTable(size, self.device, lambda: grammars().tokenizer),
            )
        self._tables: tuple[SlotTable, ...] = (self.table, *self._on_logits)
        self._pools: PoolingTable | None = None
        if self.pooling is not None:
            size, method = self.traits.hidden_size, self.pooling.method
            self._pools = PoolingTable(method, num_slots, size, self.device, self.stage.last)
            self._tables = (*self._tables, self._pools)
        self._hidden_reader = HiddenReader(
            self.model,
            self.slots,
            self.table,
            self.sampler,
            self._pools,
            () if self.pooling is None else self.pooling.tokens,
        )
        most = self.config.scheduler.max_num_batched_tokens
        largest = Size(num_slots, most, decodes=False)
        self._staging = Staging(Staging.needed(self._room(largest)), self.device)
        self._graphs = self._make_graphs()
        self._side: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _token_ids(self, tokens: Sequence[str]) -> list[int | None]:
        options = self.config.model
        tokenizer = Tokenizer.load(options.tokenizer or self.path, options.revision)
        return [tokenizer.backend.token_to_id(token) for token in tokens]

    def _make_graphs(self) -> Graphs | None:
        """None where steps cannot be captured, or are not to be."""
        scheduler, options = self.config.scheduler, self.config.device
        can = kernels.has_triton(self.device) and self._on_triton and self.traits.generates
        if options.enforce_eager or not can or not self.ranks.group.capturable:
            return None
        most = min(options.max_cudagraph_capture_size, scheduler.max_num_batched_tokens)
        shape = most, self.traits.hidden_size
        self._hidden = torch.zeros(shape, dtype=self.place.dtype, device=self.device)
        self._results = torch.empty(0, device=self.device)
        return Graphs(scheduler.max_num_seqs, most)

    @property
    def _on_triton(self) -> bool:
        return all(isinstance(backend, TritonAttention) for backend in backends_of(self.backend))

    @property
    def _attention_name(self) -> str:
        names = (type(backend).__name__ for backend in backends_of(self.backend))
        return " and ".join(dict.fromkeys(names))

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens: Ints | None = None) -> Pending:
        """Start a step. On CUDA the work goes on after this returns.

        ``tokens`` [n, 3] are (slot, position, token) of what the last stage sampled meanwhile,
        for the first stage; of the rows before ``plan``.
        """
        if self._prefault is not None:
            self._prefault.pause(LONGEST_STEP)
        self._update(plan, tokens)
        copied = self.kv.copied()
        looked_at = self._hidden_reader.rows(plan)
        whole = bool(looked_at) or not self.traits.generates
        size = None if self._graphs is None or whole else self._graphs.size_of(plan)
        inputs = self._prepare(plan, size, whole)
        hidden = self._receive(plan)
        clock = StepClock(self.device)
        result = self._forward(plan, inputs, hidden, size, whole)
        pending = self._finish(plan, inputs, result, looked_at, clock, copied)
        if self._prefault is not None:
            self._prefault.pause(IDLE_AFTER)
        return pending

    # ---- a step: prepare, forward, finish ----

    def _update(self, plan: StepPlan, tokens: Ints | None) -> None:
        """What comes before the rows compute: the tables, and copies of blocks."""
        if tokens is not None and len(tokens):
            self.slots.learn(tokens)
        for table in self._tables:
            for slot in plan.release.tolist():
                table.release(slot)
            for admit in plan.admits:
                table.admit(admit)
        self.slots.update(plan)
        if plan.copies:
            self.kv.copy(plan.copies)
        if plan.states is not None:
            self.kv.move_states(plan.states)

    def _prepare(self, plan: StepPlan, size: Size | None, whole: bool) -> Inputs:
        """The plan's rows on the device, padded to ``size``. ``whole``: all tokens are carried to
        the network's end."""
        rows = HostRows.of(plan)
        wanted = plan.wants == 1
        sampled = plan.slots[wanted], rows.contexts[wanted]
        everything = whole or not self.stage.last or len(rows.outputs) == plan.num_tokens
        room = None
        if size is not None:
            everything = size.decodes or not self.stage.last
            rows = rows.padded(size.rows, size.tokens, self.slots.spare)
            room = self._room(size)
        arrays = self.backend.arrays(plan)
        found = self._staging.upload([*rows, *sampled, *arrays], room)
        slots, contexts, starts, token_slots, positions, outputs = found[:6]
        return Inputs(
            slots, contexts, starts, token_slots, positions,
            outputs=None if everything else outputs,
            sampled_slots=found[6][: len(sampled[0])],
            sampled_positions=found[7][: len(sampled[0])],
            attention=tuple(found[8:]),
            max_context_len=int(rows.contexts.max(initial=0)),
        )  # fmt: skip

    def _room(self, size: Size) -> tuple[int, ...]:
        """Elements of each array that ``_prepare`` uploads of a step of ``size``."""
        rows, tokens = size.rows, size.tokens
        attention = self.backend.room(rows, tokens, size.decodes, self.max_model_len)
        return rows, rows, rows + 1, tokens, tokens, rows, rows, rows, *attention

    def _receive(self, plan: StepPlan) -> Tensor | None:
        """Hidden states from the stage before, if there is one."""
        if self.ranks.pipeline is None or self.stage.first:
            return None
        shape = plan.num_tokens, self.traits.hidden_size
        return self.ranks.pipeline.receive(shape, self.place.dtype)

    def _forward(
        self, plan: StepPlan, inputs: Inputs, hidden: Tensor | None, size: Size | None, whole: bool
    ) -> Tensor:
        """Logits [n, V] of the outputs; on other stages, and of a ``whole`` step, hidden states."""
        if size is None:
            result = self._compute(inputs, hidden, whole)
        else:
            assert self._graphs is not None
            if hidden is not None:
                self._hidden[: len(hidden)] = hidden
            result = self._graphs.replay(size)
        if self.ranks.pipeline is not None and not self.stage.last:
            self.ranks.pipeline.send(result[: plan.num_tokens])
        return result

    def _compute(self, inputs: Inputs, hidden: Tensor | None, whole: bool = False) -> Tensor:
        """A function of what is on the device: nothing in it looks at that on the host or waits."""
        slots = self.slots
        tokens, cells = kernels.look_up(
            slots.tokens, slots.block_tables, inputs.token_slots, inputs.positions,
            slots.block_size,
        )  # fmt: skip
        batch = Batch(
            tokens=tokens,
            positions=inputs.positions.to(cells.dtype),
            cells=cells,
            slots=inputs.slots,
            query_starts=inputs.starts,
            context_lens=inputs.contexts,
            block_tables=slots.block_tables,
            max_context_len=inputs.max_context_len,
            outputs=inputs.outputs,
            states=slots.states[inputs.slots] if self.traits.recurrent else None,
        )
        batch = replace(batch, attention=self.backend.begin(batch, inputs.attention))
        hidden = self.model.forward(batch, self.kv.layers, hidden)
        return self.model.logits(hidden) if self.stage.last and not whole else hidden

    def _finish(
        self,
        plan: StepPlan,
        inputs: Inputs,
        result: Tensor,
        looked_at: HiddenRows,
        clock: StepClock,
        copied: CopyTimes,
    ) -> Pending:
        """Sample, and send what was sampled on its way to the host."""
        sampled: Sampled | None = None
        learn: list[Learn] = []
        seen = Seen()
        if self.stage.last:
            if looked_at:
                seen = self._hidden_reader.read(plan, result, looked_at)
                ends = np.cumsum(plan.counts)[plan.wants == 1] - 1
                result = self.model.logits(result[torch.from_numpy(ends)]) if len(ends) else result
            sampled, learn = self._sample(plan, inputs, result)
        clock.stop()
        copy = None if sampled is None else sampled.start_copy(self._side)
        vectors = None
        if seen.vectors is not None and self.sampler is not None:  # nobody reads the other ranks'
            vectors = seen.vectors.start_copy(self._side)
        return Pending(plan, clock, copied, copy, seen.prompt_logprobs, vectors, learn)

    def _sample(
        self, plan: StepPlan, inputs: Inputs, logits: Tensor
    ) -> tuple[Sampled | None, list[Learn]]:
        """Rank 0 of the last stage samples, and says what wants to learn the tokens. Where the
        first stage is the last, the others of the group are told, for they look the tokens up in
        the next step."""
        group = self.ranks.group
        at = inputs.sampled_slots, inputs.sampled_positions
        count = len(at[0])
        sampled: Sampled | None = None
        learn: list[Learn] = []
        if not count:
            return None, learn
        if self.sampler is not None:
            wanted = plan.wants == 1
            slots, positions = plan.slots[wanted], (plan.starts + plan.counts)[wanted]
            logits = logits[:count]
            for table in self._on_logits:
                if table.active and (wants := table.on_logits(logits, slots, positions)):
                    learn.append(wants)
            sampled = self.sampler.sample(logits, slots, positions, at, True)
        if self.stage.first and group.size > 1:
            tokens = sampled.tokens if sampled else self.slots.tokens.new_empty(count)
            self.slots.tokens[at] = group.broadcast(tokens)
        return sampled, learn

    # ---- start-up ----

    def _device_bytes(self) -> int:
        """Bytes for device KV blocks."""
        cache = self.config.cache
        if cache.kv_cache_memory_bytes is not None:
            return cache.kv_cache_memory_bytes
        if self.device.type == "cuda":
            self._rehearse()
            free, total = torch.cuda.mem_get_info(self.device)
            used = total - free
            if self.neighbours > 1:  # the others' memory is not this rank's business
                used = torch.cuda.memory_reserved(self.device) + CUDA_CONTEXT_BYTES
            share = int(total * (cache.gpu_memory_utilization or 0.9)) // self.neighbours
            self._forget_rehearsal()
            return share - used
        free, total = host_memory()
        if cache.gpu_memory_utilization is not None:
            share = int(total * cache.gpu_memory_utilization) - (total - free)
            return share // self.neighbours
        return int(min(4 * sizes.GIB, 0.4 * free / self.neighbours))

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Take all the memory that steps need beside KV blocks: the largest step, the largest
        sample, and the largest graphs, on tables whose only block is the spare one."""
        self._make_tables(Units(0, 0, int(self.traits.recurrent)))
        scheduler = self.config.scheduler
        seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        size = Size(seqs, scheduler.max_num_batched_tokens, decodes=False)
        hidden = None
        if not self.stage.first:
            shape = size.tokens, self.traits.hidden_size
            hidden = torch.zeros(shape, dtype=self.place.dtype, device=self.device)
        whole = not self.traits.generates
        result = self._compute(self._prepare(NOTHING, size, whole), hidden, whole)
        if self.sampler is not None and not whole:
            self.sampler.warm_up(result)
            for table in self._on_logits:
                table.warm_up(result)
        del result, hidden
        if self._graphs is not None:
            largest = max(self._graphs.sizes, key=lambda size: size.tokens)
            self._capture(self._graphs, [largest])

    def _forget_rehearsal(self) -> None:
        del self.slots, self.table, self.sampler, self.kv, self._staging, self._graphs
        del self._tables, self._on_logits, self._pools, self._hidden_reader
        torch.cuda.empty_cache()

    def _capture(self, graphs: Graphs, sizes: Sequence[Size]) -> None:
        """Capture steps of ``sizes``, the largest first."""

        def prepare(size: Size) -> Callable[[], Tensor]:
            inputs = self._prepare(NOTHING, size, whole=False)
            hidden = None if self.stage.first else self._hidden[: size.tokens]

            def compute() -> Tensor:
                result = self._compute(inputs, hidden)
                if len(result) > len(self._results):  # the first time, before it is captured
                    self._results = torch.empty_like(result)
                return self._results[: len(result)].copy_(result)

            return compute

        graphs.capture(sizes, prepare)

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
        wants = int(self.traits.generates)
        seconds: list[float] = []
        for _ in range(2):
            prefill = StepPlan(
                -1, ints([0]), ints([0]), ints([num]), ints([wants]), ints(cells), (admit,)
            )
            seconds.append(self.run(prefill).result().seconds)
            if wants and num + 1 < max_model_len:
                decode = StepPlan(-1, ints([0]), ints([num]), ints([1]), ints([1]), ints(), ())
                self.run(decode).result()
        self.table.release(0)
        return seconds[-1] / num
