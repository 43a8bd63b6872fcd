"""Two machines: two network namespaces, a cable between them, a working folder and a torchrun in each, gloo on CPUs."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import PROGRAMS, ROOT, SMALL, assert_same_training, log_rows, start, wait_for


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

    def start(self, script, *flags, extra=((), ())):
        """One process of `script` on each machine, in its folder. `extra` holds the flags of one machine alone."""
        started = []
        for number, (folder, name, more) in enumerate(zip(self.folders, self.names, extra), 1):
            launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
            launch += ["--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-conf", f"is_host={int(number == 1)}"]
            launch += ["--local-addr", f"10.77.0.{number}", "--", script]
            command = ["ip", "netns", "exec", name, sys.executable, *launch, *SMALL, *flags, *more]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
            with (folder / "stderr.txt").open("w") as stderr:
                started.append(subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stderr=stderr))
        self.processes += started
        return started

    def run(self, *flags, extra=((), ())):
        """The exit codes of train.py on both machines, and what it wrote to standard error there."""
        codes = [process.wait(timeout=200) for process in self.start(ROOT / "train.py", *flags, extra=extra)]
        return codes, self.messages()

    def messages(self):
        return [(folder / "stderr.txt").read_text() for folder in self.folders]

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


def sentences(message):
    """The error lines of train.py in what torchrun and its process wrote."""
    return [line for line in message.splitlines() if line.startswith("error: ")]


def test_two_machines_train_and_resume_as_two_processes_of_one_machine(dataroot, tmp_path, machines):
    """Only the first machine has the checkpoint."""
    one_machine = start(dataroot, tmp_path / "whole", 2, "--epochs", 2)
    message = one_machine.communicate(timeout=200)[1]
    assert one_machine.returncode == 0, message
    for flags in (["--epochs", 1], ["--epochs", 2, "--resume"]):
        codes, messages = machines.run("--dataroot", dataroot, "--outdir", "run", *flags)
        assert codes == [0, 0], messages
    assert_same_training(tmp_path / "whole", machines.folders[0] / "run")
    assert not (machines.folders[1] / "run").exists()


def test_machines_with_different_images_or_flags_are_refused(dataroot, machines):
    codes, messages = machines.run("--dataroot", dataroot, extra=([], ["--lr", "0.001"]))
    assert 0 not in codes
    for message in messages:
        assert len(sentences(message)) == 1 and "--lr is 0.0002 in process 0" in sentences(message)[0], message
    shutil.copytree(dataroot, machines.folders[1] / "data")
    one, other = sorted((machines.folders[1] / "data" / "64" / "train").iterdir())[:2]
    shutil.copy(one, other)
    codes, messages = machines.run(extra=(["--dataroot", dataroot], []))
    assert 0 not in codes
    for message in messages:
        assert len(sentences(message)) == 1 and "copy the same crops to all machines" in sentences(message)[0], message
    assert not list(machines.folders[0].rglob("checkpoint.pt"))


def test_each_machine_draws_its_demo_faces_and_ends_when_the_other_is_out_of_reach(machines):
    both = machines.start(PROGRAMS / "train_quick_demo.py", "--demo", "--epochs", 5000)
    log = machines.folders[0] / "runs" / "demo" / "log.jsonl"
    wait_for(lambda: log.exists() and len(log_rows(log.parent)) > 1, both[0])
    first, second = (sorted(path.name for path in folder.glob("data/demo/64/*/*.png")) for folder in machines.folders)
    assert first == second and len(first) == 48
    subprocess.run(["ip", "-n", machines.names[1], "link", "set", "cable", "down"], check=True)
    for process, folder in zip(both, machines.folders):
        wait_for(lambda folder=folder: sentences((folder / "stderr.txt").read_text()), process)
        assert "cannot be reached" in sentences((folder / "stderr.txt").read_text())[0]
