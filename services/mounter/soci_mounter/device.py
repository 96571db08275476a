# SPDX-License-Identifier: Apache-2.0
"""The data device of EROFS mounts: one file a mount, its content the layer's tar, bytes brought when they are read.

The kernel has the metadata (`soci.erofs`), so all that it asks here is bytes. The descriptor of the connection outlives
this process (`soci_mounter.holder`): a successor takes it, asks the kernel to send again what was left unanswered, and
answers. Readers wait meanwhile; none fails.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from soci.errors import FailedPrecondition, InvalidInput, SociError
from soci.tree import LayerTree, Node
from soci_mounter import protocol
from soci_mounter.filesystem import Content, Handle
from soci_mounter.numbers import compact
from soci_mounter.protocol import Request

BLOCK = 512
HANDLES = 256
"""Files of one device whose reading order is remembered."""
BURST = 64
"""Requests that are taken before the loop's other work has its turn."""
READS = 1024
"""Reads in flight of all devices together; the kernel keeps the others until one ends."""

Report = Callable[[str, BaseException], None]


def node_of(mount: str) -> int:
    """The device's inode number: from the mount's name alone, for the kernel keeps it while processes come and go."""
    return int.from_bytes(hashlib.sha256(mount.encode()).digest()[:8], "little") | 1 << 63


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as a device needs it. ``size`` is its tar's, in bytes."""

    tree: LayerTree
    content: Content
    size: int
    members: Callable[[], Members]
    """Made once a layer; raises as `Members`."""
    node: Callable[[int], Awaitable[Node]]


class Members:
    """Which file of a layer owns which bytes of its tar."""

    def __init__(self, tree: LayerTree) -> None:
        """`InvalidInput` where two files share bytes: what was read could not be told to be one's or the other's."""
        columns = tree.columns
        found = sorted(
            (columns.data_offset[node], columns.size[node], node)
            for node in range(len(tree))
            if stat.S_ISREG(columns.mode[node]) and columns.size[node]
        )
        self._starts = compact([start for start, _, _ in found])
        self._ends = compact([start + size for start, size, _ in found])
        self._nodes = compact([node for _, _, node in found])
        if any(end > start for end, start in zip(self._ends, self._starts[1:], strict=False)):
            raise InvalidInput("two files of the layer share bytes of its tar")

    def within(self, start: int, end: int) -> Sequence[tuple[int, int, int, int]]:
        """``(node, offset in the tar, from, to)``, in order, of the files with bytes in [start, end)."""
        found = []
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            first, last = max(start, self._starts[at]), min(end, self._ends[at])
            if first < last:
                begins = self._starts[at]
                found.append((self._nodes[at], begins, first - begins, last - begins))
            at += 1
        return found


class Device:
    """One mount's file. Bytes that belong to no file of the layer (tar's own) are zeros: nobody asks for them."""

    def __init__(self, mount: str, layer: Layer) -> None:
        """Raises `InvalidInput` for a layer that cannot be shown so."""
        self.mount = mount
        self.node = node_of(mount)
        self.size = -(-layer.size // BLOCK) * BLOCK  # whole blocks: the kernel reads no others
        self._content = layer.content
        self._members = layer.members()
        self._node = layer.node
        self._handles: OrderedDict[int, Handle] = OrderedDict()

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes at ``offset``, cut at the end. Raises what reading the files raises."""
        end = min(offset + length, self.size)
        found = self._members.within(offset, end)
        if len(found) == 1 and found[0][3] - found[0][2] == end - offset:
            node, _, start, stop = found[0]
            return await (await self._handle(node)).read(start, stop - start)
        made = bytearray(max(0, end - offset))
        for node, begins, start, stop in found:
            at = begins + start - offset
            made[at : at + stop - start] = await (await self._handle(node)).read(start, stop - start)
        return bytes(made)

    def forget(self) -> None:
        """Let go of what is only remembered of files' reading order."""
        self._handles.clear()

    async def _handle(self, node: int) -> Handle:
        handle = self._handles.pop(node, None)
        if handle is None:
            handle = self._content.open(self.mount, node, await self._node(node))
        self._handles[node] = handle
        if len(self._handles) > HANDLES:
            self._handles.popitem(last=False)
        return handle


class DeviceServer:
    """All devices of this node, over one connection. Used from one event loop."""

    def __init__(self, descriptor: int, report: Report) -> None:
        """``descriptor`` is a ``/dev/fuse`` that is mounted; `serve` sets it to not block."""
        self._fuse = descriptor
        self._report = report
        self._devices: dict[int, Device] = {}
        self._names: dict[bytes, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[None] | None = None
        self._known = asyncio.Event()
        self._listening = False

    def add(self, device: Device) -> None:
        """Show a device under its mount's name."""
        self._devices[device.node] = device
        self._names[device.mount.encode()] = device.node

    def remove(self, mount: str) -> None:
        """Take a device away; reads of it fail from now on."""
        self._devices.pop(node_of(mount), None)
        self._names.pop(mount.encode(), None)

    def forget(self, mount: str) -> None:
        """See `Device.forget`."""
        device = self._devices.get(node_of(mount))
        if device is not None:
            device.forget()

    def all_known(self) -> None:
        """All devices of a predecessor are added: what is unknown from now on is nobody's."""
        self._known.set()

    async def serve(self, *, successor: bool) -> None:
        """Answer until the mount is gone. ``successor``: another process began with this connection.

        Raises `FailedPrecondition` where the kernel's FUSE is too old.
        """
        loop = asyncio.get_running_loop()
        os.set_blocking(self._fuse, False)
        self._ended = loop.create_future()
        if successor:
            os.write(self._fuse, protocol.resend())
        self._listen()
        try:
            await self._ended
        finally:
            self._deafen()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Have `serve` return; what is not answered by then is the successor's."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _listen(self) -> None:
        if not self._listening:
            asyncio.get_running_loop().add_reader(self._fuse, self._readable)
            self._listening = True

    def _deafen(self) -> None:
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._fuse)
            self._listening = False

    def _readable(self) -> None:
        for _ in range(BURST):
            if len(self._tasks) >= READS:
                self._deafen()
                return
            try:
                data = os.read(self._fuse, protocol.REQUEST_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {errno.EINTR, errno.ENOENT}:  # the request was taken back
                    continue
                if error.errno != errno.ENODEV:  # that is: unmounted
                    self._report("read", error)
                self.stop()
                return
            try:
                self._take(protocol.parse_request(data))
            except InvalidInput as error:
                self._report("parse", error)

    def _take(self, request: Request) -> None:
        if request.opcode in protocol.SILENT:
            return
        if request.opcode == protocol.INIT:
            self._begin(request)
        elif request.opcode == protocol.READ or not self._known.is_set():
            task = asyncio.get_running_loop().create_task(self._later(request))
            self._tasks.add(task)
            task.add_done_callback(self._landed)
        else:
            self._send(*self._answer(request))

    def _begin(self, request: Request) -> None:
        try:
            self._send(*protocol.reply(request.unique, protocol.init(request)))
        except FailedPrecondition as error:
            self._send(*protocol.failure(request.unique, errno.EPROTO))
            if self._ended is not None and not self._ended.done():
                self._ended.set_exception(error)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._ended is not None and not self._ended.done():
            self._listen()

    async def _later(self, request: Request) -> None:
        """An answer that may have to wait: for bytes, or for the predecessor's devices."""
        try:
            await self._known.wait()
            if request.opcode != protocol.READ:
                answer = self._answer(request)
            else:
                offset, length = protocol.read_range(request)
                device = self._devices.get(request.node)
                if device is None:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                answer = protocol.reply(request.unique, await device.read(offset, length))
        except asyncio.CancelledError:
            raise  # no answer: the successor is asked again
        except Exception as error:  # noqa: BLE001  whatever it is, a reader waits
            if not isinstance(error, OSError | SociError):
                self._report("read", error)
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            answer = protocol.failure(request.unique, number)
        self._send(*answer)

    def _answer(self, request: Request) -> tuple[bytes, bytes]:
        unique, node = request.unique, request.node
        match request.opcode:
            case protocol.LOOKUP:
                found = self._names.get(request.body.rstrip(b"\0")) if node == protocol.ROOT else None
                if found is None:
                    return protocol.failure(unique, errno.ENOENT)
                return protocol.reply(unique, protocol.entry(found, self._devices[found].size))
            case protocol.GETATTR:
                device = self._devices.get(node)
                if node != protocol.ROOT and device is None:
                    return protocol.failure(unique, errno.ESTALE)
                return protocol.reply(unique, protocol.attribute_answer(node, device.size if device else 0))
            case protocol.OPEN:
                return protocol.reply(unique, protocol.opened())
            case protocol.STATFS:
                return protocol.reply(unique, protocol.statfs())
            case protocol.RELEASE | protocol.FLUSH | protocol.DESTROY:
                return protocol.reply(unique)
            case _:
                return protocol.failure(unique, errno.ENOSYS)

    def _send(self, head: bytes, content: bytes) -> None:
        try:
            os.writev(self._fuse, [head, content] if content else [head])
        except OSError as error:
            if error.errno != errno.ENOENT:  # nobody waits for it any more
                self._report("answer", error)
