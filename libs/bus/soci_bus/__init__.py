# SPDX-License-Identifier: Apache-2.0
"""Every sentence our processes can say to one another, over NATS."""
