"""The report as Markdown: model, stages, machine, results, curves, samples, data and options."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median

from nanochat import paths
from nanochat.eval.results import TaskScore, centered_mean, centered_mean_error
from nanochat.paths import MANIFEST_FILE
from nanochat.report.history import Stage
from nanochat.spark.plan import Tariff
from nanochat.stages import STAGES
from nanochat.units import format_duration

CAPTIONS = {
    "loss": "Training loss. The thin line is each step, the thick line a moving average.",
    "bits-per-byte": "Bits per byte of held-out text, comparable between tokenizers.",
    "reward": "Share of correct replies, length of replies, and share of replies in groups with different rewards, "
    "the only ones with a gradient.",
    "optimizer": "Multiplier of all learning rates, and the gradient norm before clipping.",
    "speed": "Tokens per second, and their share of the machine's peak FLOP/s.",
    "stages": "Scores of the chat model after each stage.",
    "CORE": "The 22 tasks of CORE.",
    "ChatCORE": "The six tasks of ChatCORE.",
}
"""By plot."""
MAX_SAMPLES = 4
"""Per stage, from its first to its last."""
Row = Sequence[str]


def document(stages: Sequence[Stage], plots: Mapping[str, str], tariff: Tariff) -> str:
    """The whole report on the `stages` of one model, base first. `plots`: path of each picture by name."""
    sections = [
        _opening(stages),
        _stages(stages, tariff),
        _plan(stages, tariff),
        _machine(stages),
        _results(stages, plots),
        _curves(plots),
        _samples(stages),
        _data(stages),
        _options(stages),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _opening(stages: Sequence[Stage]) -> str:
    last = stages[-1]
    shape = last.facts["model_config"]
    machines = dict.fromkeys(f"{stage.facts['machine']} ({stage.facts['software']})" for stage in stages)
    running = "" if last.is_finished else f" Its {STAGES[last.source].title} is at step {last.step:,}."
    return (
        f"# {last.facts['tag']}: {' → '.join(stage.source for stage in stages)}\n\n"
        f"A language model of {last.facts['num_parameters']:,} parameters: {shape['n_layer']} layers of "
        f"width {shape['n_embd']}, a context of {shape['sequence_len']:,} tokens, a vocabulary of "
        f"{shape['vocab_size']:,}. It was trained on {sum(stage.tokens for stage in stages):,} tokens in "
        f"{format_duration(sum(stage.seconds for stage in stages))}.{running}\n\n"
        f"Trained on {'; '.join(machines)}. Written on {time.strftime('%Y-%m-%d at %H:%M')}."
    )


def _stages(stages: Sequence[Stage], tariff: Tariff) -> str:
    energy = [stage.kwh(tariff) for stage in stages]

    def energy_and_cost(kwh: float | None) -> Row:
        cost = None if kwh is None or tariff.price_per_kwh is None else kwh * tariff.price_per_kwh
        return _figure(kwh, "{:.3g} kWh"), _figure(cost, "{:.2f}")

    rows: list[Row] = [
        (
            stage.source,
            f"{stage.step:,} of {stage.facts['num_iterations']:,}",
            f"{stage.tokens:,}",
            format_duration(stage.seconds),
            _statistic(stage, "tokens_per_second", median, "{:,.0f}"),
            _statistic(stage, "mfu", median, "{:.1%}"),
            _figure(stage.facts.get("peak_memory"), "{:.1f} GiB", 2**-30),
            *energy_and_cost(kwh),
        )
        for stage, kwh in zip(stages, energy, strict=True)
    ]
    if len(stages) > 1:
        tokens, seconds = sum(stage.tokens for stage in stages), sum(stage.seconds for stage in stages)
        known = [kwh for kwh in energy if kwh is not None]
        total = sum(known) if len(known) == len(stages) else None
        rows.append(("total", "", f"{tokens:,}", format_duration(seconds), "", "", "", *energy_and_cost(total)))
    headings = ("stage", "steps", "tokens", "time", "tokens/s", "MFU", "memory", "energy", "cost")
    notes = ["Tokens/s and MFU are medians over the steps; time is wall time, loading and evaluation included."]
    if skipped := [f"{n:.0f} in {stage.source}" for stage in stages if (n := stage.last("skipped_steps"))]:
        notes.append(f"Steps skipped because of a non-finite loss or gradient: {', '.join(skipped)}.")
    if tariff.watts is None:
        notes.append("Measured energy is that of the GPUs only; set NANOCHAT_WATTS for the whole machine.")
    else:
        notes.append(f"Energy is the time at {tariff.watts:g} W per machine, from NANOCHAT_WATTS.")
    return f"## Stages\n\n{_table(headings, rows)}\n\n{' '.join(notes)}"


def _plan(stages: Sequence[Stage], tariff: Tariff) -> str:
    """The estimate of the first stage that made one, next to the time and energy that its stages took."""
    planner = next((stage for stage in stages if stage.plan), None)
    if planner is None or planner.plan is None:
        return ""
    plan, machine = planner.plan, planner.plan.machine
    if tariff.watts is not None:
        machine = replace(machine, watts=tariff.watts * planner.facts.get("machines", 1))
    by_source, rows = {stage.source: stage for stage in stages}, []
    for work in plan.work:
        stage, start = by_source.get(work.name), plan.step if work.name == planner.source else 0
        taken, used = "", None
        if stage:
            before = stage.until(start)
            taken = format_duration(stage.seconds - before.seconds)
            taken += "" if stage.is_finished else f" until step {stage.step:,}"
            used = stage.kwh(tariff)
            used = None if used is None else used - (before.kwh(tariff) or 0.0)
        rows.append(
            (
                f"{work.name} after step {start:,}" if start else work.name,
                format_duration(machine.hours(work) * 3600),
                taken,
                _figure(machine.kwh(work), "{:.3g} kWh"),
                _figure(used, "{:.3g} kWh"),
            )
        )
    table = _table(("stage", "planned", "taken", "energy planned", "energy used"), rows)
    return f"### Plan\n\nEstimated by {planner.source} after step {plan.step:,}, {machine.sources[0]}.\n\n{table}"


def _machine(stages: Sequence[Stage]) -> str:
    """Temperature, clock, power and memory, as far as measured."""
    rows = [
        (
            stage.source,
            _statistic(stage, "gpu_temperature_c", max, "{:.0f} °C"),
            _statistic(stage, "gpu_clock_mhz", min, "{:,.0f} MHz"),
            _statistic(stage, "gpu_power_w", mean, "{:.0f} W"),
            _statistic(stage, "memory_available_bytes", min, "{:.1f} GiB", 2**-30),
            _statistic(stage, "page_cache_bytes", max, "{:.1f} GiB", 2**-30),
        )
        for stage in stages
    ]
    if not any(any(row[1:]) for row in rows):
        return ""
    headings = ("stage", "max temperature", "min clock", "mean power", "min available memory", "max page cache")
    return f"## Machine\n\n{_table(headings, rows)}"


def _results(stages: Sequence[Stage], plots: Mapping[str, str]) -> str:
    scores = {stage.source: stage.scores() for stage in stages}
    bits_per_byte = {
        stage.source: stage.stage_result.bits_per_byte if stage.stage_result else stage.last("bpb") for stage in stages
    }
    parts = []
    for name, title in (("stages", ""), ("CORE", "CORE"), ("ChatCORE", "ChatCORE")):
        measured = {source: of_stage[name] for source, of_stage in scores.items() if name in of_stage}
        if not measured:
            continue
        rows = [_score_row(line) for line in zip(*measured.values(), strict=False)]
        if title:
            means = (f"{centered_mean(s):.3f} ± {centered_mean_error(s):.3f}" for s in measured.values())
            rows.append((f"**{title}**", "", "0", *means))
        elif any(bits_per_byte.values()):
            rows.append(("bits per byte", "", "", *(_figure(bits_per_byte[source], "{:.3f}") for source in measured)))
        table = _table(("task", "problems", "guessing", *measured), rows)
        parts.append((f"### {title}\n\n" if title else "") + table + _picture(plots, name))
    if not parts:
        return "## Results\n\nNot evaluated yet: run ./eval.sh."
    note = (
        "Accuracy with its standard error, sqrt(p (1 - p) / n). CORE and ChatCORE are means of scores rescaled so that "
        "guessing is 0."
    )
    return "\n\n".join(["## Results", note, *parts])


def _score_row(scores: Sequence[TaskScore]) -> Row:
    first = scores[0]
    cells = (f"{score.accuracy:.1%} ± {100 * score.standard_error:.1f}" for score in scores)
    name = first.task.removeprefix("bigbench_").replace("_", " ")
    return name, f"{first.problems:,}", f"{first.baseline:.0%}", *cells


def _curves(plots: Mapping[str, str]) -> str:
    pictures = [_picture(plots, name) for name in ("loss", "bits-per-byte", "reward", "optimizer", "speed")]
    return "## Curves" + "".join(pictures) if any(pictures) else ""


def _picture(plots: Mapping[str, str], name: str) -> str:
    return f"\n\n![{CAPTIONS[name]}]({plots[name]})\n\n*{CAPTIONS[name]}*" if name in plots else ""


def _samples(stages: Sequence[Stage]) -> str:
    parts = []
    for stage in stages:
        count = min(MAX_SAMPLES, len(stage.samples))
        chosen = [stage.samples[round(i * (len(stage.samples) - 1) / max(count - 1, 1))] for i in range(count)]
        if chosen:
            text = "\n\n".join("\n".join([f"step {row['step']:,}", *row["samples"]]) for row in chosen)
            parts.append(f"### {stage.source}\n\n{_verbatim(text)}")
    return "\n\n".join(["## Samples during training", *parts]) if parts else ""


def _data(stages: Sequence[Stage]) -> str:
    parts = [f"### {stage.source}\n\n{_verbatim(stage.facts['learns'])}{_origin(stage)}" for stage in stages]
    return "\n\n".join(["## Training data", *parts])


def _origin(stage: Stage) -> str:
    """Repository, revision and size of downloaded text, from its manifest."""
    manifest = paths.data_dir(str(stage.facts["options"].get("dataset"))) / MANIFEST_FILE
    try:
        kept = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return ""
    size = sum(file["size"] for file in kept["files"].values())
    return f"\n\n{len(kept['files'])} files, {size / 1e9:.2f} GB, of {kept['repository']} at {kept['revision']}."


def _options(stages: Sequence[Stage]) -> str:
    options = [stage.facts["options"] for stage in stages]
    names = sorted(set().union(*options))
    rows = [(f"`{name}`", *(_code(of_stage.get(name, "")) for of_stage in options)) for name in names]
    commits = ", ".join(dict.fromkeys(str(stage.facts.get("commit", "unknown")) for stage in stages))
    return f"## Options\n\nCommit: {commits}.\n\n" + _table(("option", *(s.source for s in stages)), rows)


def _statistic(stage: Stage, key: str, reduce: Callable[[Sequence[float]], float], form: str, unit: float = 1.0) -> str:
    values = stage.series(key)[1]
    return _figure(reduce(values) if values else None, form, unit)


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value * unit)


def _table(headings: Row, rows: Sequence[Row]) -> str:
    """A Markdown table without its empty columns."""
    filled = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    line: Callable[[Row], str] = lambda cells: f"| {' | '.join(cells[i] for i in filled)} |"  # noqa: E731
    rule = [":--", *["--:"] * (len(headings) - 1)]
    return "\n".join(map(line, (headings, rule, *rows)))


def _code(value: object) -> str:
    text = "" if value is None else str(value).translate({ord("`"): "'", ord("|"): "/"})
    return f"`{text}`" if text else ""


def _verbatim(text: str) -> str:
    """A code block with a fence longer than any in `text`."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
