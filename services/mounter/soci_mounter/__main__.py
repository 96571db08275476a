# SPDX-License-Identifier: Apache-2.0
"""``soci-mounter``: shows lazy layers as directories."""

from __future__ import annotations

from soci_mounter.service import NAME, run
from soci_runtime.serve import service_command

main = service_command(NAME, run)

if __name__ == "__main__":
    main()
