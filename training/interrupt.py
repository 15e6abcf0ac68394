"""SIGTERM and Ctrl-C let a training finish its step and save a checkpoint."""

import contextlib
import os
import signal

from accelerate import Accelerator


@contextlib.contextmanager
def catch_signals():
    """Collects the numbers of SIGTERM and SIGINT (Ctrl-C) in the list that it yields.

    A second Ctrl-C ends a run of a single process at once.
    """
    caught = []

    def catch(number: int, frame):
        if signal.SIGINT in caught and number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise KeyboardInterrupt
        caught.append(number)

    handlers = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def should_stop(accelerator: Accelerator, caught: list[int], is_logging_step: bool) -> bool:
    """Whether any process has caught a signal. Called by every process.

    Several processes ask each other at logging steps only, because the answer waits for the device.
    """
    if accelerator.num_processes == 1:
        return bool(caught)
    if caught:
        accelerator.set_trigger()
    return is_logging_step and accelerator.check_trigger()
