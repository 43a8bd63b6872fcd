
import copy
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kill_train import SMALL, assert_equal, assert_same_training, kill, load, start, wait_for
from PIL import Image
from torch import nn

import train
from dataloader import DataGenerater, make_loader, to_float
from support import checkpoint
from support.augment import augment
from support.seeding import augmentation, step_latents

EAGER = torch.autocast("cpu", torch.bfloat16, enabled=False)


def small_args(*flags):
    return train.parse_args([*SMALL, *flags])


def run(dataroot, outdir, *flags):
    train.main([*SMALL, "--dataroot", str(dataroot), "--outdir", str(outdir), *map(str, flags)])


@pytest.mark.parametrize("flags", [[], ["--augment", "--group-norm"]])
def test_20_steps_equal_a_plain_loop(dataroot, flags):
    """The fast step against the report's loop, written plainly: BCELoss, contiguous tensors, gradients everywhere.

    In float64: Adam divides by gradients near zero, and after some steps makes visible any other order of summation.
    """
    state = train.make_state(small_args(*flags), torch.device("cpu"))
    for net in (state.netG, state.netD, state.average):
        net.double()
    netG = copy.deepcopy(state.netG).to(memory_format=torch.contiguous_format)
    netD = copy.deepcopy(state.netD).to(memory_format=torch.contiguous_format)
    optG = torch.optim.Adam(netG.parameters(), 2e-4, (0.5, 0.999))
    optD = torch.optim.Adam(netD.parameters(), 2e-4, (0.5, 0.999))
    criterion, dataset, losses = nn.BCELoss(), DataGenerater(dataroot / "64" / "train", 64), []
    for step in range(20):
        real = to_float(next(iter(make_loader(dataset, 8, 0, step)))).double()
        z = step_latents(0, step, 8, 8).double()
        u = augmentation(small_args(), step).double() if flags else [None] * 3
        train.train_step(state, real.contiguous(memory_format=torch.channels_last), z, EAGER, 0.999, u)

        netD.zero_grad()
        errD_real = criterion(netD(augment(real, u[0])), torch.ones(8, 1, 1, 1))
        fake = netG(z)
        errD_fake = criterion(netD(augment(fake.detach(), u[1])), torch.zeros(8, 1, 1, 1))
        errD = errD_real + errD_fake
        errD.backward()
        optD.step()
        netG.zero_grad()
        errG = criterion(netD(augment(fake, u[2])), torch.ones(8, 1, 1, 1))
        errG.backward()
        optG.step()
        losses.append((errD.item(), errG.item()))
    assert state.totals[:2].tolist() == pytest.approx(torch.tensor(losses).sum(0).tolist(), rel=1e-5)
    for fast, plain in ((state.netG, netG), (state.netD, netD)):
        for a, b in zip(fast.parameters(), plain.parameters()):
            assert (a - b).abs().max() < 1e-5 + 1e-3 * b.abs().max()


def test_compiled_steps_equal_eager_ones(monkeypatch):
    """The graphs that --compile captures, run as they are: what inductor makes of them takes minutes to build."""
    compile_net = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: compile_net(net, backend="aot_eager"))
    states = [train.make_state(small_args(*flags), torch.device("cpu")) for flags in ([], ["--compile"])]
    for step in range(3):
        real = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(step)) * 2 - 1
        for state in states:
            train.train_step(state, real, step_latents(0, step, 8, 8), EAGER, 0.999)
    assert states[0].totals.tolist() == pytest.approx(states[1].totals.tolist(), rel=1e-5)
    for eager, compiled in zip(states[0].netG.parameters(), states[1].netG.parameters()):
        assert (eager - compiled).abs().max() < 1e-5


class Constant(nn.Module):
    """A discriminator that gives every image the probability 1/4, whatever it sees; the factor is its parameter."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(1 / 3).log())

    def forward(self, images, logits):
        assert logits
        return self.logit + 0 * images.mean((1, 2, 3), keepdim=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--augment", "--group-norm", "--precision", "bf16"]])
def test_a_cuda_graph_gives_the_bits_of_single_launches(dataroot, tmp_path, monkeypatch, flags):
    """Also stopped and gone on with, which records it anew."""
    record, recorded = train.CudaGraph.record, []
    monkeypatch.setattr(train.CudaGraph, "record", lambda *inputs: recorded.append(record(*inputs)))
    flags = ["--device", "cuda", "--deterministic", *flags]
    run(dataroot, tmp_path / "graph", "--epochs", 3, *flags)
    run(dataroot, tmp_path / "resumed", "--epochs", 1, *flags)
    run(dataroot, tmp_path / "resumed", "--epochs", 3, "--resume", *flags)
    assert len(recorded) == 3
    monkeypatch.setattr(train, "CudaGraph", lambda step: None)
    run(dataroot, tmp_path / "plain", "--epochs", 3, *flags)
    assert_same_training(tmp_path / "graph", tmp_path / "plain")
    assert_same_training(tmp_path / "resumed", tmp_path / "plain")


def test_a_recipe_is_flag_values_and_a_flag_wins():
    report, best = train.parse_args([]), train.parse_args(["--recipe", "best"])
    changed = {name for name in vars(report) if getattr(report, name) != getattr(best, name)}
    assert changed == {"recipe", "batch_size", "augment", "group_norm", "ema"}
    own = train.parse_args(["--batch-size", "64", "--recipe", "best"])
    assert own.batch_size == 64 and own.augment and own.recipe == "best"
    assert not train.parse_args(["--no-augment", "--recipe", "best"]).augment


def test_losses_by_hand():
    """D says 1/4 to all: loss_d = -ln(1/4) - ln(3/4). Its SGD step is known, and with it loss_g."""
    args = small_args()
    state = train.make_state(args, torch.device("cpu"))
    state.netD = Constant()
    state.optD = torch.optim.SGD(state.netD.parameters(), 1.0)
    logit = torch.tensor(1 / 3).log().item()
    train.train_step(state, torch.zeros(8, 3, 64, 64), step_latents(0, 0, 8, 8), EAGER, 0)
    after = torch.sigmoid(torch.tensor(logit - ((0.25 - 1) + 0.25)))  # d/dlogit of both losses
    expected = [torch.tensor([0.25, 0.75]).log().neg().sum().item(), after.log().neg().item(), 0.25, 0.25]
    assert state.totals.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("frozen, moving, lr", [("netG", "netD", "optG"), ("netD", "netG", "optD")])
def test_a_step_of_one_leaves_the_other_untouched(frozen, moving, lr):
    state = train.make_state(small_args(), torch.device("cpu"))
    getattr(state, lr).param_groups[0]["lr"] = 0.0  # its gradients are still computed
    before = {name: [p.clone() for p in getattr(state, name).parameters()] for name in ("netG", "netD")}
    real = torch.rand(8, 3, 64, 64) * 2 - 1
    train.train_step(state, real, step_latents(0, 0, 8, 8), EAGER, 0.999)
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
            train.train_step(state, torch.zeros(8, 3, 64, 64), step_latents(0, step, 8, 8), EAGER, ema)
        runs[ema] = state
    assert_equal(runs[0].netG.state_dict(), runs[0.999].netG.state_dict())
    last, average, none = (list(n.parameters()) for n in (runs[0].netG, runs[0.999].average, runs[0].average))
    assert not any(map(torch.equal, average, last))
    assert all(map(torch.equal, none, last))  # --ema 0: the last iterate itself


def test_the_average_has_statistics_of_its_own():
    """The first map is linear in latents of N(0,1): its variances are sums of squared weights. G's are not touched."""
    args = small_args("--ema", "0.5")
    state = train.make_state(args, torch.device("cpu"))
    for step in range(3):
        train.train_step(state, torch.zeros(8, 3, 64, 64), step_latents(0, step, 8, 8), EAGER, args.ema)
    before = copy.deepcopy(state.netG.state_dict())
    train.estimate_statistics(state, args, torch.device("cpu"), EAGER)
    assert_equal(before, state.netG.state_dict())
    assert not state.average.training
    first, norm = state.average.main[0], state.average.main[1]
    expected = first.weight.square().sum(0).mean((1, 2))
    assert norm.running_var.tolist() == pytest.approx(expected.tolist(), rel=0.1)
    assert (norm.running_mean / norm.running_var.sqrt()).abs().max() < 0.1


def test_bf16_tracks_fp32(dataroot):
    """Over 200 steps, the means of 50 steps at a time: losses within 0.3, D(x) and D(G(z)) within 0.05."""
    means = {}
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    for enabled in (False, True):
        state, means[enabled] = train.make_state(small_args(), torch.device("cpu")), []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        for step in range(200):
            real = to_float(next(iter(make_loader(dataset, 8, 0, step))))
            train.train_step(state, real, step_latents(0, step, 8, 8), autocast, 0.999)
            if state.step % 50 == 0:
                means[enabled].append(state.totals / 50)
                state.totals = torch.zeros(4)
        assert next(state.netG.parameters()).dtype == torch.float32
    apart = (torch.stack(means[True]) - torch.stack(means[False])).abs().amax(0)
    assert (apart < torch.tensor([0.3, 0.3, 0.05, 0.05])).all(), apart  # NaN is not below anything


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_kept():
    """A block of 64 MiB has 16,384 pages, new ones without it; with it, those of the larger one that was freed."""
    script = """
import resource, torch
from support.devices import keep_freed_memory
keep_freed_memory()
torch.ones(2**27, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


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
    assert facts.keys() >= {"python", "git_commit", "device_type", "device_name", "threads", "processes", "lr"}


def test_fid_is_measured_and_the_best_average_kept(dataroot, tmp_path, weights):
    """Also across an interruption; --eval-every touches nothing else of a training."""
    flags = ["--eval-every", 1, "--eval-flags", f"--inception tf2015 --dims 64 --num 3 --weights '{weights}'"]
    run(dataroot, tmp_path / "plain", "--epochs", 3)
    run(dataroot, tmp_path / "run", "--epochs", 2, *flags)
    run(dataroot, tmp_path / "run", "--epochs", 3, *flags, "--resume")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    fids = {row["epoch"]: row["fid"] for row in rows if "fid" in row}
    assert list(fids) == [1, 2, 3] and len(set(fids.values())) == 3
    best = min(fids, key=fids.get)
    run(dataroot, tmp_path / "until best", "--epochs", best)
    for mine, plain in (("generator_best.params", "until best"), ("generator.params", "plain")):
        assert_equal(load(tmp_path / "run" / mine), load(tmp_path / plain / "generator.params"))
    with Image.open(tmp_path / "run" / "fid.png") as picture:
        assert picture.size == (900, 420)
    with pytest.raises(SystemExit, match="--weights nowhere does not exist"):
        run(dataroot, tmp_path / "no", "--eval-every", 1, "--eval-flags", "--weights nowhere")


@pytest.mark.parametrize("flags", [[], ["--augment", "--group-norm"]])
def test_resume_equals_no_interruption(dataroot, tmp_path, flags):
    run(dataroot, tmp_path / "whole", "--epochs", 2, *flags)
    run(dataroot, tmp_path / "parts", "--epochs", 1, *flags)
    run(dataroot, tmp_path / "parts", "--epochs", 2, "--resume", *flags)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("precision, processes, number", [("fp32", 1, signal.SIGKILL), ("bf16", 2, signal.SIGTERM)])
def test_killed_training_goes_on_bit_for_bit(tmp_path, precision, processes, number):
    """The short form of tests/kill_train.py, once, while a file is being written."""
    flags = ["--epochs", 14, "--precision", precision, "--augment", "--group-norm"]
    torn = kill(tmp_path, 1, flags, processes, number)
    assert torn == (number == signal.SIGKILL)


def test_log_goes_on_without_what_came_after_the_checkpoint(tmp_path):
    rows = [json.dumps({"step": step}) for step in (20, 40, 60)]
    (tmp_path / "log.jsonl").write_text("\n".join([*rows, '{"step": 7']))
    with checkpoint.continue_log(tmp_path, 45) as log:
        log.write('{"step": 60}\n')
    assert [row["step"] for row in checkpoint.read_log(tmp_path / "log.jsonl", 99)] == [20, 40, 60]


def test_a_second_ctrl_c_stops_at_once(dataroot, tmp_path):
    """In the middle of a step of some seconds, which the first one lets end."""
    run(dataroot, tmp_path / "run", "--epochs", 1, "--ngf", 64, "--ndf", 64, "--batch-size", 40)
    flags = ["--epochs", 99, "--ngf", 64, "--ndf", 64, "--batch-size", 40, "--resume"]
    process = start(dataroot, tmp_path / "run", 1, *flags)
    log = tmp_path / "run" / "log.jsonl"
    rows = len(log.read_text().splitlines())
    wait_for(lambda: len(log.read_text().splitlines()) > rows, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "stopped at" not in message


def test_one_process_dies_and_the_other_ends(dataroot, tmp_path):
    process = start(dataroot, tmp_path / "run", 2, "--epochs", 500)
    wait_for((tmp_path / "run" / "checkpoint.pt").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("needs /proc")
    dies, other = map(int, children.read_text().split())
    os.kill(dies, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_damaged_checkpoint_falls_back_to_the_one_before(dataroot, tmp_path, capsys):
    run(dataroot, tmp_path / "whole", "--epochs", 2)
    run(dataroot, tmp_path / "run", "--epochs", 2)
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    run(dataroot, tmp_path / "run", "--epochs", 2, "--resume")
    assert "damaged" in capsys.readouterr().err
    assert_same_training(tmp_path / "whole", tmp_path / "run")


SPY = f"""
import glob, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
step, seen = train.train_step, []
def spied(state, real, *arguments):
    seen.append(real)
    step(state, real, *arguments)
    parts = {{name: part.state_dict() for name, part in state.parts().items()}}
    torch.save(dict(parts, seen=torch.cat(seen)), "rank" + os.environ["RANK"] + ".pt")
train.train_step = spied
train.main(sys.argv[1:])
print(*(open(task).read() for task in glob.glob("/proc/self/task/*/comm")))
"""


def test_two_processes_stay_equal_and_share_each_batch(dataroot, tmp_path):
    """Bit by bit after an epoch, D's BatchNorm statistics apart, of which each has those of its own images.

    Threads of gloo that outlived the training could abort the process while it ends.
    """
    (tmp_path / "spy.py").write_text(SPY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "spy.py"]
    command += [*SMALL, "--dataroot", dataroot, "--outdir", "run", "--epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "gloo" not in done.stdout
    ranks = [load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    images = to_float(DataGenerater(dataroot / "64" / "train", in_memory=True).images)
    seen = torch.cat([rank.pop("seen") for rank in ranks])
    indices = [(images == image).flatten(1).all(1).nonzero().item() for image in seen]  # each is one of the set
    assert len(indices) == len(images) // 8 * 8 == len(set(indices))
    for rank in ranks:
        rank["netD"] = {name: tensor for name, tensor in rank["netD"].items() if "running" not in name}
    assert_equal(*ranks)
    train_again = [*SMALL, "--dataroot", str(dataroot), "--outdir", str(tmp_path / "run"), "--epochs", "2", "--resume"]
    train.main(train_again)  # a single process goes on with it


def test_nan_stops_it(dataroot, tmp_path, run_script, refused):
    done = run_script("train.py", *SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run", "--lr", "1e30")
    refused(done, "diverged")


def test_full_and_read_only_disk(dataroot, tmp_path, small_disk, run_script, refused):
    """One sentence, and what was there goes on once there is room again."""
    run(dataroot, tmp_path / "whole", "--epochs", 3)
    run(dataroot, small_disk / "run", "--epochs", 1)
    again = ["--dataroot", dataroot, "--outdir", small_disk / "run", "--epochs", 3, "--resume"]
    kept = (small_disk / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    refused(run_script("train.py", *SMALL, *again), "cannot write", small_disk / "run", "No space left", "free some")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(run_script("train.py", *SMALL, *again), "cannot write", small_disk / "run", "Read-only")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert (small_disk / "run" / "checkpoint.pt").read_bytes() == kept
    (small_disk / "filler").unlink()
    run(*again[1:4:2], "--epochs", 3, "--resume")
    assert_same_training(tmp_path / "whole", small_disk / "run")


def test_files_read_by_processes_give_the_same_faces(dataroot, tmp_path, monkeypatch):
    """Where the images do not fit in memory; one that is damaged is named."""
    run(dataroot, tmp_path / "memory", "--epochs", 1)
    monkeypatch.setattr(train, "fits_in_memory", lambda *_: False)
    run(dataroot, tmp_path / "files", "--epochs", 1, "--workers", 2)
    name = "generator_raw.params"
    assert_equal(load(tmp_path / "memory" / name), load(tmp_path / "files" / name))
    shutil.copytree(dataroot, tmp_path / "data")
    damaged = sorted((tmp_path / "data" / "64" / "train").iterdir())[7]
    damaged.write_bytes(damaged.read_bytes()[:100])
    for workers in (0, 1):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "data", tmp_path / f"damaged {workers}", "--workers", workers)
        assert f"error: {damaged} cannot be read" in str(stop.value) and "\n" not in str(stop.value)


SPAWNED = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
import train
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    train.fits_in_memory = lambda *_: False
    train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("inside", ["", "mount -t tmpfs -o ro tmpfs /dev/shm &&"])
def test_spawned_processes_and_none_where_there_is_no_shared_memory(dataroot, tmp_path, inside):
    """As Windows starts processes; and as in many containers, where semaphores cannot be made."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("needs the right to unshare")
    script = tmp_path / "é spawned.py"
    script.write_text(SPAWNED.format(root=str(ROOT)))
    command = ["unshare", "--mount", "sh", "-c", f'{inside} exec "$@"', "sh", sys.executable, script, *SMALL]
    command += ["--dataroot", dataroot, "--outdir", "ein Ordner", "--epochs", "1", "--workers", "1"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "ein Ordner" / "generator.params").exists(), done.stderr


def test_read_only_checkout(dataroot, tmp_path, small_disk):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, small_disk)
    shutil.copytree(ROOT / "support", small_disk / "support", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    command = [sys.executable, small_disk / "train.py", *SMALL, "--dataroot", dataroot, "--epochs", "1"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "runs" / "64" / "generator.params").exists(), done.stderr


class Bomb:
    def __reduce__(self):
        return (exec, ("open('boom', 'w')",))


@pytest.mark.parametrize("name, value, words", [
    ("netG", Bomb(), "damaged"),
    ("netG", {}, "loading state_dict"),
    ("netD", {"main.0.weight": torch.zeros(1).expand(2**20, 2**20)}, "claims"),
    ("average", {"main.0.weight": torch.zeros(3)}, "loading state_dict"),
    ("optG", {"state": {}, "param_groups": []}, "param"),
    ("optD", {"state": 7}, "not a checkpoint"),
    ("step", "many", "not a checkpoint"),
    ("step", -1, "not a checkpoint"),
    ("totals", torch.full((4,), float("nan")), "NaN"),
    ("fixed", None, "not a checkpoint"),
])
def test_checkpoints_from_anywhere(dataroot, tmp_path, monkeypatch, trained, name, value, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoint_previous.pt").unlink()
    content = load(trained / "checkpoint.pt")
    torch.save(content | {name: value}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(SystemExit, match=words) as stop:
        run(dataroot, "run", "--epochs", 3, "--resume")
    assert str(stop.value).startswith("error: run/checkpoint.pt") and "\n" not in str(stop.value)
    assert not Path("boom").exists()


def test_moments_and_weights_of_a_checkpoint_are_checked(dataroot, tmp_path, trained):
    for change, words in (
        (lambda content: content["optG"]["state"][0].update(exp_avg=torch.zeros(3)), "moments"),
        (lambda content: content["netD"]["main.0.weight"].fill_(float("nan")), "NaN"),
        (lambda content: content["optD"]["state"][2]["exp_avg_sq"].fill_(float("inf")), "infinite"),
    ):
        shutil.copytree(trained, tmp_path / words)
        content = load(trained / "checkpoint.pt")
        change(content)
        torch.save(content, tmp_path / words / "checkpoint.pt")
        with pytest.raises(SystemExit, match=words):
            run(dataroot, tmp_path / words, "--epochs", 3, "--resume")


@pytest.fixture(scope="module")
def trained(dataroot, tmp_path_factory):
    """A finished training of two epochs."""
    outdir = tmp_path_factory.mktemp("trained") / "run"
    run(dataroot, outdir, "--epochs", 2)
    return outdir


def test_out_of_memory_says_what_to_lower(dataroot, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(SystemExit, match="out of memory; lower --batch-size"):
        run(dataroot, tmp_path / "run")


def test_resume_with_other_images_is_refused(dataroot, tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(dataroot, tmp_path / "data")
    one, other = sorted((tmp_path / "data" / "64" / "train").iterdir())[:2]
    shutil.copy(one, other)
    with pytest.raises(SystemExit, match="training images are others"):
        run(tmp_path / "data", tmp_path / "run", "--epochs", 3, "--resume")


def test_no_checkpoint_once_a_loss_is_no_number(dataroot, tmp_path, trained, monkeypatch):
    """Also between two rows of the log: the last good checkpoint stays, and is named."""
    shutil.copytree(trained, tmp_path / "run")
    step = train.train_step

    def diverge(state, *rest):
        step(state, *rest)
        state.totals += float("nan")

    monkeypatch.setattr(train, "train_step", diverge)
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="near step 11: .*last good checkpoint is .*checkpoint.pt"):
        run(dataroot, tmp_path / "run", "--epochs", 3, "--checkpoint-every", 1, "--resume")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept


@pytest.mark.parametrize("flags, words", [
    (("--dataroot", "nowhere"), ["nowhere", "preprocess.py"]),
    (("--batch-size", "1000"), ["--batch-size"]),
    (("--resume",), ["--resume", "no checkpoint"]),
    (("--image-size", "65"), ["--image-size"]),
    (("--device", "cuda:99"), ["--device"]),
    (("--outdir", "/proc/none"), ["--outdir"]),
    (("--lr", "-1"), ["--lr", "-1 is not"]),
    (("--lr", "nan"), ["--lr"]),
    (("--beta1", "1"), ["--beta1", "below 1"]),
    (("--ema", "2"), ["--ema", "below 1"]),
    (("--seed", "9" * 30), ["--seed", "too large"]),
    (("--eval-every", "1", "--eval-flags", "--weights 'w"), ["--eval-flags"]),
])
def test_bad_input(dataroot, run_script, refused, flags, words):
    refused(run_script("train.py", *SMALL, "--dataroot", dataroot, *flags), *words)


def test_another_run_is_never_overwritten(dataroot, tmp_path, run_script, refused):
    run(dataroot, tmp_path / "run", "--epochs", 1)
    again = ["--dataroot", dataroot, "--outdir", tmp_path / "run", "--epochs", "1"]
    refused(run_script("train.py", *SMALL, *again), "--resume", tmp_path / "run")
    refused(run_script("train.py", *SMALL, *again, "--resume", "--lr", "0.1"), "--lr", "0.0002")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    run(dataroot, tmp_path / "run", "--epochs", 1, "--resume")  # nothing is left to do
    for path in (tmp_path / "run").rglob("*.p*"):
        assert path.read_bytes() == before[path], path
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"no checkpoint")
    refused(run_script("train.py", *SMALL, *again, "--resume"), "checkpoint")
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (tmp_path / "run" / name).unlink()
    refused(run_script("train.py", *SMALL, *again), "generator.params", "--outdir")


def test_a_kill_in_the_first_epoch_can_be_resumed(dataroot, tmp_path, monkeypatch):
    """Also once generator.params is there and the checkpoint of that epoch is not yet."""
    run(dataroot, tmp_path / "whole", "--epochs", 2)

    def killed(*_):
        raise KeyboardInterrupt

    save_params = train.save_params

    def save_params_and_die(*arguments):
        save_params(*arguments)
        killed()

    for name, death in (("train_step", killed), ("save_params", save_params_and_die)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train, name, death)
            run(dataroot, tmp_path / name, "--epochs", 2)
        run(dataroot, tmp_path / name, "--epochs", 2, "--resume")
        assert_same_training(tmp_path / "whole", tmp_path / name)


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
