# SPDX-License-Identifier: Apache-2.0
"""The fetcher: the registry's door. It finds indexes, and brings bytes into the span cache."""
