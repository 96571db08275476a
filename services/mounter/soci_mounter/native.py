# SPDX-License-Identifier: Apache-2.0
"""Layers as the kernel's own file systems: an EROFS image of the metadata, and a device that brings the bytes.

An EROFS mount belongs to the kernel and stays when this process ends. Its device is a file of one FUSE mount
(`soci_mounter.device`), whose connection a holder keeps (`soci_mounter.holder`): a successor goes on where the
predecessor stopped, and no reader fails. The folder of a mount is its path below ``mounts``.

Where all of a layer is here and proven (`soci_mounter.graduate`) the device is ``layer.tar`` itself: such a mount is
*native*, and needs none of our processes. What a mount is, its image's name tells, which the kernel tells in turn: so
it is known whoever died when.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.erofs import Attributes, Showing, build_erofs
from soci.errors import FailedPrecondition, SociError, Unavailable
from soci_mounter import holder, kernel
from soci_mounter.device import Device, DeviceServer, Layer
from soci_mounter.filesystem import LATEST_NS, Inherited, Manner
from soci_mounter.protocol import MAX_READ
from soci_runtime.flights import in_thread

HELD: Final = "device"
"""The name under which the holder keeps the connection."""
HOLD_SECONDS: Final = 5.0
"""How often to see that the holder, which may have been restarted, still has it."""
OLDEST_KERNEL: Final = (6, 12)
"""The first that mounts EROFS from a file without a loop device."""
EROFS, NATIVE = "erofs", "native"
"""The two ways; so end the names of their images."""
_READ_ONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8  # mount(2)

_libc = ctypes.CDLL(None, use_errno=True)

Report = Callable[[str, BaseException], None]


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how layers are shown on this node."""

    setting: str  # auto, fuse, erofs
    kernel: tuple[int, int]
    erofs: bool  # the kernel has EROFS
    held: bool  # a holder answers


def choose(machine: Machine) -> tuple[str, str]:
    """``erofs`` or ``fuse``, and why. `FailedPrecondition` where ``erofs`` is demanded and cannot be."""
    release = ".".join(map(str, machine.kernel))
    if machine.setting == "fuse":
        return "fuse", "mount_mode is fuse"
    if not machine.erofs:
        lacks = "the kernel has no EROFS"
    elif machine.kernel < OLDEST_KERNEL:
        lacks = f"Linux {release} mounts no EROFS from files (6.12 does)"
    elif machine.setting == "auto" and not machine.held:
        lacks = "no soci-holder answers: a restart of the mounter would end the mounts"
    else:
        return "erofs", f"Linux {release}" + (", held" if machine.held else ", not held")
    if machine.setting == "erofs":
        raise FailedPrecondition(f"mount_mode is erofs, but {lacks}")
    return "fuse", lacks


def look_at(setting: str, folder: Path) -> Machine:
    """This machine's facts. Loads the kernel's EROFS where it is a module that is allowed to be."""
    release = os.uname().release.split(".")
    version = tuple(int("".join(filter(str.isdigit, part)) or "0") for part in release[:2])
    held = True
    try:
        holder.get(folder / holder.SOCKET, "nothing")
    except SociError:
        held = False
    return Machine(setting, (version[0], version[-1]), kernel.has_file_system("erofs"), held)


def abandon(folder: Path, mounts: Path) -> None:
    """Take away what a predecessor showed by EROFS, for this process does not: no read may wait for it. Blocks."""
    with suppress(SociError):
        holder.drop(folder / holder.SOCKET, HELD)
    kernel.clear(folder / "data")
    if not kernel.mounted_at(mounts) and mounts.is_dir():
        for path in mounts.iterdir():
            kernel.clear(path)


class Native:
    """All EROFS mounts of this node, and their devices. Used from one event loop."""

    def __init__(self, folder: Path, mounts: Path, report: Report) -> None:
        """``folder`` is the mounter's own, ``mounts`` the folder whose names are the mounts'."""
        self._folder = folder
        self._data = folder / "data"
        self._images = folder / "images"
        self._mounts = mounts
        self._report = report
        self._server: DeviceServer | None = None
        self._shown: dict[str, str] = {}  # mount -> way
        self._descriptor = -1
        self._successor = False
        self._stopped = False
        self._one_by_one = threading.Lock()

    def open(self) -> None:
        """Take over a predecessor's connection, or begin one. Blocks. Raises `Unavailable`."""
        if any(kind.startswith("fuse") for _, kind in kernel.mounted_at(self._mounts)):
            kernel.clear(self._mounts)  # of a predecessor that showed layers by FUSE, dead perhaps
        self._images.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mounts.mkdir(mode=0o711, parents=True, exist_ok=True)
        with suppress(SociError):
            self._descriptor = holder.get(self._folder / holder.SOCKET, HELD) or -1
        # By the list of mounts: to look at the folder itself is to wait for an answer that only we can give.
        self._successor = self._descriptor >= 0 and len(kernel.mounted_at(self._data)) == 1
        if not self._successor:
            self._begin()
        self._server = DeviceServer(self._descriptor, self._report)
        self.hold()

    def _begin(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        for path in self._mounts.iterdir():  # of a connection that is gone: their devices answer no more
            if kernel.mounted_at(path) and self._way_of(path.name) != NATIVE:
                kernel.clear(path)
        kernel.clear(self._data)
        self._data.mkdir(mode=0o700, exist_ok=True)
        try:
            self._descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"/dev/fuse cannot be opened: {error}") from error
        options = f"fd={self._descriptor},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_READ}"
        _mount("soci-data", self._data, "fuse", _READ_ONLY | _NOSUID | _NODEV | _NOEXEC, options)

    def hold(self) -> None:
        """See that the holder has the connection. Blocks. Trouble is reported, and tried again the next time."""
        path = self._folder / holder.SOCKET
        try:
            held = holder.get(path, HELD)
            if held is None:
                holder.put(path, HELD, self._descriptor)
            else:
                os.close(held)
        except SociError as error:
            self._report("hold", error)

    async def serve(self) -> None:
        """Answer the kernel until `stop`. Raises `Unavailable` where the mount is taken away."""
        if self._server is None:
            raise Unavailable("the device's connection is not open")
        holding = asyncio.get_running_loop().create_task(self._keep_held())
        try:
            await self._server.serve(successor=self._successor)
            if not self._stopped:
                raise Unavailable(f"the mount at {self._data} was taken away")
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            os.close(self._descriptor)

    def stop(self) -> None:
        """Take no more questions. Mounts and connection stay for the successor, if a holder has it."""
        self._stopped = True
        if self._server is not None:
            self._server.stop()

    def all_known(self) -> None:
        """All that a predecessor showed is added."""
        if self._server is not None:
            self._server.all_known()

    async def _keep_held(self) -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS)
            await in_thread(self.hold)

    def adopt(self, mount: str, layer: Layer) -> str:
        """Go on with a mount that a predecessor made, by the way that is answered; "" where there is none."""
        way = self._way_of(mount)
        if way == NATIVE:
            self._shown[mount] = way
        elif way == EROFS and self._successor:
            self._add(mount, layer)
        else:
            return ""
        return way

    def _way_of(self, mount: str) -> str:
        """By which way the kernel shows what is mounted there, last; "" for none of ours."""
        mounts = kernel.mounts_at(self._mounts / mount)
        image = Path(mounts[-1][2]) if mounts and mounts[-1][1] == "erofs" else Path()
        return image.suffix[1:] if image.parent == self._images and image.suffix[1:] in {EROFS, NATIVE} else ""

    async def show(
        self, mount: str, layer: Layer, inherited: Mapping[int, Inherited], manner: Manner, tar: Path | None
    ) -> str:
        """Mount the layer at its folder; the way. Raises `SociError` where EROFS cannot show it: FUSE can.

        ``tar`` is a file with all of the layer, which keeps its bytes: the mount is native, if the kernel can.
        """
        if tar is not None:
            try:
                await in_thread(self._mount, mount, layer, _Wish(inherited, manner, NATIVE, tar))
            except SociError as error:
                self._report("mount natively", error)
            else:
                self._shown[mount] = NATIVE
                return NATIVE
        self._add(mount, layer)
        try:
            await in_thread(self._mount, mount, layer, _Wish(inherited, manner, EROFS, self._data / mount))
        except BaseException:
            self._forget(mount)
            raise
        return EROFS

    def forget(self, mount: str) -> None:
        """Let go of what a mount needs not while nobody reads it."""
        if self._server is not None:
            self._server.forget(mount)

    def way(self, mount: str) -> str:
        """The way of one of our mounts; "" for others."""
        return self._shown.get(mount, "")

    async def hide(self, mount: str) -> None:
        """Take the mount away; containers that still use it lose its bytes that are not cached."""
        await in_thread(self._unmount, mount)
        self._forget(mount)

    def _add(self, mount: str, layer: Layer) -> None:
        if self._server is None:
            raise Unavailable("the device's connection is not open")
        self._server.add(Device(mount, layer))
        self._shown[mount] = EROFS

    def _forget(self, mount: str) -> None:
        self._shown.pop(mount, None)
        if self._server is not None:
            self._server.remove(mount)

    def _mount(self, mount: str, layer: Layer, wish: _Wish) -> None:
        taken = {node: _attributes(one) for node, one in wish.inherited.items()}
        manner = wish.manner
        image = build_erofs(layer.tree, layer.size, Showing(taken, manner.opaque, manner.uids, manner.gids))
        path, top = self._images / f"{mount}.{wish.way}", self._mounts / mount
        draft = path.with_suffix(".new")
        try:
            draft.write_bytes(image)
            draft.replace(path)
            top.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise Unavailable(f"the EROFS image of {mount} cannot be written: {error}") from error
        kernel.clear(top)
        with self._one_by_one:
            before = kernel.erofs_devices()
            _mount(str(path), top, "erofs", _READ_ONLY, f"device={wish.device}")
            kernel.tune_erofs(before)

    def _unmount(self, mount: str) -> None:
        kernel.clear(self._mounts / mount)
        with suppress(OSError):
            (self._mounts / mount).rmdir()
        for way in (EROFS, NATIVE):
            (self._images / f"{mount}.{way}").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Wish:
    """How a layer is to be mounted."""

    inherited: Mapping[int, Inherited]
    manner: Manner
    way: str
    device: Path


def _attributes(one: Inherited) -> Attributes:
    mtime_ns = one.mtime_ns if 0 <= one.mtime_ns <= LATEST_NS else 0
    return Attributes(one.mode, one.uid, one.gid, mtime_ns, one.xattrs)


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    done = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), os.fsencode(options)
    )
    if done != 0:
        number = ctypes.get_errno()
        raise Unavailable(f"{kind} at {target} cannot be mounted: {os.strerror(number)}")
