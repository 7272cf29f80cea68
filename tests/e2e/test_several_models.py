"""Several models in one server, of which one comes, one is replaced and one leaves under load; the
examples of docs/serving.md."""

import asyncio
import re
import shlex
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from tests.parity.tiny_models import TINY_MODELS
from tests.soak.chaos import manta_command
from tests.support.served import ROOT, Served, serve
from tests.support.tiny_tokenizer import save_tokenizer
from tests.support.waiting import PATIENCE

SECTION = (ROOT / "docs/serving.md").read_text().split("## Several models in one server")[1]
FILE, COMMANDS = re.findall(r"```(?:yaml)?\n(.*?)```", SECTION.split("\n## ")[0], re.DOTALL)
FEW = {"worker-cpus": 0.2, "num-gpu-blocks-override": 200, "swap-space": 0}
PROMPT = [5, 17, 40, 3]
STORY = {"prompt": "Once upon a time", "max_tokens": 150, "ignore_eos": True}
FRANCE = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
TINY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def checkpoint(name: str, folder: Path) -> tuple[Path, str]:
    """A tiny checkpoint with a tokenizer of words, and what transformers says after PROMPT."""
    tiny = next(one for one in TINY_MODELS if one.name == name)
    path = save_tokenizer(tiny.save(folder), 128)
    ids = torch.tensor([PROMPT])
    whole = tiny.build().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=12,
        max_new_tokens=12, eos_token_id=None,
    )  # fmt: skip
    return path, " ".join(f"w{i}" for i in whole[0, len(PROMPT) :].tolist())


def options(path: Path) -> list[str]:
    words = [f"--{name}={value}" for name, value in FEW.items()]
    return [*words, f"--model={path}", "--dtype=float32"]


class Load:
    """Requests of one model that are asked over and over, in streams, and must never change."""

    def __init__(self, http: httpx.AsyncClient, model: str, *allowed: str, **body: Any) -> None:
        self._http, self._body, self.allowed = http, {"model": model, **body}, allowed
        self.answers = 0
        self._over = False

    async def run(self) -> None:
        while not self._over:
            assert await stream(self._http, self._body) in self.allowed
            self.answers += 1

    def end(self) -> None:
        self._over = True


async def stream(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    text, done = "", False
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            done = done or data == "[DONE]"
            if line.startswith("data: {"):
                text += yaml.safe_load(data)["choices"][0]["text"]
    assert done
    return text


async def ask(http: httpx.AsyncClient, model: str | None, **body: Any) -> str:
    body = body if model is None else body | {"model": model}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def names(http: httpx.AsyncClient) -> set[str]:
    return {one["id"] for one in (await http.get("/v1/models")).json()["data"]}


def command(line: str, **paths: Path) -> list[str]:
    """The words of an example, with the paths of this test and little memory where it has some."""
    words = shlex.split(line.split("  #")[0])[1:]
    given = [paths.get(word.rpartition("/")[2]) for word in words]
    path = next(filter(None, given), None)
    words = [word for word in words if "path/or/" not in word]
    return words if path is None else [*words, *options(path)]


def test_models_come_change_and_leave_and_nothing_of_the_others_is_lost(tmp_path: Path) -> None:
    path, said = checkpoint("llama", tmp_path)
    other_path, other_said = checkpoint("qwen2", tmp_path)
    paths = {"hub-id": path, "other": other_path}
    config = yaml.safe_load(FILE)
    del config["port"]
    for model in config["models"]:
        model |= FEW
    config["models"][1] |= {"model": str(path), "dtype": "float32"}
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(config))
    listed, add, replace, scale, remove = (
        command(line, **paths) for line in COMMANDS.splitlines()
    )  # fmt: skip

    async def timed(served: Served, words: list[str]) -> str:
        begun = time.monotonic()
        said = await manta_command(served, *words)
        print(f"{' '.join(words[:1])}: {time.monotonic() - begun:.1f} s")
        return said

    async def scenario(served: Served) -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:
            assert await names(http) == {"manta-demo", "small", "small-v1"}
            assert await ask(http, "manta-demo", **FRANCE) == " Paris"
            assert await ask(http, "small", **TINY) == await ask(http, "small-v1", **TINY) == said
            unknown = await http.post("/v1/completions", json=TINY | {"model": "new"})
            assert unknown.status_code == 404 and "small-v1" in unknown.json()["error"]["message"]
            without = await http.post("/v1/completions", json=TINY)
            assert without.status_code == 400 and without.json()["error"]["param"] == "model"
            there = [line.split("  ")[:2] for line in (await timed(served, listed)).splitlines()]
            assert there == [["manta-demo", "1 engines"], ["small", "2 engines"]]

            stories = [await ask(http, "manta-demo", seed=i, **STORY) for i in range(3)]
            loads = [
                *(
                    Load(http, "manta-demo", text, seed=i, **STORY)
                    for i, text in enumerate(stories)
                ),
                Load(http, "small", said, **TINY),
            ]
            running = [asyncio.create_task(load.run()) for load in loads]
            await timed(served, add)
            assert await names(http) == {"manta-demo", "small", "small-v1", "new"}
            assert await ask(http, "new", **TINY) == said
            changing = Load(http, "new", said, other_said, **TINY)
            task = asyncio.create_task(changing.run())
            await timed(served, replace)
            assert await ask(http, "new", **TINY) == other_said != said
            changing.end()
            await task
            await timed(served, scale)
            last = asyncio.create_task(stream(http, {"model": "new", **TINY, "max_tokens": 200}))
            await timed(served, remove)
            assert (await last).startswith(other_said)
            gone = await http.post("/v1/completions", json=TINY | {"model": "new"})
            assert gone.status_code == 404
            assert await names(http) == {"manta-demo", "small", "small-v1"}
            for load in loads:
                load.end()
            await asyncio.gather(*running)
            print("answers while that went on:", [load.answers for load in (*loads, changing)])
            assert all(load.answers >= 3 for load in (*loads, changing))
            engines = (await http.get("/load")).json()["engines"]
            assert sorted(engine["model"] for engine in engines) == ["manta-demo", "small"]
            metrics = (await http.get("/metrics")).text
            for name in ("manta-demo", "small"):
                assert re.search(
                    rf'request_success_total{{.*model_name="{name}".*}} [1-9]', metrics
                )

    with serve("--config", str(file), "--shutdown-timeout", "20", model=None) as served:
        asyncio.run(scenario(served))
