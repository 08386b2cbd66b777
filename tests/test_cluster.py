"""The files in cluster/, held against what reads them: KubeRay's, Kubernetes' and Ray's schemas."""

import copy
import gzip
import json
import re
import shlex
import shutil
import subprocess
import time
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import RunConfig
from conftest import write_photos

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
GUIDE = ROOT / "docs" / "tutorials" / "on-a-cluster.md"
MANIFESTS = sorted(CLUSTER.glob("ray*.yaml"))


def _schema(kind: str) -> dict[str, Any]:
    """KubeRay's schema of a kind, with unknown keys forbidden as `kubectl --validate` does."""
    path = Path(__file__).parent / "fixtures" / f"ray.io_{kind.lower()}s.json.gz"
    schema = json.loads(gzip.decompress(path.read_bytes()))
    _make_strict(schema)
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {
                "type": "string",
                "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
                "maxLength": 47,
            },
            "labels": {"type": "object"},
            "annotations": {"type": "object"},
        },
        "additionalProperties": False,
    }
    return schema


def _make_strict(schema: dict[str, Any]) -> None:
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        schema.pop("type", None)
        schema["type"] = ["integer", "string"]
    keeps_unknown = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in schema and not keeps_unknown:
        schema.setdefault("additionalProperties", False)
    for each in schema.get("properties", {}).values():
        _make_strict(each)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            _make_strict(schema[name])


def _problems(manifest: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(_schema(manifest["kind"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kuberay_accepts_the_manifests(path):
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    assert _problems(manifest) == []
    wrong = copy.deepcopy(manifest)
    cluster = wrong["spec"].get("rayClusterSpec", wrong["spec"])
    cluster["workerGroupSpecs"][0]["maxReplica"] = 8
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = 5
    del wrong["metadata"]["name"]
    assert len(_problems(wrong)) == 3, "the schema is strict"


def _pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_nothing_runs_as_root_and_nothing_is_exposed(path):
    manifest = yaml.safe_load(path.read_text())
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in cluster["headGroupSpec"]
    for pod in _pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert not container["image"].endswith((":latest", "captioner"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_accepts_the_pods(path):
    validate = pytest.importorskip("kubernetes_validate")
    for spec in _pods(yaml.safe_load(path.read_text())):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
        validate.validate(pod, "1.31", strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate(
                pod | {"spec": spec | {"serviceAcountName": "x"}}, "1.31", strict=True
            )


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("rayjob-*.yaml")), ids=lambda path: path.name)
def test_the_entrypoints_are_commands_of_ours(path):
    """With options that there are; the buckets are not asked."""
    words = shlex.split(yaml.safe_load(path.read_text())["spec"]["entrypoint"])
    assert words.pop(0) == "captioner"
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    command = main.commands[words[0]]
    command.make_context(words[0], words[1:])


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("rayjob-*.yaml")), ids=lambda path: path.name)
def test_a_mistake_does_not_cost_many_clusters(path):
    """KubeRay does not tell it from a head that goes."""
    assert yaml.safe_load(path.read_text())["spec"]["backoffLimit"] == 1


def test_the_heads_container_can_start_nodes():
    """Ray's autoscaler, which works there, calls AWS, and then the nodes by SSH."""
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    assert (config["provider"]["type"], "docker" in config) == ("aws", True)
    words = (CLUSTER / "Dockerfile").read_text().split()
    assert {"openssh-client", "rsync", "boto3"} <= set(words)
    assert " boto3 " in GUIDE.read_text(), "where ray up is called, too"


def test_ray_accepts_the_aws_cluster():
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    schema = json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"worker_nodes": {}}, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)


def _shell_lines() -> list[str]:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    lines = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"]]
    readme = GUIDE.read_text()
    lines += re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    instructions = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    return lines + re.findall(r"^RUN (.*)$", instructions, re.MULTILINE)


def test_the_shell_lines_are_sound():
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    for line in _shell_lines():
        # RAY_HEAD_IP is Ray's; a tilde that Ray expands on the other side.
        excluded = "SC2154,SC2088"
        ran = subprocess.run(
            [shellcheck, "--shell=bash", f"--exclude={excluded}", "-"],
            input=line,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, f"{line}\n{ran.stdout}"


def test_the_image_is_pinned_and_not_roots():
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    instructions = [tuple(line.split(maxsplit=1)) for line in lines]
    assert {name for name, _ in instructions} <= {
        "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    bases = [rest for name, rest in instructions if name == "FROM"]
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    assert [rest for name, rest in instructions if name == "USER"][-1] == "ray"
    for name, rest in instructions:
        if name == "COPY":
            sources = rest.split()[:-1]
            assert all((ROOT / source).exists() for source in sources), rest
        if name == "RUN" and "pip install" in rest:
            assert "--no-cache-dir" in rest
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)


def test_ray_has_one_version():
    """The clients' and the nodes' must be the same."""
    texts = [(CLUSTER / "Dockerfile").read_text(), GUIDE.read_text()]
    versions = {version for text in texts for version in re.findall(r"ray\[.+\]==([\d.]+)", text)}
    for path in MANIFESTS:
        spec = yaml.safe_load(path.read_text())["spec"]
        versions.add(spec.get("rayClusterSpec", spec)["rayVersion"])
    assert len(versions) == 1


@pytest.mark.slow
def test_the_dashboard_shows_what_a_job_tells_prometheus(local_ray, model_directory, tmp_path):
    import ray

    shown = set(re.findall(r"ray_captioner_\w+", (CLUSTER / "grafana.json").read_text()))
    assert len(shown) == 10
    write_photos(tmp_path / "photos", 20)
    arguments = (str(tmp_path / "photos"), str(tmp_path / "out"), str(model_directory))
    caption_images(*arguments, run=RunConfig(engine="ray", device="cpu", shard_size=8))
    url = f"http://{ray.util.get_node_ip_address()}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    told: dict[str, float] = {}
    # A counter that never counted is not told; the dashboard takes these for zero.
    idle = {f"ray_captioner_model_waited_for_{name}_seconds_total" for name in ("decode", "write")}
    # What Ray tells is some seconds old: at first it may be from the middle of the job.
    while (
        not shown - idle <= told.keys()
        or told["ray_captioner_images_total"] < 20
        or told["ray_captioner_images_remaining"] > 0
    ) and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().split("\n")
        for line in lines:
            if line.startswith("ray_captioner_") and f'output="{tmp_path}/out"' in line:
                told[line.split("{")[0]] = float(line.split()[-1])
    assert shown - idle <= told.keys() <= shown
    assert told["ray_captioner_images_total"] == told["ray_captioner_batch_images_total"] == 20
    assert told["ray_captioner_images_remaining"] == 0
