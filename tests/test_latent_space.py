"""Interpolation, arithmetic, projection and completion of faces, and the flags of generator.py that use them."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

import generator
from dataloader import to_float
from support.files import UserError
from support.latent_space import arithmetic, interpolate, mean_latent
from support.projection import complete, project, psnr, read_photo
from support.seeding import latents

# ---------------------------------------------------------------------------------------------- the maths


def test_interpolation_passes_through_its_seeds_and_keeps_the_norm():
    z = latents(range(3))
    path = interpolate(z, frames=10)
    assert path.shape == (30, 100, 1, 1)
    assert torch.allclose(path[::10], z, atol=1e-5)
    assert path.flatten(1).norm(dim=1).min() > 0.9 * z.flatten(1).norm(dim=1).min()


def test_arithmetic_is_an_algebra():
    a, b = latents(range(3)), latents([9])
    assert torch.allclose(arithmetic([(1, a), (-1, a), (1, b)]), mean_latent(b), atol=1e-5)
    assert torch.allclose(arithmetic([(1, a), (1, b)]), arithmetic([(1, b), (1, a)]), atol=1e-5)
    for z in (arithmetic([(1, a), (-1, b)]), mean_latent(a), mean_latent(b)):
        assert z.shape == (1, 100, 1, 1) and z.norm().item() == pytest.approx(10, rel=1e-5)


@pytest.fixture
def netG(trained):
    return generator.load_generator(trained / "generator.params")


def test_faces_of_the_generator_are_recovered(netG):
    for seed in (100, 101, 102):
        face = next(generator.sample(netG, [seed]))[0]
        z = project(netG, to_float(face))
        assert psnr(generator.draw(netG, z)[0], face) > 30


def test_the_hidden_part_of_a_photo_does_not_change_its_projection(netG):
    face = next(generator.sample(netG, [100]))[0]
    known = torch.ones(64, 64, dtype=torch.bool)
    known[20:40, 10:50] = False
    other = torch.where(known, face, 255 - face)
    assert torch.equal(project(netG, to_float(face), known), project(netG, to_float(other), known))


def test_a_completed_photo_keeps_its_known_pixels_and_has_no_seam():
    """The face is the photo, darker: the hole gets the photo's colours from its border."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64) + 100
    hole = torch.zeros(64, 64, dtype=torch.bool)
    hole[10:30, 40:] = True  # up to the border of the image
    assert torch.equal(complete(ramp, ramp - 60, hole), ramp)
    photo = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    completed = complete(photo, ramp, hole)
    assert torch.equal(completed[:, ~hole], photo[:, ~hole]) and not torch.equal(completed, photo)


# ---------------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("text, terms", [
    ("1,2,3 - 4,5,6 + 7", [(1, [1, 2, 3]), (-1, [4, 5, 6]), (1, [7])]),
    ("1-3 + 9", [(1, [1, 2, 3]), (1, [9])]),
    ("5", [(1, [5])]),
])
def test_sums_of_groups(text, terms):
    assert generator.parse_terms(text) == terms


@pytest.mark.parametrize("text", ["", "1 +  - 2", "1 - ", "1 * 2", "1,2 -", "a + b"])
def test_other_texts_are_no_sums(text):
    with pytest.raises(argparse.ArgumentTypeError, match="with spaces"):
        generator.parse_terms(text)


@pytest.fixture
def run(trained, tmp_path, monkeypatch, capsys):
    """Runs generator.py with a small generator in an empty folder that holds a photo and a mask."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[:60, :80]
    photo = Image.fromarray(np.stack([3 * x, 4 * y, x + y], -1).astype(np.uint8))
    photo.save("photo.png")
    photo.rotate(180).save("other.jpg")
    Image.fromarray(((x > 30) & (x < 50) & (y > 20)).astype(np.uint8) * 255).save("mask.png")

    def call(*flags):
        generator.main(["--device", "cpu", "--params", str(trained / "generator.params"), *flags])
        return capsys.readouterr().out

    return call


def size(path):
    with Image.open(path) as image:
        return image.size


def test_a_morph_between_two_photos_is_two_commands(run, tmp_path):
    out = run("--project", "photo.png", "other.jpg", "--mask", "mask.png")
    assert out.count("PSNR") == 2
    names = {f"{name}{end}" for name in ("photo", "other") for end in (".latents", "_projected.png", "_completed.png")}
    assert {path.name for path in (tmp_path / "projections").iterdir()} == names
    assert size("projections/photo_projected.png") == (200, 68)
    cropped, hole = read_photo(tmp_path / "photo.png", 64, tmp_path / "mask.png")
    completed = np.asarray(Image.open("projections/photo_completed.png")).transpose(2, 0, 1)
    assert (completed == cropped.numpy())[:, ~hole].all() and hole.any()
    files = ["projections/photo.latents", "projections/other.latents"]
    run("--latents", *files, "--interpolate", "--grid", "--outdir", "morph")
    assert {path.name for path in (tmp_path / "morph").glob("*.png")} == {"photo.png", "other.png"}
    assert size("morph_interpolation.gif") == (68, 68) and size("morph_grid.png") == (134, 68)
    face = Image.open("projections/photo_projected.png").crop((68, 2, 132, 66))
    assert np.array_equal(np.asarray(face), np.asarray(Image.open("morph/photo.png")))
    with pytest.raises(UserError, match="exists; choose another --outdir, or pass --overwrite"):
        run("--project", "photo.png")


def test_a_projection_computes_without_tf32(run, monkeypatch, tf32):
    """Rounded to TF32, it recovers four of six faces that float32 recovers."""
    seen = []

    def spy(*_):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return latents([1], 8)

    monkeypatch.setattr(generator, "project", spy)
    run("--project", "photo.png")
    assert seen == [(False, False)]


def test_arithmetic_draws_each_group_and_the_sum(run):
    run("--arithmetic", "1,2,3 - 4,5 + 6")
    assert size("faces_arithmetic.png") == (4 * 66 + 2 + 16 + 3 * 66 + 2, 3 * 66 + 2)
    with pytest.raises(UserError, match="cancel"):
        run("--arithmetic", "1,2 - 1,2", "--overwrite")


@pytest.mark.parametrize("flags, words", [
    (["--project", "text.jpg"], "text.jpg cannot be read .not an image: none of JPEG, PNG"),
    (["--project", "photo.png", "photo.png"], "same name"),
    (["--project", "photo.png", "--mask", "small.png"], "small.png is 9x9, but photo.png is 80x60"),
    (["--project", "photo.png", "--mask", "black.png"], "not white"),
    (["--latents", "text.jpg"], "text.jpg is damaged"),
    (["--latents", "short.latents"], "short.latents holds latents of length 5, but the generator takes 8"),
    (["--latents", "a/x.latents", "short.latents"], "short.latents holds latents of length 5"),
    (["--latents", "none.latents"], "none.latents holds no latents"),
    (["--latents", "nan.latents"], "nan.latents holds NaN"),
    (["--latents", "a/x.latents", "b/x.latents"], "would be called x.png"),
])
def test_bad_input_is_refused(run, tmp_path, flags, words):
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("L", (9, 9), 255).save("small.png")
    Image.new("L", (80, 60)).save("black.png")
    for name in "ab":
        (tmp_path / name).mkdir()
        torch.save({"latents": latents([1], 8)}, tmp_path / name / "x.latents")
    torch.save({"latents": latents([1], 5)}, "short.latents")
    torch.save({"z": latents([1], 8)}, "none.latents")
    torch.save({"latents": latents([1], 8) * float("nan")}, "nan.latents")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        run(*flags)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [
    ["--mask", "mask.png"], ["--project", "photo.png", "--grid"], ["--seeds", "1", "--arithmetic", "1 + 2"],
])
def test_flags_that_do_not_go_together(run, capsys, flags):
    with pytest.raises(SystemExit):
        run(*flags)
    assert "error: " in capsys.readouterr().err


def test_generate_gives_pil_images(netG):
    [face] = generator.generate(netG, [7])
    assert isinstance(face, Image.Image) and face.size == (64, 64)
