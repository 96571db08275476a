# SPDX-License-Identifier: Apache-2.0
"""``soci-indexer``: takes build jobs from the work queue, one at a time; registries may put some there themselves."""

from __future__ import annotations

from contextlib import AsyncExitStack

from soci.errors import SociError
from soci_bus.asks import BuildIndex
from soci_bus.events import IndexBegun, IndexFailed, IndexMade
from soci_bus.nats import connect
from soci_indexer.build import IndexBuilder
from soci_indexer.webhook import listening
from soci_indexing.pool import BuildPool
from soci_registry import DockerConfig, Registry, RegistrySettings
from soci_runtime.config import Config
from soci_runtime.logs import log
from soci_runtime.serve import Process, service_command, trouble
from soci_runtime.tracing import step

WHY_LIMIT = 16_384
"""Characters of a failure's reason that are told: it may speak of every layer."""


async def run(config: Config, process: Process) -> None:
    """Serve until told to stop."""
    settings = RegistrySettings(plain_http=frozenset(config.plain_http))
    async with (
        Registry(settings=settings, credentials=DockerConfig()) as registry,
        BuildPool() as pool,
        connect(config.nats_url, node=config.node, name="soci-indexer", trouble=trouble) as bus,
    ):
        builder = IndexBuilder(registry, pool, bus.publish)

        async def job(ask: BuildIndex, job_id: str) -> None:
            if ask.by == "webhook" and await passed_over(builder, ask):
                return
            bus.publish(IndexBegun(job_id, ask.image))
            try:
                with step("build-index", None, image=ask.image):
                    built = await builder.build(ask, job_id)
            except SociError as error:
                log.warning("no index was built", image=ask.image, error=error)
                bus.publish(IndexFailed(job_id, ask.image, error.code, str(error)[:WHY_LIMIT]))
                return
            except Exception as error:  # noqa: BLE001  a defect: another try would end alike, and somebody waits
                log.error("no index was built", image=ask.image, error=error, exc_info=error)
                why = f"internal error {type(error).__name__}: see the log of soci-indexer"
                bus.publish(IndexFailed(job_id, ask.image, SociError.code, why))
                return
            log.info("index built", image=ask.image, index=built.index, layers=len(built.indexed))
            bus.publish(IndexMade(job_id, ask.image, built.index, built.manifest, built.discovery))

        await bus.work(BuildIndex, job)
        async with AsyncExitStack() as stack:
            facts = {}
            if config.webhook_address:
                address, token, name = config.webhook_address, config.webhook_token, config.webhook_registry
                least = config.webhook_min_layer_size
                hook = listening(address, token, name, bus.submit, min_layer_size=least)
                bound = await stack.enter_async_context(hook)
                facts["webhook"] = str(bound)
            process.ready(node=config.node, **facts)
            await process.stopping.wait()


async def passed_over(builder: IndexBuilder, ask: BuildIndex) -> bool:
    """Whether a push needs no index, which the log says. What cannot be told is tried."""
    try:
        why = await builder.needless(ask)
    except SociError:
        return False
    if why:
        log.info("a push needs no index", image=ask.image, why=why)
    return bool(why)


main = service_command("soci-indexer", run)

if __name__ == "__main__":
    main()
