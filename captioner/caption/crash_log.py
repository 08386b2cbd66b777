"""Records which shards are in progress, and which images processes crashed on.

A crash in a decoder's C code or the kernel's out-of-memory killer cannot be caught. A process
therefore writes a small file when it begins a shard, and deletes the file when the shard is
finished. A file that remains shows that its process died. When the shard is then captioned, the
file names each image before it is read, and each batch before the model captions it. The images of
a batch that a process died with are captioned image by image.

A broken device kills its processes on any image. Before a process reads an image that another
process may have crashed on, it therefore captions a plain grey image, the probe:

- A death with the probe counts against no image. After :data:`_PROBES` such deaths in a row
  on one device the job stops.
- A death with a single image counts against the image once the same device captions the probe, or
  any image, afterwards. Two counted deaths set the image aside.
- Uncounted deaths on :data:`_DEVICES` different devices set the image aside too: each device
  captioned the probe just before. Otherwise a job that gets a new machine for every process would
  never end.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from captioner import storage
from captioner.errors import DeviceError, OutputError
from captioner.output.directory import PRIVATE

__all__ = ["CrashLog", "Crashes"]

_SHARD = re.compile(r"(\d{6,})\.json")
_DEATHS = 2  # counted deaths that set an image aside
_DEVICES = 3  # devices with uncounted deaths that set an image aside
_PROBES = 3  # consecutive deaths with the probe that show a broken device


@dataclass
class Crashes:
    """What is known about processes that died on a shard.

    Attributes:
        deaths: counted deaths on a single image, by URI.
        unproven: uncounted deaths on a single image, as URI and device: the device has captioned
            nothing since.
        singles: URIs of the images of batches that processes died with.
    """

    deaths: dict[str, int] = field(default_factory=dict)
    unproven: list[tuple[str, str]] = field(default_factory=list)
    singles: list[str] = field(default_factory=list)

    def count_deaths_on(self, device: str) -> None:
        """Counts the deaths on a device once it has captioned an image and thus works."""
        for uri, where in self.unproven:
            if where == device:
                self.deaths[uri] = self.deaths.get(uri, 0) + 1
        self.unproven = [(uri, where) for uri, where in self.unproven if where != device]

    def names(self, uri: str) -> bool:
        """Whether a process died with an image, or with a batch that it was in."""
        unproven = any(image == uri for image, _ in self.unproven)
        return unproven or uri in self.deaths or uri in self.singles

    def sets_aside(self, uri: str) -> bool:
        """Whether an image is to be set aside."""
        devices = {where for image, where in self.unproven if image == uri}
        return self.deaths.get(uri, 0) >= _DEATHS or len(devices) >= _DEVICES


class CrashLog:
    """The files that record which shards are in progress: ``__captioner/attempts/N.json``.

    A file holds a shard's :class:`Crashes` and what is in progress: ``alone``, the URI of a single
    image and the process's device, or null; ``batch``, the URIs of a batch. ``device-….json``
    counts the consecutive processes that died with the probe on a device.
    """

    def __init__(self, output: str):
        self._directory = storage.join(storage.join(output, PRIVATE), "attempts")

    def begin(
        self,
        shard: int,
        crashes: Crashes | None = None,
        *,
        alone: tuple[str, str] | None = None,
        batch: Sequence[str] = (),
    ) -> None:
        """Records that this process begins a shard, a single image on a device, or a batch."""
        values = {"alone": alone, "batch": [*batch], **asdict(crashes or Crashes())}
        storage.write(self._shard(shard), json.dumps(values).encode())

    def end(self, shard: int) -> None:
        """Records that a shard is finished."""
        storage.delete(self._shard(shard))

    def crashes(self, shard: int) -> Crashes | None:
        """What is known about processes that died on a shard; None if no process did.

        Raises:
            OutputError: the file cannot be read.
        """
        values = self._read(self._shard(shard))
        if values is None:
            return None
        try:
            unproven = [values["alone"]] if values["alone"] else []
            unproven += values["unproven"]
            return Crashes(
                deaths={str(uri): int(count) for uri, count in values["deaths"].items()},
                unproven=[(str(uri), str(where)) for uri, where in unproven],
                singles=[str(uri) for uri in [*values["singles"], *values["batch"]]],
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            # A power cut or a copy of the folder may leave the file empty or cut off. It still
            # shows that the shard was in progress; a crash on an image will show again.
            return Crashes()

    def shards(self) -> set[int]:
        """The numbers of the shards that were in progress when their process died.

        Raises:
            OutputError: the files cannot be listed.
        """
        return {int(match[1]) for name in self._names() if (match := _SHARD.fullmatch(name))}

    def begin_probe(self, device: str) -> None:
        """Records that this process is about to caption the probe on a device.

        Raises:
            DeviceError: too many processes in a row died with the probe on this device.
        """
        values = self._read(self._device(device))
        deaths = (values or {}).get("deaths", 0)
        if deaths >= _PROBES:
            self.end_probe(device)  # it may be repaired before the job is run again
            raise DeviceError(
                f"{device} seems to be broken: {deaths} processes in a row died there while they "
                "captioned a plain grey image. Repair or exclude the device, then run the same "
                "command again; no image is set aside because of it"
            )
        text = json.dumps({"device": device, "deaths": deaths + 1})
        storage.write(self._device(device), text.encode())

    def end_probe(self, device: str) -> None:
        """Records that a device captioned the probe."""
        storage.delete(self._device(device))

    def clear_after_orderly_end(self) -> None:
        """Clears the shards and probes in progress, for a job that ends without a crash.

        Recorded deaths stay.
        """
        for shard in self.shards():
            values = self._read(self._shard(shard))
            if values and (values.get("deaths") or values.get("unproven")):
                cleared = values | {"alone": None, "batch": []}
                storage.write(self._shard(shard), json.dumps(cleared).encode())
            else:
                self.end(shard)
        for name in self._names():
            if name.startswith("device-"):
                storage.delete(storage.join(self._directory, name))

    def delete(self) -> None:
        """Deletes all files: the job has ended, and every image has its row."""
        storage.delete(self._directory)

    def _shard(self, number: int) -> str:
        return storage.join(self._directory, f"{number:06d}.json")

    def _device(self, device: str) -> str:
        name = hashlib.sha256(device.encode()).hexdigest()[:16]
        return storage.join(self._directory, f"device-{name}.json")

    def _names(self) -> list[str]:
        try:
            return storage.names(self._directory)
        except OSError as error:
            raise OutputError(f"cannot list {self._directory}: {error}") from error

    def _read(self, uri: str) -> dict[str, Any] | None:
        """Reads a file's JSON; None if the file does not exist, ``{}`` if it is damaged."""
        try:
            values = json.loads(storage.read(uri))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        except OSError as error:
            raise OutputError(f"cannot read {uri}: {error}") from error
        return values if isinstance(values, dict) else {}
