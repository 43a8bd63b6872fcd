"""The whole pipeline as a user runs it, one command per stage: photos, crops, training, faces, FID."""

import torch
from helpers import random_inception
from PIL import Image

from support import demo_faces


def test_photos_to_fid(tmp_path, run_script):
    (tmp_path / "my photos").mkdir()
    for i in range(40):
        demo_faces.draw_face(1, i).save(tmp_path / "my photos" / f"é {i}.jpg")
    torch.save(random_inception(tf2015=True).state_dict(), tmp_path / "inception.pth")

    def step(script, *arguments):
        done = run_script(script, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "40 written" in step("preprocess.py", "my photos")
    small = ("--batch-size", "8", "--ngf", "4", "--ndf", "4", "--epochs", "1", "--device", "cpu")
    for size in (64, 128):
        assert "next:" in step("train.py", "--image-size", size, *small)
        params = f"runs/{size}/generator.params"
        step("generator.py", "--params", params, "--outdir", f"faces {size}", "--seeds", "0-9", "--grid")
        with Image.open(tmp_path / f"faces {size}" / "00000009.png") as face:
            assert face.size == (size, size)
    measured = ("--inception", "tf2015", "--weights", "inception.pth", "--dims", "64", "--num", "10")
    assert step("evaluate.py", *measured).splitlines()[-1].startswith("Fréchet Inception Distance (FID): ")
