import os
import subprocess
import sys
from pathlib import Path


def test_matplotlib_is_silent_without_a_home_directory(tmp_path: Path):
    code = (
        "import numpy as np\n"
        "from captioner.output.attention import colour\n"
        "print(colour(np.eye(3)).size)"
    )
    clean = {name: v for name, v in os.environ.items() if name not in ("XDG_CACHE_HOME", "HOME")}
    clean |= {"HOME": os.devnull, "TMPDIR": str(tmp_path)}
    clean.pop("MPLCONFIGDIR", None)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=clean
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "(3, 3)\n", "")
