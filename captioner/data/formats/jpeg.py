"""How many passes over a JPEG its scans ask for."""

import re

__all__ = ["MOST_SCANS", "scan_components"]

#: Encoders write about ten scans; each costs a pass over the image, and may be a few bytes long.
MOST_SCANS = 100
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed byte nor a restart
_SCAN, _END = b"\xda", b"\xd9"


def scan_components(data: bytes) -> list[int]:
    """How many of a JPEG's colour components each of its scans has; one scan more than allowed."""
    scans: list[int] = []
    position = 0
    while (marker := _MARKER.search(data, position)) and marker[1] != _END:
        position = marker.end()
        if marker[1] == _SCAN:
            scans += data[position + 2 : position + 3]
            if len(scans) > MOST_SCANS:
                break
        if marker[1] != b"\xd8":  # the start has no length
            position += int.from_bytes(data[position : position + 2], "big")
        # Most have one scan, nearly all of the file: it is not gone through if no other may follow.
        if marker[1] == _SCAN and data.find(b"\xff" + _SCAN, position) < 0:
            break
    return scans
