# SPDX-License-Identifier: Apache-2.0
"""Work that several askers wait for: see `soci_runtime.flights`."""

from __future__ import annotations

from soci_runtime.flights import Flights, in_thread, join

__all__ = ["Flights", "in_thread", "join"]
