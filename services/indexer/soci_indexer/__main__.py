# SPDX-License-Identifier: Apache-2.0
"""``soci-indexer``: takes build jobs from the work queue, one at a time."""

from __future__ import annotations

from soci.errors import SociError
from soci_bus.asks import BuildIndex
from soci_bus.events import IndexBegun, IndexFailed, IndexMade
from soci_bus.nats import connect
from soci_indexer.build import IndexBuilder
from soci_registry import DockerConfig, Registry, RegistrySettings
from soci_runtime.config import Config
from soci_runtime.logs import log
from soci_runtime.serve import Process, service_command, trouble
from soci_runtime.tracing import step


async def run(config: Config, process: Process) -> None:
    """Serve until told to stop."""
    settings = RegistrySettings(plain_http=frozenset(config.plain_http))
    async with (
        Registry(settings=settings, credentials=DockerConfig()) as registry,
        connect(config.nats_url, node=config.node, name="soci-indexer", trouble=trouble) as bus,
    ):
        builder = IndexBuilder(registry, bus.publish)

        async def job(ask: BuildIndex, job_id: str) -> None:
            bus.publish(IndexBegun(job_id, ask.image))
            try:
                with step("build-index", None, image=ask.image):
                    built = await builder.build(ask, job_id)
            except SociError as error:
                log.warning("no index was built", image=ask.image, error=error)
                bus.publish(IndexFailed(job_id, ask.image, error.code, str(error)))
                return
            log.info("index built", image=ask.image, index=built.index, layers=len(built.indexed))
            bus.publish(IndexMade(job_id, ask.image, built.index, built.manifest, built.discovery))

        await bus.work(BuildIndex, job)
        process.ready(node=config.node)
        await process.stopping.wait()


main = service_command("soci-indexer", run)

if __name__ == "__main__":
    main()
