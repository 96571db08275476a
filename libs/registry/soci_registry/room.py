# SPDX-License-Identifier: Apache-2.0
"""Memory for one range: made once, filled from its front by whichever tries and hosts it takes, handed on uncopied."""

from __future__ import annotations

import io
from typing import Self


class Room:
    """``size`` bytes, of which the first ``count`` have come. No memory is taken before the first of them comes.

    A context manager: at its end the memory is lent to nobody any more, or its own end would be an error that no one
    can catch.
    A `BytesIO` over fresh zeros lends a view to write into and gives its bytes away without a copy once all views
    are back; the zeros are the kernel's own, so that no byte is touched before it arrives.
    """

    __slots__ = ("_file", "_view", "count", "size")

    def __init__(self, size: int) -> None:
        self._file: io.BytesIO | None = None
        self._view = memoryview(b"")
        self.size = size
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()
        self._file = None

    @property
    def missing(self) -> int:
        """Bytes that have not come."""
        return self.size - self.count

    def rest(self) -> memoryview:
        """Where the missing bytes go; whoever writes there adds to ``count``."""
        if self._file is None:
            self._file = io.BytesIO(bytes(self.size))
            self._view = self._file.getbuffer()
        return self._view[self.count :]

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes, of which there may be no more than are missing."""
        self.rest()[: len(data)] = data
        self.count += len(data)

    def content(self) -> bytes:
        """All bytes, once they have come; the room may not be filled any more."""
        if self.missing:
            raise RuntimeError(f"{self.missing} bytes are missing")
        self._view.release()  # while memory is lent it would be copied
        return b"" if self._file is None else self._file.getvalue()
