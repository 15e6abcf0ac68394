import json

import pytest
from huggingface_hub.errors import HfHubHTTPError

from tests.fake_hub.hub import Fault
from tests.sharing.conftest import NAME, PROGRAMS, call
from vit_simple.files import NETWORK_ERRORS
from vit_simple.sharing import network

NEVER = 3600  # seconds until the Hub answers


def test_calls_of_a_hub_that_never_answers_end_with_an_error_and_say_what_they_wait_for(hub, tmp_path):
    parent = hub.create(f"models/{NAME}").at("main").sha
    hub.faults += [Fault(path, times=99, delay=NEVER) for path in ("/whoami", "/commit/")]
    result = call(hub, tmp_path, PROGRAMS / "call_stalled_hub.py", NAME, parent)
    assert result.returncode == 0, result.stderr
    login, commit = json.loads(result.stdout.splitlines()[-1])
    assert "checking the login: the Hub does not answer" in login
    assert "creating the commit: the Hub does not answer" in commit
    for what in ("checking the login", "creating the commit"):
        assert f"waiting for the Hub: {what}\n" in result.stderr
    assert hub.repos[f"models/{NAME}"].at("main").sha == parent


def test_wait_that_is_short_says_nothing(monkeypatch, capsys):
    with network.announced("an answer"):
        pass
    assert capsys.readouterr().err == ""


def test_call_is_not_tried_again_after_the_time_limit(monkeypatch):
    (library, *_) = HfHubHTTPError.__bases__
    tries = []

    def call():
        tries.append(None)
        error = library("no answer")
        error.__class__ = type("ReadTimeout", (library,), {"__module__": "requests", "response": None})
        raise error

    monkeypatch.setattr(network, "PATIENCE", -1)
    with pytest.raises(NETWORK_ERRORS):
        network.with_retries("reading", call)
    assert len(tries) == 1
