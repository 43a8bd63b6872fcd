"""Inception-v3 features: support/inception.py."""

import numpy as np
import pytest
import torch
from helpers import fid, random_inception
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

import evaluate
import network
from support import inception
from support.files import UserError, hash_file


def close(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max())


def test_torchvision_features_are_those_before_the_last_layer(tmp_path):
    """The reference is torchvision's recipe: ImageNet's mean and deviation, which transform_input reverts."""
    net = random_inception(tf2015=False)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    features, metadata = inception.load_inception("torchvision", 2048, tmp_path / "w.pth")
    net.fc = net.dropout = nn.Identity()
    net.transform_input = True
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    x = interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = net((x - mean) / deviation)
    assert close(features(images), expected)
    assert metadata["resize"] == "bilinear" and len(metadata["weights_sha256"]) == 64


def test_the_flags_name_what_can_be_measured(capsys):
    """evaluate.py lists it again, so that --help needs no torch."""
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for choices in (inception.URLS, inception.LAST_LAYER, inception.RESIZES):
        assert f"{{{','.join(map(str, choices))}}}" in text
    defaults = ", ".join(f"{resize} for {name}" for name, resize in inception.DEFAULT_RESIZE.items())
    assert defaults in text


def test_tf32_is_off_while_features_are_computed(weights, tf32):
    features, _ = inception.load_inception("tf2015", 64, weights)
    seen = []
    features.layers.register_forward_pre_hook(lambda *_: seen.append(
        (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)))
    features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert seen == [(False, False)] and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_dims_is_the_length_of_the_features(weights, dims):
    features, _ = inception.load_inception("tf2015", dims, weights)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    out = features(images)
    assert out.shape == (2, dims) and out.dtype == torch.float32
    assert close(features(images[1:]), out[1:])


def test_tensorflow_pooling(weights):
    """torchvision averages over the padding. The 2015 graph does not, and its last block takes the maximum."""
    blocks, x, y = {}, torch.rand(1, 192, 9, 9), torch.rand(1, 2048, 4, 4)
    network_of = {"torchvision": 1000, "tf2015": 1008}
    state = torch.load(weights, weights_only=True)
    for name, classes in network_of.items():
        path = weights.with_name(f"{name}.pth")
        torch.save(state | {"fc.bias": torch.zeros(classes)}, path)
        blocks[name] = inception.load_inception(name, 2048, path)[0].layers
    with torch.no_grad():
        for name, include in (("torchvision", True), ("tf2015", False)):
            block = blocks[name].Mixed_5b
            pooled = avg_pool2d(x, 3, 1, 1, count_include_pad=include)
            assert torch.allclose(block(x)[:, -32:], block.branch_pool.conv(pooled).relu(), atol=1e-5)
        for name, pool in (("torchvision", avg_pool2d), ("tf2015", max_pool2d)):
            block = blocks[name].Mixed_7c
            assert torch.allclose(block(y)[:, -192:], block.branch_pool.conv(pool(y, 3, 1, 1)).relu(), atol=1e-4)


# ---------------------------------------------------------------------------------------------- resizing


def resized(images, resize):
    rows = inception.resize_matrix(images.shape[-1], resize)
    return (rows @ images.float() @ rows.T).clamp(0, 255)


@pytest.mark.parametrize("size", [32, 64, 128, 299, 400])
def test_bilinear_equals_pytorch(size):
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    expected = interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    assert (resized(images, "bilinear") - expected).abs().max() < 1e-3


@pytest.mark.parametrize("size", [32, 64, 128, 299, 400])
def test_clean_equals_pillow_channel_by_channel(size):
    image = np.random.default_rng(0).integers(0, 256, (3, size, size), dtype=np.uint8)
    expected = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
        for channel in image
    ]
    ours = resized(torch.from_numpy(image)[None], "clean")[0].numpy()
    assert abs(ours - np.stack(expected).clip(0, 255)).max() < 1e-3


def test_tf_aligns_the_top_left_corners():
    """Pixel i of the output lies at i * size / 299. The last pixel repeats beyond the edge."""
    images = torch.randint(0, 256, (1, 3, 10, 10), dtype=torch.uint8)
    ours = resized(images, "tf")[0]
    for i, j in ((0, 0), (1, 7), (150, 298), (298, 298)):
        y, x = i * 10 / 299, j * 10 / 299
        expected = 0
        for dy in (0, 1):
            for dx in (0, 1):
                pixel = images[0, :, min(int(y) + dy, 9), min(int(x) + dx, 9)].float()
                expected = expected + pixel * abs(1 - dy - y % 1) * abs(1 - dx - x % 1)
        assert torch.allclose(ours[:, i, j], expected, atol=1e-2)


def test_the_2015_graph_centers_pixels_at_128(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"fc.bias": torch.zeros(1000)}, tmp_path / "torchvision.pth")
    centres = {
        (name, resize): inception.load_inception(name, 64, path, resize=resize)[0].centre
        for name, path in (("tf2015", weights), ("torchvision", tmp_path / "torchvision.pth"))
        for resize in inception.RESIZES
    }
    assert [centre for key, centre in centres.items() if centre == 128] == [128, 128]
    assert centres["tf2015", "tf"] == centres["tf2015", "clean"] == 128


def test_bf16_is_close_to_fp32(weights):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    fp32, _ = inception.load_inception("tf2015", 64, weights, precision="fp32")
    bf16, metadata = inception.load_inception("tf2015", 64, weights, precision="bf16")
    a, b = fp32(images), bf16(images)
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05 * a.abs().max() and metadata["dtype"] == "bf16"


# ---------------------------------------------------------------------------------------------- weights files


def test_half_and_double_precision_files(weights, tmp_path):
    """The file in FAKEFACEGEN_SHARED has this form: half precision, no fc.weight, no step counters."""
    state = torch.load(weights, weights_only=True)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = inception.load_inception("tf2015", 64, weights)[0](images)
    for dtype in (torch.float16, torch.float64):
        small = {k: v.to(dtype) for k, v in state.items() if not k.endswith(("num_batches_tracked", "fc.weight"))}
        torch.save(small, tmp_path / "w.pth")
        out = inception.load_inception("tf2015", 64, tmp_path / "w.pth")[0](images)
        assert torch.allclose(out, expected, rtol=1e-2, atol=1e-2 * expected.abs().max())


def test_prefixes_and_nested_state_dicts(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = inception.load_inception("tf2015", 64, weights)[0](images)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "w.pth")
    assert torch.equal(inception.load_inception("tf2015", 64, tmp_path / "w.pth")[0](images), expected)


def test_real_weights_distinguish_faces_from_noise(dataroot, shared):
    path = shared / "weights" / "inception_2015-12-05_half.pth"
    features, _ = inception.load_inception("tf2015", 192, path)
    paths = sorted((dataroot / "64" / "train").iterdir())[:24]
    faces = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    noise = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    near, far = (fid(features(faces[:12]), features(other)) for other in (faces[12:], noise))
    assert near < far / 10


def test_files_without_inception_weights_are_refused(tmp_path, weights):
    def refused(path, words, name="tf2015"):
        with pytest.raises(UserError, match=words):
            inception.load_inception(name, 64, path)

    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.pth")
    refused(tmp_path / "g.pth", "g.pth does not hold the weights of Inception")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:10_000])
    refused(tmp_path / "cut.pth", "cut.pth is damaged")
    refused(weights, "holds the tf2015 network, not torchvision", name="torchvision")
    state = torch.load(weights, weights_only=True)
    for value, words in (
        (torch.full_like(state["Conv2d_1a_3x3.conv.weight"], torch.nan), "NaN"),
        (torch.zeros(1).expand(2**20, 2**20), "claims"),
        (torch.zeros(32, 3, 5, 5), "see Conv2d_1a_3x3.conv.weight"),
        ("text", "see Conv2d_1a_3x3.conv.weight"),
    ):
        torch.save(state | {"Conv2d_1a_3x3.conv.weight": value}, tmp_path / "bad.pth")
        refused(tmp_path / "bad.pth", f"bad.pth.*{words}")


def test_a_download_is_hashed_and_a_failure_is_explained(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = hash_file(weights)
    served = tmp_path / f"inception-{digest[:8]}.pth"
    served.write_bytes(weights.read_bytes())
    monkeypatch.setitem(inception.URLS, "tf2015", served.as_uri())
    path = inception.find_weights("tf2015")
    assert path.parent == tmp_path / "hub" / "checkpoints" and hash_file(path) == digest
    served.unlink()
    assert inception.find_weights("tf2015") == path  # from the cache, without a second download
    for name in ("missing-00000000.pth", "wrong-00000000.pth"):
        (tmp_path / "wrong-00000000.pth").write_bytes(b"something else")
        monkeypatch.setitem(inception.URLS, "tf2015", (tmp_path / name).as_uri())
        with pytest.raises(UserError, match=f"{name}.*91 MB.*SHA-256 begins 00000000.*--weights"):
            inception.find_weights("tf2015")
        assert not (tmp_path / "hub" / "checkpoints" / name).exists()


@pytest.mark.parametrize("free, size", [(2**20, 16), (2 * 2**30, 64), (80 * 2**30, 256)])
def test_the_default_batch_size_fits_the_device(monkeypatch, free, size):
    assert inception.pick_batch_size(torch.device("cpu")) == 16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    assert inception.pick_batch_size(torch.device("cuda")) == size
