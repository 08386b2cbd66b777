"""Standard streams that are closed, full or gone: the work is done, and its exit code is right."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from captioner.cli import main
from captioner.runtime.streams import has_own_streams
from conftest import write_photos


def _shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which ``"$@"`` is the command."""
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "captioner.cli", *arguments]
    return subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.parametrize(
    ("line", "code", "stdout"),
    [
        ('"$@" 2>&-', 0, 1),
        pytest.param('"$@" 2> >(true)', 0, 1, marks=pytest.mark.thorough),
        ('"$@" 2>/dev/full', 0, 1),
        pytest.param('"$@" >&-', 0, 0, marks=pytest.mark.thorough),
        ('"$@" >&- 2>&- <&-', 0, 0),
        ('"$@" 2>/dev/null | true; exit ${PIPESTATUS[0]}', 0, 0),
    ],
)
def test_a_broken_stream_is_no_reason_to_lose_work(line, code, stdout, tmp_path, model_directory):
    photos = write_photos(tmp_path / "photos", 2)[0].parent
    arguments = ("caption", photos, tmp_path / "out", "--model", model_directory, "--engine=local")
    ran = _shell(line, *arguments)
    assert ran.returncode == code, ran.stderr
    assert len(ran.stdout.splitlines()) == stdout
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["part-000000.parquet"]
    assert "Traceback" not in ran.stderr


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    ran = _shell('"$@" >/dev/full', "--help")
    assert ran.returncode == 1
    assert ran.stderr == ("captioner: cannot write to standard output: No space left on device\n")


def test_a_mistake_with_a_closed_stderr_has_its_exit_code(tmp_path: Path):
    assert _shell('"$@" 2>&-', "report", tmp_path).returncode == 2


def test_streams_that_somebody_replaced_stay(tmp_path: Path):
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("captioner: ")
    assert not has_own_streams()
