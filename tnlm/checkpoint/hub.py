"""Keeps a load from waiting for a hub that cannot be reached."""

from __future__ import annotations

import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

from tnlm.errors import CheckpointError


def hub_options(source: str, folder: str = "", **places: Any) -> dict[str, Any]:
    """Return how to load a hub id: without a connection, from its local copy alone.

    Otherwise each file would be asked for several times, over half a minute.

    Args:
        source: a hub id.
        folder: the subfolder of the repository that is loaded.
        **places: ``cache_dir`` and ``revision``, as ``from_pretrained`` takes them.

    Raises:
        CheckpointError: if the hub cannot be reached, and there is no local copy.
    """
    offline = is_offline_mode()
    if not offline and _is_known(constants.ENDPOINT):
        return {}
    config = f"{folder}/config.json" if folder else "config.json"
    if not isinstance(try_to_load_from_cache(source, config, **places), str):
        host = urlsplit(constants.ENDPOINT).hostname
        why = "HF_HUB_OFFLINE is set" if offline else f"{host} cannot be reached"
        raise CheckpointError(
            f"no directory has this name; as a hub id, it has no local copy, and {why}"
        )
    return {"local_files_only": True}


def _is_known(address: str) -> bool:
    """Return whether the host of an address is found; a proxy that leads there finds it."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    leading = {parts.scheme, "all"} & urllib.request.getproxies().keys()
    if leading and not urllib.request.proxy_bypass(host):
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
