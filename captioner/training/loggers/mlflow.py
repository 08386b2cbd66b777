"""MLflow, by its own client; ``MLFLOW_TRACKING_URI`` says where, by default a file in OUTPUT."""

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from captioner import storage
from captioner.errors import InputError, one_line
from captioner.training.directory import TrainingDirectory

if TYPE_CHECKING:
    from mlflow.entities import Metric

__all__ = ["MlflowLogger"]

_SECONDS = 10.0  # between two requests
_METRICS, _PARAMETERS = 1000, 100  # in a request, at most
_STORE = "mlflow.db"

_logger = logging.getLogger(__name__)


class MlflowLogger:
    """Sends figures every few seconds, and keeps them while the server cannot be reached.

    The run's id is in its directory: a resumed run is one run there.

    Raises:
        InputError: the server refuses the run, or cannot be reached.
    """

    def __init__(self, directory: TrainingDirectory):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # figures are sent again
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._error: type[Exception] = MlflowException
        self._pending: list[Metric] = []
        self._sent = time.monotonic()
        self._failed = False
        try:
            uri = os.environ.get("MLFLOW_TRACKING_URI") or _own_store(directory)
            self._client = MlflowClient(tracking_uri=uri)
            self._run = self._resume(directory) or self._begin(directory)
        except MlflowException as error:
            raise InputError(f"--log mlflow: {_without_credentials(error)}") from error

    def _resume(self, directory: TrainingDirectory) -> str | None:
        """Continues the run that has begun; None if there is none."""
        run = directory.read_id("mlflow")
        if run is None:
            return None
        try:
            found = self._client.get_run(run)
        except self._error as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if found.info.lifecycle_stage != "active":
            return None
        self._client.update_run(run, status="RUNNING")
        # MLflow does not change a parameter.
        changes = json.dumps(directory.read_settings().get("changes", []))
        self._client.set_tag(run, "changes", changes)
        return run

    def _begin(self, directory: TrainingDirectory) -> str:
        from mlflow.entities import Param

        created = self._client.create_run(self._experiment(directory), run_name=directory.name)
        run = str(created.info.run_id)
        directory.write_id("mlflow", run)
        settings = _flat("", directory.read_settings())
        parameters = [Param(_allowed(name), str(value)) for name, value in settings.items()]
        for begin in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(run, params=parameters[begin : begin + _PARAMETERS])
        return run

    def _experiment(self, directory: TrainingDirectory) -> str:
        """The id of the experiment that the environment names, or of ``captioner``."""
        if identity := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "captioner"
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            location = storage.join(directory.uri, "mlartifacts")
        return str(self._client.create_experiment(name, artifact_location=location))

    def log_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes a step's figures."""
        self._take(step, figures)
        if time.monotonic() - self._sent >= _SECONDS:
            self.flush()

    def log_epoch(
        self, epoch: int, figures: Mapping[str, float], captions: Sequence[tuple[str, str]]
    ) -> None:
        """Takes an epoch's figures; ``samples.md`` has the captions."""
        self._take(epoch, figures)

    def _take(self, place: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(_allowed(n), value, now, place) for n, value in figures.items()]

    def flush(self) -> None:
        """Sends the figures; what cannot be sent is sent with the next ones."""
        try:
            while self._pending:
                self._client.log_batch(self._run, metrics=self._pending[:_METRICS])
                del self._pending[:_METRICS]
            self._failed = False
        except self._error as error:
            self._warn(error)
        self._sent = time.monotonic()

    def close(self, *, failed: bool) -> None:
        """Marks the run as ended."""
        try:
            self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")
        except self._error as error:
            self._warn(error)
        if self._pending and not failed:
            _logger.warning("%d figures were not sent to MLflow", len(self._pending))

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            _logger.warning("cannot send figures to MLflow: %s", _without_credentials(error))
        self._failed = True


def _own_store(directory: TrainingDirectory) -> str:
    """The URI of a SQLite file in the run's directory.

    Raises:
        InputError: the directory is in a bucket, or packages are missing.
    """
    if not storage.is_local(directory.uri):
        raise InputError(
            f"--log mlflow: {directory.uri} is in a bucket: set MLFLOW_TRACKING_URI to a server"
        )
    if find_spec("alembic") is None or find_spec("sqlalchemy") is None:
        raise InputError(
            f"--log mlflow: to write {_STORE} in OUTPUT, pip install 'captioner[mlflow]'; or set "
            "MLFLOW_TRACKING_URI to a server"
        )
    return f"sqlite:///{storage.as_path(directory.uri)}/{_STORE}"


def _flat(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by names such as ``train/epochs``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            _flat(f"{prefix}{name}/", value) if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _allowed(name: str) -> str:
    """A name without the characters that MLflow refuses, which a data set's name may have."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def _without_credentials(error: Exception) -> str:
    """An error in a line, without a user name and a password in its URIs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", one_line(error))
