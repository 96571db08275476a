# SPDX-License-Identifier: Apache-2.0
"""The command line ``soci``: the client that pulls and runs images lazily, and asks the services for the rest."""

from __future__ import annotations
