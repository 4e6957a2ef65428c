"""The report as Markdown: model, stages, machine, results, curves, samples, data and options."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median

from nanochat.eval.results import CENTERED, STAGES_TABLE, centered_mean, centered_mean_error
from nanochat.report.history import Stage, results_by_benchmark
from nanochat.spark.plan import Tariff
from nanochat.stages import STAGES
from nanochat.units import format_duration

CAPTIONS = {  # by plot
    "loss": "Training loss. The thin line is each step, the thick line a moving average.",
    "bits-per-byte": "Bits per byte of held-out text, comparable between tokenizers.",
    "reward": "Share of correct replies, length of replies, and share of replies in groups with unequal rewards, "
    "the only ones that produce a gradient.",
    "optimizer": "Multiplier of all learning rates, and the gradient norm before clipping.",
    "speed": "Tokens per second, and their share of the machine's peak FLOP/s.",
    "stages": "Scores of the chat model after each stage.",
    "CORE": "The 22 tasks of CORE.",
    "ChatCORE": "The six tasks of ChatCORE.",
    "tasks": "Tasks given with --task.",
}
MAX_SAMPLES = 4  # per stage, from its first to its last
Row = Sequence[str]


def document(stages: Sequence[Stage], plots: Mapping[str, str], tariff: Tariff) -> str:
    """The whole report on the `stages` of one model, base first. `plots`: path of each image by name."""
    sections = [
        _opening(stages),
        _stages(stages, tariff),
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
    machines = dict.fromkeys(_text(f"{stage.facts['machine']} ({stage.facts['software']})") for stage in stages)
    running = "" if last.is_finished else f" Its {STAGES[last.source].title} is at step {last.step:,}."
    return (
        f"# {_text(last.facts['tag'])}: {' → '.join(stage.label for stage in stages)}\n\n"
        f"A language model of {last.facts['num_parameters']:,} parameters: {shape['n_layer']} layers of "
        f"width {shape['n_embd']}, a context of {shape['sequence_len']:,} tokens, a vocabulary of "
        f"{shape['vocab_size']:,}. It was trained on {sum(stage.tokens for stage in stages):,} tokens in "
        f"{format_duration(sum(stage.seconds for stage in stages))}.{running}\n\n"
        f"Trained on {'; '.join(machines)}. Written on {time.strftime('%Y-%m-%d at %H:%M')}."
    )


def _stages(stages: Sequence[Stage], tariff: Tariff) -> str:
    def row(name: str, steps: str, tokens: int, seconds: float, speed: Row, kwh: float | None) -> Row:
        cost = None if kwh is None or tariff.price_per_kwh is None else kwh * tariff.price_per_kwh
        energy = _figure(kwh, "{:.3g} kWh"), _figure(cost, "{:.2f}")
        return name, steps, f"{tokens:,}", format_duration(seconds), *speed, *energy

    rows = []
    for stage in stages:
        speed = (
            _statistic(stage, "tokens_per_second", median, "{:,.0f}"),
            _statistic(stage, "mfu", median, "{:.1%}"),
            _figure(stage.facts.get("peak_memory"), "{:.1f} GiB", 2**-30),
        )
        steps = f"{stage.step:,} of {stage.facts['num_iterations']:,}"
        rows.append(row(stage.label, steps, stage.tokens, stage.seconds, speed, stage.kwh(tariff)))
    if len(stages) > 1:
        known = [kwh for stage in stages if (kwh := stage.kwh(tariff)) is not None]
        total = sum(known) if len(known) == len(stages) else None
        tokens, seconds = sum(stage.tokens for stage in stages), sum(stage.seconds for stage in stages)
        rows.append(row("total", "", tokens, seconds, ("", "", ""), total))
    headings = ("stage", "steps", "tokens", "time", "tokens/s", "MFU", "memory", "energy", "cost")
    notes = ["Tokens/s and MFU are medians over the steps; time is wall time, loading and evaluation included."]
    if skipped := [f"{n:.0f} in {stage.label}" for stage in stages if (n := stage.last("skipped_steps"))]:
        notes.append(f"Steps skipped because of a non-finite loss or gradient: {', '.join(skipped)}.")
    if tariff.watts is None:
        notes.append("Measured energy includes only the GPUs; set NANOCHAT_WATTS for the whole machine.")
    else:
        notes.append(f"Energy is time x {tariff.watts:g} W per machine, from NANOCHAT_WATTS.")
    return f"## Stages\n\n{_table(headings, rows)}\n\n{' '.join(notes)}"


def _machine(stages: Sequence[Stage]) -> str:
    columns: dict[str, tuple[str, Callable[[Sequence[float]], float], str, float]] = {
        "max temperature": ("gpu_temperature_c", max, "{:.0f} °C", 1.0),
        "min clock": ("gpu_clock_mhz", min, "{:,.0f} MHz", 1.0),
        "mean power": ("gpu_power_w", mean, "{:.0f} W", 1.0),
        "min available memory": ("memory_available_bytes", min, "{:.1f} GiB", 2**-30),
        "max page cache": ("page_cache_bytes", max, "{:.1f} GiB", 2**-30),
    }
    rows = [(stage.label, *(_statistic(stage, *column) for column in columns.values())) for stage in stages]
    return f"## Machine\n\n{_table(('stage', *columns), rows)}" if any(any(row[1:]) for row in rows) else ""


def _results(stages: Sequence[Stage], plots: Mapping[str, str]) -> str:
    parts = []
    for name, measured in results_by_benchmark(stages).items():
        rows = []
        for scores in zip(*(result.scores for result in measured.values()), strict=False):
            cells = (f"{score.accuracy:.1%} ± {100 * score.standard_error:.1f}" for score in scores)
            task = _text(scores[0].task.removeprefix("bigbench_").replace("_", " "))
            rows.append((task, f"{scores[0].problems:,}", f"{scores[0].baseline:.0%}", *cells))
        if name == STAGES_TABLE:
            rows.append(("bits per byte", "", "", *(_figure(r.bits_per_byte, "{:.3f}") for r in measured.values())))
        elif name in CENTERED:
            columns = (result.scores for result in measured.values())
            means = (f"{centered_mean(s):.3f} ± {centered_mean_error(s):.3f}" for s in columns)
            rows.append((f"**{name}**", "", "0", *means))
        table = _table(("task", "problems", "guessing", *measured), rows)
        parts.append(("" if name == STAGES_TABLE else f"### {name}\n\n") + table + _picture(plots, name))
    if not parts:
        return "## Results\n\nNot evaluated yet: run ./eval.sh."
    note = (
        "Accuracy with its standard error, sqrt(p (1 - p) / n). CORE and ChatCORE are means of scores rescaled so that "
        "guessing is 0."
    )
    return "\n\n".join(["## Results", note, *parts])


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
            texts = ("\n".join([f"step {row['step']:,}", *row["samples"]]) for row in chosen)
            parts.append(f"### {stage.label}\n\n" + _verbatim("\n\n".join(texts)))
    return "\n\n".join(["## Samples during training", *parts]) if parts else ""


def _data(stages: Sequence[Stage]) -> str:
    parts = ["## Training data"]
    for stage in stages:
        parts += [f"### {stage.label}", _verbatim(stage.facts.get("trained_on", "not recorded"))]
    return "\n\n".join(parts)


def _options(stages: Sequence[Stage]) -> str:
    options = [stage.facts["options"] for stage in stages]
    names = sorted(set().union(*options))

    def code(value: object) -> str:
        text = "" if value is None else " ".join(str(value).translate({ord("`"): "'", ord("|"): "/"}).split())
        return f"`{text}`" if text else ""

    rows = [(code(name), *(code(of_stage.get(name)) for of_stage in options)) for name in names]
    commits = ", ".join(dict.fromkeys(_text(stage.facts.get("commit", "unknown")) for stage in stages))
    return f"## Options\n\nCommit: {commits}.\n\n" + _table(("option", *(s.label for s in stages)), rows)


def _statistic(stage: Stage, key: str, reduce: Callable[[Sequence[float]], float], form: str, unit: float = 1.0) -> str:
    values = stage.series(key)[1]
    return _figure(reduce(values) if values else None, form, unit)


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value * unit)


def _table(headings: Row, rows: Sequence[Row]) -> str:
    """A Markdown table without its empty columns."""
    filled = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    lines = [headings, [":--", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells[i] for i in filled)} |" for cells in lines)


def _text(value: object) -> str:
    """Escape the characters that have a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>&|~#])", r"\\\1", " ".join(str(value).split()))


def _verbatim(text: str) -> str:
    """A code block with a fence longer than any in `text`."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
