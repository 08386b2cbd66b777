"""What a job computes before its engine starts: listing tar files as tasks on Ray."""

import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from captioner.caption import tasks
from captioner.caption.inputs import mapper_of
from captioner.caption.tasks import map_on_ray
from captioner.config import ListingConfig, RunConfig
from captioner.data.listing import list_source
from captioner.errors import InputError
from captioner.runtime.prefetch import map_in_threads
from captioner.storage import WebAccess
from captioner.storage.web.access import current_access
from conftest import write_photos
from containers import make_tars

WEB = WebAccess(user_agent="a test")


@pytest.fixture
def tars(tmp_path: Path) -> str:
    write_photos(tmp_path / "photos", 12)
    return make_tars(tmp_path / "photos", tmp_path / "tars")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls are enough for Ray."""
    monkeypatch.setattr(tasks, "_FEW", 1)


def test_calls_are_tasks_whose_results_keep_their_order(local_ray):
    def seen_by_task(number: int) -> tuple[int, int, str | None]:
        return number, os.getpid(), current_access().user_agent

    with ExitStack() as connection:
        seen = [*map_on_ray(seen_by_task, range(20), web=WEB, connection=connection)]
    assert [number for number, _, _ in seen] == [*range(20)]
    assert os.getpid() not in {process for _, process, _ in seen}
    assert {agent for _, _, agent in seen} == {"a test"}


def test_tar_files_listed_on_ray_are_those_listed_in_threads(local_ray, few, tars):
    settings = ListingConfig(keep="number", exclude=("*-0003.jpg",))
    with ExitStack() as connection:
        mapper = mapper_of(RunConfig(engine="ray"), connection)
        listed = list_source(tars, settings, mapper=mapper)
    assert len(listed) == 11
    assert listed.equals(list_source(tars, settings))


def test_an_error_of_a_task_is_that_of_its_call(local_ray, few, tars):
    with ExitStack() as connection:
        mapper = mapper_of(RunConfig(engine="ray"), connection)
        with pytest.raises(InputError, match=r"^cannot list \S+/00002\.tar: it does not exist$"):
            list_source(f"{tars}/{{00000..00002}}.tar", ListingConfig(), mapper=mapper)


def test_a_task_whose_process_dies_is_one_line(local_ray, few, monkeypatch):
    def die(number: int) -> None:
        os._exit(number)

    monkeypatch.setattr(tasks, "_RETRIES", 0)
    with ExitStack() as connection, pytest.raises(InputError, match=r"^a task on Ray failed: .+"):
        [*map_on_ray(die, [1, 2], web=WEB, connection=connection)]


def test_ray_starts_only_for_many_tar_files(tars, tmp_path, monkeypatch):
    def refuse() -> None:
        raise AssertionError("Ray is not needed")

    monkeypatch.setattr(tasks, "connected", refuse)
    with ExitStack() as connection:
        mapper = mapper_of(RunConfig(engine="ray"), connection)
        for source in (f"{tmp_path}/photos", f"{tars}/00000.tar", tars):
            assert len(list_source(source, ListingConfig(), mapper=mapper)) >= 5
        monkeypatch.setattr(tasks, "_FEW", 1)
        with pytest.raises(AssertionError, match="not needed"):
            list_source(tars, ListingConfig(), mapper=mapper)
        assert mapper_of(RunConfig(engine="local"), connection) is map_in_threads
        assert isinstance(mapper, partial)


def test_what_tasks_import_lacks_torch():
    code = "import sys, captioner.caption.tasks, captioner.data.tar.listing\n"
    code += "print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
