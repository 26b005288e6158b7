# SPDX-License-Identifier: Apache-2.0
"""One shape for every error: ``<op>: expected <contract>; got <value>. <one remedy>``."""

from __future__ import annotations


def message(where: str, contract: str, got: object, remedy: str) -> str:
    return f"{where}: expected {contract}; got {got}. {remedy}"


def require(condition: bool, where: str, contract: str, got: object, remedy: str) -> None:
    """Raises ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(message(where, contract, got, remedy))
