"""Where caches are kept."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from captioner import storage
from captioner.storage import cache


@pytest.fixture(autouse=True)
def forget():
    cache._temporary_base.cache_clear()
    yield
    cache._temporary_base.cache_clear()


def test_a_cache_is_in_the_users_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert storage.cache_directory("features") == tmp_path / ".cache" / "captioner" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert storage.cache_directory("features") == tmp_path / "caches" / "captioner" / "features"


@pytest.mark.parametrize("problem", ["no home", "not writable"])
def test_without_a_home_directory_a_cache_is_among_the_temporary_files(
    problem, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if problem == "no home":
        monkeypatch.setattr(Path, "home", _no_home)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    directory = storage.cache_directory("features")
    base = tmp_path / f"captioner-cache-{os.getuid()}"
    assert directory == base / "captioner" / "features"
    assert base.stat().st_mode & 0o777 == 0o700


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_temporary_folder_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    shared = tmp_path / f"captioner-cache-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    directory = storage.cache_directory("features")
    assert shared not in directory.parents
    assert storage.cache_directory("features") == directory


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_user_id_without_a_name_has_a_cache():
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from captioner import storage
os.setuid(54321)
directory = storage.cache_directory("features")
directory.mkdir(parents=True)
print(directory)
"""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")
    }
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folder is closed to other users
        Path(temporary).chmod(0o777)
        ran = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parents[2])],
            env=environment | {"TMPDIR": temporary},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == f"{temporary}/captioner-cache-54321/captioner/features"
