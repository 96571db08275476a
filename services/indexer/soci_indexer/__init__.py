# SPDX-License-Identifier: Apache-2.0
"""The indexer: the builder's door. It makes SOCI indexes, straight from the registry and back to it."""
