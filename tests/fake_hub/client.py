"""Points the hub's client of this process at a fake hub, and makes its pauses short."""

from __future__ import annotations

import time
import types

import pytest

from bigq.io.remote import shards
from bigq.io.remote.ranged import Patience
from bigq.sched import push
from fake_hub.server import Hub


def use_hub(hub: Hub, patch: pytest.MonkeyPatch, *, silence: float = 20.0) -> None:
    """silence: seconds after which a job gives up."""
    use_url(hub.url, patch, silence=silence)


def use_url(url: str, patch: pytest.MonkeyPatch, *, silence: float = 20.0) -> None:
    """The same for the hub at an address, which may be another process's."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic))
    patience = Patience(silence=silence, first=0.01, longest=0.05)
    for module in (shards, push):
        patch.setattr(module, "QUICK", patience)
        patch.setattr(module, "PATIENT", patience)
