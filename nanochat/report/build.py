"""Write the report: report.md with its plots, and report.html, which is self-contained."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from nanochat import paths
from nanochat.atomic import atomic_write
from nanochat.eval.results import STAGES_TABLE
from nanochat.report.document import document
from nanochat.report.history import Stage, newest_stages, results_by_benchmark
from nanochat.report.plots import CURVES, draw_curves, draw_scores
from nanochat.spark.plan import Tariff

DOTS_PER_INCH = 120


def write(model_tag: str | None = None) -> Path:
    """Write the report on `model_tag`, by default the most recently trained model; return the path of report.html.

    Raises UserError if nothing has been trained.
    """
    stages = newest_stages(model_tag)
    folder = paths.report_dir()
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    pictures = draw(stages)
    for outdated in {path.stem for path in plots.glob("*.png")} - pictures.keys():
        (plots / f"{outdated}.png").unlink()
    tariff = Tariff.from_environment()
    text = document(stages, {name: f"plots/{name}.png" for name in pictures}, tariff)
    contents = {f"plots/{name}.png": png for name, png in pictures.items()}
    contents |= {"report.md": text.encode(), "report.html": page(stages, pictures, tariff).encode()}
    for name, content in contents.items():
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
    return folder / "report.html"


def draw(stages: Sequence[Stage]) -> dict[str, bytes]:
    """All plots that have data, by name, as PNG."""
    figures: dict[str, Figure | None] = {name: draw_curves(stages, shown) for name, shown in CURVES.items()}
    for name, measured in results_by_benchmark(stages).items():
        scores = {stage: result.scores for stage, result in measured.items()}
        figures[name] = draw_scores("Scores after each stage" if name == STAGES_TABLE else name, scores)
    pictures = {}
    for name, figure in figures.items():
        if figure:
            figure.savefig(buffer := BytesIO(), format="png", dpi=DOTS_PER_INCH, facecolor="white")
            pictures[name] = buffer.getvalue()
    return pictures


def page(stages: Sequence[Stage], pictures: Mapping[str, bytes], tariff: Tariff) -> str:
    """The report as one HTML page with embedded images."""
    text = document(stages, {name: f"{name}.png" for name in pictures}, tariff)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, png in pictures.items():
        body = body.replace(f'src="{name}.png"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    body = re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', body, flags=re.DOTALL)
    template = files("nanochat.report").joinpath("page.html").read_text()
    title = f"nanochat {html.escape(str(stages[-1].facts['tag']))}"
    parts = {"title": title, "body": body}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
