import signal
import subprocess
import sys

import pytest

from captioner.runtime.signals import catch_signals


def test_sigterm_interrupts_the_main_thread_and_the_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # is ignored
        with pytest.raises(KeyboardInterrupt):
            signals.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


_HANGS = {
    "a clean-up": """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)
""",
    "the start of a thread": """
    with threading._active_limbo_lock:  # which a thread's start takes
        with contextlib.suppress(KeyboardInterrupt):
            print("ready", flush=True)
            time.sleep(60)
        time.sleep(60)
""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hang", ["a clean-up", "the start of a thread"])
def test_a_stop_that_hangs_ends_with_the_signals_exit_code(hang, number):
    code = """
import contextlib, signal, sys, threading, time
from captioner.runtime.signals import catch_signals, limit_stopping
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
limit_stopping(0.5)
with catch_signals():"""
    code += _HANGS[hang]
    job = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None
        job.stdout.readline()
        job.send_signal(number)
        _, error = job.communicate(timeout=20)
    finally:
        job.kill()
    assert job.returncode == 128 + number
    assert error == (
        f"captioner: stopped by {number.name}, without the time to clean up; "
        "run the same command again to resume\n"
    )
