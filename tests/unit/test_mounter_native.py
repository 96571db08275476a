# SPDX-License-Identifier: Apache-2.0
"""How layers are shown, which file of a layer owns which bytes, the FUSE protocol's frames, and the holder."""

from __future__ import annotations

import os
import struct

import pytest

from soci.errors import FailedPrecondition, InvalidInput
from soci.tree import LayerTree
from soci_mounter import protocol
from soci_mounter.device import Members, node_of
from soci_mounter.holder import HELD_MAX, Held
from soci_mounter.native import Machine, choose
from support.trees import entry

NEW, OLD = (6, 12), (6, 11)


@pytest.mark.parametrize(
    ("machine", "way", "why"),
    [
        (Machine("fuse", NEW, erofs=True, held=True), "fuse", "mount_mode"),
        (Machine("auto", NEW, erofs=True, held=True), "erofs", "Linux 6.12"),
        (Machine("auto", NEW, erofs=True, held=False), "fuse", "soci-holder"),
        (Machine("auto", NEW, erofs=False, held=True), "fuse", "no EROFS"),
        (Machine("auto", OLD, erofs=True, held=True), "fuse", "6.11"),
        (Machine("erofs", NEW, erofs=True, held=False), "erofs", "not held"),
        (Machine("erofs", (7, 0), erofs=True, held=True), "erofs", "7.0"),
    ],
)
def test_how_layers_are_shown(machine: Machine, way: str, why: str) -> None:
    """Every row of the decision, each with its reason."""
    got, reason = choose(machine)
    assert got == way
    assert why in reason


@pytest.mark.parametrize(
    "machine", [Machine("erofs", OLD, erofs=True, held=True), Machine("erofs", NEW, erofs=False, held=True)]
)
def test_what_is_demanded_and_cannot_be_is_refused(machine: Machine) -> None:
    """`erofs` on a kernel without it ends the start, and says what is missing."""
    with pytest.raises(FailedPrecondition, match="mount_mode is erofs, but"):
        choose(machine)


def test_whose_bytes() -> None:
    """A range is cut at the files' ends; what belongs to no file is left out; empty files own nothing."""
    members = [entry(b"a", offset=512, size=700), entry(b"e", offset=2048), entry(b"b", offset=2560, size=10)]
    tree = LayerTree.of(members)
    a, b = tree.find(b"a"), tree.find(b"b")
    found = Members(tree)
    assert found.within(0, 512) == []
    assert found.within(0, 1024) == [(a, 512, 0, 512)]
    assert found.within(1024, 4096) == [(a, 512, 512, 700), (b, 2560, 0, 10)]
    assert found.within(2565, 2566) == [(b, 2560, 5, 6)]
    assert found.within(3000, 9000) == []


def test_files_that_share_bytes_are_refused() -> None:
    """Whose header would have to be right is not decidable then."""
    with pytest.raises(InvalidInput, match="share bytes"):
        Members(LayerTree.of([entry(b"a", offset=512, size=1000), entry(b"b", offset=1024, size=10)]))


def test_a_devices_number_is_its_names() -> None:
    """The same in every process, never the root's, and different for different names."""
    assert node_of("m1") == node_of("m1") != node_of("m2")
    assert node_of("m1") > protocol.ROOT


def request(opcode: int, body: bytes, *, length: int | None = None) -> bytes:
    size = 40 + len(body) if length is None else length
    return struct.pack("<IIQQIIIHH", size, opcode, 7, 9, 0, 0, 0, 0, 0) + body


@pytest.mark.parametrize("data", [b"", bytes(39), request(15, b"x", length=40), request(15, b"", length=2**31)])
def test_frames_that_the_kernel_does_not_send_are_refused(data: bytes) -> None:
    """Short, or of another length than they say."""
    with pytest.raises(InvalidInput):
        protocol.parse_request(data)


def test_reads_have_a_limit() -> None:
    """A read says offset and length; impossible ones are refused."""
    read = protocol.parse_request(request(protocol.READ, struct.pack("<QQI", 0, 512, 4096)))
    assert (read.opcode, read.unique, read.node) == (protocol.READ, 7, 9)
    assert protocol.read_range(read) == (512, 4096)
    for body in (b"", struct.pack("<QQI", 0, 1 << 63, 1), struct.pack("<QQI", 0, 0, protocol.MAX_READ + 1)):
        with pytest.raises(InvalidInput):
            protocol.read_range(protocol.parse_request(request(protocol.READ, body)))


@pytest.mark.parametrize(
    ("minor", "flags", "more", "good"),
    [(40, 1 << 30, 1 << 7, True), (44, 1 << 30 | 1, 1 << 7, True), (39, 1 << 30, 1 << 7, False),
     (40, 0, 1 << 7, False), (40, 1 << 30, 0, False)],
)  # fmt: skip
def test_a_kernel_that_cannot_send_again_is_refused(minor: int, flags: int, more: int, good: bool) -> None:  # noqa: FBT001
    """Without FUSE_NOTIFY_RESEND a successor could not answer what its predecessor left: said at once."""
    ask = protocol.parse_request(request(protocol.INIT, struct.pack("<IIIII", 7, minor, 1 << 20, flags, more)))
    if good:
        assert len(protocol.init(ask)) == 64
        assert struct.unpack_from("<II", protocol.init(ask)) == (protocol.MAJOR, protocol.MINOR)
    else:
        with pytest.raises(FailedPrecondition, match=r"RESEND|too old"):
            protocol.init(ask)


def test_the_holder_keeps_what_it_is_given_and_no_more() -> None:
    """Put, get, replaced, dropped; a full one refuses and closes what came; nonsense is refused."""
    held = Held()
    first, second = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    assert held.answer(["put", "a"], [first]) == (b"kept", [])
    assert held.answer(["get", "a"], []) == (b"here", [first])
    assert held.answer(["put", "a"], [second]) == (b"kept", [])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(first)
    assert held.answer(["get", "b"], []) == (b"none", [])
    for number in range(HELD_MAX - 1):
        assert held.answer(["put", f"x{number}"], [os.dup(second)])[0] == b"kept"
    extra = os.dup(second)
    assert held.answer(["put", "more"], [extra]) == (b"refused", [])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(extra)
    for words in ([], ["put"], ["put", "a"], ["put", "../a"], ["steal", "a"], ["get", "a", "b"]):
        assert held.answer(words, [])[0] == b"refused"
    assert held.answer(["drop", "a"], []) == (b"gone", [])
    held.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(second)
