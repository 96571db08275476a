# SPDX-License-Identifier: Apache-2.0
"""What `./dev` runs: a private set of daemons, a counting proxy, image builders, the demo. Never installed."""
