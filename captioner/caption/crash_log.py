"""Which shards are in a process's hands, and which images processes died with.

A crash in a decoder's C code or the kernel's out-of-memory killer cannot be caught. A small file
therefore says which shard a process has in hand, and is deleted when the shard is finished. A file
that is found later tells that its process died, or was killed. The shard is then captioned image by
image, each named in the file before it is touched.

A device that breaks kills its processes too, whatever the image. Before a process touches an image
that another process may have died with, it therefore captions a plain grey image, the probe:

- A death with the probe counts against no image. After :data:`_PROBES` such deaths in a row
  on one device the job stops.
- A death with an image alone counts against the image only once the probe, or any image, has gone
  through on the same device afterwards. Two such deaths set the image aside.
- Deaths on :data:`_DEVICES` different devices set the image aside too: each had captioned the probe
  just before, and a job whose every process gets another machine could otherwise never end.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from captioner import storage
from captioner.errors import DeviceError, OutputError
from captioner.output.directory import PRIVATE

__all__ = ["CrashLog", "Crashes"]

_SHARD = re.compile(r"(\d{6,})\.json")
_DEATHS = 2  # counted deaths, with the image alone, that set it aside
_DEVICES = 3  # devices with deaths that are not counted, which set it aside as well
_PROBES = 3  # deaths in a row with the probe, after which the device is taken to be broken


@dataclass
class Crashes:
    """What is known about processes that died with a shard.

    Attributes:
        deaths: counted deaths with an image alone, by URI.
        unproven: other deaths with an image alone, as URI and device: nothing has gone through on
            the device since.
    """

    deaths: dict[str, int] = field(default_factory=dict)
    unproven: list[tuple[str, str]] = field(default_factory=list)

    def count_deaths_on(self, device: str) -> None:
        """Counts the deaths on a device that has just captioned an image, and therefore works."""
        for uri, where in self.unproven:
            if where == device:
                self.deaths[uri] = self.deaths.get(uri, 0) + 1
        self.unproven = [(uri, where) for uri, where in self.unproven if where != device]

    def sets_aside(self, uri: str) -> bool:
        """Whether an image is to be set aside."""
        devices = {where for image, where in self.unproven if image == uri}
        return self.deaths.get(uri, 0) >= _DEATHS or len(devices) >= _DEVICES


class CrashLog:
    """The files that say which shards are in a process's hands: ``__captioner/attempts/N.json``.

    A file holds a shard's :class:`Crashes` and ``alone``, the URI of the image that its process
    has in hand alone and the process's device, or null. ``device-….json`` counts the processes in a
    row that died with the probe on a device.
    """

    def __init__(self, output: str):
        self._directory = storage.join(storage.join(output, PRIVATE), "attempts")

    def begin(
        self, shard: int, crashes: Crashes | None = None, *, alone: tuple[str, str] | None = None
    ) -> None:
        """Says that a shard, or one image of it on a device, is in this process's hands."""
        values = {"alone": alone, **asdict(crashes or Crashes())}
        storage.write(self._shard(shard), json.dumps(values).encode())

    def end(self, shard: int) -> None:
        """Says that a shard is finished."""
        storage.delete(self._shard(shard))

    def crashes(self, shard: int) -> Crashes | None:
        """What is known about processes that died with a shard; None where none did.

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
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            # A power cut or a copy of the folder may leave the file empty or cut off. It still
            # says that the shard was in hand; an image that kills its process is found again.
            return Crashes()

    def shards(self) -> set[int]:
        """The shards that were in a process's hands when it died, by number.

        Raises:
            OutputError: the files cannot be listed.
        """
        return {int(match[1]) for name in self._names() if (match := _SHARD.fullmatch(name))}

    def begin_probe(self, device: str) -> None:
        """Says that this process is about to caption the probe on a device.

        Raises:
            DeviceError: too many processes in a row died with the probe on this device.
        """
        values = self._read(self._device(device))
        deaths = (values or {}).get("deaths", 0)
        if deaths >= _PROBES:
            self.end_probe(device)  # it may be repaired before the job is run again
            raise DeviceError(
                f"{device} seems to be broken: {deaths} processes in a row died there while they "
                "captioned a plain grey image. Repair it or leave it out, then run the same "
                "command again; no image is set aside because of it"
            )
        text = json.dumps({"device": device, "deaths": deaths + 1})
        storage.write(self._device(device), text.encode())

    def end_probe(self, device: str) -> None:
        """Says that the probe has gone through on a device."""
        storage.delete(self._device(device))

    def clear_after_orderly_end(self) -> None:
        """Clears what no crash has left: the shards and probes of a job that ends in order.

        Earlier deaths stay.
        """
        for shard in self.shards():
            values = self._read(self._shard(shard))
            if values and (values.get("deaths") or values.get("unproven")):
                storage.write(self._shard(shard), json.dumps(values | {"alone": None}).encode())
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
        """A file's JSON; None where there is no such file, an empty object where it is damaged."""
        try:
            values = json.loads(storage.read(uri))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        except OSError as error:
            raise OutputError(f"cannot read {uri}: {error}") from error
        return values if isinstance(values, dict) else {}
