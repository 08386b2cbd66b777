"""Runs captioner with faults put into its processes: ``python faults.py ENGINE caption …``.

An image file that ends in ``KILL`` kills the process that decodes it. With ``KILL_MODEL`` in the
environment, a magenta image kills the process whose model captions it. While the file named by
``BROKEN_DEVICE`` exists, any image does, as on a broken GPU. If ``KILL_RENAME`` names a file that
does not exist, the first process to rename a part creates that file and is killed before the
renaming.

``RUNS`` in the environment runs a local job so often, one process after another; all but the last
have to die.
"""

import os
import signal
import sys


def install() -> None:
    """Puts the faults into this process, those of the model once it is imported.

    A worker of Ray that decodes or writes never imports torch, which takes seconds.
    """
    import importlib.abc
    import importlib.util

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

    broken = os.environ.get("BROKEN_DEVICE", "")

    def poison(captioner: type, method: str) -> None:
        call = getattr(captioner, method)

        def poisoned_call(self, images, *arguments):
            magenta = any((image == (255, 0, 255)).all() for image in images)
            if os.path.exists(broken) or ("KILL_MODEL" in os.environ and magenta):
                die()
            return call(self, images, *arguments)

        setattr(captioner, method, poisoned_call)

    class Poisoner(importlib.abc.MetaPathFinder):
        """Poisons a model's module when it is imported."""

        def __init__(self, module: str, captioner: str, method: str):
            self.module, self.captioner, self.method = module, captioner, method

        def find_spec(self, name, path, target=None):
            if name != self.module:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def execute_and_poison(module) -> None:
                execute(module)
                poison(getattr(module, self.captioner), self.method)

            spec.loader.exec_module = execute_and_poison
            return spec

    images.decode = poisoned_decode
    if "KILL_MODEL" in os.environ or broken:
        native = Poisoner("captioner.model.native", "Captioner", "__call__")
        pretrained = Poisoner(
            "captioner.model.huggingface.captioner", "PretrainedCaptioner", "caption"
        )
        sys.meta_path[:0] = [native, pretrained]
    if once:
        sys.addaudithook(audit)


if __name__ == "__main__":
    engine, *arguments = sys.argv[1:]
    if engine == "ray":
        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112 - they have no faults
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

    for _ in range(int(os.environ.get("RUNS", "1")) - 1):
        from captioner.caption import job  # noqa: F401 - once for all processes, for it takes long

        process = os.fork()
        if not process:
            break
        status = os.waitpid(process, 0)[1]
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            sys.exit(f"a run ended before the last one, with status {status}")
    main([*arguments, "--engine", engine])
