"""wandb and trackio behind one interface. Their failures never end a run."""

import importlib.util
import netrc
import os
from collections.abc import Callable, Mapping
from typing import Any

from nanochat.errors import UserError, one_line


class Tracker:
    def __init__(self, kind: str, run: str | None, run_id: str | None, report: Callable[[str], None]) -> None:
        """`kind` auto: wandb if `run` is given or the user is logged in. Never prompts.

        `run` is the name of the run, `run_id` the tracker's id of a resumed one, whose curves continue. `report` is
        called once if logging ends early, as for an unreachable server. Raises UserError if it is not installed.
        """
        if kind == "auto":
            kind = "wandb" if run is not None or is_logged_in_to_wandb() else "none"
        self.run_id = run_id
        self._run, self._kind, self._report = run, kind, report
        self._module: Any = None
        if kind != "none" and importlib.util.find_spec(kind) is None:
            raise UserError(
                f"--tracker {kind} is not installed: run .venv/bin/python -m pip install {kind}, or leave it out"
            )

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        if self._kind == "none":
            return
        if self._kind == "wandb" and not is_logged_in_to_wandb():
            os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later; a login prompt would block
        self._module = importlib.import_module(self._kind)
        # wandb identifies a run by its id, trackio by its name, which it makes up if none is given.
        is_wandb = self._kind == "wandb"
        name = {"name": self._run, "id": self.run_id} if is_wandb else {"name": self._run or self.run_id}

        def start(module: Any) -> None:
            started = module.init(project=project, config=dict(config), resume="allow", **name)
            self.run_id = str(started.id if is_wandb else started.name)

        self._try("failed to start", start)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        self._try("stopped logging", lambda module: module.log(numbers, step=step))

    def close(self) -> None:
        self._try("failed to finish", lambda module: module.finish())

    def _try(self, failure: str, act: Callable[[Any], object]) -> None:
        """Use the module until it fails once: an unreachable server may take minutes to fail at every step."""
        if self._module is None:
            return
        try:
            act(self._module)
        except Exception as error:  # each tracker has its own exceptions
            self._module = None
            self._report(f"{self._kind} {failure} ({one_line(error)})")


def is_logged_in_to_wandb() -> bool:
    """True if wandb works without a login prompt."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
