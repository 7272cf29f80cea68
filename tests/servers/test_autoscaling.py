"""The number of engines follows their load, on a server that runs."""

import asyncio
import time

import httpx

from tests.soak.chaos import manta_command
from tests.support.served import serve
from tests.support.waiting import PATIENCE

OPTIONS = [
    "--max-num-seqs", "4", "--worker-cpus", "0.5", "--num-gpu-blocks-override", "400",
    "--upscale-delay", "0", "--downscale-delay", "2",
]  # fmt: skip


def test_engines_come_with_the_load_and_leave_after_it_and_nothing_is_lost() -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as client:

            async def ask(seed: int) -> str:
                body = {
                    "model": "manta-demo", "prompt": "Once upon a time", "max_tokens": 300,
                    "seed": seed, "ignore_eos": True,
                }  # fmt: skip
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                text: str = answer.json()["choices"][0]["text"]
                return text

            async def until(count: int) -> None:
                deadline = time.monotonic() + PATIENCE
                while len((await client.get("/load")).json()["engines"]) != count:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)

            expected = await asyncio.gather(*map(ask, range(8)))
            await manta_command(served, "scale", "--max-replicas", "2")
            await until(1)
            over = asyncio.Event()

            async def keep_asking(seed: int) -> None:
                while not over.is_set():
                    assert await ask(seed % 8) == expected[seed % 8]

            asking = asyncio.gather(*map(keep_asking, range(24)))
            begun = time.monotonic()
            await until(2)
            print(f"a second engine after {time.monotonic() - begun:.1f} s")
            over.set()
            await asking
            quiet = asyncio.gather(*(ask(seed) for seed in range(2)))
            begun = time.monotonic()
            while not quiet.done():  # one engine is enough for these, wherever they are
                await asyncio.sleep(0.05)
            assert await quiet == expected[:2]
            await until(1)
            print(f"one engine again after {time.monotonic() - begun:.1f} s")

    with serve(*OPTIONS) as served:
        asyncio.run(scenario())
