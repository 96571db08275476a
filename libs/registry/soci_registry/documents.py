# SPDX-License-Identifier: Apache-2.0
"""Configuration files of Kubernetes: YAML or JSON, read within limits into plain objects."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from soci.errors import InvalidConfig

FILE_BYTES_MAX = 1024 * 1024


def read_document(path: Path) -> dict[str, Any]:
    """The one object that ``path`` holds. `FileNotFoundError` where there is no file, else `InvalidConfig`.

    No message holds content of the file: kubeconfigs hold secrets.
    """
    import yaml  # noqa: PLC0415  not for the many who read none

    content = read_file(path)
    try:
        found = yaml.safe_load(content)  # JSON is YAML
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InvalidConfig(f"{path}: not YAML{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InvalidConfig(f"{path}: not YAML") from None
    if not isinstance(found, dict):
        raise InvalidConfig(f"{path}: not an object")
    return found


def read_file(path: Path, most: int = FILE_BYTES_MAX) -> bytes:
    """The content of a regular file of at most ``most`` bytes; errors as `read_document` has them."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: a pipe would keep us waiting
            raise InvalidConfig(f"{path}: not a regular file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from error
    if len(content) > most:
        raise InvalidConfig(f"{path}: more than {most} bytes")
    return content


def table(value: object) -> dict[str, Any]:
    """``value`` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str:
    """``value`` if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""
