"""What a job is going to do, and whether the cluster can."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from captioner.caption.actors import fit_actors
from captioner.caption.plan import InProcess, make_plan, precision_on_ray
from captioner.cli import main
from captioner.config import LaunchConfig, RunConfig
from captioner.data.source import list_files
from captioner.errors import InputError
from captioner.output.manifest import Shard
from captioner.storage import Listed
from captioner.training.ray import _uses_gpus
from conftest import write_photos


def _cluster(*nodes: dict[str, float], growing: bool = False) -> SimpleNamespace:
    """What is asked of Ray, for a cluster of such nodes."""
    largest = {"CPU": 1000, "GPU": 100} if growing else None
    state = SimpleNamespace(get_max_resources_from_cluster_config=lambda: largest)
    dead = {"Alive": False, "Resources": {"CPU": 100, "GPU": 8}}
    total = Counter()
    for node in nodes:
        total.update(node)
    return SimpleNamespace(
        cluster_resources=lambda: dict(total),
        nodes=lambda: [
            dead,
            *(
                {"Alive": True, "Resources": node, "NodeManagerHostname": f"node-{number}"}
                for number, node in enumerate(nodes)
            ),
        ],
        _private=SimpleNamespace(state=SimpleNamespace(state=state)),
    )


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([{"CPU": 2}], {}, (1, 1, 0.75, 0, 2)),
        ([{"CPU": 1}], {}, (1, 1, 0.4, 0, 1)),
        ([{"CPU": 32}, {"CPU": 32}], {}, (8, 8, 0.75, 0, 8)),
        ([{"CPU": 8}, {"CPU": 16, "GPU": 4}], {}, (4, 4, 0.75, 1, None)),
        ([{"CPU": 16, "GPU": 2}], {"gpus_per_actor": 0.5}, (4, 4, 0.75, 0.5, None)),
        ([{"CPU": 16, "GPU": 2}], {"gpus_per_actor": 0.4}, (4, 4, 0.75, 0.4, None)),
        ([{"CPU": 16, "GPU": 2}], {"device": "cpu"}, (2, 2, 0.75, 0, 8)),
        ([{"CPU": 16, "GPU": 4}], {"actors": "1:3"}, (1, 3, 0.75, 1, None)),
        ([{"CPU": 16}], {"actors": "4", "gpus_per_actor": 0.0}, (4, 4, 0.75, 0, 4)),
    ],
)
def test_actors_fit_the_cluster(nodes, settings, expected):
    actors = fit_actors(_cluster(*nodes), RunConfig(**settings))
    assert (actors.least, actors.most, actors.cpus, actors.gpus, actors.threads) == expected


@pytest.mark.parametrize(
    ("nodes", "settings", "problem"),
    [
        ([{"CPU": 4}], {"actors": "9"}, "no room for 9 actors of 0.75 CPUs and 0 GPUs, only for 5"),
        ([{"CPU": 4}], {"gpus_per_actor": 1.0}, "no room for 1 actors .* 1 GPUs, only for 0: the"),
        (
            [{"CPU": 9, "GPU": 1}, {"CPU": 9, "GPU": 1}],
            {"gpus_per_actor": 2.0},
            "only for 0: .* 2 n",
        ),
        ([{"CPU": 3}], {"actors": "4"}, "leave 0 CPUs to decode images, which takes 0.5 "),
        (
            [{"CPU": 2}],
            {"cpus_per_decode": 1.5},
            "leave 1.25 CPUs to decode images, which takes 1.5 ",
        ),
        ([{"CPU": 8}], {"device": "cuda"}, "^--device cuda needs a GPU: the cluster has 1"),
        (
            [{"CPU": 8, "GPU": 4}],
            {"gpus_per_actor": 1.5},
            "must be a whole number or at most 1, not 1.5",
        ),
    ],
)
def test_a_cluster_without_room_says_what_is_missing(nodes, settings, problem):
    with pytest.raises(InputError, match=problem):
        fit_actors(_cluster(*nodes), RunConfig(**settings))


@pytest.mark.parametrize("told", [True, False])
def test_a_cluster_that_grows_may_have_no_room_yet(told):
    run = RunConfig(actors="2:8", gpus_per_actor=1.0, wait_for_nodes=not told)
    actors = fit_actors(_cluster({"CPU": 1}, growing=told), run)
    assert (actors.least, actors.most, actors.gpus) == (2, 8, 1)
    run = RunConfig(device="cuda", wait_for_nodes=not told)
    assert fit_actors(_cluster({"CPU": 8}, growing=told), run).gpus == 1


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, {}, False),
        (1, {}, False),  # not one on the GPU and one on the CPU
        (2, {}, True),
        (2, {"device": "cpu"}, False),
        (2, {"device": "cuda"}, True),
        (1, {"device": "cuda"}, "2 workers need a GPU each, but the cluster has 1"),
        (2, {"device": "cuda:1"}, "Ray chooses the GPUs of its workers"),
    ],
)
def test_training_takes_a_gpu_for_each_worker_or_none(gpus, settings, expected):
    launch, cluster = LaunchConfig(workers=2, **settings), {"CPU": 4, "GPU": gpus}
    if isinstance(expected, bool):
        assert _uses_gpus(_cluster(cluster), launch) is expected
    else:
        with pytest.raises(InputError, match=expected):
            _uses_gpus(_cluster(cluster), launch)
    if settings.get("device") == "cuda":
        assert _uses_gpus(_cluster(cluster, growing=True), launch)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"actors": "4"}, (0.4, 1)),  # nothing is known of the nodes
        ({"actors": "4", "cpus_per_actor": 8.0}, (8, 8)),
        ({"actors": "4", "cpus_per_actor": 0.5}, (0.5, 1)),
        ({"actors": "4", "cpus_per_actor": 4.0, "gpus_per_actor": 1.0}, (4, None)),
    ],
)
def test_actors_of_nodes_that_are_yet_to_come(settings, expected):
    actors = fit_actors(_cluster(growing=True), RunConfig(**settings))
    assert (actors.cpus, actors.threads) == expected


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        (
            "http://127.0.0.1:8265",
            "RAY_ADDRESS is http://127.0.0.1:8265, an address for ray job su",
        ),
        ("here and there", "cannot reach Ray at RAY_ADDRESS, here and there: "),
    ],
)
def test_a_ray_that_is_not_there_is_one_line(
    address, problem, monkeypatch, tmp_path: Path, model_directory: Path
):
    photos = write_photos(tmp_path / "photos", 1)[0].parent
    monkeypatch.setenv("RAY_ADDRESS", address)
    command = ["caption", str(photos), str(tmp_path / "out"), "--model", str(model_directory)]
    ran = subprocess.run(
        [sys.executable, "-m", "captioner.cli", *command], capture_output=True, text=True
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.splitlines()[-1].startswith(f"captioner: {problem}")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("actors", ["0", "3:2", "x", "1:", "-1", "1:2:3", "", "٣"])
def test_an_invalid_number_of_actors_is_refused(actors):
    with pytest.raises(InputError, match="actors must be"):
        RunConfig(actors=actors)


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 7)[0].parent
    output = tmp_path / "out"
    command = ["caption", str(photos), str(output), "--model", str(model_directory)]
    command += ["--engine", "local", "--device", "cpu", "--precision", "fp32", "--batch-size", "4"]

    def run(*more: str) -> str:
        result = CliRunner().invoke(main, [*command, *more])
        assert result.exit_code == 0, result.output
        return result.output

    place = "in this process, on cpu, in float32, 4 images per batch\n"
    dry = run("--shard-size", "3", "--dry-run")
    assert dry == f"7 images, all to caption, in 3 shards; {place}"
    assert not output.exists()
    assert run("--shard-size", "3", "--limit", "4").startswith(
        dry.replace("7", "4").replace(" 3", " 2")
    )
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert run("--dry-run") == f"7 images, 3 to caption, in 1 shard; {place}"
    assert run("--dry-run", "--overwrite") == f"7 images, all to caption, in 1 shard; {place}"
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    run()
    assert run("--dry-run") == "7 images, all captioned\n"
    result = CliRunner().invoke(main, [*command, "--beam", "2", "--dry-run"])
    assert (result.exit_code, "other settings: --beam was 1" in result.output) == (2, True)


@pytest.mark.parametrize(
    ("settings", "images", "expected"),
    [
        ({}, 9_999, "off"),
        ({}, 10_000, "on"),
        ({"compile": "off"}, 10_000, "off"),
        ({"compile": "on"}, 1, "on"),
    ],
)
def test_the_encoder_is_compiled_where_that_pays(settings, images, expected):
    counts = [100] * (images // 100) + [images % 100]
    shards = [Shard(n, list_files([Listed("", None)] * count)) for n, count in enumerate(counts)]
    on_cpu, on_gpu = (InProcess(torch.device(kind), "fp32") for kind in ("cpu", "cuda"))
    assert make_plan(images, shards, RunConfig(**settings), on_cpu).run.compile == expected
    plan = make_plan(images, shards, RunConfig(**settings), on_gpu)
    assert plan.run.compile == settings.get("compile", "off")


def test_workers_that_read_decode_and_write_import_neither_torch_nor_timm():
    code = (
        "import sys, captioner.caption.ray\n"
        "assert not {'torch', 'timm', 'ray'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_actors_of_a_cluster_have_one_precision():
    nodes, asked = ({"CPU": 8}, {"CPU": 16, "GPU": 4}), []

    class Task:
        def remote(self, device: str) -> str:
            return f"precision on {device}"

    cluster = _cluster(*nodes)
    cluster.remote = lambda **reserved: asked.append(reserved) or (lambda _: Task())
    cluster.get = lambda result: {"precision on auto": "fp32"}[result]  # as on older GPUs
    pool = fit_actors(cluster, RunConfig())
    assert precision_on_ray(cluster, pool, RunConfig(), dry=False) == "fp32"
    assert asked == [{"num_cpus": 0.75, "num_gpus": 1}]
    assert precision_on_ray(cluster, pool, RunConfig(precision="bf16"), dry=False) == "bf16"
    assert len(asked) == 1, "what is given is not asked for"


def test_a_dry_run_does_not_wait_for_a_cluster_to_grow():
    run = RunConfig(gpus_per_actor=1.0, wait_for_nodes=True)
    cluster = _cluster({"CPU": 8})
    assert precision_on_ray(cluster, fit_actors(cluster, run), run, dry=True) == "bf16"
