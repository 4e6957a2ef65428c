"""Write the report on a model: how it was trained, and how well it performs.

./nanochat.sh report --model-tag d20
"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.errors import one_line


@dataclass
class ReportOptions:
    """Rebuild report.md and report.html, as every stage and evaluation does at its end."""

    model_tag: str | None = None
    """model; default: the one trained last"""
    quiet: bool = False
    """print one line and exit with 0 even if the report fails, because the caller's own work is done"""


def main(options: ReportOptions) -> None:
    try:
        from nanochat.report import build  # matplotlib may fail to load

        path = build.write(options.model_tag)
    except Exception as error:
        if not options.quiet:
            raise
        print(f"note: report not written ({one_line(error)}); ./nanochat.sh report retries")
    else:
        print(f"report: {path}" if options.quiet else path)


if __name__ == "__main__":
    cli.run(main, ReportOptions, demo=ReportOptions())
