"""Images uint8 (N,3,S,S) -> Inception-v3 pool features (N,dims): the network that FID is measured with.

    from inception import load_inception
    features, facts = load_inception("tf2015", dims=2048)
    features(images)                                # float32 (N,2048)

Two sets of weights: `tf2015` is the graph of 2015-12-05 that papers report with, as ported to PyTorch by pytorch-fid;
`torchvision` is torchvision's ImageNet network, which the report used. Three ways to 299x299 (Parmar, Zhang, Zhu, "On
Aliased Resizing and Surprising Subtleties in GAN Evaluation", 2022, tells them apart): `bilinear` of pytorch-fid, `tf`
of TensorFlow 1, which is inside the graph of 2015, and `clean` of clean-fid. A FID holds only between equal ones.
"""

import hashlib
import re
from collections import OrderedDict
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import Inception_V3_Weights
from torchvision.models.inception import BasicConv2d, Inception3

from support.devices import DTYPES
from support.weights import check_tensors, load_tensors

LAST_LAYER = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}  # by number of features
URLS = {
    "torchvision": Inception_V3_Weights.IMAGENET1K_V1.url,
    "tf2015": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}
MEGABYTES = {"torchvision": 104, "tf2015": 91}
CLASSES = {"torchvision": 1000, "tf2015": 1008}  # all other shapes of the two are the same
# What made the published numbers: TensorFlow's graph (TTUR, StyleGAN, torch-fidelity) resizes by itself; the report,
# and whoever takes torchvision's network, by PyTorch.
DEFAULT_RESIZE = {"torchvision": "bilinear", "tf2015": "tf"}
RESIZES = ("bilinear", "tf", "clean")


class Features(nn.Module):
    """Inception-v3 up to the layer that gives `dims` features, averaged over the map; BatchNorm folded in.

    `centre` is the pixel value that becomes 0: 127.5 takes [0,255] to [-1,1]; the graph of 2015 takes 128.
    """

    def __init__(self, layers: OrderedDict, resize: str, centre: float):
        super().__init__()
        self.layers = nn.Sequential(layers)
        self.resize, self.centre = resize, centre

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N,3,S,S) -> float32 (N,dims)."""
        rows = resize_matrix(images.shape[-1], self.resize).to(images.device)
        x = (rows @ images.float() @ rows.T).clamp_(0, 255)  # bicubic overshoots
        x = x.sub_(self.centre).div_(self.centre).to(next(self.parameters()).dtype)
        # cuDNN would round the factors of a float32 product to ten bits, unasked.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.layers(x.contiguous(memory_format=torch.channels_last))
        return x.float().mean((2, 3))


@lru_cache
def resize_matrix(size: int, resize: str, out: int = 299) -> torch.Tensor:
    """float32 (out,size): R such that R X R^T is the square image X resized. All three ways are linear in each axis."""
    if resize == "tf":  # corner on corner: no half pixel is added to a position before it is scaled
        position = torch.arange(out, dtype=torch.float32) * (size / out)
        low = position.long().clamp_max(size - 1)
        high, share = (low + 1).clamp_max(size - 1), (position - low)[:, None]
        return torch.eye(size)[low] * (1 - share) + torch.eye(size)[high] * share
    # Resizing the unit vectors, along one axis, gives the weights: PyTorch's in its float32, Pillow's in its float64.
    options = {"mode": "bicubic", "antialias": True} if resize == "clean" else {"mode": "bilinear"}
    identity = torch.eye(size, dtype=torch.float64 if resize == "clean" else torch.float32)[None, None]
    return interpolate(identity, (out, size), align_corners=False, **options)[0, 0].float()


def load_inception(
    name: str,
    dims: int = 2048,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
    resize: str | None = None,
    precision: str = "fp32",
) -> tuple[Features, dict]:
    """The network `name` (torchvision or tf2015) with the state dict of the file `weights`, or of torch's hub cache.

    Returns it with facts: network, dims, resize, dtype and the weights' hash, by which statistics are told apart.
    Raises SystemExit when the weights cannot be had, or are not those of this Inception-v3.
    """
    path, resize = Path(weights or find_weights(name)), resize or DEFAULT_RESIZE[name]
    if not path.is_file():
        raise SystemExit(f"error: --weights {path} does not exist; give a state dict of Inception-v3")
    digest = hash_file(path)
    with torch.device("meta"):
        net = Inception3(aux_logits=False, init_weights=False)
    layers = OrderedDict()
    for layer, module in net.named_children():
        layers[layer] = module
        if layer == LAST_LAYER[dims]:
            break
    stack = nn.Sequential(layers)
    stack.load_state_dict(read_weights(path, name, stack.state_dict()), assign=True)
    stack.eval().requires_grad_(False)
    if name == "tf2015":
        for layer, block in layers.items():
            if hasattr(block, "branch_pool"):
                pool_as_tensorflow(block, "max" if layer == "Mixed_7c" else "average")
    for module in stack.modules():
        if isinstance(module, BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    centre = 128 if name == "tf2015" and resize != "bilinear" else 127.5
    features = Features(layers, resize, centre).to(device, DTYPES[precision], memory_format=torch.channels_last)
    facts = {"network": name, "dims": dims, "resize": resize, "dtype": precision, "weights_sha256": digest}
    return features.requires_grad_(False).eval(), facts


def read_weights(path: Path, name: str, expected: dict) -> dict:
    """The tensors of `expected`, float32, out of the file `path`. Raises SystemExit when they are not all there."""
    remedy = f"give the state dict of {Path(URLS[name]).name} to --weights"
    state = load_tensors(path, remedy)
    for key in expected:
        if key.endswith("num_batches_tracked"):  # counts the training's steps, where a file has it at all
            state[key] = torch.tensor(0)
    check_tensors(state, expected, path, "the weights of Inception-v3", remedy)
    classes = state.get("fc.bias")
    if isinstance(classes, torch.Tensor) and classes.numel() != CLASSES[name]:
        found = next((other for other, n in CLASSES.items() if n == classes.numel()), "another")
        raise SystemExit(f"error: {path} holds the {found} network, not {name}; choose --inception to fit, or {remedy}")
    return {key: state[key].to(tensor.dtype) for key, tensor in expected.items()}


def pool_as_tensorflow(block: nn.Module, kind: str) -> None:
    """Makes the pooled branch of an Inception block pool as the graph of 2015-12-05 does.

    Its averages leave the padding out, where torchvision's divide by 9 also at the border: what torchvision pooled is
    corrected on its way into the branch. Its very last block takes the maximum: its input is kept, and pooled there.
    """

    def average(_, inputs):
        x = inputs[0]
        return x / avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)

    def keep(_, inputs):
        block.unpooled = inputs[0]

    def largest(_, __):
        x, block.unpooled = block.unpooled, None
        return max_pool2d(x, 3, 1, 1)

    if kind == "max":
        block.register_forward_pre_hook(keep)
    block.branch_pool.register_forward_pre_hook(largest if kind == "max" else average)


def find_weights(name: str) -> Path:
    """The file of network `name` in torch's hub cache; downloaded, with its hash checked, where it is not there."""
    url = URLS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        prefix = re.search(r"-([0-9a-f]{8})\.pth$", url)[1]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix)
        except (OSError, RuntimeError, HTTPException) as error:
            raise SystemExit(
                f"error: the Inception weights could not be downloaded ({type(error).__name__}); put {path.name} "
                f"({MEGABYTES[name]} MB, SHA-256 begins {prefix}, from {url}) into {path.parent}, or pass --weights"
            ) from None
    return path


def hash_file(path: Path) -> str:
    """SHA-256 of a weights file. Raises SystemExit when its name carries the beginning of another one."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be read ({error.strerror}); pass another to --weights") from None
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not digest.hexdigest().startswith(named[1]):
        raise SystemExit(
            f"error: {path} is not what its name says: its SHA-256 begins {digest.hexdigest()[:8]}; "
            f"get it again, or pass another to --weights"
        )
    return digest.hexdigest()
