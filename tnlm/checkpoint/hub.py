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
    host = urlsplit(constants.ENDPOINT).hostname or ""
    if not is_offline_mode() and _is_known(host):
        return {}
    config = f"{folder}/config.json" if folder else "config.json"
    if not isinstance(try_to_load_from_cache(source, config, **places), str):
        raise CheckpointError(
            f"no directory has this name; as a hub id, it has no local copy, and {host} cannot be "
            "reached"
        )
    return {"local_files_only": True}


def _is_known(host: str) -> bool:
    """Return whether the name of a host is found; behind a proxy, which finds it, this is so."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
