"""Writes photos into files that hold many: tar and Parquet files."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets


def make_tars(photos: Path, folder: Path) -> str:
    """Puts photos into two tar files, each with a number."""
    folder.mkdir()
    paths = sorted(photos.iterdir())
    for number, some in enumerate((paths[:7], paths[7:])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for path in some:
                tar.add(path, path.name)
                text = json.dumps({"number": paths.index(path)}).encode()
                info = tarfile.TarInfo(f"{path.stem}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return str(folder)


def make_parquet(photos: Path, folder: Path) -> str:
    """Puts photos into two Parquet files as datasets writes them, each with a number."""
    folder.mkdir()
    paths = sorted(photos.iterdir())
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int32")})
    for begin, end in ((0, 7), (7, len(paths))):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths[begin:end]]
        data = {"image": cells, "number": [*range(begin, end)]}
        written = datasets.Dataset.from_dict(data, features=features)
        written.to_parquet(folder / f"train-{begin:05d}.parquet")
    return str(folder)


#: What puts photos into containers in a folder, each with its number in the column ``number``.
MAKERS: dict[str, Callable[[Path, Path], str]] = {"tar": make_tars, "parquet": make_parquet}
