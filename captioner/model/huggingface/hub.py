"""Where a pretrained model's files are: a directory, a bucket, or a model hub.

A model of the hub is written ``owner/name`` or ``owner/name@revision``. Its revision is resolved to
a commit once; from then on only that commit's files are read, on every machine. Only JSON,
safetensors, tokenizer and template files are fetched: none of them can hold code that runs.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from captioner import storage
from captioner.errors import BundleError, one_line

__all__ = [
    "Location",
    "fetch_config",
    "hub_errors",
    "is_hub_name",
    "list_hub",
    "locate",
    "parse_config",
    "split_revision",
    "weights_among",
]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_HASHED_WHOLE = 1 << 31  # bytes of a weights file; of a larger one, samples are hashed
_SAMPLE, _SAMPLES = 1 << 16, 4096
_DOWNLOADS = 4  # files at once


@dataclass(frozen=True, kw_only=True)
class Location:
    """A model's files.

    Attributes:
        uri: the model as the user named it.
        kind: ``local``, ``bucket`` or ``hub``.
        revision: the commit of a model of the hub.
        files: the names to fetch.
        identity: what tells this model from any other.
        config: the content of config.json.
    """

    uri: str
    kind: str
    files: tuple[str, ...]
    identity: str
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def fetch(self) -> Path:
        """The directory on this machine that holds the files, which are fetched where they are not.

        Raises:
            BundleError: they cannot be had.
        """
        if self.kind == "local":
            path = Path(storage.as_path(self.uri))
            if not (path / "config.json").is_file():
                raise BundleError(
                    f"the model {self.uri} is not on this machine; put it in a bucket, "
                    "or at the same path on every machine"
                )
            return path
        if self.kind == "bucket":
            return _fetch_bucket(self)
        return _fetch_hub(self)


def is_hub_name(uri: str) -> bool:
    """Whether this is written as a model of the hub is, and is no directory here."""
    return _NAME.fullmatch(uri) is not None and not os.path.isdir(uri)


def locate(uri: str) -> Location:
    """Finds a model's files, and reads its config.json; fetches no weights.

    Raises:
        BundleError: there is no such model, it cannot be reached, or it has only pickled weights.
    """
    if is_hub_name(uri):
        return _locate_hub(uri)
    uri = storage.absolute(uri)
    try:
        sizes = storage.sizes(uri)
    except OSError as error:
        raise BundleError(f"cannot read the model {uri}: {one_line(error)}") from error
    files = _wanted(uri, list(sizes))
    local = storage.is_local(uri)
    digest = hashlib.sha256()
    for name in files:
        place = storage.join(uri, name)
        digest.update(f"{name} {sizes[name]} ".encode())
        with storage.open_binary(place) as file:
            for part in _samples(file, sizes[name]):
                digest.update(part)
    with storage.open_binary(storage.join(uri, "config.json")) as file:
        config = parse_config(uri, file.read())
    return Location(
        uri=uri,
        kind="local" if local else "bucket",
        files=files,
        identity=digest.hexdigest(),
        config=config,
    )


def _samples(file: Any, size: int) -> Iterator[bytes]:
    """The bytes of a file that are hashed: all or, for a large file, evenly spaced parts."""
    if size <= _HASHED_WHOLE:
        while part := file.read(1 << 20):
            yield part
        return
    for number in range(_SAMPLES):
        file.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
        yield file.read(_SAMPLE)


def parse_config(uri: str, data: bytes) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        BundleError: it is not a JSON object.
    """
    try:
        config = json.loads(data)
    except ValueError as error:
        raise BundleError(f"config.json of the model {uri} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BundleError(f"config.json of the model {uri} is not an object")
    return config


def weights_among(names: Sequence[str]) -> list[str]:
    """The files of the weights among a directory's names, empty where there are none."""
    if _INDEX in names:
        return [name for name in names if fnmatch.fnmatch(name, "model-*.safetensors")]
    return [_WEIGHTS] if _WEIGHTS in names else []


def _wanted(uri: str, names: Sequence[str]) -> tuple[str, ...]:
    """The files that a model is loaded from.

    Raises:
        BundleError: it has no config.json or no weights in safetensors.
    """
    top = [name for name in names if "/" not in name]
    if "config.json" not in top:
        raise BundleError(f"{uri} is not a model: it has no config.json")
    weights = weights_among(top)
    if not weights:
        pickled = [name for name in top if name.endswith(_PICKLES)]
        if not pickled:
            raise BundleError(f"{uri} is not a model: it has no {_WEIGHTS}")
        raise BundleError(
            f"the model {uri} has its weights only as {pickled[0]}, a format that can run code; "
            f"convert it once with: captioner import-model {uri} DIRECTORY"
        )
    small = [name for name in top if any(fnmatch.fnmatch(name, each) for each in _SMALL)]
    return tuple(sorted({*small, *weights}))


def split_revision(uri: str) -> tuple[str, str | None]:
    """The name and the revision of ``owner/name@revision``."""
    name, _, revision = uri.partition("@")
    return name, revision or None


def _locate_hub(uri: str) -> Location:
    """A model of the hub; without a network, as it was downloaded before."""
    name, revision = split_revision(uri)
    with hub_errors(uri):
        names, cached = list_hub(name, revision)
        files = _wanted(uri, names)
        config = fetch_config(name, revision, cached=cached)
        commit = config.parent.name
        return Location(
            uri=uri,
            kind="hub",
            files=files,
            identity=f"{name}@{commit}",
            revision=commit,
            config=parse_config(uri, config.read_bytes()),
        )


def list_hub(name: str, revision: str | None) -> tuple[list[str], bool]:
    """The names of a model's files; True: those in the cache, because the hub is not reached."""
    import huggingface_hub as hub

    try:
        found = hub.HfApi().model_info(name, revision=revision)
    except (hub.errors.OfflineModeIsEnabled, hub.utils.httpx.TransportError):
        config = fetch_config(name, revision, cached=True)
        return sorted(each.name for each in config.parent.iterdir()), True
    return [each.rfilename for each in found.siblings or []], False


def fetch_config(name: str, revision: str | None, *, cached: bool) -> Path:
    """The path of config.json, whose folder is named after the commit.

    Args:
        name: ``owner/name``.
        revision: a branch, a tag or a commit. The cache records its commit, for times without a
            network.
        cached: take the file from the cache only.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=cached))


def _fetch_hub(location: Location) -> Path:
    """Every file at the location's commit; those that are in the cache are not fetched again."""
    with hub_errors(location.uri):
        from huggingface_hub import hf_hub_download

        name, _ = split_revision(location.uri)
        get = partial(hf_hub_download, name, revision=location.revision)
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            paths = list(pool.map(get, location.files))
    return Path(paths[0]).parent


@contextlib.contextmanager
def hub_errors(uri: str) -> Iterator[None]:
    """Turns an error of the hub's client into one line that says what to do.

    The client's own lines, one for each retry, are not shown meanwhile.
    """
    try:
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import httpx, logging
    except ImportError as error:
        raise BundleError(
            f"there is no directory {uri}; a model of the Hugging Face hub needs captioner[hf]: "
            "pip install 'captioner[hf]'"
        ) from error
    name, revision = split_revision(uri)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError as error:
        raise BundleError(
            f"the model {uri} is gated: accept its terms on its page with your account, then "
            "set HF_TOKEN to a token of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BundleError(f"the model {name} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise BundleError(
            f"there is no model {uri}: no such directory, and no public model of this name on the "
            "hub; for a private model set HF_TOKEN"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise BundleError(f"{uri} is not a model: {one_line(error)[-200:]}") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is not reached"
        raise BundleError(
            f"the model {uri} is not in the cache, and {why}; check the network, download the "
            "model on a machine with a network, or give a directory"
        ) from error
    except (errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise BundleError(
            f"cannot reach the hub for the model {uri}: {one_line(error)[:200]}; if the model is "
            "in the cache, set HF_HUB_OFFLINE=1"
        ) from error
    except OSError as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"cannot download the model {uri}: {one_line(error)[:200]}") from error
    finally:
        logging.set_verbosity(verbosity)


def _fetch_bucket(location: Location) -> Path:
    """A bucket's model, copied once to this machine's cache."""
    path = storage.cache_directory("models") / location.identity
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.locked(str(path) + ".lock", wait=True):  # another process may fetch it
        if path.is_dir():
            return path
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in location.files:
            with (
                storage.open_binary(storage.join(location.uri, name)) as source,
                open(part / name, "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        os.replace(part, path)
    return path
