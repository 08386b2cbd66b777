import errno
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from captioner.runtime import progress as progress_module
from captioner.runtime.progress import Progress, progress_bar


def test_quick_work_without_a_terminal_writes_nothing(capsys):
    with progress_bar(9, unit="image") as progress:
        progress.update(9)
    assert capsys.readouterr().err == ""


def test_lines_without_a_terminal_name_the_phase_the_counts_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS", 0.05)
    with progress_bar(1001, unit="image", initial=1, description="epoch 3/14") as progress:
        progress.update(4)
        progress.set_postfix(loss=2.1)
        time.sleep(0.3)  # nothing is finished meanwhile
        progress.update(996)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert lines[0].startswith("epoch 3/14: 5 of 1001 images, ")
    assert lines[0].endswith(" left, loss 2.1")
    assert " images/s, " in lines[0]
    assert lines[-1].startswith("epoch 3/14: 1001 of 1001 images, ")
    assert " left" not in lines[-1]


def test_the_rate_counts_only_what_this_run_finished(monkeypatch):
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 100.0)
    lines = progress_module._Lines(1000, "image", 400, "")
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 102.0)
    lines.update(20)
    assert lines.line() == "420 of 1000 images, 10.0 images/s, 0:58 left"
    lines.close()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (103.4, "1:43"), (7303, "2:01:43"), (59.7, "1:00")]
)
def test_the_time_left_is_written_as_a_clock_does(seconds, expected):
    assert progress_module._clock(seconds) == expected


def test_quiet_work_and_work_that_is_not_logged_report_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS", 0.01)
    for options in ({"quiet": True}, {"logged": False}):
        with progress_bar(9, unit="image", **options) as progress:
            assert type(progress) is Progress
            progress.update(4)
            progress.set_postfix(loss=1)
            time.sleep(0.05)
    assert capsys.readouterr().err == ""


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_broken_message_stream_does_not_end_the_work(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS", 0.01)
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, _Full()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with progress_bar(9, unit="image") as progress:
                progress.update(4)
                time.sleep(0.05)
                assert progress._thread.is_alive(), stream  # type: ignore[attr-defined]


def test_a_terminal_shows_a_bar(tmp_path: Path):
    code = (
        "from captioner.runtime.progress import progress_bar\n"
        "with progress_bar(9, unit='image', description='validation') as progress:\n"
        "    progress.update(9)\n"
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=child, check=True)
    os.close(child)
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert "validation: 100%" in shown
    assert "9/9" in shown
