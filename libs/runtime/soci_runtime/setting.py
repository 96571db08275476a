# SPDX-License-Identifier: Apache-2.0
"""What is known of one setting, and how a value of it is taken."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from soci.errors import InvalidConfig
from soci_runtime.kinds import Kind
from soci_runtime.values import Config

OURS = "sociable"
"""The table in the file of what the reference does not have."""
_DEFAULTS = {one.name: one.default for one in fields(Config)}
_UNITS = {"s": " seconds", "ms": " seconds", "bytes": " bytes"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. ``field`` is `Config`'s; ``key`` is in the file, with its tables, as the reference spells it."""

    field: str
    key: str
    kind: Kind
    meaning: str
    limits: tuple[float, float] | None = None  # of the value in base units, both included
    choices: tuple[str, ...] = ()
    zero: bool = False  # 0, or an empty text, in the file stands for the default
    flag: str = ""
    environment: str = ""
    secret: bool = False
    reference: str = ""  # the reference's name, where it is not ``key``
    since: str = "0.1.0"

    @property
    def default(self) -> Any:
        """What holds where nobody sets it."""
        return _DEFAULTS[self.field]

    @property
    def ours(self) -> bool:
        """Whether its key is in the table `OURS`."""
        return self.key.startswith(f"{OURS}.")

    def take(self, value: Any, where: str) -> Any:
        """``value`` as the field has it. Raises `InvalidConfig`, whose text begins with ``where``."""
        if self.secret and not isinstance(value, str):
            raise InvalidConfig(f"{where}: not a text")  # and not what it is
        found = self.kind.read(value, where)
        if self.choices and found not in self.choices:
            raise InvalidConfig(f"{where}: {repr(value)[:100]} is none of {', '.join(self.choices)}")
        if self.limits is not None:
            low, high = self.limits
            if not low <= found <= high:  # so written that a TOML nan is refused too
                between = f"must be between {low:g} and {high:g}{_UNITS.get(self.kind.unit, '')}"
                raise InvalidConfig(f"{where}: {repr(value)[:100]} {between}")
        return found
