"""Which shards are in a process's hands, and which images processes died with.

A crash in a decoder's C code or the kernel's out-of-memory killer cannot be caught: a small file
says which shard is in a process's hands, and is deleted when the shard is out of them. Where that
file is found, the process died, or was killed by somebody; the shard is then done image by image,
each named in the file before it is touched.
"""

import json
import re
from typing import Any

from captioner import storage
from captioner.errors import OutputError
from captioner.output.directory import PRIVATE

__all__ = ["Attempts"]

_NAME = re.compile(r"(\d{6,})\.json")


class Attempts:
    """The files that say which shards are in a process's hands: ``__captioner/attempts/N.json``.

    A file holds ``alone``, the URI of the image that is in the process alone, or null, and
    ``deaths``, how often a process died with an image alone in it, by URI.
    """

    def __init__(self, output: str):
        self._directory = storage.join(storage.join(output, PRIVATE), "attempts")

    def _uri(self, number: int) -> str:
        return storage.join(self._directory, f"{number:06d}.json")

    def begin(
        self, number: int, *, alone: str | None = None, deaths: dict[str, int] | None = None
    ) -> None:
        """Says that a shard, or an image of it alone, is in this process's hands from now on."""
        values = {"alone": alone, "deaths": deaths or {}}
        storage.write(self._uri(number), json.dumps(values).encode())

    def end(self, number: int) -> None:
        """Says that a shard is out of this process's hands."""
        storage.delete(self._uri(number))

    def deaths(self, number: int) -> dict[str, int] | None:
        """None where no process died with the shard; else how often one did with an image alone."""
        values = self._read(number)
        if values is None:
            return None
        deaths: dict[str, int] = values["deaths"]
        if values["alone"] is not None:
            deaths[values["alone"]] = deaths.get(values["alone"], 0) + 1
        return deaths

    def _read(self, number: int) -> Any:
        try:
            return json.loads(storage.read(self._uri(number)))
        except FileNotFoundError:
            return None
        except ValueError:
            # A power cut or a copy of the folder may leave it empty or cut off. It still says that
            # the shard was in hand; an image that kills its process is found out again.
            return {"alone": None, "deaths": {}}
        except OSError as error:
            raise OutputError(f"cannot read {self._uri(number)}: {error}") from error

    def suspects(self) -> set[int]:
        """The numbers of the shards that were in a process's hands when it died."""
        try:
            names = storage.names(self._directory)
        except OSError as error:
            raise OutputError(f"cannot list {self._directory}: {error}") from error
        return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}

    def forgive(self) -> None:
        """After an orderly end: what is in hands now is nobody's fault, earlier deaths stay."""
        for number in self.suspects():
            if (values := self._read(number)) and values["deaths"]:
                self.begin(number, deaths=values["deaths"])
            else:
                self.end(number)

    def clear(self) -> None:
        """Deletes all files: the job has ended, and every image has its row."""
        storage.delete(self._directory)
