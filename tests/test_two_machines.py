"""Two machines: two network namespaces, a cable between them, a working folder and a torchrun in each, gloo on CPUs."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import (
    PROGRAMS,
    ROOT,
    SMALL,
    assert_same_training,
    errors,
    log_rows,
    rank_environment,
    start_ranks,
    wait_for,
)


class Machines:
    """Two network namespaces at 10.77.0.1 and 10.77.0.2, and the processes started in them."""

    def __init__(self, folder):
        self.folders, self.processes = [folder / "first", folder / "second"], []
        self.names = [f"faces-{os.getpid()}-{number}" for number in (1, 2)]

    def connect(self):
        first, second = self.names
        for folder, name in zip(self.folders, self.names):
            folder.mkdir()
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        cable = ["ip", "-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second]
        subprocess.run(cable, check=True, capture_output=True)
        for number, name in enumerate(self.names, 1):
            address = ["addr", "add", f"10.77.0.{number}/24", "dev", "cable"]
            for words in (address, ["link", "set", "cable", "up"], ["link", "set", "lo", "up"]):
                subprocess.run(["ip", "-n", name, *words], check=True)

    def start(self, script, *flags, torchrun=False):
        """One process of `script` on each machine, in its folder."""
        started = []
        for rank, (folder, name) in enumerate(zip(self.folders, self.names)):
            launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
            launch += ["--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-conf", f"is_host={int(rank == 0)}"]
            launch += ["--local-addr", f"10.77.0.{rank + 1}", "--"]
            command = ["ip", "netns", "exec", name, sys.executable, *launch * torchrun, script, *SMALL, *flags]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} if torchrun else rank_environment(rank, 2, "10.77.0.1")
            environment |= {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "cable"}
            with (folder / "stderr.txt").open("w") as stderr:
                started.append(subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stderr=stderr))
        self.processes += started
        return started

    def run(self, script, *flags, torchrun=False):
        for process, folder in zip(self.start(script, *flags, torchrun=torchrun), self.folders):
            assert process.wait(timeout=200) == 0, (folder / "stderr.txt").read_text()

    def remove(self):
        for process in self.processes:
            process.kill()
            process.wait()
        for name in self.names:  # the cable goes with them
            for number in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                os.kill(int(number), 9)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def machines(tmp_path):
    pair = Machines(tmp_path)
    try:
        pair.connect()
    except (OSError, subprocess.CalledProcessError):
        pair.remove() if shutil.which("ip") else None
        pytest.skip("needs ip and the right to make network namespaces")
    yield pair
    pair.remove()


def test_two_machines_train_and_resume_as_two_processes_of_one_machine(dataroot, tmp_path, machines):
    """Only the first machine has the checkpoint."""
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "whole", "--epochs", 2]
    for process in start_ranks("train.py", flags, flags, cwd=tmp_path):
        assert process.communicate(timeout=200) and process.returncode == 0
    flags = ["--dataroot", dataroot, "--outdir", "run"]
    machines.run(ROOT / "train.py", *flags, "--epochs", 1, torchrun=True)
    machines.run(ROOT / "train.py", *flags, "--epochs", 2, "--resume")
    assert_same_training(tmp_path / "whole", machines.folders[0] / "run")
    assert not (machines.folders[1] / "run").exists()


def test_each_machine_draws_its_demo_faces_and_ends_when_the_other_is_out_of_reach(machines):
    both = machines.start(PROGRAMS / "train_quick_demo.py", "--demo", "--epochs", 5000)
    log = machines.folders[0] / "runs" / "demo" / "log.jsonl"
    wait_for(lambda: log.exists() and len(log_rows(log.parent)) > 1, both[0])
    first, second = (sorted(path.name for path in folder.glob("data/demo/64/*/*.png")) for folder in machines.folders)
    assert first == second and len(first) == 48
    subprocess.run(["ip", "-n", machines.names[1], "link", "set", "cable", "down"], check=True)
    for process, folder in zip(both, machines.folders):
        assert process.wait(timeout=100) == 1
        message = (folder / "stderr.txt").read_text()
        assert len(errors(message)) == 1 and "cannot be reached" in errors(message)[0], message
