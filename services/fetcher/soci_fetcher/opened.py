# SPDX-License-Identifier: Apache-2.0
"""Layers whose files stay open for filling: a few, those used last, and all that somebody still uses."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from soci.digest import Digest
from soci_cache import LayerStore, LayerWriter
from soci_fetcher.claims import Claims
from soci_runtime.flights import in_thread

OPEN_LAYERS: Final = 64
"""Layers whose files stay open; the one unused for longest is closed first."""

Layer = tuple[Digest, Digest]  # layer and zTOC


@dataclass(slots=True, eq=False)
class Opened:
    """One layer's files. ``users`` counts those who must not find them closed; ``image`` asked for it last."""

    key: Layer
    writer: LayerWriter
    claims: Claims
    image: str = ""
    users: int = 0

    def close(self) -> None:
        """Let go of the files; nobody may be using them."""
        self.writer.close()
        self.claims.close()


class OpenLayers:
    """All of them in one process. Used from one event loop."""

    def __init__(self, store: LayerStore) -> None:
        self._store = store
        self.open: OrderedDict[Layer, Opened] = OrderedDict()
        self.old: list[Opened] = []  # their folder is gone, but somebody still uses them

    async def use(self, key: Layer, image: str) -> Opened:
        """The layer's files, with one more user: say `done` afterwards. `NotFound` where it is not prepared."""
        found = self.open.get(key)
        if found is not None and not found.writer.current():
            self.old.append(self.open.pop(key))
            found = None
        if found is None:
            writer, claims = await in_thread(self._files, key)
            found = Opened(key, writer, claims)
            if key in self.open:  # another ask opened it meanwhile
                found.close()
                found = self.open[key]
            self.open[key] = found
        self.open.move_to_end(key)
        found.image = image
        found.users += 1
        self._close_idle()
        return found

    def _files(self, key: Layer) -> tuple[LayerWriter, Claims]:
        writer = self._store.write(*key)
        try:
            return writer, Claims(writer.directory)
        except BaseException:
            writer.close()
            raise

    def done(self, opened: Opened) -> None:
        """One user less."""
        opened.users -= 1
        if not opened.users:
            self._close_idle()

    def _close_idle(self) -> None:
        for opened in [one for one in self.old if not one.users]:
            self.old.remove(opened)
            opened.close()
        idle = [key for key, one in self.open.items() if not one.users]
        for key in idle[: max(0, len(self.open) - OPEN_LAYERS)]:
            self.open.pop(key).close()

    def close(self) -> None:
        """Close all; nothing may be under way."""
        for opened in [*self.open.values(), *self.old]:
            opened.close()
        self.open.clear()
        self.old.clear()
