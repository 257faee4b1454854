"""The bundles of a server by name: loaded when they are asked for, dropped when room is needed."""

import asyncio
import gc
import logging
import time
from dataclasses import replace

import torch

from ddm.errors import ArtifactError, DdmError, require
from serve.engine.expert import ServingError
from serve.engine.metrics import Metrics
from serve.engine.service import BusyError, Connect, Service, Shared
from serve.model.loading import bundle_folder
from serve.settings import Settings

log = logging.getLogger(__name__)


class UnknownModelError(Exception):
    """A model of that name is not served here."""


class Models:
    """A service for each bundle; all share the device, the quotas and the limits.

    The first is loaded at once, the others when they are first asked for. Before more than
    `serve.models_MiB` of weights are loaded, those that were used longest ago, and not now, are
    dropped. `start` and `stop` it on one event loop. Raises `DdmError` naming what is wrong with
    the first bundle or the settings.
    """

    def __init__(self, config: Settings, metrics: Metrics, connect: Connect | None = None) -> None:
        self.settings, self.metrics, self._connect = config, metrics, connect
        self.began_s = int(time.time())
        self.draining = False
        self._shared = Shared()
        self._settings = {config.name(): config}
        if config.models:
            self._settings = {
                name: replace(config, run=folder, models={}, serve=replace(config.serve, name=name))
                for name, folder in config.models.items()
            }
        self.names = list(self._settings)
        first = self.names[0]
        for name in self.names:
            try:
                self._size(name)
            except ArtifactError as error:
                if name == first:
                    raise
                log.warning("%s cannot be loaded now: %s", name, error)
        self._loaded = {first: self._service(first)}  # used last comes last
        self._sizes = {first: self._size(first)}  # of what is loaded
        self._loading = asyncio.Lock()

    @property
    def services(self) -> list[Service]:
        """Of the bundles that are loaded."""
        return list(self._loaded.values())

    def loaded(self, name: str) -> Service | None:
        """The service of that name, None unless its bundle is loaded."""
        return self._loaded.get(name)

    async def get(self, name: str | None = None) -> Service:
        """The service of that name, None for the first; it is loaded if it is not.

        Raises `UnknownModelError`; `BusyError` if there is no room while others are in use, and
        `ServingError` if it cannot be loaded.
        """
        name = self.names[0] if name is None else name
        if name not in self._settings:
            raise UnknownModelError(name)
        if name not in self._loaded:
            async with self._loading:
                if name not in self._loaded:
                    await self._load(name)
        self._loaded[name] = self._loaded.pop(name)
        return self._loaded[name]

    async def start(self) -> None:
        """Start what is loaded."""
        for service in self.services:
            await service.start()

    async def stop(self) -> None:
        """End all; requests under way end with an error."""
        for service in self.services:
            await service.stop()

    def drain(self) -> None:
        """Admit no more requests."""
        self.draining = True
        for service in self.services:
            service.drain()

    async def reload(self) -> None:
        """Load again what is loaded, from the same folders.

        Raises `DdmError` naming those that cannot be, which stay as they are.
        """
        failed = []
        for name, service in list(self._loaded.items()):
            try:
                size = self._size(name)
                await service.switch(service.settings.run)
                self._sizes[name] = size
            except (DdmError, OSError) as error:
                failed.append(f"{name}: {error}" if len(self.names) > 1 else str(error))
        if failed:
            raise DdmError("; ".join(failed))

    def _service(self, name: str) -> Service:
        prefix = f"{name}/" if len(self._settings) > 1 else ""
        own = self._settings[name]
        return Service(own, self.metrics, self._connect, self._shared, prefix)

    async def _load(self, name: str) -> None:
        if self.draining:
            raise ServingError("the server is stopping")
        try:
            size = self._size(name)
            await self._make_room(size)
            service = await asyncio.to_thread(self._service, name)
        except (DdmError, OSError) as error:
            log.error("%s cannot be loaded: %s", name, error)
            raise ServingError(f"{name} cannot be loaded: {error}") from error
        await service.start()
        if self.draining:
            service.drain()
        self._loaded[name], self._sizes[name] = service, size

    async def _make_room(self, size: float) -> None:
        most = self.settings.serve.models_MiB
        while most is not None and sum(self._sizes[each] for each in self._loaded) + size > most:
            idle = [name for name, service in self._loaded.items() if not service.busy]
            if not idle:
                raise BusyError("there is no memory for this model while others are in use", 5)
            log.info("dropping %s, to load another model", idle[0])
            await self._loaded.pop(idle[0]).stop()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _size(self, name: str) -> float:
        """The weights of a bundle on disk, in MiB. Raises `ConfigError` if there is never room for them."""
        size = _weights_mib(self._settings[name].run)
        most = self.settings.serve.models_MiB
        rule = f"be at least the {size:.1f} MiB of {name}"
        require(most is None or size <= most, "serve.models_MiB", rule, most)
        return size


def _weights_mib(folder: str) -> float:
    files = bundle_folder(folder).glob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 2**20
