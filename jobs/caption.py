"""``captioner caption`` for ``ray job submit --working-dir . -- python jobs/caption.py SOURCE …``.

Works from a checkout, without an installed captioner.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from captioner.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]], prog_name="captioner")
