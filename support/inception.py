"""Images uint8 (N,3,S,S) -> Inception-v3 pool features (N,dims): the network that FID is measured with.

    from support.inception import load_inception
    features, metadata = load_inception("tf2015", dims=2048)
    features(images)                                # float32 (N,2048)

There are two sets of weights. `tf2015` is TensorFlow's graph of 2015-12-05, which most papers use, as ported to PyTorch
by pytorch-fid. `torchvision` is torchvision's ImageNet network, which the report used. There are three ways to resize
to 299x299: `bilinear` of pytorch-fid, `tf` of TensorFlow 1, which is part of the graph of 2015, and `clean` of
clean-fid (Parmar, Zhang, Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", 2022). Only FIDs of
equal weights and equal resizes are comparable.
"""

import re
from collections import OrderedDict
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3

from support.devices import DTYPES, full_float32
from support.files import UserError, hash_file
from support.weights import add_counters, check_tensors, find_networks, load_tensors

LAST_LAYER = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}  # by number of features
URLS = {
    "torchvision": "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
    "tf2015": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}
MEGABYTES = {"torchvision": 104, "tf2015": 91}
CLASSES = {"torchvision": 1000, "tf2015": 1008}  # all other shapes are the same in both
# The resizes of published numbers: TensorFlow's graph (TTUR, StyleGAN, torch-fidelity) includes one, and users of
# torchvision's network resize with PyTorch.
DEFAULT_RESIZE = {"torchvision": "bilinear", "tf2015": "tf"}
RESIZES = ("bilinear", "tf", "clean")


class Features(nn.Module):
    """Inception-v3 up to the layer that gives `dims` features, averaged over the map, with BatchNorm folded in.

    `centre` is the pixel value that becomes 0: 127.5 maps [0,255] to [-1,1], and the graph of 2015 uses 128.
    """

    def __init__(self, layers: OrderedDict, resize: str, centre: float):
        super().__init__()
        self.layers = nn.Sequential(layers)
        self.resize = resize
        self.centre = centre

    @full_float32()
    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N,3,S,S) -> float32 (N,dims)."""
        rows = resize_matrix(images.shape[-1], self.resize).to(images.device)
        x = (rows @ images.float() @ rows.T).clamp_(0, 255)  # bicubic overshoots
        x = x.sub_(self.centre).div_(self.centre).to(next(self.parameters()).dtype)
        x = self.layers(x.contiguous(memory_format=torch.channels_last))
        return x.float().mean((2, 3))


@lru_cache
def resize_matrix(size: int, resize: str, out: int = 299) -> torch.Tensor:
    """float32 (out,size): the matrix R for which R X R^T is the square image X, resized. All three ways are linear."""
    if resize == "tf":  # the corners of both images coincide: positions are scaled without the offset of half a pixel
        position = torch.arange(out, dtype=torch.float32) * (size / out)
        low = position.long().clamp_max(size - 1)
        high, share = (low + 1).clamp_max(size - 1), (position - low)[:, None]
        return torch.eye(size)[low] * (1 - share) + torch.eye(size)[high] * share
    # Resized unit vectors of one axis are the weights, in the precision of PyTorch (float32) and Pillow (float64).
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
    """The network `name` (torchvision or tf2015) with the state dict in the file `weights` or in torch's hub cache.

    Returns (network, metadata). The metadata (network, dims, resize, dtype, hash of the weights) identifies statistics.
    Raises UserError when the weights cannot be downloaded or are not those of this Inception-v3.
    """
    path = Path(weights or find_weights(name))
    resize = resize or DEFAULT_RESIZE[name]
    layers = load_layers(name, dims, path)
    digest = hash_file(path)
    centre = 128 if name == "tf2015" and resize != "bilinear" else 127.5
    features = Features(layers, resize, centre).to(device, DTYPES[precision], memory_format=torch.channels_last)
    metadata = {"network": name, "dims": dims, "resize": resize, "dtype": precision, "weights_sha256": digest}
    return features.requires_grad_(False).eval(), metadata


def pick_batch_size(device: torch.device) -> int:
    """Number of images of a batch for the network on `device`. An image takes less than 32 MiB of a GPU's memory."""
    if device.type != "cuda":
        return 16
    return min(max(torch.cuda.mem_get_info(device)[0] // 2**25, 16), 256)


def load_layers(name: str, dims: int, path: Path) -> OrderedDict:
    """The layers of network `name` up to the one with `dims` features, ready for inference, with weights of `path`."""
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
    return layers


def read_weights(path: Path, name: str, expected: dict) -> dict:
    """The tensors of `expected`, float32, from the file `path`. Raises UserError when one is missing."""
    remedy = f"give the state dict of {Path(URLS[name]).name} to --weights"
    content = load_tensors(path, remedy)
    networks = list(find_networks(content, "Conv2d_1a_3x3.conv.weight").values())
    state = add_counters(networks[0] if len(networks) == 1 else content, expected)
    check_tensors(state, expected, path, "the weights of Inception-v3", remedy)
    classes = state.get("fc.bias")
    if isinstance(classes, torch.Tensor) and classes.numel() != CLASSES[name]:
        found = next((other for other, n in CLASSES.items() if n == classes.numel()), "another")
        raise UserError(f"{path} holds the {found} network, not {name}; choose --inception to fit, or {remedy}")
    return {key: state[key].to(tensor.dtype) for key, tensor in expected.items()}


def pool_as_tensorflow(block: nn.Module, kind: str) -> None:
    """Make the pooled branch of an Inception block pool as the graph of 2015-12-05 does.

    TensorFlow's averages leave out the padding, while torchvision divides by 9 at the border too: a hook corrects what
    torchvision pooled. The last block of the graph takes the maximum instead: hooks keep its input and pool that.
    """

    def correct_average(_, inputs):
        x = inputs[0]
        return x / avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)

    def keep_input(_, inputs):
        block.unpooled = inputs[0]

    def take_maximum(_, __):
        x, block.unpooled = block.unpooled, None
        return max_pool2d(x, 3, 1, 1)

    if kind == "max":
        block.register_forward_pre_hook(keep_input)
    block.branch_pool.register_forward_pre_hook(take_maximum if kind == "max" else correct_average)


def find_weights(name: str) -> Path:
    """The file of network `name` in torch's hub cache. Downloads it and checks its hash where it is missing."""
    url = URLS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        prefix = re.search(r"-([0-9a-f]{8})\.pth$", url)[1]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"the Inception weights could not be downloaded ({type(error).__name__}); put {path.name} "
                f"({MEGABYTES[name]} MB, SHA-256 begins {prefix}, from {url}) into {path.parent}, or pass --weights"
            ) from None
    return path
