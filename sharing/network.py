"""Calls of the Hub: every wait has a limit and a line that says what is waited for, and failed calls are retried."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError

from ..files import NETWORK_ERRORS, UserError

LIMITS = (10, 60)  # seconds that a request may wait for its connection, and for the next byte
LINES = (10, 60)  # seconds until a line says what is waited for, and between further lines
WAITS = (1, 2, 4, 8)  # seconds between tries
PATIENCE = 300  # seconds after which a call is not tried again
TRANSIENT = (408, 429, 500, 502, 503, 504)
DENIED = (401, 403)


def limit_requests(connect: float, silence: float):
    """Ends every request of huggingface_hub in this process that waits longer than this many seconds.

    The code of this function also runs by itself, in the process that verifies a checkpoint.

    Args:
        connect: for its connection.
        silence: for the next byte.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http

    if hasattr(_http, "default_client_factory"):  # huggingface_hub 1.0 and later, with httpx
        limits = {"connect": connect, "read": silence, "write": silence, "pool": silence}

        def limit(request):  # not the timeout of the client, which many calls override with None
            request.extensions["timeout"] = limits

        def open_client():
            client = _http.default_client_factory()
            client.event_hooks["request"].append(limit)
            return client

        huggingface_hub.set_client_factory(open_client)
    else:  # with requests

        def open_session():
            session = _http._default_backend_factory()
            send = session.send
            session.send = lambda request, **options: send(request, **{**options, "timeout": (connect, silence)})
            return session

        huggingface_hub.configure_http_backend(open_session)


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Prints what is waited for if the block takes long."""
    done, start = threading.Event(), time.monotonic()

    def announce():
        first, others = LINES
        if done.wait(first):
            return
        print(f"waiting for {what}", file=sys.stderr, flush=True)
        while not done.wait(others):
            seconds = time.monotonic() - start
            print(f"still waiting for {what}, after {seconds:.0f} seconds", file=sys.stderr, flush=True)

    threading.Thread(target=announce, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def with_retries(what: str, call: Callable):
    """The result of a call of the Hub's API; it is retried if the server is busy or the connection drops.

    Args:
        what: what the call does, such as "creating the commit".

    Raises:
        UserError: the login is missing or invalid, or has no access.
        one of NETWORK_ERRORS: another error, or the last one.
    """
    start = time.monotonic()
    with announced(f"the Hub: {what}"):
        for wait in (*WAITS, None):
            try:
                return call()
            except NETWORK_ERRORS as error:
                cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error  # of a download
                status = getattr(getattr(cause, "response", None), "status_code", None)
                if status in DENIED or isinstance(error, LocalTokenNotFoundError):
                    message = f"no access to the Hub; use `hf auth login` or HF_TOKEN to log in: {error}"
                    raise UserError(message) from error
                may_pass = status in TRANSIENT or is_disconnected(cause)
                if wait is None or not may_pass or time.monotonic() - start > PATIENCE:
                    if is_disconnected(cause):
                        error.args = (f"{what}: the Hub does not answer ({cause})",)
                    raise
                time.sleep(retry_after(cause) or wait)


def is_disconnected(error: BaseException | None) -> bool:
    """Whether there was no response; OSErrors of this machine are of another kind."""
    is_http = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
    return is_http and getattr(error, "response", None) is None


def retry_after(error: BaseException | None) -> int:
    """The seconds that the Hub asks to wait, at most 60; 0 if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = headers.get("Retry-After", "")
    return min(int(seconds), 60) if seconds.isdecimal() else 0
