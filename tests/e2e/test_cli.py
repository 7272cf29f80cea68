"""The command line: what it prints, what it refuses, and that its options are the engine's."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import SAMPLING_OPTIONS, _model_and_prompts, main
from engine.config import declared_options
from manta import SamplingParams, __version__
from tests.support.tiny_llm import start_llm
from tests.support.tiny_tokenizer import save_tokenizer
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}w9"
SMALL = [
    "--device", "cpu", "--dtype", "float32", "--max-num-seqs", "8", "--max-num-batched-tokens",
    "64", "--kv-cache-memory-bytes", "4000000", "--swap-space", "0.001",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """A checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    shutil.copytree(checkpoint("llama"), folder)
    save_tokenizer(folder, 128)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def llm(folder):
    return start_llm(Path(folder))


def run(*argv):
    """``main`` in this process."""
    return main([str(word) for word in argv])


def run_alone(*argv, **env):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *argv],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


def lines(llm, prompts, params):
    """What ``manta generate`` has to print."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return "".join(
        f"Prompt: {prompt!r}, Generated text: {completion.text!r}\n"
        for prompt, output in zip(prompts, outputs, strict=True)
        for completion in output.outputs
    )


# ---- manta generate ----


def test_generate_prints_each_completion(folder, llm, capsys):
    sampling = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = lines(llm, ["w3 w4", "w5"], params)
    for argv in (
        [folder, "w3 w4", "w5", *sampling, *SMALL],
        [*sampling, *SMALL, folder, "w3 w4", "w5"],
        [folder, *sampling, "w3 w4", *SMALL, "w5"],
        [folder, *sampling, *SMALL, "--", "w3 w4", "w5"],
        ["--model", folder, *sampling, *SMALL, "w3 w4", "w5"],
        [
            folder,
            *sampling,
            *SMALL,
            "w3 w4",
            "w5",
            "--disable-log-stats",
            "--trust_remote_code",
            "--quantization",
            "None",
            "-tp",
            "1",
        ],
    ):
        assert run("generate", *argv) == 0
        out, err = capsys.readouterr()
        assert out == expected
        assert "Processed prompts: 100%" in err


def test_sampling_options_reach_the_model(folder, llm, capsys):
    argv = ["--n", "2", "--temperature", "0.9", "--top-p", "0.8", "--top-k", "30", "--min-p",
            "0.001", "--repetition-penalty", "1.2", "--presence-penalty", "0.5",
            "--frequency-penalty", "0.25", "--max-tokens", "9", "--min-tokens", "4", "--stop",
            "w1", "--stop", "w2", "--ignore-eos", "--seed", "5"]  # fmt: skip
    assert {word[2:].replace("-", "_") for word in argv if word.startswith("--")} >= set(
        SAMPLING_OPTIONS
    )
    params = SamplingParams(
        n=2, temperature=0.9, top_p=0.8, top_k=30, min_p=0.001, repetition_penalty=1.2,
        presence_penalty=0.5, frequency_penalty=0.25, max_tokens=9, min_tokens=4,
        stop=["w1", "w2"], ignore_eos=True,
    )  # fmt: skip
    assert run("generate", folder, "w3 w4", *argv, *SMALL) == 0
    seeded = start_llm(Path(folder), seed=5)
    assert capsys.readouterr().out == lines(seeded, ["w3 w4"], params)


def test_ignore_eos(folder, llm, tmp_path, capsys):
    params = SamplingParams(temperature=0, max_tokens=6)
    ids = llm.generate("w3 w4", params, use_tqdm=False)[0].outputs[0].token_ids
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[2]}))
    for flag, shown in (([], ids[:2]), (["--ignore-eos"], ids)):
        argv = ["--temperature", "0", "--max-tokens", "6", *flag, *SMALL]
        assert run("generate", model, "w3 w4", *argv) == 0
        text = "".join(f" w{i}" for i in shown)
        assert capsys.readouterr().out == f"Prompt: 'w3 w4', Generated text: {text!r}\n"


def test_generate_reads_prompts_from_standard_input(monkeypatch):
    """Without an argument; the model is then the embedded one."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3\n\nw4\n"))
    assert _model_and_prompts([]) == ("manta-demo", ["w3", "w4"])
    assert _model_and_prompts(["w5"]) == ("manta-demo", ["w5"])
    assert _model_and_prompts(["model", "a", "b"]) == ("model", ["a", "b"])


def test_generate_chats(folder, llm, capsys):
    common = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos", *SMALL]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for extra, prompt in (([], "w3 w9"), (["--system", "w7"], "w7 w3 w9")):
        assert run("generate", "--chat", *extra, folder, "w3", *common) == 0
        text = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text
        assert capsys.readouterr().out == f"Prompt: 'w3', Generated text: {text!r}\n"


# ---- manta bench throughput, manta collect-env ----


def test_bench_throughput_writes_its_figures(folder, tmp_path, capsys):
    file = tmp_path / "figures.json"
    counts = {"num_prompts": 5, "input_len": 7, "output_len": 3}
    argv = [word for name, n in counts.items() for word in ("--" + name.replace("_", "-"), n)]
    assert run("bench", "throughput", folder, *argv, "--output-json", file, "--warmup", 0,
               "--repeat", 3, *SMALL) == 0  # fmt: skip
    figures = json.loads(file.read_text())
    assert figures["model"] == folder
    assert {name: figures[name] for name in counts} == counts
    seconds = figures["elapsed_time"]
    assert seconds > 0 and figures["ready_time"] > 0
    assert figures["requests_per_second"] == pytest.approx(5 / seconds)
    assert figures["tokens_per_second"] == pytest.approx(50 / seconds)
    assert figures["output_tokens_per_second"] == pytest.approx(15 / seconds)
    out, err = capsys.readouterr()
    assert re.search(r"Throughput: \d+\.\d\d requests/s, \d+\.\d\d total tokens/s, ", out)
    assert err.count("Processed prompts: 100%") == 3


def test_collect_env_prints_what_a_report_needs(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abc123")
    monkeypatch.setenv("MANTA_SOMETHING", "here")
    monkeypatch.setenv("UNRELATED", "private")
    assert run("collect-env") == 0
    out = capsys.readouterr().out
    fields = dict(line.split(": ", 1) for line in out.splitlines())
    assert fields["manta"] == __version__
    assert fields["python"].startswith(sys.version.split()[0])
    for name in ("platform", "cpu", "cpu flags", "memory", "compiler", "torch", "numpy", "ray",
                 "transformers", "safetensors", "torch threads", "cuda available"):  # fmt: skip
        assert fields[name]
    assert fields["HF_TOKEN"] == "(hidden)" and fields["MANTA_SOMETHING"] == "here"
    assert "hf_abc123" not in out and "private" not in out


# ---- options and errors ----


@pytest.mark.parametrize("command", [["generate"], ["bench", "throughput"]])
def test_help_lists_every_option_by_its_name(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*command, "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    flags = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", out))
    assert "Of vLLM's other options" in " ".join(out.split())
    for _, f in declared_options():
        if f.name == "model":
            assert "MODEL" in out
            continue
        assert "--" + f.name.replace("_", "-") in flags
        for choice in f.metadata["choices"]:
            assert choice in out
    if command == ["generate"]:
        assert {"--" + name.replace("_", "-") for name in SAMPLING_OPTIONS} <= flags


def test_help_and_version(capsys):
    for argv, expected in (
        (["--help"], ["generate", "bench", "collect-env"]),
        (["bench", "--help"], ["throughput"]),
        (["--version"], [f"manta {__version__}"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*argv)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in expected)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["genrate"], "invalid choice: 'genrate' (choose from"),
        (["bench"], "the following arguments are required: WHAT"),
        (["generate", "--max-model-lem", "5", "M", "w3"],
         "unknown option --max-model-lem; did you mean --max-model-len?"),
        (["generate", "--max_model_lem=5", "M", "w3"],
         "unknown option --max-model-lem; did you mean --max-model-len?"),
        (["generate", "--max_model_len=0", "M", "w3"], "max_model_len must be an integer of at"),
        (["generate", "--enable-lora", "M", "w3"], "enable_lora=True is not supported: there are"),
        (["bench", "throughput", "M", "--model", "N"], "give the model once: it is "),
        (["generate", "--max-model", "5", "M", "w3"], "unknown option --max-model"),
        (["bench", "throughput", "--xyzzy"], "unknown option --xyzzy"),
        (["bench", "throughput", "M", "N"], "unexpected argument 'N'"),
        (["collect-env", "all"], "unexpected argument 'all'"),
        (["generate", "--block-size", "x", "M", "w3"],
         "argument --block-size: must be an integer of at least 1 or None, got 'x'"),
        (["generate", "--block-size", "0", "M", "w3"],
         "block_size must be an integer of at least 1 or None, got 0"),
        (["generate", "--dtype", "int8", "M", "w3"], "dtype must be one of auto, bfloat16"),
        (["generate", "--swap-space", "nan", "M", "w3"], "swap_space must be a number of at"),
        (["generate", "--max-num-batched-tokens", "5", "--max-num-seqs", "6", "M", "w3"],
         "max_num_batched_tokens (5) must be at least max_num_seqs (6)"),
        (["generate", "--tensor-parallel-size", "3", "M", "w3"],
         "tensor_parallel_size=3 does not divide the number of attention heads (4); allowed: 1, 2"),
        (["generate", "--pipeline-parallel-size", "4", "M", "w3"],
         "pipeline_parallel_size=4: the model has 3 layers"),
        (["generate", "--temperature", "hot", "M", "w3"], "argument --temperature: invalid float"),
        (["generate", "--temperature", "-1", "M", "w3"], "temperature must be at least 0"),
        (["generate", "--min-tokens", "20", "M", "w3"], "min_tokens (20) must not exceed"),
        (["generate", "--system", "w4", "M", "w3"], "--system needs --chat"),
        (["generate", "/no/such/model", "w3"], "no folder /no/such/model"),
        (["generate", "M", "w3 " * 256], "prompt 0: prompt has 256 tokens; with max_model_len 256"),
        (["bench", "throughput", "M", "--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["bench", "throughput", "M", "--output-json", "/no/such/folder/f"], "--output-json must"),
        (["bench", "throughput", "M", "--input-len", "300"], "prompt has 300 tokens"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_errors_are_one_line_and_status_2(folder, capfd, argv, message):
    argv = [folder if word == "M" else word for word in argv]
    loads = any(part in message for part in ("temperature must", "min_tokens", "prompt has"))
    assert run(*argv, *(SMALL if loads else [])) == 2
    out, err = capfd.readouterr()
    assert out == ""
    error = [line for line in err.splitlines() if line.startswith("manta: error: ")]
    assert len(error) == 1 and message in error[0]
    assert "Traceback" not in err and "usage:" not in err
    if not loads:
        assert err == error[0] + "\n"


def test_an_interrupt_is_status_130(folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.llm.LLM.generate", interrupt)
    assert run("generate", folder, "w3", *SMALL) == 130


# ---- as a user runs it ----


def test_the_command_in_a_process_of_its_own(folder, llm):
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    done = run_alone("generate", folder, "w3 w4", "--temperature", "0", "--max-tokens", "5",
                     "--ignore-eos", *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == lines(llm, ["w3 w4"], params)
    for part in ("Loading weights: 100%", "device blocks", "Maximum concurrency for 256 tokens"):
        assert part in done.stderr
    assert re.search(r"^INFO .* \[manta\.llm\] Ready in \d", done.stderr, re.MULTILINE)


def test_an_error_in_a_process_of_its_own_is_quick():
    done = run_alone("generate", "--max-model-len", "none", "model", "prompt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("manta: error: argument --max-model-len: must be an integer")
    assert done.stderr.count("\n") == 1
    program = "import sys, deploy.cli; deploy.cli.main(['generate', '--x']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "manta: error: unknown option --x\n"
    assert not {"torch", "transformers", "ray"} & set(done.stdout.split())
