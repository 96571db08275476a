# SPDX-License-Identifier: Apache-2.0
"""Sociable's values and pure functions. Nothing here has a clock, a socket, a task or a log."""
