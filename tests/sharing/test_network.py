import json
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from tests.fake_hub.hub import Fault
from tests.sharing.conftest import NAME, PROGRAMS, call
from vit_simple.files import NETWORK_ERRORS
from vit_simple.sharing import network
from vit_simple.sharing.repository import remote_card

NEVER = 3600  # seconds until the Hub answers


@pytest.mark.slow
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


def test_card_that_cannot_be_read_is_not_a_missing_one(monkeypatch):
    """Otherwise a push would replace the user's text on the Hub."""
    tries = []

    def hf_hub_download(*arguments, **options):
        tries.append(arguments)
        raise LocalEntryNotFoundError("not in the cache") from NETWORK_ERRORS[0]("disconnected")

    monkeypatch.setattr(network, "WAITS", (0,))
    with pytest.raises(LocalEntryNotFoundError, match=r"reading its README\.md: the Hub does not answer"):
        remote_card(SimpleNamespace(hf_hub_download=hf_hub_download), NAME, "main")
    assert len(tries) == 2
