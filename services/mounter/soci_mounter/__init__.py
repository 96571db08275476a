# SPDX-License-Identifier: Apache-2.0
"""The mounter: the kernel's door. It shows layers as directories of one FUSE mount and serves their reads."""
