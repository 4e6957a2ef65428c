"""The file of an ablation's finished runs, a line of JSON each, and the table that is made of it."""

import fcntl
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PLAIN = "plain"


@dataclass(frozen=True)
class Setting:
    """What all runs of one table have in common."""

    depth: int
    max_seq_len: int
    tokens: int
    tuning_tokens: int
    total_batch_size: int
    eval_tokens: int
    dataset: str


@dataclass(frozen=True)
class Job:
    """One training."""

    variant: str
    purpose: Literal["tuning", "equal tokens", "equal seconds"]
    seed: int
    lr_scale: float = 1.0
    extra_lr_scale: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Of one variant, on one machine."""

    parameters: int
    step_seconds: float
    decode_ms: float
    """a token at batch 1"""


class Results:
    """The lines of one setting. Several processes may add to the file, and other settings may be in it."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path = path
        self.setting = setting

    def _lines(self, kind: str) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:  # cut short by a crash: that run is made again
                continue
            if record["kind"] == kind and record["setting"] == asdict(self.setting):
                yield record

    def runs(self) -> dict[Job, float]:
        """Bits per byte of every finished run, infinite where it diverged."""
        return {
            Job(**line["job"]): line["bpb"] if math.isfinite(line["bpb"]) else math.inf for line in self._lines("run")
        }

    def costs(self) -> dict[str, Cost]:
        """By variant."""
        return {line["variant"]: Cost(**line["cost"]) for line in self._lines("cost")}

    def best_tuning(self, variant: str) -> Job | None:
        """The tuning run with the lowest bits per byte; None before the first."""
        tuning = {job: bpb for job, bpb in self.runs().items() if job.variant == variant and job.purpose == "tuning"}
        return min(tuning, key=tuning.__getitem__, default=None)

    def by_seed(self, variant: str, purpose: str) -> dict[int, float]:
        """Bits per byte with the best learning rates of those tried."""
        best = self.best_tuning(variant)
        return {
            job.seed: bpb
            for job, bpb in self.runs().items()
            if best and (job.variant, job.purpose) == (variant, purpose)
            and (job.lr_scale, job.extra_lr_scale) == (best.lr_scale, best.extra_lr_scale)
        }  # fmt: skip

    def add(self, kind: str, **fields: Any) -> None:
        """One more line, after whatever a crash left of another."""
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        line = json.dumps({"kind": kind, "setting": asdict(self.setting), **fields})
        with self.path.open("a") as file:
            file.write("\n" * torn + line + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Another process that asks for the same waits."""
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def table(results: Results, variants: Iterable[str]) -> str:
    """What the file has, in Markdown: means over seeds ± their standard deviation, a dash where nothing is yet.

    What is gained is the plain model's less the variant's, seed by seed.
    """
    lines = [
        "| variant | lr, extra lr | bits/byte at equal tokens | gained | bits/byte at equal seconds | gained "
        "| parameters | training tokens/s | decoding ms/token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    costs = results.costs()
    for variant in variants:
        best = results.best_tuning(variant)
        cells = [variant, f"{best.lr_scale:g}, {best.extra_lr_scale:g}" if best else "–"]
        for purpose in ("equal tokens", "equal seconds"):
            plain, own = results.by_seed(PLAIN, purpose), results.by_seed(variant, purpose)
            cells += [_spread(list(own.values())), _spread([plain[seed] - own[seed] for seed in own if seed in plain])]
        if cost := costs.get(variant):
            speed = results.setting.total_batch_size / cost.step_seconds
            cells += [f"{cost.parameters:,}", f"{speed:,.0f}", f"{cost.decode_ms:.2f}"]
        lines.append(f"| {' | '.join(cells + ['–'] * (9 - len(cells)))} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f} ({len(values)})" if len(values) > 1 else mean
