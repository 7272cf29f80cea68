"""The models that engines serve, as the routes need them; each is loaded when its first engine is
there."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from cluster.client import EngineClient, EngineInfo
from engine.chat import load_template
from engine.errors import MantaError, Unavailable
from engine.log import get_logger
from engine.tokenizer import Tokenizer
from router.errors import ApiError, wrong
from router.rendering import Renderer

log = get_logger("models")


@dataclass(frozen=True)
class ServedModel:
    """One of the models."""

    info: EngineInfo
    tokenizer: Tokenizer
    chat_template: str | None
    fingerprint: str
    created: int

    @property
    def id(self) -> str:
        """The first of its names, which answers have."""
        return self.info.names[0]

    @cached_property
    def _facts(self) -> EngineInfo:
        return _facts(self.info)

    def fits(self, engine: EngineClient) -> bool:
        """Whether an engine serves just this; during an update there may be others."""
        return _facts(engine.info) == self._facts


def _facts(info: EngineInfo) -> EngineInfo:
    return replace(info, engine_id="", num_device_blocks=0, num_cpu_blocks=0, start_seconds=0.0)


class Models:
    """The models that have been loaded.

    reachable: gives the engines of a model that make progress, or of all for None.
    look: brings what is known of the server up to date.
    declared: gives the names of the models that the server is to have; none where nobody says, and
        then there are those that engines have been seen to serve.
    """

    def __init__(
        self,
        reachable: Callable[[str | None], Awaitable[list[EngineClient]]],
        look: Callable[[], Awaitable[None]] | None,
        declared: Callable[[], Collection[str]],
    ) -> None:
        self._reachable = reachable
        self._look = look
        self._declared = declared
        self._models: dict[str, ServedModel] = {}  # by id
        self._loading = asyncio.Lock()
        self._renderer = Renderer()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(sorted(self._models.values(), key=lambda model: model.id))

    def named(self, name: str) -> ServedModel | None:
        """The model of that name, if it has been loaded."""
        return next((model for model in self._models.values() if name in model.info.names), None)

    async def load(self, name: str | None) -> ServedModel:
        """The model of that name, as its engines serve it now; None stands for the only one.

        Raises ApiError 404 if there is none of that name, 400 for None where there are several, and
        Unavailable while it has no engine yet.
        """
        engines = await self._reachable(name)
        self._forget_what_was_removed()
        if name is None:
            name = self._only(engines)
        if self.lacks(name) and self._look is not None:
            await self._look()  # it may have come just now
        if self.lacks(name):
            raise self._unknown(name)
        declared = self._declared()
        async with self._loading:
            model = self.named(name)
            if model is not None and (not engines or any(map(model.fits, engines))):
                return model
            if engines:
                return self._keep(await asyncio.to_thread(self._made, engines[0].info))
        if not declared and await self._reachable(None):
            await self.load_all()  # so that it is known which there are
        if not declared and self._models:
            raise self._unknown(name)
        raise Unavailable("no engine is ready yet", "starting", name if declared else "")

    async def load_all(self) -> list[ServedModel]:
        """All that have had an engine. One that cannot be loaded keeps nobody from the others.

        Raises as ``load`` does if there is none.
        """
        engines = await self._reachable(None)
        for name in sorted({engine.info.names[0] for engine in engines}):
            try:
                await self.load(name)
            except ApiError:  # it was removed, and its engines drain
                pass
            except MantaError as error:
                log.warning("The model %s cannot be loaded: %s", name, error)
        return list(self) or [await self.load(None)]

    def lacks(self, name: str) -> bool:
        """Whether it is known which models there are to be, and none is called so."""
        declared = self._declared()
        return bool(declared) and name not in declared

    def _only(self, engines: Collection[EngineClient]) -> str:
        """The id of the only model. Raises as ``load`` does."""
        found = {engine.info.names[0] for engine in engines}
        if self._declared() or not found:
            found |= self._models.keys()  # those too of which no engine lives just now
        if len(found) > 1:
            raise wrong(f"model is missing: give one of {', '.join(sorted(found))}", "model")
        if not found:
            raise Unavailable("no engine is ready yet", "starting")
        return found.pop()

    def _unknown(self, name: str) -> ApiError:
        names = set(self._declared()) or {n for model in self for n in model.info.names}
        there = ", ".join(sorted(names))
        message = f"the model {name[:200]!r} does not exist; there is {there}"
        return ApiError(404, message, param="model", code="model_not_found")

    def _keep(self, model: ServedModel) -> ServedModel:
        """Keep a model, in the place of what had its names."""
        names = set(model.info.names)
        for id, other in list(self._models.items()):
            if names & set(other.info.names):
                del self._models[id]
        self._models[model.id] = model
        return model

    def _forget_what_was_removed(self) -> None:
        if declared := self._declared():
            self._models = {id: model for id, model in self._models.items() if id in declared}

    def _made(self, info: EngineInfo) -> ServedModel:
        facts = (info.model, info.revision, info.max_model_len, info.vocab_size, info.block_size)
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        template = info.chat_template
        tokenizer = Tokenizer.load(info.tokenizer, info.revision, info.chat_options)
        tokenizer.renderer = self._renderer.render
        self._renderer.start()
        return ServedModel(
            info,
            tokenizer,
            None if template is None else load_template(template),
            f"fp_{digest}",
            int(time.time()),
        )
