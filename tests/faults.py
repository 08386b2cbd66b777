"""Runs captioner with faults put into its processes: ``python faults.py ENGINE caption …``.

An image file that ends in ``KILL`` kills the process that decodes it. Where the environment has
``KILL_MODEL``, a magenta image kills the one whose model sees it. While a file that it names in
``BROKEN_DEVICE`` exists, any image does, as on a GPU that is broken. Where it names a file in
``KILL_RENAME`` that does not exist, the first process to rename a part makes that file and is
killed before the renaming.
"""

import os
import signal
import sys


def install() -> None:
    """Puts the faults into this process."""
    from captioner.data import images

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    decode = images.decode

    def poisoned_decode(data, *arguments, **keywords):
        if data.endswith(b"KILL"):
            die()
        return decode(data, *arguments, **keywords)

    once = os.environ.get("KILL_RENAME")

    def audit(event: str, arguments: tuple) -> None:
        if event == "os.rename" and "/part-" in str(arguments[1]) and not os.path.exists(once):
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
            die()

    images.decode = poisoned_decode
    broken = os.environ.get("BROKEN_DEVICE", "")
    if "KILL_MODEL" in os.environ or broken:  # torch takes seconds to import
        from captioner.model.native import Captioner

        call = Captioner.__call__

        def poisoned_call(self, images_BHW3):
            magenta = (images_BHW3 == (255, 0, 255)).all((1, 2, 3)).any()
            if os.path.exists(broken) or ("KILL_MODEL" in os.environ and magenta):
                die()
            return call(self, images_BHW3)

        Captioner.__call__ = poisoned_call
    if once:
        sys.addaudithook(audit)


if __name__ == "__main__":
    engine, *arguments = sys.argv[1:]
    if engine == "ray":
        os.environ["RAY_AUTH_MODE"] = "disabled"
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": install},
        )
    else:
        install()
    from captioner.cli import main

    main([*arguments, "--engine", engine])
