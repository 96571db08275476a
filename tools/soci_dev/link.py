# SPDX-License-Identifier: Apache-2.0
"""Puts a checkout's packages on the path of its venv, with a program a console script. Run by ``./dev`` alone.

What an editable install would do, without a build: one ``.pth`` file, and scripts of three lines. Standard library
only, and no import of ours, because nothing is on the path yet.
"""

from __future__ import annotations

import sys
import sysconfig
import tomllib
from pathlib import Path

PTH = "sociable-dev.pth"


def link(checkout: Path, site_packages: Path, programs: Path) -> list[str]:
    """Write the ``.pth`` file and the programs; returns the programs' names."""
    settings = tomllib.loads((checkout / "pyproject.toml").read_text())
    roots = settings["tool"]["setuptools"]["packages"]["find"]["where"]
    (site_packages / PTH).write_text("".join(f"{checkout / root}\n" for root in roots))
    scripts: dict[str, str] = settings["project"]["scripts"]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        program = programs / name
        program.write_text(
            f"#!{programs / 'python'}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        program.chmod(0o755)
    return sorted(scripts)


if __name__ == "__main__":
    link(Path(sys.argv[1]), Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("scripts")))
