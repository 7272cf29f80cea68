"""Requests for vectors: in the engine under pressure and failures, and on the way to clients."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.loop import LocalClient
from cluster.streams import Stream
from engine.config import FailoverConfig
from engine.continuation import begin
from engine.errors import CheckpointError, ConfigError, PromptTooLong, RequestError
from engine.pooling import NO_SAMPLING, Pooling, PoolingParams
from engine.sampling_params import SamplingParams
from tests.support.gated import INFO, make_loop
from tests.support.simulator import foretell, foretell_vector
from tests.support.streams import Route
from tests.unit.test_engine import AHEAD, assert_empty, make_engine, random_prompt
from workers.checkpoint import Config
from workers.models import read_traits
from workers.pooling import longest_text, read_pooling, served_config


def wants_vector(name, prompt, **options):
    return begin(name, prompt, NO_SAMPLING, pools=True, **options)


def drained(engine):
    """All outcomes by request: tokens, vector and end."""
    found = {}
    while engine.has_work:
        for name, outcome in engine.step():
            tokens, _, _ = found.get(name, ([], None, None))
            vector = None if outcome.vector is None else outcome.vector.tolist()
            found[name] = (tokens + outcome.tokens, vector, outcome.finish_reason)
    return found


@pytest.mark.parametrize("steps_ahead, pipelined", AHEAD)
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_vectors_among_tokens_under_pressure_and_deaths(steps_ahead, pipelined, mode):
    rng = random.Random(f"{steps_ahead}{pipelined}{mode}")
    engine = make_engine(
        num_blocks=24, num_cpu_blocks=20, max_model_len=64, max_num_batched_tokens=10,
        steps_ahead=steps_ahead, pipelined=pipelined, preemption_mode=mode, max_failovers=50,
    )  # fmt: skip
    run, executor = engine.executor.run, engine.executor

    def dying(plan):
        result = run(plan)
        if rng.random() < 0.02:
            raise OSError("out of paper")
        return result

    executor.run = dying
    expected = {}
    stems = [random_prompt(rng, 40) for _ in range(3)]
    for number in range(80):
        prompt = random_prompt(rng, rng.randint(1, 4))
        if number % 2:
            prompt = rng.choice(stems)[: rng.randint(1, 40)] + prompt * rng.randint(1, 6)
            engine.add(wants_vector(str(number), prompt))
            expected[str(number)] = ([], foretell_vector(prompt), "stop")
        else:
            num = rng.randint(30, 60)
            sampling = SamplingParams(max_tokens=num, seed=number)
            engine.add(begin(str(number), prompt, sampling))
            expected[str(number)] = (foretell(prompt, number, num), None, "length")
    assert drained(engine) == expected
    assert_empty(engine)
    stats = engine.scheduler.stats
    assert stats.preemptions_swap + stats.preemptions_recompute > 10
    assert sum(engine.stats.restarts.counts) > 0
    assert engine.stats.vectors == 40


def test_a_vector_that_is_not_finite_ends_its_request_alone():
    engine = make_engine(max_num_seqs=1)
    prompt = [1, 2, 3, 4, 5]
    engine.executor.spoil = True
    engine.add(wants_vector("bad", prompt))
    found = drained(engine)
    engine.executor.spoil = False
    engine.add(wants_vector("good", prompt))
    found |= drained(engine)
    assert found == {"bad": ([], None, "error"), "good": ([], foretell_vector(prompt), "stop")}
    assert_empty(engine)


def test_what_an_engine_refuses():
    engine = make_engine(max_model_len=16)
    full = list(range(16))
    engine.add(wants_vector("full", full))  # nothing has to be left for an output
    assert drained(engine)["full"][1] == foretell_vector(full)
    with pytest.raises(PromptTooLong, match="at most 16"):
        engine.add(wants_vector("long", [*full, 1]))
    with pytest.raises(RequestError, match="prompt must not be empty"):
        engine.add(wants_vector("empty", []))
    facts = engine.facts
    engine.facts = replace(facts, pooling=None)
    with pytest.raises(RequestError, match="makes no vectors"):
        engine.add(wants_vector("none", [1]))
    engine.facts = replace(facts, generates=False)
    with pytest.raises(RequestError, match="generates no tokens"):
        engine.add(begin("tokens", [1], SamplingParams()))
    assert_empty(engine)


def test_a_request_for_a_vector_outlives_its_engine():
    prompt = list(range(50))

    async def scenario():
        loops = [make_loop(), make_loop()]
        first, second = (LocalClient(loop, INFO) for loop, _ in loops)
        for loop, _ in loops:
            loop.start()
        loops[0][1].gate.clear()
        route = Route(first, second)
        stream = await Stream(wants_vector("v", prompt), route, FailoverConfig()).start()
        stopping = asyncio.create_task(asyncio.to_thread(loops[0][0].stop))
        await asyncio.sleep(0.05)
        loops[0][1].gate.set()
        vectors = [o.vector async for outcomes in stream for o in outcomes]
        await stopping
        await asyncio.to_thread(loops[1][0].stop)
        return vectors, route.moves, loops[1][1].ran

    vectors, moves, ran = asyncio.run(scenario())
    assert [cause for cause, _ in moves] == ["lost"]
    assert [vector.tolist() for vector in vectors] == [foretell_vector(prompt)]
    assert ran > 0, "it was the first engine's"


# ---- what a client makes of a vector ----


def test_a_client_cuts_and_then_normalises():
    raw = np.array([3, 4, 12], np.float32)
    embeds = Pooling("last")
    assert PoolingParams().finish(embeds, raw).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    cut = PoolingParams(dimensions=2)
    assert cut.finish(embeds, raw).tolist() == pytest.approx([0.6, 0.8])
    assert cut.finish(replace(embeds, activates=False), raw).tolist() == [3, 4]
    assert PoolingParams(use_activation=False).finish(embeds, raw).tolist() == [3, 4, 12]
    scores = Pooling("last", scores=True)
    assert PoolingParams().finish(scores, np.array([0.0, 800.0, -800.0], np.float32)).tolist() == [
        0.5, 1, 0,
    ]  # fmt: skip
    assert PoolingParams().finish(embeds, np.zeros(2, np.float32)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"dimensions": 0}, "dimensions must be an integer of at least 1"),
        ({"dimensions": 1.5}, "dimensions must be an integer"),
        ({"dimensions": True}, "dimensions must be an integer"),
        ({"use_activation": 1}, "use_activation must be True, False or None"),
    ],
)
def test_wrong_parameters_are_named(wrong, named):
    with pytest.raises(RequestError, match=named):
        PoolingParams(**wrong)


# ---- what a checkpoint says ----

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 8,
    "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 32,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
MODULES = ["models.Transformer", "models.Pooling", "models.Normalize"]


def make_checkpoint(folder: Path, modules=None, pooling=None, **config) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if modules is not None:
        listed = [
            {"path": f"1_{name[7:]}" if name.endswith(("Pooling", "Score")) else "", "type": name}
            for name in modules
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return folder


def pooling_of(path: Path, option: str = "auto") -> tuple[Pooling | None, bool]:
    config = served_config(path, option)
    traits = read_traits(config)
    ids = {"yes": 7, "no": 8}
    return read_pooling(
        path, config, traits, option, lambda names: [ids.get(name) for name in names]
    ), traits.generates


@pytest.mark.parametrize(
    "modules, pooling, expected",
    [
        (None, None, None),
        (MODULES, {"pooling_mode_lasttoken": True}, Pooling("last")),
        (MODULES[:2], {"pooling_mode_mean_tokens": True}, Pooling("mean", activates=False)),
        (MODULES, {"pooling_mode": "cls"}, Pooling("cls")),
    ],
)
def test_modules_say_how_a_checkpoint_pools(tmp_path, modules, pooling, expected):
    path = make_checkpoint(tmp_path, modules, pooling)
    assert pooling_of(path) == (expected, expected is None)
    # The option makes of it what it is not: a model that generates as well, or does nothing else.
    asked = Pooling("mean", activates=expected is None or expected.activates)
    assert pooling_of(path, "mean") == (asked, True)
    assert pooling_of(path, "none") == (None, True)
    assert pooling_of(path, "yes_no") == (Pooling("last", scores=True, tokens=(7, 8)), True)


@pytest.mark.parametrize("ids, tokens", [((9, 5), (9, 5)), ((9, None), (9,))])
def test_a_reranker_that_generates_yes_and_no(tmp_path, ids, tokens):
    path = make_checkpoint(tmp_path, ["models.Transformer", "models.LogitScore"])
    config = dict(zip(("true_token_id", "false_token_id"), ids, strict=True))
    (path / "1_LogitScore").mkdir()
    (path / "1_LogitScore/config.json").write_text(json.dumps(config))
    assert pooling_of(path) == (Pooling("last", scores=True, tokens=tokens), True)
    (path / "1_LogitScore/config.json").write_text('{"true_token_id": "yes"}')
    with pytest.raises(CheckpointError, match="must be token ids"):
        pooling_of(path)


def test_an_output_layer_that_costs_nothing_stays(tmp_path):
    path = make_checkpoint(
        tmp_path, MODULES, {"pooling_mode_lasttoken": True}, tie_word_embeddings=True
    )
    assert pooling_of(path) == (Pooling("last"), True)


@pytest.mark.parametrize(
    "modules, pooling, named",
    [
        (["models.Transformer", "models.Dense"], None, "module 'Dense' is not supported"),
        (MODULES, None, "1_Pooling/config.json is missing"),
        (MODULES, {"pooling_mode_max_tokens": True}, "pooling by .'max'. is not supported"),
        (MODULES, {"pooling_mode": ["cls", "mean"]}, "pooling by .'cls', 'mean'. is not"),
    ],
)
def test_modules_that_are_not_there_are_refused(tmp_path, modules, pooling, named):
    path = make_checkpoint(tmp_path, modules, pooling)
    with pytest.raises(CheckpointError, match=named):
        pooling_of(path)


def test_classifiers(tmp_path):
    one = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "yes"}}
    path = make_checkpoint(tmp_path, **one)
    assert pooling_of(path) == (Pooling("last", scores=True), False)
    with pytest.raises(ConfigError, match="pooling must be auto or last"):
        pooling_of(path, "mean")
    raw = one | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    assert pooling_of(make_checkpoint(tmp_path, **raw))[0] == Pooling(
        "last", scores=True, activates=False
    )
    odd = one | {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}
    with pytest.raises(CheckpointError, match="activation_fn must be one of Sigmoid, Identity"):
        pooling_of(make_checkpoint(tmp_path, **odd))
    several = one | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    with pytest.raises(CheckpointError, match="must be one label"):
        pooling_of(make_checkpoint(tmp_path, **several))


def test_a_model_without_an_output_layer(tmp_path):
    path = make_checkpoint(tmp_path, architectures=["Qwen3Model"])
    assert pooling_of(path) == (Pooling("last"), False)
    for option in ("none", "yes_no"):
        with pytest.raises(ConfigError, match=f"pooling must not be {option}"):
            pooling_of(path, option)


def test_an_architecture_that_has_no_network_alone_stays(tmp_path):
    path = make_checkpoint(
        tmp_path, MODULES, {"pooling_mode": "mean"}, architectures=["OPTForCausalLM"],
        model_type="opt",
    )  # fmt: skip
    assert pooling_of(path) == (Pooling("mean"), True)


def test_the_longest_text_that_a_model_was_made_for(tmp_path):
    assert longest_text(tmp_path) is None
    file = tmp_path / "sentence_bert_config.json"
    file.write_text('{"max_seq_length": 256, "do_lower_case": false}')
    assert longest_text(tmp_path) == 256
    file.write_text('{"do_lower_case": true}')
    with pytest.raises(CheckpointError, match="do_lower_case"):
        longest_text(tmp_path)


def test_an_encoder_has_no_decoders_fields():
    bert = {"architectures": ["BertModel"], "model_type": "bert"}
    traits = read_traits(Config(bert))
    assert not traits.generates and not traits.causal and traits.max_position == 512
    roberta = {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}
    traits = read_traits(Config(roberta | {"max_position_embeddings": 514}))
    assert traits.max_position == 512
    with pytest.raises(CheckpointError, match="is_decoder"):
        read_traits(Config(bert | {"is_decoder": True}))
    with pytest.raises(CheckpointError, match="position_embedding_type"):
        read_traits(Config(bert | {"position_embedding_type": "relative_key"}))
