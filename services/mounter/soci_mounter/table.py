# SPDX-License-Identifier: Apache-2.0
"""A layer's table of contents, in memory while it is used.

Once the kernel has a layer's names and attributes (`soci_mounter.native`), the table is needed for headers of files
that were never read, and for a file's name: not at all for most of a layer's life. It takes half a kilobyte a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from soci.digest import Digest
from soci.entries import Entries
from soci.errors import Unavailable
from soci.tree import LayerTree, Node
from soci_cache import LayerReader, LayerStore
from soci_mounter.headers import Headers
from soci_runtime.flights import in_thread

KEEP_SECONDS = 20.0
"""How long it stays after its last use."""


class Table:
    """Tree and headers of one layer. Used from one event loop."""

    def __init__(self, entries: Entries, tree: LayerTree, load: Callable[[], Entries], *, verify: bool) -> None:
        """``load`` reads the same entries again; it blocks, and raises `SociError`. Without ``verify``: no headers."""
        self._load = load
        self._held: tuple[Entries, LayerTree] | None = (entries, tree)
        self._turn = asyncio.Lock()
        self._used = 0.0
        self.pinned = False  # somebody else has the tree anyway
        self.headers = Headers(entries, self._entries) if verify else None

    async def tree(self) -> LayerTree:
        """The tree. Raises `SociError` where the layer's zTOC cannot be read any more."""
        return (await self._get())[1]

    async def node(self, number: int) -> Node:
        """One node of the tree; raises as `tree`."""
        return (await self.tree()).node(number)

    def forget(self) -> bool:
        """Let go of it, if it was not used lately; whether there was something to let go of."""
        idle = asyncio.get_running_loop().time() - self._used > KEEP_SECONDS
        if not idle or self.pinned or self._held is None or self._turn.locked():
            return False
        self._held = None
        if self.headers:
            self.headers.forget()
        return True

    async def _entries(self) -> Entries:
        return (await self._get())[0]

    async def _get(self) -> tuple[Entries, LayerTree]:
        self._used = asyncio.get_running_loop().time()
        if self._held is None:
            async with self._turn:
                if self._held is None:
                    self._held = await in_thread(self._read)
        return self._held

    def _read(self) -> tuple[Entries, LayerTree]:
        entries = self._load()
        return entries, LayerTree.of(entries)


async def open_table(store: LayerStore, layer: Digest, ztoc: Digest, *, verify: bool) -> tuple[Table, LayerReader]:
    """A layer's table, and a reader that has none. Raises `SociError`."""

    def load() -> Entries:
        return Entries.of(store.table(layer, ztoc).entries)

    entries, tree, reader = await in_thread(_open, store, layer, ztoc)
    return Table(entries, tree, load, verify=verify), reader


def _open(store: LayerStore, layer: Digest, ztoc: Digest) -> tuple[Entries, LayerTree, LayerReader]:
    """In a thread: a large layer's table of contents takes a while to read."""
    try:
        # After another boot the cache must be proven before it is believed.
        reader = store.prepare(layer, ztoc, None)
    except OSError as error:
        raise Unavailable(f"the span cache cannot be read: {error}") from error
    try:
        entries = Entries.of(reader.ztoc.entries)
        tree = LayerTree.of(entries)
        reader.forget_table()
    except BaseException:
        reader.close()
        raise
    return entries, tree, reader
