import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import checkpoint
import network
import train
from dataloader import DataGenerater, make_loader, to_float

SMALL = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]
EAGER = torch.autocast("cpu", torch.bfloat16, enabled=False)


def small_args(*flags):
    return train.parse_args([*SMALL, *flags])


def run(dataroot, outdir, *flags):
    train.main([*SMALL, "--dataroot", str(dataroot), "--outdir", str(outdir), *map(str, flags)])


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(a, b):
    """Bit by bit, through nested dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_training(one, other):
    for name in ("generator.params", "generator_raw.params", "checkpoint.pt"):
        assert_equal(load(one / name), load(other / name))
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    for rows in logs:
        for row in rows:
            del row["images_per_sec"]  # the one field that tells of the machine
    assert logs[0] == logs[1]


def test_20_steps_equal_a_plain_loop(dataroot):
    """The fast step against the report's loop, written plainly: BCELoss, contiguous tensors, gradients everywhere.

    In float64: Adam divides by gradients near zero, and after some steps makes visible any other order of summation.
    """
    state = train.make_state(small_args(), torch.device("cpu"))
    for net in (state.netG, state.netD, state.average):
        net.double()
    netG = copy.deepcopy(state.netG).to(memory_format=torch.contiguous_format)
    netD = copy.deepcopy(state.netD).to(memory_format=torch.contiguous_format)
    optG = torch.optim.Adam(netG.parameters(), 2e-4, (0.5, 0.999))
    optD = torch.optim.Adam(netD.parameters(), 2e-4, (0.5, 0.999))
    criterion, dataset, losses = nn.BCELoss(), DataGenerater(dataroot / "64" / "train", 64), []
    for step in range(20):
        real = to_float(next(iter(make_loader(dataset, 8, 0, step)))).double()
        z = network.step_latents(0, step, 8, 8).double()
        train.train_step(state, real.contiguous(memory_format=torch.channels_last), z, EAGER, 0.999)

        netD.zero_grad()
        errD_real = criterion(netD(real), torch.ones(8, 1, 1, 1))
        fake = netG(z)
        errD_fake = criterion(netD(fake.detach()), torch.zeros(8, 1, 1, 1))
        errD = errD_real + errD_fake
        errD.backward()
        optD.step()
        netG.zero_grad()
        errG = criterion(netD(fake), torch.ones(8, 1, 1, 1))
        errG.backward()
        optG.step()
        losses.append((errD.item(), errG.item()))
    assert state.totals[:2].tolist() == pytest.approx(torch.tensor(losses).sum(0).tolist(), rel=1e-5)
    for fast, plain in ((state.netG, netG), (state.netD, netD)):
        for a, b in zip(fast.parameters(), plain.parameters()):
            assert (a - b).abs().max() < 1e-5 + 1e-3 * b.abs().max()


class Constant(nn.Module):
    """A discriminator that gives every image the probability 1/4, whatever it sees; the factor is its parameter."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(1 / 3).log())

    def forward(self, images, logits):
        assert logits
        return self.logit + 0 * images.mean((1, 2, 3), keepdim=True)


def test_losses_by_hand():
    """D says 1/4 to all: loss_d = -ln(1/4) - ln(3/4). Its SGD step is known, and with it loss_g."""
    args = small_args()
    state = train.make_state(args, torch.device("cpu"))
    state.netD = Constant()
    state.optD = torch.optim.SGD(state.netD.parameters(), 1.0)
    logit = torch.tensor(1 / 3).log().item()
    train.train_step(state, torch.zeros(8, 3, 64, 64), network.step_latents(0, 0, 8, 8), EAGER, 0)
    after = torch.sigmoid(torch.tensor(logit - ((0.25 - 1) + 0.25)))  # d/dlogit of both losses
    expected = [torch.tensor([0.25, 0.75]).log().neg().sum().item(), after.log().neg().item(), 0.25, 0.25]
    assert state.totals.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("frozen, moving, lr", [("netG", "netD", "optG"), ("netD", "netG", "optD")])
def test_a_step_of_one_leaves_the_other_untouched(frozen, moving, lr):
    state = train.make_state(small_args(), torch.device("cpu"))
    getattr(state, lr).param_groups[0]["lr"] = 0.0  # its gradients are still computed
    before = {name: [p.clone() for p in getattr(state, name).parameters()] for name in ("netG", "netD")}
    real = torch.rand(8, 3, 64, 64) * 2 - 1
    train.train_step(state, real, network.step_latents(0, 0, 8, 8), EAGER, 0.999)
    same = {
        name: [torch.equal(a, b) for a, b in zip(before[name], getattr(state, name).parameters())] for name in before
    }
    assert all(same[frozen]) and not any(same[moving])


def test_average_warms_up_and_does_not_touch_training():
    args = small_args()
    runs = {}
    for ema in (0, 0.999):
        state = train.make_state(args, torch.device("cpu"))
        for step in range(3):
            train.train_step(state, torch.zeros(8, 3, 64, 64), network.step_latents(0, step, 8, 8), EAGER, ema)
        runs[ema] = state
    assert_equal(runs[0].netG.state_dict(), runs[0.999].netG.state_dict())
    last, average = runs[0.999].netG.state_dict(), runs[0.999].average.state_dict()
    assert not torch.equal(last["main.1.running_var"], average["main.1.running_var"])
    for name, tensor in runs[0].average.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, last[name])  # --ema 0: the last iterate itself


def test_bf16_tracks_fp32(dataroot):
    totals = {}
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    for enabled in (False, True):
        state = train.make_state(small_args(), torch.device("cpu"))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        for step in range(10):
            real = to_float(next(iter(make_loader(dataset, 8, 0, step))))
            train.train_step(state, real, network.step_latents(0, step, 8, 8), autocast, 0.999)
        totals[enabled] = state.totals / 10
        assert next(state.netG.parameters()).dtype == torch.float32
    assert (totals[True] - totals[False]).abs().max() < 0.1


def test_outputs(dataroot, tmp_path):
    run(dataroot, tmp_path / "run", "--epochs", 2)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"generator.params", "generator_raw.params", "checkpoint.pt", "checkpoint_previous.pt", "args.json"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    fields = ["step", "epoch", "images_seen", "loss_d", "loss_g", "d_real", "d_fake", "images_per_sec"]
    assert rows and all(list(row) == fields for row in rows)
    assert rows[-1]["images_seen"] == rows[-1]["step"] * 8 and rows[-1]["epoch"] == 2
    assert all(0 < row["d_real"] < 1 and row["loss_d"] > 0 for row in rows)
    with Image.open(tmp_path / "run" / "samples" / "epoch_002.png") as grid:
        assert grid.size == (530, 530)
    with Image.open(tmp_path / "run" / "training.gif") as animation:
        assert animation.n_frames == 2
    Image.open(tmp_path / "run" / "losses.png").verify()
    facts = json.loads((tmp_path / "run" / "args.json").read_text())
    assert facts["seed"] == 0 and facts["torch"] == torch.__version__ and len(facts["data_sha256"]) == 64


def test_resume_equals_no_interruption(dataroot, tmp_path):
    run(dataroot, tmp_path / "whole", "--epochs", 2)
    run(dataroot, tmp_path / "parts", "--epochs", 1)
    run(dataroot, tmp_path / "parts", "--epochs", 2, "--resume")
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def start(dataroot, outdir, *flags):
    command = [sys.executable, ROOT / "train.py", *SMALL, "--dataroot", dataroot, "--outdir", outdir]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command), *map(str, flags)], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_training_goes_on_bit_for_bit(dataroot, tmp_path, number):
    """In the middle of an epoch, and after half a row was written to the log."""
    run(dataroot, tmp_path / "whole", "--epochs", 3)
    process = start(dataroot, tmp_path / "killed", "--epochs", 3, "--checkpoint-every", 1)
    wait_for(tmp_path / "killed" / "checkpoint.pt", process)
    process.send_signal(number)
    message = process.communicate()[1]
    if number == signal.SIGTERM:
        assert process.returncode == 143 and "--resume" in message
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 9')
    run(dataroot, tmp_path / "killed", "--epochs", 3, "--resume")
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


def test_damaged_checkpoint_falls_back_to_the_one_before(dataroot, tmp_path, capsys):
    run(dataroot, tmp_path / "whole", "--epochs", 2)
    run(dataroot, tmp_path / "run", "--epochs", 2)
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    run(dataroot, tmp_path / "run", "--epochs", 2, "--resume")
    assert "damaged" in capsys.readouterr().err
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_two_processes_stay_equal_and_share_each_batch(dataroot, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "train.py", *SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run", "--epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["images_seen"] == len(list((dataroot / "64" / "train").iterdir())) // 8 * 8
    train_again = [*SMALL, "--dataroot", str(dataroot), "--outdir", str(tmp_path / "run"), "--epochs", "2", "--resume"]
    train.main(train_again)  # a single process goes on with it


def test_nan_stops_it(dataroot, tmp_path, run_script, refused):
    done = run_script("train.py", *SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run", "--lr", "1e30")
    refused(done, "diverged")


@pytest.mark.parametrize("flags, words", [
    (("--dataroot", "nowhere"), ["nowhere", "preprocess.py"]),
    (("--batch-size", "1000"), ["--batch-size"]),
    (("--resume",), ["--resume", "no checkpoint"]),
    (("--image-size", "65"), ["--image-size"]),
    (("--device", "cuda:99"), ["--device"]),
    (("--outdir", "/proc/none"), ["--outdir"]),
])
def test_bad_input(dataroot, run_script, refused, flags, words):
    refused(run_script("train.py", *SMALL, "--dataroot", dataroot, *flags), *words)


def test_another_run_is_never_overwritten(dataroot, tmp_path, run_script, refused):
    run(dataroot, tmp_path / "run", "--epochs", 1)
    again = ["--dataroot", dataroot, "--outdir", tmp_path / "run", "--epochs", "1"]
    refused(run_script("train.py", *SMALL, *again), "--resume", tmp_path / "run")
    refused(run_script("train.py", *SMALL, *again, "--resume", "--lr", "0.1"), "--lr", "0.0002")
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"no checkpoint")
    refused(run_script("train.py", *SMALL, *again, "--resume"), "checkpoint")


def test_a_kill_between_two_checkpoints_leaves_a_run_that_is_not_overwritten(dataroot, tmp_path, run_script, refused):
    """There the older checkpoint has its new name already, and the newer one none yet."""
    run(dataroot, tmp_path / "run", "--epochs", 2)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    again = ["--dataroot", dataroot, "--outdir", tmp_path / "run", "--epochs", "2"]
    refused(run_script("train.py", *SMALL, *again), "--resume", tmp_path / "run")
    run(dataroot, tmp_path / "run", "--epochs", 2, "--resume")


def test_a_discriminator_that_has_won_is_told(tmp_path, capsys):
    args = small_args("--outdir", str(tmp_path))
    state = train.make_state(args, torch.device("cpu"))
    for loss_d, told in ((0.5, False), (1e-4, True)):
        state.step += 20
        state.totals.copy_(20 * torch.tensor([loss_d, 5, 0.9, 0.1]))
        with (tmp_path / "log.jsonl").open("a") as log:
            row = train.log_row(state, args, 1, 20, [0, 0.0], log)
        assert row["loss_d"] == pytest.approx(loss_d) and ("D has won" in capsys.readouterr().err) == told


def test_two_trainings_in_one_folder(dataroot, tmp_path, run_script, refused):
    lock = checkpoint.open_outdir(small_args("--outdir", str(tmp_path / "run")))
    refused(run_script("train.py", *SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run"), "another training")
    lock.close()
