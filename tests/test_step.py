"""The training step: losses, updates of both networks, EMA weights, bf16 and torch.compile."""

import copy

import pytest
import torch
from helpers import assert_equal, small_args
from torch import nn

import train
from dataloader import DataGenerater, make_loader, to_float
from support.augment import augment, draw_augmentations
from support.colour import colour_loss
from support.ema import recalibrate_batchnorm
from support.seeding import step_latents

EAGER = torch.autocast("cpu", torch.bfloat16, enabled=False)


def take_steps(state, args, count):
    """Steps 0 to `count` on black images."""
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    for step in range(count):
        train.make_step(state, args, images)(train.step_inputs(args, step, torch.arange(8)))


@pytest.mark.parametrize("flags", [[], ["--augment", "--group-norm", "--colour-weight", "3"]])
def test_20_steps_equal_a_plain_loop(dataroot, flags, monkeypatch):
    """update_networks equals the report's plain loop: BCELoss, contiguous tensors, gradients of all weights.

    Both use float64, for D's logits too: Adam divides by gradients near zero, which amplifies a different rounding.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    state = train.make_state(small_args(*flags), torch.device("cpu"))
    for net in (state.netG, state.netD, state.netG_ema):
        net.double()
    netG = copy.deepcopy(state.netG).to(memory_format=torch.contiguous_format)
    netD = copy.deepcopy(state.netD).to(memory_format=torch.contiguous_format)
    optG = torch.optim.Adam(netG.parameters(), 2e-4, (0.5, 0.999))
    optD = torch.optim.Adam(netD.parameters(), 2e-4, (0.5, 0.999))
    ones, zeros = torch.ones(8, 1, 1, 1).double(), torch.zeros(8, 1, 1, 1).double()
    criterion, dataset, losses = nn.BCELoss(), DataGenerater(dataroot / "64" / "train", 64), []
    for step in range(20):
        real = to_float(next(iter(make_loader(dataset, 8, 0, step)))).double()
        z = step_latents(0, step, 8, 8).double()
        channels_last = real.contiguous(memory_format=torch.channels_last)
        u = draw_augmentations(0, step, 8, 64).double() if flags else None
        train.update_networks(state, EAGER, 3 if flags else 0, channels_last, z, u)
        u = [None] * 3 if u is None else u

        netD.zero_grad()
        errD_real = criterion(netD(augment(real, u[0])), ones)
        fake = netG(z)
        errD_fake = criterion(netD(augment(fake.detach(), u[1])), zeros)
        errD = errD_real + errD_fake
        errD.backward()
        optD.step()
        netG.zero_grad()
        errG = criterion(netD(augment(fake, u[2])), ones)
        if flags:
            errG = errG + 3 * colour_loss(real, fake)
        errG.backward()
        optG.step()
        losses.append((errD.item(), errG.item()))
    assert state.totals[:2].tolist() == pytest.approx(torch.tensor(losses).sum(0).tolist(), rel=1e-6)
    for fast, plain in ((state.netG, netG), (state.netD, netD)):
        for a, b in zip(fast.parameters(), plain.parameters()):
            assert (a - b).abs().max() < 1e-6 * b.abs().max()


def test_compiled_steps_equal_eager_steps(monkeypatch):
    """The test runs the graphs that --compile captures, without inductor, which takes minutes to build its code."""
    compile_net = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: compile_net(net, backend="aot_eager"))
    states = [train.make_state(small_args(*flags), torch.device("cpu")) for flags in ([], ["--compile"])]
    for step in range(3):
        real = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(step)) * 2 - 1
        for state in states:
            train.update_networks(state, EAGER, 0, real, step_latents(0, step, 8, 8), None)
    assert states[0].totals.tolist() == pytest.approx(states[1].totals.tolist(), rel=1e-5)
    for eager, compiled in zip(states[0].netG.parameters(), states[1].netG.parameters()):
        assert (eager - compiled).abs().max() < 1e-5


class Constant(nn.Module):
    """A discriminator whose one parameter is the logit of all images. The initial probability is 1/4."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(1 / 3).log())

    def forward(self, images, logits):
        assert logits
        return self.logit + 0 * images.mean((1, 2, 3), keepdim=True)


def test_losses_by_hand():
    """D gives all images the probability 1/4: loss_d = -ln(1/4) - ln(3/4). Its SGD step gives loss_g."""
    args = small_args()
    state = train.make_state(args, torch.device("cpu"))
    state.netD = Constant()
    state.optD = torch.optim.SGD(state.netD.parameters(), 1.0)
    logit = torch.tensor(1 / 3).log().item()
    train.update_networks(state, EAGER, 0, torch.zeros(8, 3, 64, 64), step_latents(0, 0, 8, 8), None)
    after = torch.sigmoid(torch.tensor(logit - ((0.25 - 1) + 0.25)))  # d/dlogit of both losses
    expected = [torch.tensor([0.25, 0.75]).log().neg().sum().item(), after.log().neg().item(), 0.25, 0.25]
    assert state.totals.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("frozen, moving, lr", [("netG", "netD", "optG"), ("netD", "netG", "optD")])
def test_a_step_of_one_network_leaves_the_other_unchanged(frozen, moving, lr):
    state = train.make_state(small_args(), torch.device("cpu"))
    getattr(state, lr).param_groups[0]["lr"] = 0.0  # the gradients are still computed
    before = {name: [p.clone() for p in getattr(state, name).parameters()] for name in ("netG", "netD")}
    real = torch.rand(8, 3, 64, 64) * 2 - 1
    train.update_networks(state, EAGER, 0, real, step_latents(0, 0, 8, 8), None)
    same = {
        name: [torch.equal(a, b) for a, b in zip(before[name], getattr(state, name).parameters())] for name in before
    }
    assert all(same[frozen]) and not any(same[moving])


def test_ema_warms_up_and_does_not_change_training():
    runs = {}
    for ema in (0, 0.999):
        args = small_args("--ema", str(ema))
        state = runs[ema] = train.make_state(args, torch.device("cpu"))
        take_steps(state, args, 3)
    assert_equal(runs[0].netG.state_dict(), runs[0.999].netG.state_dict())
    raw, ema, no_ema = (list(n.parameters()) for n in (runs[0].netG, runs[0.999].netG_ema, runs[0].netG_ema))
    assert not any(map(torch.equal, ema, raw))
    assert all(map(torch.equal, no_ema, raw))  # --ema 0: the raw weights


def test_ema_has_recalibrated_batchnorm_statistics():
    """The first layer is linear in latents of N(0,1): its variances are sums of squared weights. G does not change."""
    args = small_args("--ema", "0.5")
    state = train.make_state(args, torch.device("cpu"))
    take_steps(state, args, 3)
    before = copy.deepcopy(state.netG.state_dict())
    recalibrate_batchnorm(state.netG_ema, args.seed, state.step, args.batch_size, torch.device("cpu"))
    assert_equal(before, state.netG.state_dict())
    assert not state.netG_ema.training
    first, norm = state.netG_ema.main[0], state.netG_ema.main[1]
    expected = first.weight.square().sum(0).mean((1, 2))
    assert norm.running_var.tolist() == pytest.approx(expected.tolist(), rel=0.1)
    assert (norm.running_mean / norm.running_var.sqrt()).abs().max() < 0.1


def test_bf16_tracks_fp32(dataroot):
    """200 steps in both: means of 50 steps differ by less than 0.3 in the losses, 0.05 in D(x) and D(G(z))."""
    means = {}
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    for enabled in (False, True):
        state, means[enabled] = train.make_state(small_args(), torch.device("cpu")), []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        for step in range(200):
            real = to_float(next(iter(make_loader(dataset, 8, 0, step))))
            train.update_networks(state, autocast, 0, real, step_latents(0, step, 8, 8), None)
            if step % 50 == 49:
                means[enabled].append(state.totals / 50)
                state.totals = torch.zeros(4)
        assert next(state.netG.parameters()).dtype == torch.float32
    difference = (torch.stack(means[True]) - torch.stack(means[False])).abs().amax(0)
    assert (difference < torch.tensor([0.3, 0.3, 0.05, 0.05])).all(), difference  # NaN fails too
