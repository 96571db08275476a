# SPDX-License-Identifier: Apache-2.0
"""What every process of ours needs to run: configuration, signals, readiness, log lines, traces."""
