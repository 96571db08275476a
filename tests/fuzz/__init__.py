# SPDX-License-Identifier: Apache-2.0
"""A mutation fuzzer for everything that reads a stranger's bytes; see `fuzz.run`."""
