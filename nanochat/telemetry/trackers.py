"""wandb or trackio, where one is wanted. None of their failures is worth a run."""

import importlib.util
import netrc
import os
from collections.abc import Callable, Mapping
from typing import Any

from nanochat.errors import UserError


class Tracker:
    """wandb, trackio or nothing, behind one `log`."""

    def __init__(
        self, kind: str, run: str | None, project: str, config: Mapping[str, Any], run_id: str | None = None
    ) -> None:
        """`kind` auto: wandb if the user named a run, or is logged in and it is installed. Never asks a question.

        `run_id` is what a run that is resumed was called there, so that its curves go on. Raises UserError if the
        tracker asked for is not installed.
        """
        if kind == "auto":
            wanted = run is not None or (is_logged_in_to_wandb() and importlib.util.find_spec("wandb") is not None)
            kind = "wandb" if wanted else "none"
        self.run_id = run_id
        """what the tracker calls this run; None if there is none"""
        self._kind = kind
        self._trouble: str | None = None
        self._module: Any = None
        if kind == "none":
            return
        if importlib.util.find_spec(kind) is None:
            raise UserError(
                f"{kind} is not installed: run .venv/bin/pip install {kind}, or leave out --run and --tracker"
            )
        if kind == "wandb" and not is_logged_in_to_wandb():
            os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later; a login prompt would block
        self._module = importlib.import_module(kind)
        self._unless_it_fails("does not start", lambda module: self._begin(module, run, project, config))

    def _begin(self, module: Any, run: str | None, project: str, config: Mapping[str, Any]) -> None:
        # wandb knows a run by its id; trackio by its name, and makes one up where none is given.
        name = {"name": run, "id": self.run_id} if self._kind == "wandb" else {"name": run or self.run_id}
        started = module.init(project=project, config=dict(config), resume="allow", **name)
        self.run_id = str(started.id if self._kind == "wandb" else started.name)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers of one step."""
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        self._unless_it_fails("takes no more", lambda module: module.log(numbers, step=step))

    def close(self) -> None:
        """Finish the run."""
        self._unless_it_fails("does not finish", lambda module: module.finish())

    def trouble(self) -> str | None:
        """Why the tracker gets nothing more of this run, such as a server that is out of reach; told once."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def _unless_it_fails(self, failure: str, act: Callable[[Any], object]) -> None:
        """Use the module until it fails once: a server that is out of reach may take minutes to fail at each step."""
        if self._module is None:
            return
        try:
            act(self._module)
        except Exception as error:  # each tracker has errors of its own
            self._module = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._trouble = f"{self._kind} {failure} ({reason})"


def is_logged_in_to_wandb() -> bool:
    """Whether wandb can be used without asking who this is."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
