"""Several models in one server, of which one comes, one is replaced and one leaves under load; the
examples of docs/serving.md."""

import asyncio
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
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
STORY = {"prompt": "Once upon a time", "max_tokens": 150}
TINY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


def checkpoint(name: str, folder: Path) -> tuple[Path, str]:
    """A tiny checkpoint with a tokenizer of words, and what transformers says after PROMPT."""
    tiny = next(one for one in TINY_MODELS if one.name == name)
    path = save_tokenizer(tiny.save(folder), 128)
    ids = torch.tensor([PROMPT])
    whole = tiny.build().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=12,
        max_new_tokens=12, eos_token_id=None,
    )  # fmt: skip
    return path, "".join(f" w{i}" for i in whole[0, len(PROMPT) :].tolist())


def hub_cache(folder: Path, **revisions: Path) -> Path:
    """A cache of the hub that has someone/small, and for each revision what is in a folder."""
    repository = folder / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    for number, (name, path) in enumerate(revisions.items()):
        shutil.copytree(path, repository / "snapshots" / (str(number) * 40))
        (repository / "refs" / name).write_text(str(number) * 40)
    return folder


def options(path: Path) -> list[str]:
    words = [f"--{name}={value}" for name, value in FEW.items()]
    return [*words, f"--model={path}", "--dtype=float32"]


class Load:
    """A request of one model that is asked over and over, and whose answer must never change."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, *allowed: str, **body: Any) -> None:
        self.answers = 0
        self._over = False
        self._task = asyncio.create_task(self._run(client, model, allowed, body))

    async def _run(
        self, client: openai.AsyncOpenAI, model: str, allowed: tuple[str, ...], body: dict[str, Any]
    ) -> None:
        while not self._over:
            assert await ask(client, model, **body) in allowed
            self.answers += 1

    async def end(self) -> None:
        self._over = True
        await self._task
        assert self.answers >= 3


async def ask(client: openai.AsyncOpenAI, model: str, **body: Any) -> str:
    """The text of a stream that comes to its end. What is to be asked again, the client asks
    again."""
    parts = await client.completions.create(
        model=model, stream=True, extra_body={"ignore_eos": True}, **body
    )
    text, reason = "", None
    async for part in parts:
        text += part.choices[0].text
        reason = part.choices[0].finish_reason
    assert reason == "length"
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
    other_path, other_said = checkpoint("llama-biases", tmp_path)
    paths = {"hub-id": path, "other": other_path}
    config = yaml.safe_load(FILE)
    del config["port"]
    for model in config["models"]:
        model |= FEW
    cache = hub_cache(tmp_path / "hub", v1=path, v2=other_path)
    config["models"][1] |= {"model": "someone/small", "revision": "v1", "dtype": "float32"}
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

    async def until_unknown(client: openai.AsyncOpenAI) -> int:
        answers = 0
        with pytest.raises(openai.NotFoundError):
            while True:
                assert await ask(client, "new", **TINY) == other_said
                answers += 1
        return answers

    async def scenario(served: Served, http: httpx.AsyncClient, client: openai.AsyncOpenAI) -> None:
        deadline = time.monotonic() + PATIENCE
        while len((await http.get("/load")).json()["engines"]) < 3:  # it is ready with one of them
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert await names(http) == {"manta-demo", "small", "small-v1"}
        france = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
        assert await ask(client, "manta-demo", **france) == " Paris"
        assert await ask(client, "small", **TINY) == await ask(client, "small-v1", **TINY) == said
        with pytest.raises(openai.NotFoundError, match="there is manta-demo, small, small-v1"):
            await ask(client, "new", **TINY)
        without = await http.post("/v1/completions", json=TINY)
        assert without.status_code == 400 and without.json()["error"]["param"] == "model"
        there = [line.split("  ")[:2] for line in (await timed(served, listed)).splitlines()]
        assert there == [["manta-demo", "1 engine"], ["small", "2 engines"]]

        stories = [await ask(client, "manta-demo", seed=i, **STORY) for i in range(2)]
        loads = [Load(client, "manta-demo", s, seed=i, **STORY) for i, s in enumerate(stories)]
        loads.append(Load(client, "small", said, **TINY))
        await timed(served, add)
        assert await names(http) == {"manta-demo", "small", "small-v1", "new"}
        assert await ask(client, "new", **TINY) == said
        changing = Load(client, "new", said, other_said, **TINY)
        await timed(served, replace)
        assert await ask(client, "new", **TINY) == other_said != said
        await changing.end()
        await timed(served, scale)
        await loads.pop().end()
        revised = Load(client, "small", said, other_said, **TINY)
        await timed(served, ["scale", "--model", "small", "--revision", "v2"])
        assert await ask(client, "small", **TINY) == other_said
        await revised.end()
        leaving = asyncio.create_task(until_unknown(client))
        await timed(served, remove)
        assert await leaving > 0
        assert await names(http) == {"manta-demo", "small", "small-v1"}
        for load in loads:
            await load.end()
        print("answers meanwhile:", [load.answers for load in (*loads, changing)])
        engines = (await http.get("/load")).json()["engines"]
        assert sorted(engine["model"] for engine in engines) == ["manta-demo", "small"]
        metrics = (await http.get("/metrics")).text
        for name in ("manta-demo", "small"):
            assert re.search(rf'success_total{{.*model_name="{name}".*}} [1-9]', metrics)

    async def main(served: Served) -> None:
        async with (
            httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as http,
            openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client,
        ):
            await scenario(served, http, client)

    words = ["--config", str(file), "--shutdown-timeout", "20"]
    with serve(*words, model=None, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1") as served:
        asyncio.run(main(served))
