"""``python -m captioner`` is the command ``captioner``."""

from captioner.cli import main

if __name__ == "__main__":
    main()
