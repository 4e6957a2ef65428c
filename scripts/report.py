"""The report on a model: what was trained, how it went, what came of it.

./nanochat.sh report --model-tag d20
"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.report import build


@dataclass
class ReportOptions:
    """Write report.md and report.html anew, which every stage and evaluation does by itself."""

    model_tag: str | None = None
    """which model; by default the one that was trained last"""


def main(options: ReportOptions) -> None:
    print(build.write(options.model_tag))


if __name__ == "__main__":
    cli.run(main, ReportOptions, demo=ReportOptions())
