"""The script train.py: recipes, outputs, FID during training, worker processes, warnings and errors."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers import PROGRAMS, ROOT, SMALL, assert_equal, load, log_rows, run_python, run_training, small_args
from PIL import Image

import generator
import preprocess
import train
from support import training_log
from support.files import UserError
from support.training_log import FIELDS, TrainingLog, save_summary


def test_a_recipe_sets_flags_and_an_explicit_flag_wins():
    report, best = train.parse_args([]), train.parse_args(["--recipe", "best"])
    changed = {name for name in vars(report) if getattr(report, name) != getattr(best, name)}
    assert changed == {"recipe", "batch_size", "augment", "group_norm", "colour_weight", "ema", "given"}
    assert report.given == [] and best.given == ["recipe"]
    explicit = train.parse_args(["--batch-size", "64", "--recipe", "best"])
    assert explicit.batch_size == 64 and explicit.augment and explicit.recipe == "best"
    assert not train.parse_args(["--no-augment", "--recipe", "best"]).augment


@pytest.mark.parametrize("size, width", [(16, 64), (32, 64), (256, 32)])
def test_a_step_at_other_sizes(tmp_path, size, width):
    """Also with the flags of `best`. generator.py reads the size off the weights."""
    args = train.parse_args(["--image-size", str(size)])
    assert (args.ngf, args.ndf) == (width, width)
    flags = ["--dataroot", str(tmp_path), "--sizes", str(size), "--workers", "0", "--allow-upscale"]
    preprocess.main(["--demo", "9", *flags])
    flags = ["--image-size", size, "--epochs", 1, "--augment", "--group-norm"]
    run_training(tmp_path, tmp_path / "run", *flags)
    netG = generator.load_generator(tmp_path / "run" / "generator.params")
    assert netG.image_size == size and next(generator.sample(netG, [1])).shape == (1, 3, size, size)


def test_outputs(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"generator.params", "generator_raw.params", "checkpoint.pt", "checkpoint_previous.pt", "args.json"}
    rows = log_rows(trained)
    fields = ["step", "epoch", "images_seen", "loss_d", "loss_g", "d_real", "d_fake", "images_per_sec"]
    assert rows and all(list(row) == [*fields, "epoch_images_per_sec"] for row in rows)  # each epoch has one row
    assert rows[-1]["images_seen"] == rows[-1]["step"] * 8 and rows[-1]["epoch"] == 2
    assert all(0 < row["d_real"] < 1 and row["loss_d"] > 0 for row in rows)
    with Image.open(trained / "samples" / "epoch_002.png") as grid:
        assert grid.size == (530, 530)
    with Image.open(trained / "training.gif") as animation:
        assert animation.n_frames == 2
    Image.open(trained / "losses.png").verify()
    metadata = json.loads((trained / "args.json").read_text())
    assert metadata["seed"] == 0 and metadata["torch"] == torch.__version__ and len(metadata["images_sha256"]) == 64
    assert metadata.keys() >= {"python", "git_commit", "device_type", "device_name", "threads", "processes", "lr"}


def test_fid_is_measured_and_the_best_ema_weights_are_kept(dataroot, tmp_path, weights, capsys):
    """Also in a resumed training. --eval-every does not change the training."""
    flags = ["--eval-every", 1, "--eval-flags", f"--inception tf2015 --dims 64 --num 3 --weights '{weights}'"]
    run_training(dataroot, tmp_path / "plain", "--epochs", 3)
    run_training(dataroot, tmp_path / "run", "--epochs", 2, *flags)
    run_training(dataroot, tmp_path / "run", "--epochs", 3, *flags, "--resume")
    fids = {row["epoch"]: row["fid"] for row in log_rows(tmp_path / "run") if "fid" in row}
    assert list(fids) == [1, 2, 3] and len(set(fids.values())) == 3
    best = min(fids, key=fids.get)
    run_training(dataroot, tmp_path / "until best", "--epochs", best)
    for name, reference in (("generator_best.params", "until best"), ("generator.params", "plain")):
        assert_equal(load(tmp_path / "run" / name), load(tmp_path / reference / "generator.params"))
    with Image.open(tmp_path / "run" / "fid.png") as picture:
        assert picture.size == (900, 420)
    with pytest.raises(SystemExit):
        run_training(dataroot, tmp_path / "no", "--eval-every", 1, "--eval-flags", "--weights nowhere")
    assert "--weights: nowhere does not exist" in capsys.readouterr().err
    assert not (tmp_path / "no" / "log.jsonl").exists()


def test_images_from_files_give_the_same_weights_as_images_in_memory(dataroot, tmp_path, monkeypatch):
    """Worker processes read the files when the images do not fit in memory. The error names a damaged file."""
    run_training(dataroot, tmp_path / "memory", "--epochs", 1)
    monkeypatch.setattr(train, "fits_in_memory", lambda *_: False)
    run_training(dataroot, tmp_path / "files", "--epochs", 1, "--workers", 2)
    name = "generator_raw.params"
    assert_equal(load(tmp_path / "memory" / name), load(tmp_path / "files" / name))
    shutil.copytree(dataroot, tmp_path / "data")
    damaged = sorted((tmp_path / "data" / "64" / "train").iterdir())[7]
    damaged.write_bytes(damaged.read_bytes()[:100])
    for workers in (0, 1):
        with pytest.raises(UserError) as stop:
            run_training(tmp_path / "data", tmp_path / f"damaged {workers}", "--workers", workers)
        assert f"{damaged} cannot be read" in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_spawned_worker_processes(dataroot, tmp_path, request, shared_memory):
    """Windows and macOS spawn processes. Without shared memory, the training works without worker processes."""
    script = tmp_path / "é spawned.py"
    shutil.copy(PROGRAMS / "spawn_train.py", script)
    run = partial(run_python, cwd=tmp_path) if shared_memory else request.getfixturevalue("run_without_shared_memory")
    done = run(script, ROOT, *SMALL, "--dataroot", dataroot, "--outdir", "ein Ordner", "--epochs", 1, "--workers", 1)
    assert done.returncode == 0 and (tmp_path / "ein Ordner" / "generator.params").exists(), done.stderr


def test_a_warning_when_the_discriminator_has_won(tmp_path, capsys):
    args = small_args("--outdir", str(tmp_path))
    state = train.make_state(args, torch.device("cpu"))
    log = TrainingLog(tmp_path, step=0, images=800, batch_size=8, signals=[], score=None)
    for loss_d, has_won in ((0.5, False), (1e-4, True)):
        state.step += 20
        state.totals.copy_(20 * torch.tensor([loss_d, 5, 0.9, 0.1]))
        log.add_row(state, 20)
        assert log_rows(tmp_path)[-1]["loss_d"] == pytest.approx(loss_d)
        assert ("D has won" in capsys.readouterr().err) == has_won
    log.close()


def test_a_damaged_picture_of_samples_is_left_out_of_the_animation(tmp_path):
    (tmp_path / "samples").mkdir()
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"epoch_00{number}.png")
    (tmp_path / "samples" / "epoch_003.png").write_bytes(b"\x89PNG and no more")
    (tmp_path / "log.jsonl").write_text(json.dumps(dict.fromkeys(FIELDS, 1)))
    save_summary(tmp_path)
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.size == (8, 8)


def test_a_gpu_writes_files_every_30_seconds_only(tmp_path, monkeypatch):
    """An epoch may take less than a second there. The log has the speed of each epoch with what it wrote."""
    clock = [0.0]
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: clock[0])
    state = train.make_state(small_args("--outdir", str(tmp_path)), torch.device("cpu"))
    log = TrainingLog(tmp_path, step=0, images=800, batch_size=8, signals=[], score=None)
    written = []
    for clock[0] in (10.0, 29.0, 31.0, 60.0, 62.0):
        written.append(log.is_time_to_write(torch.device("cuda")))
    assert written == [False, False, True, False, True]
    assert log.is_time_to_write(torch.device("cpu"))
    state.step = 100
    log.add_row(state, 20)
    log.close()
    assert log_rows(tmp_path)[0]["epoch_images_per_sec"] == round(800 / 62, 1)


def test_the_share_of_a_process_is_contiguous(monkeypatch):
    """Otherwise each step would wait for a copy before it is sent to a GPU."""
    args = train.parse_args(["--recipe", "best"])
    whole = train.step_inputs(args, 3, torch.arange(16))
    monkeypatch.setattr(train.distributed, "rank_and_world_size", lambda: (1, 2))
    share = train.step_inputs(args, 3, torch.arange(8))
    assert share.z.is_contiguous() and share.augmentations.is_contiguous()
    assert torch.equal(share.z, whole.z[1::2]) and torch.equal(share.augmentations, whole.augmentations[:, 1::2])


def test_the_animation_of_a_long_training_is_short_and_small(tmp_path):
    """Epochs in the order of their numbers, at most 60 of them, never wider than 512 pixels."""
    (tmp_path / "samples").mkdir()
    for number in (1, 5, *range(990, 1100)):
        shade = number % 256
        Image.new("RGB", (600, 300), (shade, shade, shade)).save(tmp_path / "samples" / f"epoch_{number:03d}.png")
    save_summary(tmp_path)
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.size == (512, 256) and animation.n_frames == 60
        shades = []
        for frame in range(60):
            animation.seek(frame)
            shades.append(animation.convert("RGB").getpixel((0, 0))[0])
    assert shades[0] == 1 and shades[-1] == 1099 % 256
    assert shades[2:] == sorted(shades[2:], key=lambda shade: shade if shade > 200 else shade + 256)


def test_nan_stops_the_training(dataroot, tmp_path, run_script, refused):
    done = run_script("train.py", *SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run", "--lr", "1e30")
    refused(done, "diverged")


def test_out_of_memory_error_names_the_flag_to_lower(dataroot, tmp_path, monkeypatch):
    def raise_out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train_step", raise_out_of_memory)
    with pytest.raises(UserError, match="out of memory; lower --batch-size"):
        run_training(dataroot, tmp_path / "run")
