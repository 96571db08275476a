# SPDX-License-Identifier: Apache-2.0
"""`soci pull` and `soci run` against a real containerd, runc and registry, with containerd's own overlayfs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from soci.digest import sha256_digest
from soci.errors import LimitExceeded, NotFound, SociError
from soci.oci import Descriptor
from soci_containerd import Client, Image, connect
from soci_dev import image
from soci_dev.faults import Corrupt, Seen, Stall
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support.images import busybox_image

pytestmark = pytest.mark.root

COMMAND_SECONDS = 60.0
OVERLAYFS = ("--snapshotter", "overlayfs")


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """One of our own: these tests look at all that containerd holds."""
    return make_stack(services=())


@pytest.fixture(scope="module")
def reference(stack: Stack) -> str:
    return image.push(busybox_image(), stack.registry, "test/busybox")


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.registry) as running:
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with connect(str(stack.containerd_address), stack.namespace) as connected:
        await connected.ensure_namespace()
        yield connected


def soci(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        stack.soci_command(*words), capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
    )


def leftovers(stack: Stack) -> dict[str, list[str]]:
    """What containerd holds besides committed layers and their content, by kind."""
    snapshots = stack.ctr("snapshots", "ls").stdout.splitlines()[1:]
    return {
        "containers": stack.ctr("containers", "ls", "-q").stdout.split(),
        "tasks": stack.ctr("tasks", "ls", "-q").stdout.split(),
        "leases": stack.ctr("leases", "ls", "-q").stdout.split(),
        "ingests": stack.ctr("content", "active").stdout.splitlines()[1:],
        "snapshots": [line for line in snapshots if "Active" in line],
    }


def blob(content: bytes) -> Descriptor:
    return Descriptor("application/octet-stream", sha256_digest(content), len(content))


async def test_content_is_kept_only_as_promised(client: Client) -> None:
    """Other bytes, fewer or more than the descriptor says are refused, and nothing of them stays."""
    content = b"x" * 3_000_000

    async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async with client.lease("test") as leased:
        for given in (chunks(content[:-1], b"y"), chunks(content[:-1]), chunks(content, b"x"), content[:-1]):
            with pytest.raises(SociError):
                await leased.content.write(blob(content), given, {})
            assert not await leased.content.exists(blob(content).digest)
        assert await leased.content.write(blob(content), chunks(content), {"a": "1"}) is True
        assert await leased.content.write(blob(content), chunks(b"never read"), {"b": "2"}) is False
        info = await leased.content.info(blob(content).digest)
        assert (info.size, dict(info.labels)) == (3_000_000, {"a": "1", "b": "2"})
        assert await leased.content.read(info.digest) == content
        with pytest.raises(LimitExceeded):
            await leased.content.read(info.digest, limit=1000)


async def test_a_lease_keeps_and_its_end_frees(client: Client) -> None:
    """Content without a name lives as long as its lease: the collector takes it afterwards."""
    content = b"only leased"
    async with client.lease("test") as leased:
        await leased.content.write(blob(content), content, {})
        await client.images.put(Image("gc-1", blob(content)))
        await client.images.delete("gc-1", sync=True)  # collects now
        assert await client.content.exists(blob(content).digest)
    await client.images.put(Image("gc-2", blob(b"x")))
    await client.images.delete("gc-2", sync=True)
    assert not await client.content.exists(blob(content).digest)


async def test_a_pull_is_kept_whole_and_freed_whole(stack: Stack, reference: str, client: Client) -> None:
    """After a pull the collector takes nothing that is needed; after the image's removal it takes everything."""
    pulled = soci(stack, "pull", *OVERLAYFS, reference)
    assert pulled.returncode == 0, pulled.stderr
    assert "1 downloaded" in pulled.stdout
    assert "downloaded" in pulled.stderr
    again = soci(stack, "pull", "-q", *OVERLAYFS, reference)
    assert (again.stdout, again.stderr) == (f"{reference}\n", "")
    await client.images.put(Image("gc-3", blob(b"x")))
    await client.images.delete("gc-3", sync=True)
    assert soci(stack, "run", *OVERLAYFS, "--pull", "never", reference, "/bin/busybox", "true").returncode == 0
    await client.images.delete(reference, sync=True)
    assert stack.ctr("content", "ls", "-q").stdout == ""
    assert stack.ctr("snapshots", "ls").stdout.splitlines()[1:] == []


def test_a_run_is_like_the_command_itself(stack: Stack, reference: str) -> None:
    """Output, errors and exit code pass through, variables go in, and nothing is left in containerd."""
    script = "echo $A; echo oops >&2; exit 7"
    done = soci(stack, "run", "-q", *OVERLAYFS, "--env", "A=mine", reference, "/bin/sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "mine\n", "oops\n")
    assert not any(leftovers(stack).values())


def test_much_output_arrives_whole(stack: Stack, reference: str) -> None:
    """Far more output than a fifo holds comes through, to its last byte, though the container ends at once."""
    done = subprocess.run(
        stack.soci_command(
            "run", "-q", *OVERLAYFS, reference, "/bin/busybox", "dd", "if=/dev/zero", "bs=1M", "count=50"
        ),
        capture_output=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0
    assert len(done.stdout) == 50 << 20


def test_a_slow_reader_gets_all(stack: Stack, reference: str) -> None:
    """What the container wrote before its end arrives, though our own reader begins long after that end."""
    words = ("/bin/busybox", "dd", "if=/dev/zero", "bs=1K", "count=200")  # more than one pipe, less than all buffers
    with subprocess.Popen(
        stack.soci_command("run", "-q", *OVERLAYFS, reference, *words), stdout=subprocess.PIPE
    ) as run:
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(7)  # longer than any silence that is waited for
        assert len(run.communicate(timeout=COMMAND_SECONDS)[0]) == 200 << 10
    assert run.returncode == 0
    assert not any(leftovers(stack).values())


def test_nobody_reads(stack: Stack, reference: str) -> None:
    """With our stdout closed the container still runs to its end, and its exit code is told."""
    script = "/bin/busybox yes | /bin/busybox head -c 1000000; exit 3"
    command = stack.soci_command("run", "-q", *OVERLAYFS, reference, "/bin/sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout
        running.stdout.close()
        assert running.wait(COMMAND_SECONDS) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_container(stack: Stack, reference: str, number: signal.Signals) -> None:
    """SIGINT and SIGTERM are the container's to answer; its exit code is ours."""
    script = "trap 'echo got; exit 5' INT TERM; echo up; while :; do /bin/busybox sleep 0.05; done"
    command = stack.soci_command("run", "-q", *OVERLAYFS, reference, "/bin/sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdout.readline() == "up\n"
        running.send_signal(number)
        assert running.communicate(timeout=COMMAND_SECONDS)[0] == "got\n"
    assert running.returncode == 5
    assert not any(leftovers(stack).values())


def test_a_container_that_does_not_listen_is_killed(stack: Stack, reference: str) -> None:
    """The third signal is SIGKILL, which the exit code says."""
    script = "trap '' INT TERM; echo up; while :; do /bin/busybox sleep 0.05; done"
    command = stack.soci_command("run", "-q", *OVERLAYFS, reference, "/bin/sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdout.readline() == "up\n"
        for _ in range(3):
            running.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(0.3)  # signals of one kind that are pending together would become one
        running.communicate(timeout=COMMAND_SECONDS)
    assert running.returncode == 137
    assert not any(leftovers(stack).values())


def test_what_cannot_run_leaves_nothing(stack: Stack, reference: str) -> None:
    """A program that is not in the image, and a command that outlives its --timeout, end with a message only."""
    absent = soci(stack, "run", "-q", *OVERLAYFS, reference, "/no/such/program")
    assert absent.returncode == 1
    assert absent.stderr.startswith("soci: ")
    assert "/no/such/program" in absent.stderr
    late = soci(stack, "--timeout", "1", "run", "-q", *OVERLAYFS, reference, "/bin/busybox", "sleep", "50")
    assert late.returncode == 1
    assert "--timeout 1 s" in late.stderr
    assert not any(leftovers(stack).values())


def test_names_are_taken_once(stack: Stack, reference: str) -> None:
    """--keep leaves the container with its snapshot, and its name cannot be used meanwhile."""
    assert (
        soci(stack, "run", "-q", *OVERLAYFS, "--keep", "--name", "kept", reference, "/bin/busybox", "true").returncode
        == 0
    )
    taken = soci(stack, "run", "-q", *OVERLAYFS, "--name", "kept", reference, "/bin/busybox", "true")
    assert (taken.returncode, "--name" in taken.stderr) == (1, True)
    assert leftovers(stack)["containers"] == ["kept"]
    stack.ctr("containers", "rm", "kept")
    stack.ctr("snapshots", "rm", "kept", check=False)


async def test_damage_on_the_way_is_not_pulled(stack: Stack, reference: str, proxy: Proxy, client: Client) -> None:
    """A layer whose bytes changed on the way fails the pull, and neither it nor a snapshot of it stays."""
    await _forget(client, reference)
    layer = busybox_image().layers[0]["digest"]
    proxy.hook = lambda seen: Corrupt(100) if layer in seen.path else None
    failed = soci(stack, "pull", *OVERLAYFS, reference.replace(stack.registry, proxy.address))
    assert failed.returncode == 1
    assert failed.stderr.startswith("soci: ")
    assert failed.stderr.count("\n") == 1
    assert layer not in stack.ctr("content", "ls", "-q").stdout
    assert not any(leftovers(stack).values())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_an_interrupted_pull_leaves_nothing(
    stack: Stack, reference: str, proxy: Proxy, client: Client, number: signal.Signals, code: int
) -> None:
    """A signal in the middle of a download gives lease, ingest and snapshot back."""
    await _forget(client, reference)
    layer, reached = busybox_image().layers[0]["digest"], asyncio.Event()
    loop = asyncio.get_running_loop()

    def stall(seen: Seen) -> Stall | None:
        if layer not in seen.path:
            return None
        loop.call_soon_threadsafe(reached.set)
        return Stall(30, keep=100_000)

    proxy.hook = stall
    command = stack.soci_command("pull", *OVERLAYFS, reference.replace(stack.registry, proxy.address))
    running = await asyncio.create_subprocess_exec(*command)
    await asyncio.wait_for(reached.wait(), COMMAND_SECONDS)
    running.send_signal(number)
    assert await asyncio.wait_for(running.wait(), COMMAND_SECONDS) == code
    assert not any((await asyncio.to_thread(leftovers, stack)).values())


async def _forget(client: Client, reference: str) -> None:
    try:
        await client.images.delete(reference, sync=True)
    except NotFound:
        return


def test_what_is_not_there_is_said(stack: Stack, reference: str) -> None:
    """An absent image, snapshotter and local copy each have a message that names them and the way out."""
    nowhere = soci(stack, "pull", *OVERLAYFS, f"{stack.registry}/no/such:1")
    unknown = soci(stack, "pull", "--snapshotter", "nosuch", reference)
    local = soci(stack, "run", *OVERLAYFS, "--pull", "never", f"{stack.registry}/not/pulled:1", "true")
    assert [done.returncode for done in (nowhere, unknown, local)] == [1, 1, 1]
    assert "no/such" in nowhere.stderr
    assert "[proxy_plugins.nosuch]" in unknown.stderr
    assert "--pull missing" in local.stderr
