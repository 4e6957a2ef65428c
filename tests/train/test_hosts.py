"""A stage on two machines, which are two network namespaces with a cable between them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.data.download import HubFile, Manifest
from nanochat.runtime import Runtime
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement
from nanochat.train.agreement import difference
from nanochat.train.loop import train
from scripts import launch
from tests.training import HOW, FewRows, batches, begin

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESSES = ["10.97.31.1", "10.97.31.2"]
NAMESPACES = {address: f"nanochat-{os.getpid()}-{address}" for address in ADDRESSES}
# Stands for ssh: the other machine is the namespace that has the address, with a base directory of its own.
SSH = r"""#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host="$1"; shift
home="{folder}/$host"
exec env -i PATH="$PATH" PYTHONPATH="$PYTHONPATH" OMP_NUM_THREADS=1 HOME="$home" \
  NANOCHAT_BASE_DIR="$home/.cache/nanochat" \
  ip netns exec "nanochat-{pid}-$host" sh -c "$*"
"""
# Stands for pretrain.sh, without set-up.
SCRIPT = """#!/bin/sh
export NANOCHAT_COMMAND={script}
exec {python} -m scripts.launch 1 stage "$@"
"""
# Stands for scripts.base_train: the trainer on rows that need no files. The first time, someone presses Ctrl-C at the
# main machine.
STAGE = """
import os, signal, sys
from dataclasses import replace
import torch
from nanochat import cli, paths
from nanochat.train import agreement
from nanochat.train.options import TrainOptions
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from tests.training import FewRows, HOW, OPTIONS, batches, begin

def main(options):
    torch.set_num_threads(1)
    with Runtime.start("cpu") as runtime:
        agreement.check(agreement.CONVERSATIONS)
        run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), replace(OPTIONS, seed=options.seed))
        start = run.step

        class Source:
            def step_data(self, step):
                if runtime.world.is_main and (start, step) == (0, 7) and runtime.world.size > 1:
                    os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
                return batches(FewRows(64), OPTIONS, runtime.world).step_data(step)

        train(run, Source(), 20, **HOW)

cli.run(main, TrainOptions)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two namespaces joined by a pair of virtual Ethernet devices."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = list(NAMESPACES.values())
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Machines:
    """Two machines with a copy of the tokenizer each."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.bases = [folder / address / ".cache/nanochat" for address in ADDRESSES]
        for base in self.bases:
            tokenizer.save(base / "tokenizer")
        (folder / "stage.py").write_text(STAGE)
        self.script = folder / "stage.sh"
        ssh = folder / "bin/ssh"
        ssh.parent.mkdir()
        ssh.write_text(SSH.format(folder=folder, pid=os.getpid()))
        self.script.write_text(SCRIPT.format(python=sys.executable, script=os.path.relpath(self.script, ROOT)))
        for program in (ssh, self.script):
            program.chmod(0o755)

    def train(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `./pretrain.sh --hosts` on the first machine."""
        return subprocess.run(
            ["ip", "netns", "exec", NAMESPACES[ADDRESSES[0]], self.script, "--hosts", ",".join(ADDRESSES), *options],
            env=os.environ | {
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": f"{ROOT}:{self.folder}",
                "HOME": str(self.folder / ADDRESSES[0]),
                "NANOCHAT_BASE_DIR": str(self.bases[0]),
                "OMP_NUM_THREADS": "1",
            },
            cwd=self.folder, capture_output=True, text=True, timeout=200, check=False, start_new_session=True,
        )  # fmt: skip

    def losses(self) -> list[float]:
        rows = read_steps(self.bases[0] / "base_checkpoints/test/metrics.jsonl")
        return [row["loss"] for row in rows]


def bytes_sent() -> int:
    """Bytes sent over the cable from the first machine to the second."""
    path = "/sys/class/net/cable0/statistics/tx_bytes"
    command = ["ip", "netns", "exec", NAMESPACES[ADDRESSES[0]], "cat", path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_two_machines_are_one_also_after_ctrl_c_and_the_main_one_alone_has_the_checkpoint(
    cable: None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    machines = Machines(tmp_path, tokenizer)
    stopped = machines.train()
    assert (stopped.returncode, len(machines.losses())) == (130, 8), stopped.stderr
    before = bytes_sent()
    resumed = machines.train()
    assert resumed.returncode == 0, resumed.stderr
    sent = bytes_sent() - before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "alone"))
        with Runtime.start("cpu") as runtime:
            run = begin(runtime, tokenizer)
            train(run, batches(FewRows(64)), 20, **HOW)
            alone = [row["loss"] for row in read_steps(run.folder / "metrics.jsonl")]
    assert machines.losses() == pytest.approx(alone, abs=1e-3)
    assert list(machines.bases[0].glob("base_checkpoints/*/step_*"))
    assert not list(machines.bases[1].glob("base_checkpoints/*/step_*"))
    # The figures of docs/scaling.md. gloo's reduce is 1 + 1/P times the bytes; TCP and IP add some 5%. Once each there
    # are all weights and the optimizer's state, which the main machine alone had.
    parameters, steps = run.model.config.num_parameters, 12
    sums, weights = 4 * parameters / 2 * 1.5, 4 * parameters / 2
    state = sum(tensor.nbytes for tensor in run.optimizer.state_tensors)
    expected = steps * (sums + weights) + 4 * parameters + state
    assert sent == pytest.approx(1.05 * expected, rel=0.05)


def test_a_machine_with_another_tokenizer_is_refused_with_what_to_copy(
    cable: None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    machines = Machines(tmp_path, tokenizer)
    base, other = machines.bases
    (other / "tokenizer/extra.txt").write_text("x")
    refused = machines.train()
    assert refused.returncode == 2
    assert f"rsync -a --relative {base}/./tokenizer {ADDRESSES[1]}:{other}/" in refused.stderr


def test_it_prints_what_to_type_on_each_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_COMMAND", "./pretrain.sh")
    launch.main("1", "scripts.base_train", "--hosts", "a,user@b", "--depth", "4", "--print")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"on a:  cd {ROOT} && env NODE_RANK=0 ")
    assert first.endswith("./pretrain.sh --hosts a,user@b --depth 4")
    assert second.startswith("on user@b:  ") and "NODE_RANK=1 " in second


def test_an_ssh_that_fails_ends_the_run(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho Connection refused >&2\nexit 255\n")
    ssh.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-m", "scripts.launch", "1", "scripts.base_train", "--hosts", "localhost,there"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and "ssh there" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("wrong", ["", "a", "a,", "a,a"])
def test_hosts_that_cannot_be_get_a_sentence(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch.parse_hosts(["--hosts", wrong])
    assert "this one first" in capsys.readouterr().err


def test_files_are_compared_by_what_describes_them(base_dir: Path) -> None:
    tokens = base_dir / "tokens/text"
    tokens.mkdir(parents=True)
    (tokens / "train.shards.json").write_text('{"shards": ["shard_1"]}')
    (tokens / "shard_1.json").write_text("{}")
    (tokens / "shard_1.ids").write_bytes(b"1234")
    first = agreement.files(base_dir)
    (tokens / "shard_1.ids").write_bytes(b"4321")
    assert agreement.files(base_dir) == first  # its size is the same and so is what describes it
    (tokens / "shard_1.ids").write_bytes(b"12345")
    assert agreement.files(base_dir).keys() == first.keys() and agreement.files(base_dir) != first


def described(base: Path) -> dict[str, str]:
    """A machine with these files, as pretraining's other facts would be alike."""
    alike = dict.fromkeys((agreement.OPTIONS, agreement.CODE, agreement.SOFTWARE), "x")
    return {agreement.HOST: base.name, agreement.FOLDER: str(base), **alike, **agreement.files(base)}


def test_when_a_download_was_checked_is_each_machine_s_own(tmp_path: Path) -> None:
    for name in "ab":  # the second is a copy, whose st_ctime_ns is another
        folder = tmp_path / name / "data/gsm8k"
        folder.mkdir(parents=True)
        (folder / "rows.parquet").write_bytes(b"rows")
        Manifest(folder, "openai/gsm8k").add(HubFile("rows.parquet", 4, "00" * 32))
    first, second = ((tmp_path / name / "data/gsm8k/manifest.json").read_text() for name in "ab")
    assert first != second and difference(described(tmp_path / "a"), described(tmp_path / "b")) is None
    Manifest.load(folder, "openai/gsm8k").add(HubFile("rows.parquet", 4, "ff" * 32))
    assert "data/gsm8k" in str(difference(described(tmp_path / "a"), described(tmp_path / "b")))


def test_shards_that_no_split_names_are_not_read(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / "tokens/text").mkdir(parents=True)
        (tmp_path / name / "tokens/text/train.shards.json").write_text('{"shards": ["shard_1"]}')
        (tmp_path / name / "tokens/text/shard_1.ids").write_bytes(b"1234")
    (tmp_path / "b/tokens/text/shard_2.ids").write_bytes(b"1234")
    assert difference(described(tmp_path / "a"), described(tmp_path / "b")) is None


def test_each_stage_compares_what_it_reads(base_dir: Path) -> None:
    for path in ("tokens/text/train.shards.json", "tokens/mid/train.ids", "tokenizer/vocab.txt", "words.txt"):
        (base_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / path).write_text('{"shards": []}')
    (base_dir / "data/gsm8k").mkdir(parents=True)
    Manifest(base_dir / "data/gsm8k", "openai/gsm8k").save()
    text, talk = (agreement.facts(reads).keys() for reads in (agreement.TEXT, agreement.CONVERSATIONS))
    assert text - talk == {"tokens/text"} and talk - text == {"data/gsm8k", "words.txt"}
    assert "tokenizer" in text & talk


@pytest.mark.parametrize(
    ("fact", "remedy"),
    [
        (agreement.OPTIONS, "same options"),
        (agreement.CODE, "rsync -a --delete"),
        (agreement.SOFTWARE, r"./setup.sh"),
        ("tokens/text", "rsync -a --relative /base/./tokens/text two:/base/"),
    ],
)
def test_each_difference_has_its_remedy(fact: str, remedy: str) -> None:
    names = (agreement.OPTIONS, agreement.CODE, agreement.SOFTWARE, "tokens/text")
    one = {agreement.HOST: "one", agreement.FOLDER: "/base", **dict.fromkeys(names, "x")}
    two = one | {agreement.HOST: "two"}
    assert difference(one, two) is None
    assert remedy in str(difference(one, two | {fact: "y"}))
