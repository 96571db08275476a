# SPDX-License-Identifier: Apache-2.0
"""Measure building and loading zTOCs, each against something that the same machine does at the same time.

Every figure is a ratio of a pair of runs in fresh processes, one right after the other, in turns; what is printed is
the median of the pairs. See bench/README.md.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

READ_BYTES = 1 << 20
FILES = 50_000
"""Of the layer of many small files."""
VOCABULARY = 20_000


def texts(seed: int) -> Callable[[int], bytes]:
    """Makes text of any length whose words are as unequally frequent as in prose: gzip takes it to 0.3 to 0.4."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 11))) for _ in range(VOCABULARY)]
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(VOCABULARY)))
    pool = b" ".join(rng.choices(words, cum_weights=weights, k=2_000_000))

    def make(size: int) -> bytes:
        out = []
        while size > 0:
            at, length = rng.randrange(len(pool) - 20_000), min(size, rng.randrange(2_000, 20_000))
            out.append(pool[at : at + length])
            size -= length
        return b"".join(out)

    return make


def large_files(size: int) -> Iterator[tuple[str, bytes]]:
    """Files of 10 MiB, ``size`` bytes in all."""
    text = texts(1)
    return ((f"usr/share/large/file-{i:03d}", text(10 << 20)) for i in range(size // (10 << 20)))


def small_files() -> Iterator[tuple[str, bytes]]:
    """50,000 files of about 2 KB, like a tree of Python packages."""
    text, rng = texts(2), random.Random(2)
    name = "usr/lib/python3/dist-packages/package{:04d}/part{}/module_{:05d}.py"
    return ((name.format(i // 37, i % 5, i), text(int(rng.lognormvariate(7.2, 1)))) for i in range(FILES))


def long_names() -> Iterator[tuple[str, bytes]]:
    """The small files, far down: no name fits into a header, so that GNU's form has one before each."""
    return (("usr/lib/a-rather-long-name/" * 4 + name, data) for name, data in small_files())


def write_layer(path: Path, files: Iterator[tuple[str, bytes]], times: tuple[str, ...] = ()) -> None:
    """A gzip layer, level 6, of ``files`` and their directories; ``times`` are in PAX records before each file."""
    seen: set[str] = set()
    form = tarfile.PAX_FORMAT if times else tarfile.GNU_FORMAT
    with (
        gzip.GzipFile(path, "wb", 6, mtime=0) as out,
        tarfile.open(fileobj=out, mode="w|", format=form) as tar,
    ):
        for number, (name, data) in enumerate(files):
            parts = name.split("/")
            for folder in ("/".join(parts[:i]) for i in range(1, len(parts))):
                if folder not in seen:
                    seen.add(folder)
                    entry = tarfile.TarInfo(folder + "/")
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uname, entry.gname = len(data), 1_700_000_000 + number, "root", "root"
            entry.pax_headers = dict.fromkeys(times, f"{1700000000 + number}.{number * 123456789 % 10**9:09d}")
            tar.addfile(entry, io.BytesIO(data))


def inflate(layer: Path) -> float:
    """Seconds that the standard library's zlib takes from the file's first byte to its last."""
    begun, inflater = time.perf_counter(), zlib.decompressobj(31)
    with layer.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            inflater.decompress(chunk)
    return time.perf_counter() - begun


def build(layer: Path) -> float:
    """Seconds that building the zTOC takes; it is left beside the layer."""
    import numpy  # noqa: F401, ICN001, PLC0415  (a program imports once, however many layers it builds)

    from soci.build import ZtocBuilder  # noqa: PLC0415  (the other measurements must not pay for it)

    begun, builder = time.perf_counter(), ZtocBuilder("gzip")
    with layer.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            builder.feed(chunk)
    built = builder.finish()
    seconds = time.perf_counter() - begun
    layer.with_suffix(".ztoc").write_bytes(built.ztoc_bytes)
    return seconds


def load(layer: Path) -> float:
    """Seconds from a zTOC's bytes to all that a mount needs of it."""
    import numpy  # noqa: F401, ICN001, PLC0415

    from soci.span import Spans  # noqa: PLC0415
    from soci.tree import LayerTree  # noqa: PLC0415
    from soci.ztoc import parse_ztoc  # noqa: PLC0415
    from soci_mounter.headers import Headers  # noqa: PLC0415

    data = layer.with_suffix(".ztoc").read_bytes()
    begun = time.perf_counter()
    ztoc = parse_ztoc(data)
    kept = Spans.of(ztoc), LayerTree.of(ztoc.entries), Headers.of(ztoc.entries)
    seconds = time.perf_counter() - begun
    del kept
    return seconds


def peak_memory() -> int:
    """Bytes of this program's own peak; getrusage would count what its parent had before it."""
    line = next(line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


MEASURES = {"inflate": inflate, "build": build, "load": load}


def measure(name: str, layer: Path) -> tuple[float, int]:
    """Seconds, and the process's peak of memory in bytes, of one measurement in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, str(layer)], check=True, stdout=subprocess.PIPE, text=True
    )
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def compare(name: str, layer: Path, pairs: int) -> str:
    """``name`` against plain inflate, ``pairs`` times."""
    found: list[tuple[float, float, int]] = []
    for number in range(pairs):
        first, second = (name, "inflate") if number % 2 else ("inflate", name)
        results = {first: measure(first, layer)}
        results[second] = measure(second, layer)
        found.append((results[name][0], results["inflate"][0], results[name][1]))
    ratios = sorted(ours / plain for ours, plain, _ in found)
    return (
        f"{statistics.median(ratios):5.2f} x plain inflate ({ratios[0]:.2f} to {ratios[-1]:.2f}, {pairs} pairs), "
        f"{statistics.median(ours for ours, _, _ in found):.3f} s, peak {max(peak for _, _, peak in found) >> 20} MiB"
    )


@click.command()
@click.option("--pairs", default=5, show_default=True, help="Pairs of runs a figure.")
@click.option("--large", is_flag=True, help="Also a layer of 1 GiB, which takes a minute to make.")
@click.option("--measure", "one", type=(click.Choice(sorted(MEASURES)), click.Path(path_type=Path)), hidden=True)
def main(*, pairs: int, large: bool, one: tuple[str, Path] | None) -> None:
    """Build and load zTOCs of generated layers, against inflating the same layers and nothing else."""
    if one is not None:
        seconds = MEASURES[one[0]](one[1])
        click.echo(json.dumps([seconds, peak_memory()]))
        return
    with tempfile.TemporaryDirectory(prefix="soci-bench-") as folder:
        layers: dict[str, tuple[Callable[[], Iterator[tuple[str, bytes]]], tuple[str, ...]]] = {
            "text": (lambda: large_files(200 << 20), ()),
            "small": (small_files, ()),
            "mtime": (small_files, ("mtime",)),
            "times": (small_files, ("mtime", "atime", "ctime")),
            "names": (long_names, ()),
        }
        if large:
            layers["large"] = (lambda: large_files(1 << 30), ())
        for name, (files, times) in layers.items():
            layer = Path(folder) / f"{name}.tar.gz"
            write_layer(layer, files(), times)
            click.echo(f"build {name:5} ({layer.stat().st_size >> 20:4} MiB): {compare('build', layer, pairs)}")
        click.echo(f"load  small ({FILES} files): {compare('load', Path(folder) / 'small.tar.gz', pairs)}")


if __name__ == "__main__":
    main()
