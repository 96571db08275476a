# SPDX-License-Identifier: Apache-2.0
"""The span cache on disk: one sparse file a layer, filled span by span by the fetcher and read by the mounter."""

from soci_cache.layer import LayerReader, LayerWriter
from soci_cache.store import LayerStore

__all__ = ["LayerReader", "LayerStore", "LayerWriter"]
