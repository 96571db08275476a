# SPDX-License-Identifier: Apache-2.0
"""Which index is found for an image in a real registry, and how often the registry is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidReference, NoIndex, RegistryUnavailable
from soci.index import SOCI_INDEX_V1, SOCI_INDEX_V2
from soci.oci import OCI_MANIFEST, Descriptor
from soci_bus.asks import FindIndex, IndexedLayer, IndexFound
from soci_dev import image
from soci_dev.faults import Status, always
from soci_dev.proxy import Proxy
from soci_fetcher import finder
from soci_fetcher.discovery import find_index
from soci_fetcher.finder import Finder
from soci_indexing.discovery import choose_referrer
from soci_registry import NoCredentials, Registry
from soci_runtime.flights import Flights
from support.fetching import CONTEXT, PATIENCE, push_annotated, push_index, small_image

ZTOC = b"a zTOC, as far as a registry can tell"
MISSING = "sha256:" + "e" * 64


@dataclass
class Place:
    """An image in the registry, behind the proxy, and everything to look for its index with."""

    registry: Registry
    proxy: Proxy
    built: image.Image
    reference: str
    flights: Flights

    def ask(self, *, manifest: str | None = None, explicit: str | None = None) -> FindIndex:
        """The ask for the image's index."""
        digest = Digest(manifest or self.built.digest)
        return FindIndex(self.reference, digest, Digest(explicit) if explicit else None)

    async def find(self, ask: FindIndex, *, v1: bool = True, v2: bool = True) -> IndexFound:
        """Look once, without remembering."""
        return await find_index(self.registry.repository(self.reference), ask, v1=v1, v2=v2)

    async def index(self, version: int, ztoc: bytes = ZTOC) -> Digest:
        """Push an index, under its digest alone."""
        return await push_index(self.registry, self.reference, self.built, version, ztoc)

    async def refer(self, index: Digest, kind: str = SOCI_INDEX_V1) -> None:
        """List it as the image's referrer under the fallback tag."""
        descriptor = Descriptor(OCI_MANIFEST, index, 100, artifact_type=kind)
        await self.registry.repository(self.reference).attach_referrer_tag(Digest(self.built.digest), descriptor)

    def finder(self, clock: list[float] | None = None, **options: bool) -> Finder:
        """A `Finder`; ``clock`` holds its time."""
        told = clock if clock is not None else [0.0]
        switches: dict[str, Any] = {"v1": True, "v2": True, **options}
        return Finder(self.registry, self.flights, failure_ttl=30.0, clock=lambda: told[0], **switches)

    def found(self, index: str, found_by: str, ztoc: bytes = ZTOC) -> IndexFound:
        """The answer that is expected."""
        layer = IndexedLayer(Digest(self.built.manifest["layers"][0]["digest"]), sha256_digest(ztoc), len(ztoc))
        return IndexFound(Digest(index), found_by, (layer,))


Open = Callable[[], AbstractAsyncContextManager[Place]]


@pytest.fixture
def opened(tmp_path: Path, registry: str, proxy: Proxy) -> Open:
    """Opens an image without an index, its proxy's counts at zero."""

    @asynccontextmanager
    async def there() -> AsyncIterator[Place]:
        built = small_image(tmp_path / "image")
        name = "d/" + built.digest[-12:]
        image.push(built, registry, name, "1")
        async with Registry(settings=PATIENCE, credentials=NoCredentials()) as client, Flights() as flights:
            proxy.reset()
            yield Place(client, proxy, built, f"{proxy.address}/{name}:1", flights)

    return there


# --- which one


async def test_an_image_without_an_index(opened: Open) -> None:
    """`NoIndex` says how to make one."""
    async with opened() as place:
        with pytest.raises(NoIndex, match="soci index build"):
            await place.find(place.ask())


async def test_the_order(opened: Open) -> None:
    """What the client names, before what the image names, before what refers to the image."""
    async with opened() as place:
        v1, v2, named = await place.index(1), await place.index(2, b"v2"), await place.index(1, b"named")
        await place.refer(v1)
        annotated = await push_annotated(place.registry, place.reference, place.built, v2)
        descriptor = Descriptor(OCI_MANIFEST, v1, 100, artifact_type=SOCI_INDEX_V1)
        await place.registry.repository(place.reference).attach_referrer_tag(annotated, descriptor)
        by_image, by_client = place.ask(manifest=annotated), place.ask(manifest=annotated, explicit=named)
        assert await place.find(place.ask()) == place.found(v1, "v1-referrer")
        assert await place.find(by_image) == place.found(v2, "v2-annotation", b"v2")
        assert await place.find(by_client) == place.found(named, "explicit", b"named")
        assert await place.find(by_image, v2=False) == place.found(v1, "v1-referrer")
        assert await place.find(by_client, v1=False, v2=False) == place.found(named, "explicit", b"named")
        with pytest.raises(NoIndex, match="all lazy pull modes are disabled"):
            await place.find(by_image, v1=False, v2=False)
        with pytest.raises(NoIndex, match="has no SOCI index"):
            await place.find(place.ask(), v1=False)


async def test_of_several_referrers_the_choice_is_fixed(opened: Open) -> None:
    """The smallest digest, in whatever order the registry lists them; other kinds of referrers do not count."""
    async with opened() as place:
        indexes = [await place.index(1, bytes([number])) for number in range(3)]
        await place.refer(await place.index(2), SOCI_INDEX_V2)
        for index in indexes:
            await place.refer(index)
        assert (await place.find(place.ask())).index == min(indexes)
    listed = [Descriptor(OCI_MANIFEST, index, 1) for index in indexes]
    assert choose_referrer(listed) == choose_referrer(listed[::-1])
    assert choose_referrer([]) is None


@pytest.mark.parametrize("named", [MISSING, "sha256:x", "no digest at all", "../../etc"])
async def test_a_broken_name_in_the_image_ends_the_search(opened: Open, named: str) -> None:
    """An index that the image names and that cannot be had is seen, not silently replaced by another."""
    async with opened() as place:
        await place.refer(await place.index(1))
        annotated = await push_annotated(place.registry, place.reference, place.built, named)
        with pytest.raises(NoIndex, match="cannot be had"):
            await place.find(place.ask(manifest=annotated))


@pytest.mark.parametrize("kind", ["missing", "an image", "damaged"])
async def test_a_broken_referrer_ends_the_search(opened: Open, kind: str) -> None:
    """What is listed and is no index is `NoIndex` with the reason."""
    async with opened() as place:
        index = Digest(place.built.digest) if kind == "an image" else await place.index(1)
        await place.refer(index)
        fault = {"missing": Status(404), "damaged": Status(200, {"Content-Type": OCI_MANIFEST}, b"{}")}.get(kind)
        place.proxy.hook = lambda seen: fault if seen.path.endswith(index) else None
        with pytest.raises(NoIndex, match="cannot be had"):
            await place.find(place.ask(), v2=False)


async def test_an_image_that_is_not_there(opened: Open) -> None:
    """Neither its manifest nor its referrers can be read: `NoIndex` with the reason."""
    async with opened() as place:
        with pytest.raises(NoIndex, match="cannot be had"):
            await place.find(place.ask(manifest=MISSING))
        with pytest.raises(NoIndex, match="has no SOCI index"):
            await place.find(place.ask(manifest=MISSING), v2=False)


# --- how often


async def test_all_layers_ask_once(opened: Open) -> None:
    """The same question at the same time is one look-up; one that was answered is none."""
    async with opened() as place:
        index = await place.index(1)
        await place.refer(index)
        place.proxy.reset()
        await place.find(place.ask())
        once = place.proxy.counts.requests
        place.proxy.reset()
        it = place.finder()
        answers = await asyncio.gather(*(it.find(place.ask(), CONTEXT) for _ in range(20)))
        assert answers == [place.found(index, "v1-referrer")] * 20
        assert place.proxy.counts.requests == once
        assert await it.find(place.ask(), CONTEXT) == answers[0]
        assert place.proxy.counts.requests == once


async def test_a_failure_is_remembered_for_a_while(opened: Open) -> None:
    """Until its time is over the registry is not asked; then an index that was made meanwhile is found."""
    async with opened() as place:
        clock = [100.0]
        it = place.finder(clock)
        with pytest.raises(NoIndex):
            await it.find(place.ask(), CONTEXT)
        index = await place.index(1)
        await place.refer(index)
        place.proxy.reset()
        clock[0] += 29.9
        with pytest.raises(NoIndex):
            await it.find(place.ask(), CONTEXT)
        assert place.proxy.counts.requests == 0
        clock[0] += 0.2
        assert await it.find(place.ask(), CONTEXT) == place.found(index, "v1-referrer")


async def test_a_success_is_remembered_for_longer(opened: Open) -> None:
    """For `SUCCESS_TTL`, then the registry is asked again."""
    async with opened() as place:
        clock = [0.0]
        it = place.finder(clock)
        await place.refer(await place.index(1))
        await it.find(place.ask(), CONTEXT)
        place.proxy.reset()
        clock[0] = finder.SUCCESS_TTL - 1
        await it.find(place.ask(), CONTEXT)
        assert place.proxy.counts.requests == 0
        clock[0] = finder.SUCCESS_TTL + 1
        await it.find(place.ask(), CONTEXT)
        assert place.proxy.counts.requests > 0


async def test_different_questions_have_different_answers(opened: Open) -> None:
    """An explicit index is not what was remembered for the image, nor the other way round."""
    async with opened() as place:
        v1, named = await place.index(1), await place.index(1, b"named")
        await place.refer(v1)
        it = place.finder()
        assert (await it.find(place.ask(), CONTEXT)).index == v1
        assert (await it.find(place.ask(explicit=named), CONTEXT)).index == named
        assert (await it.find(place.ask(), CONTEXT)).index == v1


async def test_an_asker_that_gives_up_does_not_harm_the_others(opened: Open) -> None:
    """Even the one who began."""
    async with opened() as place:
        index = await place.index(1)
        await place.refer(index)
        it = place.finder()
        begun = asyncio.ensure_future(it.find(place.ask(), CONTEXT))
        await asyncio.sleep(0)
        joined = asyncio.ensure_future(it.find(place.ask(), CONTEXT))
        await asyncio.sleep(0)
        begun.cancel()
        assert (await joined).index == index
        with pytest.raises(asyncio.CancelledError):
            await begun
        assert it._under_way == {}


async def test_what_is_no_reference(opened: Open) -> None:
    """It is told as such to all who ask, and not remembered as an image without an index."""
    async with opened() as place:
        it = place.finder()
        ask = FindIndex("NOT a reference", Digest(place.built.digest))
        for error in await asyncio.gather(*(it.find(ask, CONTEXT) for _ in range(3)), return_exceptions=True):
            assert type(error) is InvalidReference
        assert not it._known
        assert not it._under_way


async def test_a_registry_that_is_away_is_no_index_for_a_while(opened: Open) -> None:
    """The pull goes on without lazy loading, and the reason is the registry's."""
    async with opened() as place:
        await place.refer(await place.index(1))
        place.proxy.hook = always(Status(503), blobs_only=False)
        clock = [0.0]
        it = place.finder(clock)
        with pytest.raises(NoIndex, match="503") as caught:
            await it.find(place.ask(), CONTEXT)
        assert isinstance(caught.value.__cause__, RegistryUnavailable)
        place.proxy.hook = None
        clock[0] = 31.0
        assert (await it.find(place.ask(), CONTEXT)).found_by == "v1-referrer"


async def test_what_is_remembered_is_bounded(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer unused for longest goes first."""
    monkeypatch.setattr(finder, "REMEMBERED", 2)
    async with opened() as place:
        it = place.finder()
        named = [await place.index(1, bytes([number])) for number in range(3)]
        for index in (named[0], named[1], named[0], named[2]):
            await it.find(place.ask(explicit=index), CONTEXT)
        assert [key[2] for key in it._known] == [named[0], named[2]]
