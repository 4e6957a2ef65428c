"""The connection of two machines, also as two network namespaces with ssh between them if the system allows it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.data.download import HubFile, Manifest
from nanochat.errors import UserError
from nanochat.host import SSH
from nanochat.spark.cluster import Port, check_bandwidth, check_link, command_on, ports_of, shared_networks
from nanochat.train import agreement
from scripts import cluster
from tests.machine import FakeMachine

ROOT = Path(__file__).resolve().parent.parent.parent
HALF_A = Port("enp1s0f0np0", "rocep1s0f0", True, "192.168.100.1/24", 9000, 100_000)
HALF_B = Port("enP2p1s0f0np0", "roceP2p1s0f0", True, "192.168.101.1/24", 9000, 100_000)
SLOW = Port("enP7s7", "", True, "10.0.0.1/24", 1500, 10_000)


def there(port: Port) -> Port:
    """The same port on the other machine."""
    return replace(port, address=port.address.replace(".1/24", ".2/24"))


def statuses(*ports: Port) -> dict[str, str]:
    return {check.name: check.status for check in check_link(list(ports), [there(port) for port in ports])}


def test_both_halves_with_jumbo_frames_are_ok() -> None:
    assert statuses(SLOW, HALF_A, HALF_B) == {"link": "ok", "MTU": "ok"}


def test_one_half_alone_and_small_frames_are_reported_with_a_fix() -> None:
    small = replace(HALF_A, mtu=1500)
    link, mtu = check_link([small], [there(small)])
    assert link.status == "warning" and "one half" in link.text and "enP2p1s0" in link.fix
    assert mtu.status == "warning" and "enp1s0f0np0 (1500)" in mtu.text and "mtu 9000" in mtu.fix


def test_a_link_without_rdma_or_none_at_all() -> None:
    assert statuses(SLOW) == {"link": "warning"}
    assert statuses(replace(HALF_A, active=False)) == {"link": "failed"}
    (check,) = check_link([HALF_A], [there(HALF_B)])  # cabled crosswise: no subnet in common
    assert check.status == "failed"


def test_rdma_precedes_the_slow_network() -> None:
    pairs = shared_networks([SLOW, HALF_A], [there(SLOW), there(HALF_A)])
    assert [a.interface for a, _ in pairs] == ["enp1s0f0np0", "enP7s7"]


@pytest.mark.parametrize(("speed", "words"), [(22.5, ""), (11.0, "one half"), (3.0, "does not use RoCE")])
def test_bandwidth_is_compared_with_two_sparks(speed: float, words: str) -> None:
    check = check_bandwidth(speed, over_rdma=True)
    assert check.status == ("warning" if words else "ok") and words in check.fix


def test_ports_are_read_from_the_system(machine: FakeMachine) -> None:
    """The files of a Spark with one cable; ip prints the addresses."""
    for device, interface, state in (
        ("rocep1s0f0", "enp1s0f0np0", "4: ACTIVE"),
        ("rocep1s0f1", "enp1s0f1np1", "1: DOWN"),
    ):
        machine.write(f"sys/class/infiniband/{device}/ports/1/link_layer", "Ethernet\n")
        machine.write(f"sys/class/infiniband/{device}/ports/1/state", f"{state}\n")
        machine.write(f"sys/class/infiniband/{device}/ports/1/gid_attrs/ndevs/0", f"{interface}\n")
        machine.write(f"sys/class/net/{interface}/mtu", "9000\n")
    machine.write("sys/class/net/enp1s0f0np0/speed", "100000\n")
    shown = [{"ifname": "enp1s0f0np0", "addr_info": [{"local": "192.168.100.1", "prefixlen": 24}]}]
    machine.command("ip", f"echo '{json.dumps(shown)}'")
    up, down = ports_of("localhost")
    assert up == HALF_A
    assert (down.device, down.active, down.address) == ("rocep1s0f1", False, "")


def prepared(base: Path) -> None:
    """A small copy of what prepare.sh writes."""
    for path, content in (
        ("tokenizer/vocab.txt", "a\n"),
        ("tokens/text/train.shards.json", '{"shards": ["shard_1"]}'),
        ("tokens/text/shard_1.ids", "1234"),
        ("data/text/shard_1.parquet", "text"),
        ("data/gsm8k/rows.parquet", "rows"),
        ("words.txt", "word\n"),
        ("identity_conversations.jsonl", "{}\n"),
    ):
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_text(content)
    Manifest(base / "data/text", "x/text").add(HubFile("shard_1.parquet", 4, "00"))
    Manifest(base / "data/gsm8k", "openai/gsm8k").add(HubFile("rows.parquet", 4, "00"))


def difference(first: Path, second: Path) -> str | None:
    """The error for machines with these base directories and the same code and options."""
    alike = dict.fromkeys((agreement.HOST, agreement.FOLDER, agreement.OPTIONS, agreement.CODE, agreement.SOFTWARE), "")
    return agreement.difference(alike | agreement.files(first), alike | agreement.files(second))


def test_sync_copies_what_a_run_reads_and_makes_the_venv(base_dir: Path) -> None:
    prepared(base_dir)
    commands = [" ".join(command) for command in cluster.sync_commands("spark-b", base_dir)]
    assert commands[0].endswith(f"spark-b mkdir -p {ROOT} {base_dir}")
    assert any(f"{ROOT}/nanochat {ROOT}/scripts" in command for command in commands)
    copied = next(command for command in commands if command.endswith(f" spark-b:{base_dir}/")).split()
    assert {Path(word).name for word in copied if "/./" in word} == {
        "tokenizer", "text", "gsm8k", "words.txt", "identity_conversations.jsonl"
    }  # fmt: skip
    assert not any("--delete" in command and str(base_dir) in command for command in commands)
    assert commands[-1].endswith("setup.sh --no-sudo --quiet")


def test_an_unreachable_host_is_named(machine: FakeMachine) -> None:
    machine.command("ssh", "echo 'ssh: connect to host spark-b port 22: No route to host' >&2; exit 255")
    checks = {check.status: check for check in cluster.check("localhost", "spark-b")}
    assert "spark-b: ssh: connect to host" in checks["failed"].text
    assert checks["failed"].fix == "ssh-copy-id spark-b"


@pytest.mark.parametrize("hosts", [(), ("a",), ("a", "b", "c")])
def test_check_needs_two_hosts(hosts: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="two hosts"):
        cluster.main(cluster.ClusterOptions("check", hosts))


def test_a_command_for_another_host_keeps_its_words_together() -> None:
    assert command_on("spark-b", "echo", "two words")[-1] == "echo 'two words'"
    assert command_on("localhost", "echo", "two words") == ["echo", "two words"]


NEAR, FAR = "10.77.31.1", "10.77.31.2"


@pytest.fixture
def two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two connected network namespaces with an ssh server in the second; yields the command that enters the first."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if os.geteuid() != 0 or not sshd or not shutil.which("ip") or not (ROOT / ".venv/complete-run").exists():
        pytest.skip("needs root, iproute2, an ssh server and .venv")
    first, second = (f"nanochat-{os.getpid()}-{side}" for side in "ab")
    veth_first, veth_second = (f"nc{os.getpid() % 100_000}{side}" for side in "ab")
    if subprocess.run(["ip", "netns", "add", first], capture_output=True).returncode:
        pytest.skip("no permission to create network namespaces")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    server_config = tmp_path / "sshd_config"
    server_config.write_text(
        f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin prohibit-password\n"
    )
    client_config = tmp_path / "ssh_config"
    client_config.write_text(f"Host *\n  IdentityFile {key}\n  UserKnownHostsFile {tmp_path}/known_hosts\n")
    wrapper = tmp_path / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client_config} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    server = None
    try:
        for command in (
            f"netns add {second}",
            f"link add {veth_first} netns {first} type veth peer name {veth_second} netns {second}",
            f"-n {first} address add {NEAR}/24 dev {veth_first}",
            f"-n {second} address add {FAR}/24 dev {veth_second}",
            f"-n {first} link set {veth_first} mtu 9000 up",
            f"-n {second} link set {veth_second} mtu 9000 up",
            f"-n {first} link set lo up",
            f"-n {second} link set lo up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        server = subprocess.Popen(["ip", "netns", "exec", second, sshd, "-D", "-e", "-f", server_config])
        enter = ["ip", "netns", "exec", first]
        until = time.monotonic() + 20
        while subprocess.run([*enter, *SSH, FAR, "true"], capture_output=True).returncode and time.monotonic() < until:
            time.sleep(0.1)
        yield enter
    finally:
        if server:
            server.terminate()
            server.wait()
        for name in (first, second):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_all_reduce_is_measured_between_two_hosts_over_ssh(two_hosts: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    command = [*two_hosts, sys.executable, "-m", "scripts.cluster", "check", "localhost", FAR]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    said = " ".join(result.stdout.split())
    assert f"({NEAR}/24)" in said and f"({FAR}/24), without RDMA: slow" in said
    assert "GB/s over TCP" in said


@pytest.mark.slow
def test_sync_copies_everything_to_another_host(two_hosts: list[str], tmp_path: Path) -> None:
    """Real rsync over real ssh. Both hosts have one disk here, so the copy goes to another place on it."""
    if not shutil.which("rsync"):
        pytest.skip("needs rsync")
    source, target = tmp_path / "from", tmp_path / "to"
    prepared(source)
    target.mkdir()
    command = cluster.sync_commands(FAR, source)[-2]
    assert command[0] == "rsync" and command[-1] == f"{FAR}:{source}/"
    subprocess.run([*two_hosts, *command[:-1], f"{FAR}:{target}/"], check=True, timeout=60)
    assert difference(source, target) is None


def test_sync_refuses_to_overwrite_another_tokenizer(
    base_dir: Path, machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real rsync; the stand-in for ssh runs its commands here, with another base directory."""
    if not shutil.which("rsync"):
        pytest.skip("needs rsync")
    other = tmp_path / "other"
    machine.command(
        "ssh",
        f'while [ "$1" != spark-b ]; do shift; done; shift; eval "$(echo "$*" | sed "s#{base_dir}#{other}#g")"',
    )
    prepared(base_dir)
    assert cluster.differing_files("spark-b", base_dir) == []  # it has nothing yet
    other.mkdir()
    subprocess.run(cluster.sync_commands("spark-b", base_dir)[-2], check=True)
    assert difference(base_dir, other) is None
    assert cluster.differing_files("spark-b", base_dir) == []
    (other / "tokenizer/vocab.txt").write_text("b\n")
    assert cluster.differing_files("spark-b", base_dir) == ["tokenizer"]
    with pytest.raises(UserError, match=r"tokenizer.*--force"):
        cluster.main(cluster.ClusterOptions("sync", ("spark-b",)))
    assert (other / "tokenizer/vocab.txt").read_text() == "b\n"
