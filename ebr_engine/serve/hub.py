"""What the endpoints of one server share: its settings, its store, its worker and what its model can do."""

from typing import Any

from ebr_engine.errors import EbrError
from ebr_engine.jobs.sheet import tasks_of_sheet
from ebr_engine.prompts.catalogue import AUTO, find_prompts, prompt_files
from ebr_engine.request import RestoreRequest
from ebr_engine.serve.metrics import Metrics
from ebr_engine.serve.settings import Settings
from ebr_engine.serve.store import Store
from ebr_engine.serve.worker import Worker


class Hub:
    """Everything that lives as long as the server does; `restorer` has `restore_file` and a backbone's name, as `Restorer`."""

    def __init__(self, settings: Settings, restorer: Any):
        self.settings = settings
        self.store = Store(settings.store, settings.queue, settings.store_bytes, settings.keep_seconds)
        self.metrics = Metrics(self.store)
        self.worker = Worker(self.store, restorer, self.metrics)
        self.backbone = restorer.backbone.name
        self.model = f"ebr-{self.backbone}"
        self.is_built = getattr(restorer, "built", None) is not None  # an engine file, whose task is fixed

    @property
    def tasks(self) -> list[str]:
        """What can be asked for by name."""
        return [] if self.is_built else [*sorted(prompt_files(self.backbone)), AUTO]

    def check_request(self, values: dict[str, Any]) -> None:
        """`EbrError` for a task that the model has no prompt for, before anything is queued."""
        request = RestoreRequest.from_json(values)
        if request.task and request.task != AUTO and not self.is_built:
            find_prompts(self.backbone, request.task)

    def check_sheets(self) -> None:
        """`EbrError` where there is nothing to choose from: an engine file's task is fixed."""
        if self.is_built:
            raise EbrError("an engine file has one task; there is nothing to choose from")
        tasks_of_sheet(self.backbone)

    def check_model(self, name: str | None) -> None:
        """`EbrError` unless a client asks for the model that is loaded, or for none by name."""
        if name not in (None, "", self.model, self.backbone):
            raise EbrError(f"this server has the model {self.model}; another one is served by a server of its own")

    def close(self) -> None:
        """Finish the current step, leave the rest in the queue."""
        self.worker.stop()
        if self.worker.is_alive():
            self.worker.join()
        self.store.close()
