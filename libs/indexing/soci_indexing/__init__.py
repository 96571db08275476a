# SPDX-License-Identifier: Apache-2.0
"""Making SOCI indexes of images: what the command line and the indexer service share."""
