"""The command line takes vLLM's spellings, and says what there is instead of what it has not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cli import main
from engine.vllm_options import ALIASES, FOREIGN


def serve(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The options of a server that these words start."""
    assert main(["serve", *words, "--print-serve-config"]) == 0, capsys.readouterr().err
    config = yaml.safe_load(capsys.readouterr().out)
    return config["applications"][0]["args"] | config["http_options"]


def error(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that these words of ``manta serve`` are refused with."""
    assert main(["serve", *words, "--print-serve-config"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("manta: error: ").strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--max_model_len=64 --max_num_seqs 4", {"max_model_len": 64, "max_num_seqs": 4}),
        ("-tp 2 -pp 3", {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}),
        ("--data-parallel-size 2 -asc 3", {"num_replicas": 2, "num_ingress_replicas": 3}),
        ("--kv-offloading-size 2", {"swap_space": 2}),
        ("--max-model-len 1k", {"max_model_len": 1000}),
        ("--max-model-len 1K", {"max_model_len": 1024}),
        ("--max-num-batched-tokens 1.5k", {"max_num_batched_tokens": 1500}),
        ("--kv-cache-memory-bytes 4G", {"kv_cache_memory_bytes": 4 << 30}),
        ("--served-model-name a b --port 9", {"served_model_name": ["a", "b"], "port": 9}),
        ("--api-key a --api-key b c", {"api_key": ["a", "b", "c"]}),
        ('--allowed-origins ["x","y"]', {"allowed_origins": ["x", "y"]}),
        ("--no_enable_prefix_caching", {"enable_prefix_caching": False}),
        ("-q fp8", {"quantization": "fp8"}),
    ],
)
def test_vllms_spellings(
    words: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = serve("m", *words.split(), capsys=capsys)
    assert {name: options[name] for name in expected} == expected
    assert options["model"] == "m"


@pytest.mark.parametrize(
    "words", ["--max-model-len auto", "--max-model-len -1", "--tokenizer None"]
)
def test_words_for_what_is_not_given(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("m", *words.split(), capsys=capsys) == serve("m", capsys=capsys)


def test_the_model_is_an_argument_or_an_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What could be meant as the model is never taken for something else in silence."""
    expected = serve("m", "--served-model-name", "a", "b", capsys=capsys)
    for words in (("--model", "m", "--served-model-name", "a", "b"),
                  ("--served-model-name", "a", "b", "--model=m")):  # fmt: skip
        assert serve(*words, capsys=capsys) == expected
    file = tmp_path / "c.yaml"
    file.write_text("model: m\n")
    words = ("--config", str(file), "--served-model-name", "a", "b")
    assert serve(*words, capsys=capsys) == expected
    for words in (("--served-model-name", "a", "b"), ("--api-key", "secret", "m")):
        assert "which is the model? Give it first: manta serve MODEL" in error(
            *words, capsys=capsys
        )
    assert error("m", "--model", "n", capsys=capsys) == "give the model once: it is m and --model n"
    assert serve("--served-model-name", "a", capsys=capsys)["model"] == "manta-demo"


def test_a_file_may_have_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "max-model-len: 4k\ndata-parallel-size: 2\ndisable-log-requests: true\nquantization:\n"
        "max-num-seqs: 16\n"
    )
    options = serve("m", "--config", str(file), "--num-replicas", "3", capsys=capsys)
    assert options["max_model_len"] == 4000 and options["num_replicas"] == 3
    assert options["max_num_seqs"] == 16 and "quantization" not in options
    file.write_text("max_model_len: some\n")
    message = "max_model_len must be an integer of at least 1 or None, got 'some'"
    assert error("m", "--config", str(file), capsys=capsys) == message
    file.write_text("enable-lora: true\n")
    assert "there are no LoRA adapters" in error("m", "--config", str(file), capsys=capsys)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_asks_for_nothing_is_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag, expected = "--" + name.replace("_", "-"), serve("m", capsys=capsys)
    for value in FOREIGN[name].neutral:
        if FOREIGN[name].flag:
            words = [flag if value else flag.replace("--", "--no-")]
        else:
            words = [flag, "anything" if value is ... else json.dumps(value).strip('"')]
        if name not in ALIASES:
            assert serve("m", *words, capsys=capsys) == expected, words
        assert serve(*words, "m", capsys=capsys)["model"] == "m"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-q bitsandbytes", "quantization must be one of fp8, gptq, awq, compressed-tensors"),
        ("--kv-cache-dtype fp8_e5m2", "kv_cache_dtype must be one of auto, fp8, fp8_e4m3"),
        ("--tool-server demo", "tool_server='demo' is not supported: output is"),
        ("--tool-call-parser hermse", "tool_call_parser must be one of auto, none, cohere"),
        ("--cudagraph-capture-sizes 1 2 4", "cudagraph_capture_sizes=1 is not supported"),
        ("--compilation-config.level 3", "compilation_config='--compilation-config.level' is not"),
        ("-O3", "optimization_level=3 is not supported: nothing is captured"),
        ('--speculative-config {"method":1}', "there is no speculative decoding"),
        ("--swap-space 1 --kv-offloading-size 2", "kv_offloading_size and swap_space are one"),
        ("--max-model-len 1.5K", "argument --max-model-len: must be an integer of at least 1"),
        ("--max_modl_len 5", "unknown option --max-modl-len; did you mean --max-model-len?"),
    ],
)
def test_what_there_is_not_is_refused_in_a_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error("m", *words.split(), capsys=capsys)
