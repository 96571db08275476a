# SPDX-License-Identifier: Apache-2.0
"""``soci-fetcher``: wires the registry, the span cache and the bus."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from soci_bus.asks import FetchLayer, FetchSpans, FindIndex, FreeCache, PrepareLayer, ReadImageConfig
from soci_bus.in_use import layers_in_use
from soci_bus.nats import connect
from soci_cache import LayerStore
from soci_fetcher.access import BusQuestion, budget_folder, host_book, logins, registry_settings, tell
from soci_fetcher.fill import Filler
from soci_fetcher.finder import Finder
from soci_fetcher.keeper import keeping
from soci_fetcher.layers import LayerFetcher
from soci_fetcher.links import Links
from soci_fetcher.peers import peering
from soci_fetcher.quiet import Quiet
from soci_fetcher.source import RegistrySource
from soci_fetcher.spans import SpanFetcher
from soci_registry import Registry
from soci_runtime.config import Config
from soci_runtime.flights import Flights
from soci_runtime.serve import Process, service_command, trouble

QUEUE = "fetchers"
"""The queue group: any number of fetchers of a node share its asks."""


async def run(config: Config, process: Process) -> None:
    """Serve until told to stop; on the way out nothing new is taken and what was taken is finished."""
    question = BusQuestion()
    async with (
        logins(config, question) as credentials,
        Registry(
            settings=registry_settings(config),
            credentials=credentials,
            hosts=host_book(config),
            tell=tell,
            budget=budget_folder(config),
        ) as registry,
        AsyncExitStack() as last,
        Flights() as flights,
        connect(config.nats_url, node=config.node, name="soci-fetcher", trouble=trouble) as bus,
        keeping(config.cache, bus, budget=config.cache_budget) as keeper,
        AsyncExitStack() as doors,
    ):
        question.bus = bus
        store = LayerStore(config.cache, room=keeper.make_room, told=keeper.told)
        links = Links()
        origin = RegistrySource(registry, links)
        layers = LayerFetcher(
            store,
            registry,
            bus.publish,
            config.cache / "whole",
            download_chunk=config.download_chunk,
            max_downloads=config.max_downloads,
            max_downloads_per_image=config.max_downloads_per_image,
        )
        source = await doors.enter_async_context(
            peering(
                config,
                bus,
                store=store,
                registry=origin,
                layers=layers,
                flights=flights,
                last=last,
            )
        )
        quiet = Quiet(config.cache)
        spans = SpanFetcher(
            store, source, bus.publish, flights, attempts=config.span_attempts, quiet=quiet, seen=origin.seen
        )
        ttl = config.index_failure_ttl
        finder = Finder(registry, flights, v1=config.soci_v1, v2=config.soci_v2, failure_ttl=ttl, links=links)
        await bus.serve(FindIndex, finder.find, queue=QUEUE)
        await bus.serve(PrepareLayer, layers.prepare, queue=QUEUE)
        await bus.serve(FetchSpans, spans.fetch, queue=QUEUE)
        await bus.serve(FetchLayer, layers.fetch, queue=QUEUE)
        await bus.serve(ReadImageConfig, layers.read_config, queue=QUEUE)
        await bus.serve(FreeCache, keeper.free, queue=QUEUE)
        process.ready(node=config.node, cache=str(config.cache))
        async with asyncio.TaskGroup() as tasks:
            filling = Filler(
                spans, quiet, lambda: layers_in_use(bus), lambda: keeper.room, silence=config.silence_period
            )
            filler = None if config.background_fetch_disable else tasks.create_task(filling.run())
            await process.stopping.wait()
            if filler is not None:
                filler.cancel()


main = service_command("soci-fetcher", run)

if __name__ == "__main__":
    main()
