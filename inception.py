"""Images uint8 (N,3,S,S) -> Inception-v3 pool features (N,dims): the network that FID is measured with.

    from inception import load_inception
    features, facts = load_inception("tf2015", dims=2048)
    features(images)                                # float32 (N,2048)

Two sets of weights: `tf2015` is the graph of 2015-12-05 that papers report with, as ported to PyTorch by pytorch-fid;
`torchvision` is torchvision's ImageNet network, which the report used. A FID holds only between equal ones.
"""

import hashlib
import re
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import Inception_V3_Weights
from torchvision.models.inception import BasicConv2d, Inception3

from network import load_tensors

LAST_LAYER = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}  # by number of features
URLS = {
    "torchvision": Inception_V3_Weights.IMAGENET1K_V1.url,
    "tf2015": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}
MEGABYTES = {"torchvision": 104, "tf2015": 91}
RESIZE = "bilinear"  # of pytorch-fid: not antialiased, corners not aligned


class Features(nn.Module):
    """Inception-v3 up to the layer that gives `dims` features, averaged over the map; BatchNorm folded in."""

    def __init__(self, layers: OrderedDict):
        super().__init__()
        self.layers = nn.Sequential(layers)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N,3,S,S) -> float32 (N,dims)."""
        x = interpolate(images.float() / 255, (299, 299), mode=RESIZE, align_corners=False)
        # Both networks want [-1,1]: torchvision's ImageNet mean and deviation are undone by its own transform_input.
        x = self.layers((2 * x - 1).contiguous(memory_format=torch.channels_last))
        return x.mean((2, 3))


def load_inception(name: str, dims: int = 2048, weights: Path | None = None, device="cpu") -> tuple[Features, dict]:
    """The network `name` (torchvision or tf2015) with the state dict of the file `weights`, or of torch's hub cache.

    Returns it with facts: network, dims, resize and the weights' hash, by which statistics are told apart.
    Raises SystemExit when the weights cannot be had, or are not those of an Inception-v3.
    """
    path = weights or find_weights(name)
    if not path.is_file():
        raise SystemExit(f"error: --weights {path} does not exist; give a state dict of Inception-v3")
    digest = hash_file(path)
    remedy = f"give the state dict of {Path(URLS[name]).name} to --weights"
    state = load_tensors(path, remedy)
    net = Inception3(aux_logits=False, init_weights=False, transform_input=False)
    layers = OrderedDict()
    for layer, module in net.named_children():
        layers[layer] = module
        if layer == LAST_LAYER[dims]:
            break
    expected = nn.Sequential(layers).state_dict()
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
        if not isinstance(state.get(key), torch.Tensor) or state[key].shape != tensor.shape:
            raise SystemExit(f"error: {path} does not hold the weights of Inception-v3 (see {key}); {remedy}")
        if not state[key].isfinite().all():
            raise SystemExit(f"error: {path}: {key} holds NaN or infinite values; {remedy}")
    nn.Sequential(layers).load_state_dict({key: state[key] for key in expected})
    features = Features(layers).eval().requires_grad_(False)
    if name == "tf2015":
        for layer, block in layers.items():
            if hasattr(block, "branch_pool"):
                pool_as_tensorflow(block, "max" if layer == "Mixed_7c" else "average")
    for module in features.modules():
        if isinstance(module, BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    facts = {"network": name, "dims": dims, "resize": RESIZE, "weights_sha256": digest}
    return features.to(device, memory_format=torch.channels_last), facts


def pool_as_tensorflow(block: nn.Module, kind: str) -> None:
    """Makes the pooled branch of an Inception block pool as the graph of 2015-12-05 does.

    Its averages leave the padding out, and its very last block takes the maximum. torchvision's block pools inside its
    own forward: its input is kept, and pooled again on the way into the branch.
    """

    def keep(_, inputs):
        block.unpooled = inputs[0]

    def pool(_, __):
        x, block.unpooled = block.unpooled, None
        return max_pool2d(x, 3, 1, 1) if kind == "max" else avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    block.register_forward_pre_hook(keep)
    block.branch_pool.register_forward_pre_hook(pool)


def find_weights(name: str) -> Path:
    """The file of network `name` in torch's hub cache; downloaded, with its hash checked, where it is not there."""
    url = URLS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        prefix = re.search(r"-([0-9a-f]{8})\.pth$", url)[1]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise SystemExit(
                f"error: the Inception weights could not be downloaded ({type(error).__name__}); put {path.name} "
                f"({MEGABYTES[name]} MB, SHA-256 begins {prefix}, from {url}) into {path.parent}, or pass --weights"
            ) from None
    return path


def hash_file(path: Path) -> str:
    """SHA-256 of a weights file. Raises SystemExit when its name carries the beginning of another one."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not digest.startswith(named[1]):
        raise SystemExit(f"error: {path} is not what its name says: its SHA-256 begins {digest[:8]}; get it again")
    return digest
