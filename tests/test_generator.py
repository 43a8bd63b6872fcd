"""The script generator.py: faces, grids and interpolations from a file of weights."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generator
import network
import network_128
from dataloader import DataGenerater, find_images
from support.files import UserError, path_next_to
from support.seeding import latents


@pytest.fixture
def params(tmp_path):
    """A file of random generator weights."""
    torch.manual_seed(0)
    torch.save(network.Generator(16, 8).state_dict(), tmp_path / "generator.params")
    return tmp_path / "generator.params"


def test_a_seed_gives_the_same_face_in_any_batch(params):
    netG = generator.load_generator(params)
    whole = torch.cat(list(generator.sample(netG, range(12), 12)))
    assert whole.shape == (12, 3, 64, 64) and whole.dtype == torch.uint8
    for size in (1, 5):
        parts = torch.cat(list(generator.sample(netG, range(12), size)))
        # Convolutions round the last bit of a float differently for different batch sizes.
        assert (parts.int() - whole.int()).abs().max() <= 1
    alone = next(generator.sample(netG, [7]))
    assert (alone[0].int() - whole[7].int()).abs().max() <= 1
    assert (whole[0] != whole[1]).any()


def test_grid_and_interpolation_lie_next_to_the_folder_of_faces(params, tmp_path, capsys):
    out = tmp_path / "faces"
    flags = ["--device", "cpu", "--params", str(params), "--seeds", "0-4,9", "--grid", "--interpolate"]
    generator.main([*flags, "--outdir", str(out)])
    assert sorted(path.name for path in out.glob("*.png")) == [f"{seed:08d}.png" for seed in (0, 1, 2, 3, 4, 9)]
    assert len(find_images(out)) == len(DataGenerater(out, None, in_memory=True)) == 6  # evaluate.py reads the folder
    face = next(generator.sample(generator.load_generator(params), [9]))[0].permute(1, 2, 0)
    assert abs(np.asarray(Image.open(out / "00000009.png")).astype(int) - face.numpy()).max() <= 1
    grid, animation = tmp_path / "faces_grid.png", tmp_path / "faces_interpolation.gif"
    assert capsys.readouterr().out.endswith(f"in {out}, grid in {grid}, interpolation in {animation}\n")
    with Image.open(grid) as image:
        assert image.size == (2 + 6 * 66, 2 + 66)
    with Image.open(animation) as image:
        assert image.n_frames > 100 and image.size == (68, 68)


@pytest.mark.parametrize("outdir, grid", [
    (".", "../work_grid.png"), ("x/", "x_grid.png"), ("a/x.y/", "a/x.y_grid.png"), ("a/..", "../work_grid.png"),
])
def test_the_grid_of_any_outdir_has_its_name(tmp_path, monkeypatch, outdir, grid):
    (tmp_path / "work" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert path_next_to(Path(outdir), "_grid.png").resolve() == Path(grid).resolve()


@pytest.mark.parametrize("many", [7, 8])
def test_each_face_of_many_batches_has_the_name_of_its_seed(params, tmp_path, monkeypatch, many):
    """Whether processes write them or this one. Also without a terminal: tqdm counts nothing then."""
    monkeypatch.setattr(generator, "MANY", many)
    monkeypatch.setattr(generator, "count_cores", lambda: 2)
    flags = ["--params", str(params), "--seeds", "3-9", "--batch-size", "2", "--device", "cpu"]
    generator.main([*flags, "--outdir", str(tmp_path / "faces")])
    assert len(list((tmp_path / "faces").glob("*.png"))) == 7
    netG = generator.load_generator(params)
    for seed in range(3, 10):
        face = next(generator.sample(netG, [seed]))[0].permute(1, 2, 0).numpy()
        written = np.asarray(Image.open(tmp_path / "faces" / f"{seed:08d}.png"))
        assert abs(written.astype(int) - face).max() <= 1, seed


def test_weights_of_the_pytorch_tutorial(tmp_path):
    """DataParallel saves netG_epoch_N.pth with these keys."""
    netG = network_128.Generator(10, 4)
    torch.save({f"module.{name}": tensor for name, tensor in netG.state_dict().items()}, tmp_path / "netG_epoch_4.pth")
    assert generator.load_generator(tmp_path / "netG_epoch_4.pth").image_size == 128


def test_the_pretrained_generator_replaces_a_missing_training_with_a_notice(params, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator.main(["--seeds", "0"])
    assert "pretrained/generator_64.params" in capsys.readouterr().err
    with Image.open("faces/00000000.png") as face:
        assert face.size == (64, 64)
    Path("runs/64").mkdir(parents=True)
    params.rename("runs/64/generator.params")
    assert generator.choose_params(None) == Path("runs/64/generator.params")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [64, 128])
def test_pretrained_generators(size):
    """The files are small and in half precision. Faces of different seeds differ."""
    path = generator.PRETRAINED.with_name(f"generator_{size}.params")
    assert path.stat().st_size < {64: 8e6, 128: 26e6}[size]
    assert {t.dtype for t in torch.load(path, weights_only=True).values()} == {torch.float16, torch.int64}
    faces = next(generator.sample(generator.load_generator(path), range(16))).float()
    assert faces.shape == (16, 3, size, size) and faces.std(0).mean() > 20 and faces.std((2, 3)).mean() > 20


def test_bf16_gives_nearly_the_same_faces(tmp_path):
    for precision in ("fp32", "bf16"):
        flags = ["--params", str(generator.PRETRAINED), "--seeds", "0-7", "--precision", precision]
        generator.main([*flags, "--device", "cpu", "--outdir", str(tmp_path / precision)])
    fp32, bf16 = (
        np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / precision).glob("*.png"))])
        for precision in ("fp32", "bf16")
    )
    assert (fp32 != bf16).any() and abs(fp32 - bf16).mean() < 0.5  # of 255


def test_faces_of_two_generators_in_a_folder_are_a_warning(params, tmp_path, capsys):
    """evaluate.py would measure the mixture. The note in the folder is the SHA-256 of the weights."""
    other = tmp_path / "other.params"
    torch.save(network.Generator(16, 8).state_dict(), other)
    note = tmp_path / "faces" / "weights.sha256"

    def warned(path, seeds, *flags):
        generator.main(["--params", str(path), "--seeds", seeds, "--outdir", str(tmp_path / "faces"), *flags])
        return "warning: " in capsys.readouterr().err

    assert not warned(params, "0-3") and not warned(params, "4,5")
    assert note.read_text() == hashlib.sha256(params.read_bytes()).hexdigest() + "\n"
    assert warned(other, "6") and warned(params, "7") and warned(other, "0-3", "--overwrite")
    assert len(note.read_text().split()) == 2
    assert not warned(other, "0-7", "--overwrite")  # no face of the first generator stays
    assert note.read_text() == hashlib.sha256(other.read_bytes()).hexdigest() + "\n"


def test_nothing_is_overwritten_without_the_flag(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--params", str(params), "--seeds", "3-4", "--grid", "--interpolate", "--device", "cpu"]
    generator.main(flags)
    for name in ("faces/00000004.png", "faces_grid.png", "faces_interpolation.gif"):
        written = Path(name).read_bytes()
        Path(name).write_text("mine")
        others = [path for path in tmp_path.rglob("faces*/*") if path != tmp_path / name]
        for path in {*others, *tmp_path.glob("faces_*")} - {tmp_path / name}:
            path.unlink()
        with pytest.raises(UserError, match=f"{name} exists; choose another --outdir, or pass --overwrite"):
            generator.main(flags)
        assert Path(name).read_text() == "mine"
        generator.main([*flags, "--overwrite"])
        assert Path(name).read_bytes() == written


def test_out_of_memory_error_names_the_flag_to_lower(params, monkeypatch):
    netG = generator.load_generator(params)

    def raise_out_of_memory(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(netG, "forward", raise_out_of_memory)
    with pytest.raises(UserError, match="out of memory; lower --batch-size"):
        generator.draw(netG, latents([0], 16))
