"""A reward server: cross-model entropy over HTTP, for OpenRLHF's `--remote_rm_url` and others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cme_reward._lazy import lazy

if TYPE_CHECKING:
    from cme_reward.server.app import create_app
    from cme_reward.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]

_HOMES = {"ServerSettings": "settings", "create_app": "app"}
__getattr__ = lazy(__name__, _HOMES, needs=["fastapi", "prometheus_client"], extra="serve")
