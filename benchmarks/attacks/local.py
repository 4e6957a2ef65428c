"""Names, texts and kills that try to reach other folders, the report, the terminal or a checkpoint."""

import io
import re
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from rich.console import Console

from benchmarks.random_model import random_model
from nanochat import paths
from nanochat.data import demo_data
from nanochat.errors import UserError
from nanochat.hub.import_model import ImportedModel, save_checkpoint
from nanochat.inference.detokenizer import Delta
from nanochat.report import build
from nanochat.report.history import Stage
from nanochat.runtime import Runtime
from nanochat.serve.terminal_output import MarkdownPrinter, PlainPrinter
from nanochat.spark.plan import Tariff
from nanochat.telemetry.console import LogFile, ProgressDisplay
from nanochat.tokenizer import Tokenizer
from nanochat.train import archive, checkpoint, resume
from nanochat.train.options import PretrainOptions
from scripts import watch

TAGS = [
    "", ".", "..", "../x", "../../x", "/tmp/x", "a/b", "a/../../x", "aside", "aside/../../x", "aside/aside", "~/x",
    "-x", ".x", "x\n", "x\ny", "x y", "x\0", "x\x1b[31m", "<b>", "<script>alert(1)</script>", "x'\"", "$(id)", "`id`",
    "x;id", "x|y", "x*", "?", "[x]", "{x}", "x\\y", "..\\x", "x:y", "%2e%2e%2fx", "x" * 101,
    "\u202ex", "\ufeffx", "\ud800",
]  # fmt: skip
INJECTIONS = [
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<base href=//evil.example><form action=//evil.example><input name=x>",
    "[click](javascript:alert(1)) [click](https://evil.example) <https://evil.example>",
    "![x](https://evil.example/x.png) ![x][y]\n\n[y]: https://evil.example",
    "x\n\n# heading\n\n<img src=x>",
    "x | y |\n\n<img src=x>",
    "```\n</code></pre><img src=x>\n```",
    "`` ` <img src=x>",
    "{{body}}{{title}}{{refresh}}",
    "\\<img src=x\\>",
    "&lt;img src=x&gt; &#60;img src=x&#62;",
]
ESCAPES = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "\x1b[2J\x1b[H",
    "\x9b2J", "\x1bP+q544e\x1b\\", "\x1b]52;c;ZXZpbA==\x07", "\x1b[6n", "\x07", "\x08\x08\x08", "\r overwritten",
    "\x7f", "\x85", "\x00", "\x1b[?1049h", "\x1b]1337;File=:x\x07", "\x0e", "\x1b#8",
]  # fmt: skip
FACTS = {
    "source": "base", "tag": "d2", "num_iterations": 9, "num_parameters": 1, "parent": None, "trained_on": "text",
    "model_config": {"n_layer": 2, "n_embd": 128, "sequence_len": 64, "vocab_size": 512}, "commit": "unknown",
    "options": {"seed": 1}, "machine": "machine", "software": "software",
}  # fmt: skip
ACTIVE_HTML = re.compile(r"<(script|img|iframe|base|form|input|a)\b|</title>.*</title>", re.IGNORECASE | re.DOTALL)
KILLS = 50


def tags(folder: Path) -> Iterator[tuple[str, bool]]:
    """Name a model so that its folder is elsewhere, wherever a name is taken: options, imports and archives."""
    tokenizer = Tokenizer.train(demo_data.documents("train")[:20], 300)
    tokenizer.save(paths.tokenizer_dir())
    with Runtime.start("cpu") as runtime:
        model = random_model(1, tokenizer.vocab_size, 64, runtime)
        imported = ImportedModel("origin", "base", 1, model, tokenizer, None)
        saved = save_checkpoint(imported, "base", "d1", {})

        def restore(tag: str) -> None:
            with tarfile.open(folder / "odd.tar", "w") as tar:
                tar.add(saved.folder, f"mid_checkpoints/{tag}/step_000002")
                tar.add(paths.tokenizer_dir(), "tokenizer")
            archive.restore(folder / "odd.tar")

        doors: dict[str, Callable[[str], object]] = {
            "import": lambda tag: save_checkpoint(imported, "base", tag, {}),
            "restore": restore,
            "train": lambda tag: resume.start_or_resume(
                "base", PretrainOptions(model_tag=tag), runtime, tokenizer, config=model.config
            ),
            "read": lambda tag: checkpoint.find("base", tag),
        }
        before = sorted(folder.rglob("*"))
        for tag in filter(None, TAGS):
            for door, enter in doors.items():
                success = False
                try:
                    enter(tag)
                    success = True
                except (UserError, UnicodeEncodeError):
                    pass
                (folder / "odd.tar").unlink(missing_ok=True)
                yield f"{door} {tag[:40]!r}", success or sorted(folder.rglob("*")) != before


def report(folder: Path) -> Iterator[tuple[str, bool]]:
    """Bring HTML, links or images into the report through the texts of a run."""
    for text in INJECTIONS:
        for field in ("tag", "machine", "software", "commit", "trained_on", "options", "sample"):
            value = {text: text, "dataset": text} if field == "options" else text
            samples = [{"step": 1, "samples": [text]}]
            page = build.page([Stage(FACTS | {field: value}, [], samples, None, 0.0)], {}, Tariff(None, None))
            safe = "base-uri 'none'; form-action 'none'" in page and page.count("<h1>") == 1
            yield f"{field}: {text!r}", bool(ACTIVE_HTML.search(page)) or not safe


def terminal(folder: Path) -> Iterator[tuple[str, bool]]:
    """Send control sequences to the terminal through what a model writes, in every place that shows it."""

    def chat(text: str) -> str:
        printer = PlainPrinter(out := io.StringIO())
        for kind in ("text", "python", "python_output"):
            printer.add(Delta(kind, text))
        printer.end()
        return out.getvalue()

    def markdown(text: str) -> str:
        printer = MarkdownPrinter(Console(file=(out := io.StringIO()), color_system=None))
        printer.add(Delta("text", text))
        printer.end()
        return out.getvalue()

    def training(text: str) -> str:
        log = LogFile(folder / "log.txt")
        ProgressDisplay("base", 9, 0, cast(io.TextIOBase, out := io.StringIO()), log).print(text)
        log.close()
        return out.getvalue() + (folder / "log.txt").read_text()

    def watching(text: str) -> str:
        stage = Stage(FACTS | {"tag": text, "machine": text}, [], [{"step": 1, "samples": [text]}], None, 0.0)
        Console(file=(out := io.StringIO()), color_system=None).print(watch.screen([stage], 0.0))
        return out.getvalue()

    for show in (chat, markdown, training, watching):
        for text in ESCAPES:
            shown = show(f"before{text}after")
            yield f"{show.__name__}: {text!r}", any(unicodedata.category(c) == "Cc" for c in shown if c not in "\n\t")


def kills(folder: Path) -> Iterator[tuple[str, bool]]:
    """Make a training run lose or repeat work by killing it (benchmarks/kill_test.py)."""
    command = [sys.executable, "-m", "benchmarks.kill_test", "--kills", str(KILLS), "--num-iterations", "250"]
    done = subprocess.run(command, capture_output=True, text=True)
    output = (done.stdout + done.stderr)[-2000:]
    yield from ((f"kill {number}: {output}", bool(done.returncode)) for number in range(KILLS))
