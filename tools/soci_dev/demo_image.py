# SPDX-License-Identifier: Apache-2.0
"""The demo's image: a Debian base, Python from Debian, scientific packages from PyPI, and a small program.

Built for real, layer by layer, and cached under a hash of its recipe. Everything mounted while building lives in a
private mount namespace, so that a build that dies leaves no mount behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from soci.errors import FailedPrecondition, Unavailable
from soci_dev import image
from soci_dev.folders import cache_folder, locked
from soci_dev.mirror import find_mirror
from soci_dev.tools import find

SUITE: Final = "bookworm"
DEBIAN_PACKAGES: Final = ("python3",)
PYTHON: Final = "3.11"
"""What the suite's ``python3`` is: wheels are chosen for it, whatever Python runs here."""

WHEELS: Final = (
    "numpy==2.2.6",
    "pandas==2.2.3",
    "python-dateutil==2.9.0.post0",
    "pytz==2025.2",
    "tzdata==2025.2",
    "six==1.17.0",
    "scipy==1.15.3",
    "scikit-learn==1.6.1",
    "joblib==1.5.1",
    "threadpoolctl==3.6.0",
    "statsmodels==0.14.4",
    "patsy==1.0.1",
    "numba==0.61.2",
    "llvmlite==0.44.0",
    "matplotlib==3.10.3",
    "contourpy==1.3.2",
    "cycler==0.12.1",
    "fonttools==4.58.4",
    "kiwisolver==1.4.8",
    "packaging==25.0",
    "pillow==11.2.1",
    "pyparsing==3.2.3",
)
"""Of one time and closed under their requirements, so that no resolver has a say in the image."""

APP: Final = '''\
"""Counts a made-up month of orders: imports numpy and pandas, says when it is ready, prints what it found."""
import hashlib
import json

import numpy
import pandas

random = numpy.random.Generator(numpy.random.PCG64(20240229))
orders = pandas.DataFrame({"shop": random.integers(0, 12, 20000), "cents": random.integers(100, 90000, 20000)})
print("ready", flush=True)
totals = orders.groupby("shop")["cents"].agg(["count", "sum", "max"])
matrix = random.integers(0, 1000, (200, 200))
text = totals.to_csv()
print(json.dumps({
    "orders": int(totals["count"].sum()),
    "cents": int(totals["sum"].sum()),
    "trace": int((matrix @ matrix).trace()),
    "checksum": hashlib.sha256(text.encode() + (matrix @ matrix).astype("<i8").tobytes()).hexdigest(),
}), flush=True)
'''

READY: Final = "ready"
"""The line by which the program says that its imports are done."""

CMD: Final = ("/usr/bin/python3", "/opt/app/main.py")
REPOSITORY: Final = "demo"

_RECIPE: Final = 1  # raise when the steps below change what they make
_STEP_LIMIT_S: Final = 900
_SIZE_BOUNDS: Final = (150_000_000, 300_000_000)
_PLATFORMS: Final = {
    "amd64": ("manylinux2014_x86_64", "manylinux_2_28_x86_64"),
    "arm64": ("manylinux2014_aarch64", "manylinux_2_28_aarch64"),
}
_ENV: Final = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH=/opt/app/lib",
    "OPENBLAS_NUM_THREADS=1",
    "LANG=C.UTF-8",
)


def demo_image(progress: Callable[[str], None] = print) -> image.Image:
    """The image from the cache, or built now (minutes, once). Needs root, debootstrap, apt and PyPI."""
    home = cache_folder() / "images" / f"demo-{recipe_hash()}"
    with locked(home.with_suffix(".lock")):
        found = image.read_image(home)
        if found:
            return found
        if os.geteuid() != 0:
            raise FailedPrecondition("building the demo's image needs root: debootstrap and chroot do")
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as temporary:
            work = Path(temporary)
            built = _build(work, progress)
            shutil.rmtree(home, ignore_errors=True)
            (work / "layout").rename(home)
        for older in home.parent.glob("demo-*"):
            if older not in {home, home.with_suffix(".lock")}:
                shutil.rmtree(older) if older.is_dir() else older.unlink()
        _check_size(built)
    found = image.read_image(home)
    if found is None:
        raise Unavailable(f"{home} vanished while it was built")
    return found


def recipe_hash() -> str:
    """Of everything that decides what is built: 12 hex digits."""
    recipe = [_RECIPE, SUITE, DEBIAN_PACKAGES, PYTHON, WHEELS, APP, CMD, _ENV, image.architecture()]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def _build(work: Path, progress: Callable[[str], None]) -> image.Image:
    layout, base, upper = work / "layout", work / "base", work / "upper"
    mirror = find_mirror(SUITE)
    layers = []
    with _told(progress, f"Debian {SUITE} base (debootstrap)"):
        _debootstrap(base, mirror)
        layers.append(image.add_tree(layout, base, created_by=f"debootstrap --variant=minbase {SUITE}"))
    with _told(progress, f"Debian packages: {' '.join(DEBIAN_PACKAGES)} and what they need"):
        _install_packages(work, base, upper)
        layers.append(
            image.add_tree(layout, upper, overlay=True, created_by=f"apt-get install {' '.join(DEBIAN_PACKAGES)}")
        )
    with _told(progress, f"PyPI packages: {', '.join(wheel.partition('==')[0] for wheel in WHEELS)}"):
        wheels = work / "wheels"
        _install_wheels(wheels)
        _compile_wheels(work, wheels)
        layers.append(image.add_tree(layout, wheels, created_by=f"pip install {' '.join(WHEELS)}"))
    app = work / "app" / "opt" / "app"
    app.mkdir(parents=True)
    (app / "main.py").write_text(APP)
    layers.append(image.add_tree(layout, work / "app", created_by="COPY main.py /opt/app/"))
    return image.write_image(layout, layers, cmd=CMD, env=_ENV, working_dir="/opt/app")


def _debootstrap(base: Path, mirror: str) -> None:
    program = find("debootstrap")
    environment = {**_clean_environment(), **_proxy_of_apt()}
    # It mounts /proc while it works: in a namespace of its own, which takes the mount with it.
    _run(["unshare", "--mount", str(program), "--variant=minbase", SUITE, str(base), mirror], environment)
    # This machine's, copied by debootstrap: not for others to see.
    (base / "etc/resolv.conf").write_text("")
    (base / "etc/hostname").write_text("localhost\n")
    _empty(base / "var/cache/apt")
    _empty(base / "var/lib/apt/lists")


def _install_packages(work: Path, base: Path, upper: Path) -> None:
    """Apt in a chroot on an overlay of the base: the upper directory is the layer, whiteouts and all."""
    scratch, merged = work / "scratch", work / "merged"
    for folder in (upper, scratch, merged):
        folder.mkdir()
    script = """\
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3,redirect_dir=off,metacopy=off,index=off" "$4"
mount -t proc proc "$4/proc"
mount -t tmpfs tmpfs "$4/tmp"
mount -t tmpfs tmpfs "$4/run"
touch "$4/run/resolv.conf" "$4/run/ca.crt"
# Names are looked up as on this machine; a mirror behind TLS is checked against this machine's authorities.
cat /etc/resolv.conf >"$4/run/resolv.conf"
[ ! -f /etc/ssl/certs/ca-certificates.crt ] || cat /etc/ssl/certs/ca-certificates.crt >"$4/run/ca.crt"
[ ! -e "$4/etc/resolv.conf" ] || mount --bind "$4/run/resolv.conf" "$4/etc/resolv.conf"
root=$4; shift 4
chroot "$root" apt-get -qq -o Acquire::https::CaInfo=/run/ca.crt update
DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get -qq -y --no-install-recommends \\
  -o Acquire::https::CaInfo=/run/ca.crt install "$@"
chroot "$root" apt-get clean
find "$root/var/lib/apt/lists" "$root/var/cache/apt" -mindepth 1 -delete
"""
    arguments = [str(base), str(upper), str(scratch), str(merged), *DEBIAN_PACKAGES]
    environment = {**_clean_environment(), **_proxy_of_apt()}
    _run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", script, "sh", *arguments], environment)


def _install_wheels(tree: Path) -> None:
    target = tree / "opt" / "app" / "lib"
    target.mkdir(parents=True)
    platforms = [word for name in _PLATFORMS[image.architecture()] for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--target", str(target), "--only-binary=:all:", "--implementation", "cp"]
    _run([*command, "--python-version", PYTHON, *platforms, *WHEELS], dict(os.environ))


def _compile_wheels(work: Path, wheels: Path) -> None:
    """Byte code as an install inside the image would have made it, by the image's own Python."""
    script = """\
set -e
mount -t overlay overlay -o "lowerdir=$1:$2:$3" "$4"
mount -t proc proc "$4/proc"
mount --bind "$1/opt/app/lib" "$4/opt/app/lib"
exec chroot "$4" /usr/bin/python3 -m compileall -q -j 2 /opt/app/lib
"""
    arguments = [str(wheels), str(work / "upper"), str(work / "base"), str(work / "merged")]
    # Status 1 says that some file does not compile: packages ship test data that is wrong on purpose.
    _run(["unshare", "--mount", "sh", "-c", script, "sh", *arguments], _clean_environment(), accept=(0, 1))


def _run(command: list[str], environment: dict[str, str], accept: tuple[int, ...] = (0,)) -> None:
    try:
        done = subprocess.run(
            command,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_STEP_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no end within {_STEP_LIMIT_S} s: {' '.join(command)[:200]}") from error
    if done.returncode not in accept:
        raise Unavailable(f"status {done.returncode} of {' '.join(command)[:200]}\n{done.stdout[-4000:]}")


def _clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return {**kept, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def _proxy_of_apt() -> dict[str, str]:
    """Apt's own proxy setting in the form that debootstrap's downloader and the chroot's apt read."""
    done = subprocess.run(["apt-config", "shell", "P", "Acquire::http::Proxy"], check=False, capture_output=True)
    value = done.stdout.decode().strip().removeprefix("P=").strip("'")
    return {"http_proxy": value} if value else {}


def _empty(folder: Path) -> None:
    for entry in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _check_size(built: image.Image) -> None:
    low, high = _SIZE_BOUNDS
    if not low <= built.size <= high:
        raise FailedPrecondition(
            f"the demo's image has {built.size} bytes of layers, not {low} to {high}: see its recipe"
        )


@contextmanager
def _told(progress: Callable[[str], None], what: str) -> Iterator[None]:
    begun = time.monotonic()
    progress(f"building: {what}")
    yield
    progress(f"built:    {what} ({time.monotonic() - begun:.0f} s)")
