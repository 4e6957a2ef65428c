"""Writes the report: report.md with its plots, and report.html, which needs no other file."""

import base64
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from nanochat import paths
from nanochat.errors import UserError
from nanochat.report.document import document
from nanochat.report.history import Stage, newest_stages
from nanochat.report.plots import CURVES, draw_curves, draw_scores
from nanochat.spark.plan import Tariff

PLOTS_FOLDER = "plots"
DOTS_PER_INCH = 120


def rebuild(model_tag: str | None = None) -> None:
    """Write the report anew after a stage or an evaluation; a report that fails must not fail them."""
    try:
        print(f"report: {write(model_tag)}")
    except Exception as error:
        print(f"note: the report was not written ({error}): ./nanochat.sh report tries again")


def write(model_tag: str | None = None) -> Path:
    """Write the report on the model that was trained last, or on `model_tag`; gives the path of report.html.

    Raises UserError if nothing has been trained.
    """
    stages = stages_to_report(model_tag)
    folder = paths.report_dir()
    (folder / PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    pictures = draw(stages)
    for outdated in {path.stem for path in (folder / PLOTS_FOLDER).glob("*.png")} - pictures.keys():
        (folder / PLOTS_FOLDER / f"{outdated}.png").unlink()
    for name, png in pictures.items():
        _replace(folder / PLOTS_FOLDER / f"{name}.png", png)
    tariff = Tariff.from_environment()
    text = document(stages, {name: f"{PLOTS_FOLDER}/{name}.png" for name in pictures}, tariff)
    _replace(folder / "report.md", text.encode())
    _replace(folder / "report.html", page(stages, pictures, tariff).encode())
    return folder / "report.html"


def stages_to_report(model_tag: str | None = None) -> list[Stage]:
    """The stages of the model. Raises UserError if there is none."""
    stages = newest_stages(model_tag)
    if not stages:
        which = f"tagged {model_tag} " if model_tag else ""
        raise UserError(f"no model {which}has been trained in {paths.base_dir()}: run ./pretrain.sh first")
    return stages


def draw(stages: Sequence[Stage]) -> dict[str, bytes]:
    """Every plot that there is something to draw in, by name, as PNG."""
    figures: dict[str, Figure | None] = {name: draw_curves(stages, shown) for name, shown in CURVES.items()}
    scores = {stage.source: stage.scores() for stage in stages}
    for name, title in (("stages", "What each stage taught"), ("CORE", "CORE"), ("ChatCORE", "ChatCORE")):
        measured = {source: of_stage[name] for source, of_stage in scores.items() if name in of_stage}
        figures[name] = draw_scores(title, measured) if measured else None
    return {name: _png(figure) for name, figure in figures.items() if figure}


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return buffer.getvalue()


def page(stages: Sequence[Stage], pictures: Mapping[str, bytes], tariff: Tariff, refresh_seconds: int = 0) -> str:
    """The report as one HTML page with the pictures in it; it loads itself anew every `refresh_seconds`, if any."""
    text = document(stages, {name: f"{name}.png" for name in pictures}, tariff)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, png in pictures.items():
        body = body.replace(f'src="{name}.png"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    body = re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', body, flags=re.DOTALL)
    template = files("nanochat.report").joinpath("page.html").read_text()
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    title = f"nanochat {stages[-1].facts['tag']}"
    return template.replace("{{refresh}}", refresh).replace("{{title}}", title).replace("{{body}}", body)


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is never seen half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
