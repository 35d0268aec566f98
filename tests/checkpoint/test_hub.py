"""Without a connection a hub id is loaded from its local copy, or refused at once."""

from __future__ import annotations

import socket

import pytest

import tnlm
from tests.checkpoint.test_loading import cache
from tnlm.checkpoint import hub
from tnlm.checkpoint.dense_models import load_model
from tnlm.errors import CheckpointError


def unknown(*_):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.mark.parametrize("load", [tnlm.load, load_model])
def test_a_misspelt_directory_is_refused_without_a_request(load, offline, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match=r"^(cannot load )?mi-model: no directory has this"):
        load("mi-model")


def test_a_local_copy_is_loaded_without_a_connection(offline, tiny_llama, tmp_path):
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.5, progress=False)
    where = cache(tnlm.save(model, tmp_path / "model"), tmp_path / "cache")
    loaded = tnlm.load("someone/model", cache_dir=where["cache_dir"])
    assert loaded.num_parameters() == model.num_parameters()


def test_a_hub_that_is_there_is_asked(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    assert hub.hub_options("someone/model") == {}
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy"})
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the proxy finds names"))
    assert hub.hub_options("someone/model") == {}


@pytest.mark.parametrize(
    "settings",
    [{"no_proxy": "localhost"}, {"all_proxy": "proxy", "no_proxy": "huggingface.co"}],
    ids=["only_no_proxy", "the_hub_is_excepted"],
)
def test_settings_that_lead_to_no_proxy_are_none(settings, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    with pytest.raises(CheckpointError, match=r"huggingface\.co cannot be reached"):
        hub.hub_options("someone/model")


def test_a_hub_that_may_not_be_asked_is_not_said_to_be_out_of_reach(monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(CheckpointError, match=r"no local copy, and HF_HUB_OFFLINE is set$"):
        hub.hub_options("someone/model")
