"""An engine's loop on the simulated executor, whose steps a test can hold and break."""

import threading
import time

from cluster.client import EngineInfo
from cluster.loop import EngineLoop
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.sampling_params import SamplingParams
from tests.support.simulator import VOCAB, SimulatedExecutor


class Gated(SimulatedExecutor):
    """Steps that wait for a gate, fail on demand, and count."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = threading.Event()
        self.gate.set()
        self.error = self.dead = None
        self.ran = 0
        self.stopped = False

    def run(self, plan):
        self.gate.wait()
        self.ran += 1
        if self.error is not None:
            raise self.error
        time.sleep(0.001)
        return super().run(plan)

    def check(self):
        if self.dead is not None:
            raise EngineError(self.dead)

    def stop(self):
        self.stopped = True


def make_loop(num_blocks=64, num_cpu_blocks=32, **options):
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 32} | options
    config = EngineConfig.from_options(**options)
    executor = Gated(num_blocks, num_cpu_blocks, 4, config.scheduler.max_num_seqs, 128, None)
    engine = Engine(config, executor, executor.load(), executor.reserve(), 128)
    return EngineLoop(engine), executor


INFO = EngineInfo(
    engine_id="e",
    model="m",
    tokenizer="t",
    revision=None,
    chat_template=None,
    max_model_len=128,
    vocab_size=VOCAB,
    max_logprobs=20,
    block_size=4,
    num_device_blocks=64,
    num_cpu_blocks=32,
    scheduling_policy="fcfs",
    default_sampling=SamplingParams(),
)
