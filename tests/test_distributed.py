"""Two processes over gloo: training, evaluation, faces, and the loss of one of them."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import (
    PROGRAMS,
    SMALL,
    assert_equal,
    errors,
    kill_one_of_two,
    load,
    run_training,
    start_ranks,
)
from PIL import Image

import evaluate
import generator
import network
import train
from dataloader import DataGenerater
from support import distributed
from support.checkpoint import refuse_unequal_ranks
from support.distributed import explain_group_error, first_rank_writes, from_first_rank, joined_ranks, once_per_machine
from support.feature_stats import load_statistics
from support.files import UserError


def run_ranks(script, *flags_of_ranks, cwd):
    """What start_ranks() has started, finished: (exit code, standard output, standard error) of each process."""
    processes = start_ranks(script, *flags_of_ranks, cwd=cwd)
    outputs = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_two_processes_stay_equal_and_share_each_batch(dataroot, tmp_path):
    """After an epoch, the ranks are equal bit by bit. Only D's BatchNorm statistics depend on the images of a rank.

    No thread of gloo may still run after the training, because it could abort the process at exit.
    """
    flags = [*SMALL, "--dataroot", str(dataroot), "--outdir", str(tmp_path / "run")]
    flags_of_rank = [*flags, "--epochs", 1]
    for code, stdout, stderr in run_ranks(PROGRAMS / "spy_on_steps.py", flags_of_rank, flags_of_rank, cwd=tmp_path):
        assert code == 0, stderr
        assert "gloo" not in stdout
    ranks = [load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    images = DataGenerater(dataroot / "64" / "train", in_memory=True).images
    seen = torch.cat([rank.pop("seen") for rank in ranks])
    indices = [(images == image).flatten(1).all(1).nonzero().item() for image in seen]  # each image is in the data set
    assert len(indices) == len(images) // 8 * 8 == len(set(indices))
    for rank in ranks:
        rank["netD"] = {name: tensor for name, tensor in rank["netD"].items() if "running" not in name}
    assert_equal(*ranks)
    train.main([*flags, "--epochs", "2", "--resume"])  # one process resumes the training of two


def test_after_the_death_of_one_process_the_other_says_so_and_ends(dataroot, tmp_path):
    kill_one_of_two(dataroot, tmp_path)


def test_evaluate_in_two_processes_equals_one_process(dataroot, weights, tmp_path):
    torch.manual_seed(0)
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    flags = ["--params", tmp_path / "g.params", "--num", 21, "--dims", 64, "--inception", "tf2015"]
    flags += ["--weights", weights, "--device", "cpu"]
    commands = []
    for processes in (1, 2):
        root = tmp_path / str(processes)  # the cache of statistics is below it
        (root / "64").mkdir(parents=True)
        for split in ("train", "test"):
            (root / "64" / split).symlink_to(dataroot / "64" / split)
        commands.append([*flags, "--dataroot", root, "--json", root / "r.json", "--save-stats", root / "s.npz"])
    evaluate.main([*map(str, commands[0])])
    (code, stdout, stderr), (other_code, other_stdout, _) = run_ranks("evaluate.py", *[commands[1]] * 2, cwd=tmp_path)
    assert code == other_code == 0, stderr
    assert stdout.count("Fréchet Inception Distance") == 1 and not other_stdout
    single, double = (json.loads((tmp_path / folder / "r.json").read_text()) for folder in "12")
    stats, double_stats = (load_statistics(tmp_path / folder / "s.npz") for folder in "12")
    assert double["n_fake"] == 21 and double["n_real"] == single["n_real"] == double_stats["n"]
    assert double["fid"] == pytest.approx(single["fid"], abs=1e-4)
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(double_stats[name], stats[name], rtol=1e-5, atol=1e-5)


def test_two_processes_share_the_faces_of_generator(tmp_path, capsys, monkeypatch):
    """Each seed is drawn once. The first process alone prints and makes the grid, with the faces in their order."""
    torch.manual_seed(0)
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    monkeypatch.chdir(tmp_path)
    flags = ["--params", "g.params", "--seeds", "0-4", "--device", "cpu", "--grid", "--interpolate", "--outdir"]
    generator.main([*flags, "1"])
    flags = [*flags, "2"]
    (code, stdout, stderr), (other_code, other_stdout, _) = run_ranks("generator.py", flags, flags, cwd=tmp_path)
    assert code == other_code == 0, stderr
    printed = "5 faces of 64x64 from g.params in 1, grid in 1_grid.png, interpolation in 1_interpolation.gif\n"
    assert capsys.readouterr().out == printed and not other_stdout
    assert stdout == printed.replace("in 1", "in 2")
    names = [sorted(path.name for path in (tmp_path / folder).glob("*.png")) for folder in "12"]
    assert names[0] == names[1] and len(names[0]) == 5
    pairs = [(tmp_path / "1" / name, tmp_path / "2" / name) for name in names[0]]
    pairs += [(tmp_path / f"1_{name}", tmp_path / f"2_{name}") for name in ("grid.png", "interpolation.gif")]
    for pair in pairs:
        single, double = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in pair)
        assert abs(single - double).max() <= 1, pair  # convolutions round differently for other batch sizes


def test_processes_with_different_flags_all_end_with_one_sentence(dataroot, tmp_path):
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run"]
    for code, _, message in run_ranks("train.py", flags, [*flags, "--lr", "0.001"], cwd=tmp_path):
        assert code == 1 and len(errors(message)) == 1 and "--lr is 0.0002 in process 0" in errors(message)[0], message
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_machines_with_different_images_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, (value[0] | {"images_sha256": "other"}, "beta")])
    args = train.parse_args([])
    args.images_sha256 = "one"
    with pytest.raises(UserError, match=r"process 1 \(beta\) differ; copy the same crops to all machines"):
        refuse_unequal_ranks(args, torch.device("cpu"))


@pytest.mark.parametrize("world_size, refused", [("2", True), ("", False), ("1", False)])
def test_world_size_without_torchrun(monkeypatch, world_size, refused):
    """Schedulers of clusters set WORLD_SIZE for another purpose."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if not refused:
        with joined_ranks("cpu") as device:
            assert device == torch.device("cpu") and distributed.rank_and_world_size() == (0, 1)
        return
    with pytest.raises(UserError, match="WORLD_SIZE is set and RANK is not"), joined_ranks("cpu"):
        pass


NCCL = "NCCL error in: ../torch/csrc/NCCLUtils.hpp:317, {}, NCCL version 2.21.5\n{}: words. \nLast error:\n{}"
SHM = "Error while creating shared memory segment /dev/shm/nccl-EoOvZr (size 7340384)"
CLOSED = "socketProgress: Connection closed by remote peer 10.0.0.2<41822>"


@pytest.mark.parametrize("error, begin", [
    (NCCL.format("unhandled system error", "ncclSystemError", SHM), f"NCCL cannot connect the GPUs: {SHM}; "),
    (NCCL.format("remote process exited or there was a network error", "ncclRemoteError", CLOSED),
     f"another process has ended or cannot be reached ({CLOSED}); "),
    ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2048",
     "another process has ended or cannot be reached (Connection closed by peer [127.0.0.1]:2048); "),
    ("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", None),
])
def test_an_error_of_the_group_is_one_sentence_with_its_cause(error, begin):
    """The text of NCCL is torch's, of vllm-project/vllm issue 14537."""
    message = explain_group_error(RuntimeError(error))
    assert (message is None) == (begin is None)
    assert message is None or message.startswith(begin) and "\n" not in message


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_sigusr1_stops_a_training_after_a_checkpoint(dataroot, tmp_path, monkeypatch):
    """SLURM's --signal=USR1@60 sends it before the end of the time that a job has."""
    step, before = train.train_step, signal.getsignal(signal.SIGUSR1)

    def signalled_step(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        step(*arguments)

    monkeypatch.setattr(train, "train_step", signalled_step)
    with pytest.raises(SystemExit) as stop:
        run_training(dataroot, tmp_path / "run", "--epochs", 2)
    signal.signal(signal.SIGUSR1, before)
    assert stop.value.code == 128 + signal.SIGUSR1
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 1


def test_one_process_is_first_everywhere():
    """Without torchrun, what one process does for all is done once, and an error of it is raised."""
    calls = []
    first_rank_writes(lambda: calls.append("written"))
    assert from_first_rank(lambda: calls) == once_per_machine(lambda: calls) == ["written"]
    with pytest.raises(ZeroDivisionError):
        first_rank_writes(lambda: 1 / 0)


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "10"], "evenly"),
    (["--batch-size", "4", "--colour-weight", "10"], "two images a process"),
    (["--batch-size", "16"], "BatchNorm"),
    (["--batch-size", "28"], "BatchNorm"),
    (["--batch-size", "32"], ""),
])
def test_batches_that_four_processes_share(monkeypatch, capsys, flags, words):
    """Batches that cannot be shared are refused; small shares get a warning, since BatchNorm normalises each."""
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 4))
    monkeypatch.setattr(distributed, "refuse_differences", lambda *_: None)
    args = train.parse_args(flags)
    args.images_sha256 = ""
    if words in ("", "BatchNorm"):
        refuse_unequal_ranks(args, torch.device("cpu"))
        assert (words or "no warning") in (capsys.readouterr().err or "no warning")
    else:
        with pytest.raises(UserError, match=words):
            refuse_unequal_ranks(args, torch.device("cpu"))
