"""Means and covariances on disk, and fingerprints of image folders: support/feature_stats.py."""

import numpy as np
from PIL import Image

from dataloader import find_images
from support.feature_stats import fingerprint, load_statistics
from support.files import UserError


def test_fingerprint_changes_with_the_files(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    paths = find_images(tmp_path)
    before = fingerprint(paths, tmp_path)
    assert before == fingerprint(paths, tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    assert fingerprint(paths, tmp_path) != before != fingerprint(paths[:1], tmp_path)


def test_damaged_statistics_give_an_error_of_one_sentence(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", mu=np.zeros(64), sigma=np.eye(64))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "objects.npz", mu=np.array([{}] * 4), sigma=np.eye(4))
    np.savez(tmp_path / "unfit.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "none.npz", mean=np.zeros(3))
    np.savez(tmp_path / "n.npz", mu=np.zeros(4), sigma=np.eye(4), n="many")
    np.savez(tmp_path / "rows.npz", mu=np.zeros(4), sigma=np.eye(4), n=3, features=np.zeros((2, 4)))
    np.savez(tmp_path / "network.npz", mu=np.zeros(4), sigma=np.eye(4), network=np.zeros(3))
    np.savez(tmp_path / "resolution.npz", mu=np.zeros(4), sigma=np.eye(4), resolution="64")
    np.savez(tmp_path / "dims.npz", mu=np.zeros(4), sigma=np.eye(4), dims=5)
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for cut in range(0, len(whole), 37):
        (tmp_path / f"cut{cut}.npz").write_bytes(whole[:cut])
        (tmp_path / f"flip{cut}.npz").write_bytes(whole[:cut] + bytes([whole[cut] ^ 0x10]) + whole[cut + 1 :])
    harmless = 0
    for path in tmp_path.glob("*.npz"):
        try:
            stats = load_statistics(path)
            assert path.stem == "whole" or path.stem.startswith("flip")  # a timestamp, for example
            assert (stats["mu"] == 0).all() and (stats["sigma"] == np.eye(64)).all()
            harmless += 1
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
    assert harmless
