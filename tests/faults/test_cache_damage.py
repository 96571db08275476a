# SPDX-License-Identifier: Apache-2.0
"""The span cache's files damaged at rest: what is damaged is fetched again, and no wrong byte is ever read or kept."""

from __future__ import annotations

import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from soci_cache.journal import RECORD
from soci_cache.presence import HEADER, boot_id
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import pulls
from support.pulls import Node, Pushed, drop_pages, read, read_tree

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

DEADLINE_S = 15.0
NEWEST_FIRST = ("snapshotter", "mounter", "fetcher-1")
NOISE_SEED = 3


@pytest.fixture(scope="module")
def node(make_stack: Callable[..., Stack]) -> Node:
    """A node whose services are killed and started again."""
    return pulls.node(make_stack, DEADLINE_S)


@pytest.fixture
def proxy(node: Node) -> Iterator[Proxy]:
    with Proxy(node.stack.registry) as running:
        yield running


def place_of(node: Node, pushed: Pushed) -> Path:
    """The layer's folder in the cache."""
    return node.stack.root / "cache/layers" / pushed.layer.removeprefix("sha256:") / pushed.ztoc.removeprefix("sha256:")


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's bytes where they are."""
    path.write_bytes(change(path.read_bytes()))


def garbled(content: bytes) -> bytes:
    return random.Random(NOISE_SEED).randbytes(len(content))


def flip(place: Path, offset: int) -> None:
    """Damage one byte of the layer's tar, which stays sparse."""
    with (place / "layer.tar").open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0xFF]), offset)


def cut(place: Path, size: int) -> None:
    os.truncate(place / "layer.tar", size)


def lose_pages(place: Path, start: int, length: int) -> None:
    """Zeros where bytes were that never reached the disk."""
    with (place / "layer.tar").open("r+b") as file:
        os.pwrite(file.fileno(), bytes(length), start)


def age(place: Path) -> None:
    """Have the map be of another boot."""
    edit(place / "spans", lambda old: old.replace(boot_id().encode(), str(uuid.uuid4()).encode(), 1))


ANOTHER_BOOT: dict[str, Callable[[Path], None]] = {
    "nothing": lambda _: None,
    "a byte of the tar": lambda place: flip(place, 5000),
    "pages of the tar": lambda place: lose_pages(place, 8192, 100_000),
    "the tar cut": lambda place: cut(place, 70_000),
    "the tar gone": lambda place: (place / "layer.tar").unlink(),
    "the journal cut in a record": lambda place: os.truncate(place / "journal", RECORD.size * 2 + 7),
    "the journal garbled": lambda place: edit(place / "journal", garbled),
    "the journal gone": lambda place: (place / "journal").unlink(),
    "a record of the journal": lambda place: edit(place / "journal", lambda old: garbled(old[:50]) + old[50:]),
}
"""What a machine that went down hard may leave: only what the journal's digests prove counts then."""

SAME_BOOT: dict[str, Callable[[Path], None]] = {
    "the map empty": lambda place: os.truncate(place / "spans", 0),
    "the map cut": lambda place: os.truncate(place / "spans", HEADER + 3),
    "the map's header garbled": lambda place: edit(place / "spans", lambda old: garbled(old[:HEADER]) + old[HEADER:]),
    "the map garbled": lambda place: edit(place / "spans", garbled),
    "the map gone": lambda place: (place / "spans").unlink(),
    "the tar cut": lambda place: cut(place, 70_000),
    "the tar gone": lambda place: (place / "layer.tar").unlink(),
    "the zTOC garbled": lambda place: edit(place / "ztoc", garbled),
    "a byte of the zTOC": lambda place: edit(
        place / "ztoc", lambda old: old[:999] + bytes([old[999] ^ 1]) + old[1000:]
    ),
    "the zTOC cut": lambda place: os.truncate(place / "ztoc", 100),
    "the zTOC gone": lambda place: (place / "ztoc").unlink(),
    "everything gone": shutil.rmtree,
}
"""What hands may do to the files while the services are stopped."""


def stop(node: Node) -> None:
    for name in NEWEST_FIRST:
        node.stack.kill(name)


def start(node: Node) -> None:
    for name in reversed(NEWEST_FIRST):
        node.stack.start(name)


def wrong_after(node: Node, proxy: Proxy, folder: Path, damages: Mapping[str, Callable[[Path], None]]) -> list[str]:
    """Read some of an image a damage, stop, damage each, start, read all; the damages after which that went wrong."""
    pulled = {}
    for number, what in enumerate(damages):
        pushed = pulls.push(proxy.upstream, folder / str(number))
        pulled[what] = pushed, node.pull(proxy.address, pushed)
        with node.rootfs(pulled[what][1]) as data:
            assert tuple(read(data, number) for number in (0, 1)) == pushed.files[:2]
            drop_pages(data)
    stop(node)
    for what, (pushed, _) in pulled.items():
        damages[what](place_of(node, pushed))
    start(node)
    wrong = []
    for what, (pushed, chain) in pulled.items():
        with node.rootfs(chain) as data:
            if not reads_right(data, pushed):
                wrong.append(what)
    here = node.here()
    assert all(here[pushed.layer] for pushed, _ in pulled.values())
    node.alive()
    return wrong


def reads_right(data: Path, pushed: Pushed) -> bool:
    """Whether all files read right; an error of reading is none, wrong bytes fail the test at once."""
    try:
        found = read_tree(data)
    except OSError:
        return False
    assert found == pushed.files
    return True


def test_damage_found_after_another_boot(node: Node, proxy: Proxy, tmp_path: Path) -> None:
    """Spans whose bytes the journal proves are kept, all others are fetched again."""

    def aged(damage: Callable[[Path], None]) -> Callable[[Path], None]:
        def both(place: Path) -> None:
            damage(place)
            age(place)

        return both

    damages = {what: aged(damage) for what, damage in ANOTHER_BOOT.items()}
    assert wrong_after(node, proxy, tmp_path, damages) == []


def test_damage_by_hands(node: Node, proxy: Proxy, tmp_path: Path) -> None:
    """A file that is not what it should be is made anew, from the journal or from the registry."""
    assert wrong_after(node, proxy, tmp_path, SAME_BOOT) == []


def test_a_sound_span_is_not_fetched_again_after_another_boot(node: Node, proxy: Proxy, tmp_path: Path) -> None:
    """One damaged byte costs its span, and no other."""
    pushed = pulls.push(proxy.upstream, tmp_path)
    chain = node.pull(proxy.address, pushed)
    with node.rootfs(chain) as data:
        assert read_tree(data) == pushed.files
        drop_pages(data)
    whole = proxy.counts.paths[f"/v2/{pushed.name.rpartition(':')[0]}/blobs/{pushed.layer}"].body_bytes
    stop(node)
    place = place_of(node, pushed)
    flip(place, 5000)
    age(place)
    start(node)
    proxy.reset()
    with node.rootfs(chain) as data:
        assert read_tree(data) == pushed.files
    assert 0 < proxy.counts.blob_bytes < whole / 4


def test_the_folder_deleted_under_readers(node: Node, proxy: Proxy, tmp_path: Path) -> None:
    """Who has the image mounted goes on reading, without a new mount and without a restart."""
    pushed = pulls.push(proxy.upstream, tmp_path)
    with node.rootfs(node.pull(proxy.address, pushed)) as data:
        assert read(data, 0) == pushed.files[0]
        shutil.rmtree(place_of(node, pushed))
        assert read_tree(data) == pushed.files
    node.here()
    node.alive()
