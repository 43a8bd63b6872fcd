"""What only a GPU can show, the most important first: the CUDA graph, NCCL, and results like those of the CPU.

Tests that take a device run on the CPU too, where they cost little: there they test the test.
"""

import contextlib
import time

import numpy as np
import pytest
import torch
from helpers import (
    PROGRAMS,
    ROOT,
    SMALL,
    assert_equal,
    assert_same_training,
    fid,
    kill_one_of_two,
    load,
    run_python,
    run_training,
    small_args,
    torchrun,
)

import generator
import train
from support.cuda_graph import CudaGraph, as_cuda_graph
from support.demo_faces import draw_face
from support.devices import explain_out_of_memory, set_up_training
from support.files import UserError
from support.images import to_pil
from support.inception import load_inception

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
CUDA = torch.device("cuda")
BEST = ["--augment", "--group-norm", "--colour-weight", "3"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def usual_algorithms():
    """--deterministic is a setting of the process."""
    yield
    torch.use_deterministic_algorithms(False)


def noise(count):
    """Images uint8 (count,3,64,64)."""
    return torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def take_steps(device, count, *flags, graph=True, on_device=True, synchronize=False):
    """The state after `count` steps on noise: in a CUDA graph, with the images on the device, without a wait."""
    args = small_args(*flags)
    set_up_training(args.deterministic)
    state, images = train.make_state(args, device), noise(64)
    step = train.make_step(state, args, images.to(device) if on_device else None)
    optimizers = (state.optD, state.optG)
    with as_cuda_graph(step, optimizers, device) if graph else contextlib.nullcontext(step) as launch:
        for number in range(count):
            batch = torch.randint(64, (args.batch_size,), generator=torch.Generator().manual_seed(number))
            launch(train.step_inputs(args, number, batch if on_device else images[batch]))
            if synchronize:
                torch.cuda.synchronize()
    return state


def assert_equal_states(one, other):
    for part in one.parts():
        assert_equal(one.parts()[part].state_dict(), other.parts()[part].state_dict())
    assert torch.equal(one.totals, other.totals)


@pytest.mark.parametrize("flags, count", [
    (["--nz", "8"], 3),
    pytest.param(["--ngf", "64", "--ndf", "64", "--batch-size", "128"], 30, marks=needs_gpu),
    pytest.param(["--ngf", "64", "--ndf", "64", "--batch-size", "16", *BEST], 30, marks=needs_gpu),
])
def test_steps_of_default_widths_in_a_graph_are_near_eager_steps(flags, count):
    """cuDNN chooses its algorithms by their time, so that the bits differ."""
    device = torch.device("cuda" if GPUS and count == 30 else "cpu")
    states = [take_steps(device, count, *flags, graph=graph) for graph in (True, False)]
    means = [(state.totals / count).tolist() for state in states]
    assert means[0] == pytest.approx(means[1], rel=0.05, abs=0.02)
    assert all(parameter.isfinite().all() for parameter in states[0].netG_ema.parameters())


@needs_gpu
@pytest.mark.parametrize("flags", [[], [*BEST, "--precision", "bf16"]])
def test_a_cuda_graph_gives_the_same_bits_as_single_launches(dataroot, tmp_path, monkeypatch, flags):
    """Also for a resumed training, which records a second graph."""
    record, recorded = CudaGraph.record, []
    monkeypatch.setattr(CudaGraph, "record", lambda graph: recorded.append(record(graph)))
    flags = ["--device", "cuda", "--deterministic", *flags]
    run_training(dataroot, tmp_path / "graph", "--epochs", 3, *flags)
    run_training(dataroot, tmp_path / "resumed", "--epochs", 1, *flags)
    run_training(dataroot, tmp_path / "resumed", "--epochs", 3, "--resume", *flags)
    assert len(recorded) == 3
    monkeypatch.setattr(train, "as_cuda_graph", lambda step, *_: contextlib.nullcontext(step))
    run_training(dataroot, tmp_path / "plain", "--epochs", 3, *flags)
    assert_same_training(tmp_path / "graph", tmp_path / "plain")
    assert_same_training(tmp_path / "resumed", tmp_path / "plain")


def test_batches_of_images_equal_indices_of_images_on_the_device(device):
    states = [take_steps(device, 6, "--deterministic", on_device=on_device) for on_device in (True, False)]
    assert_equal_states(*states)


@needs_gpu
def test_200_steps_without_a_wait_equal_steps_with_one():
    states = [take_steps(CUDA, 200, "--deterministic", *BEST, synchronize=wait) for wait in (False, True)]
    assert_equal_states(*states)


@needs_gpu
def test_compiled_steps_in_a_graph_are_near_eager_steps():
    states = [take_steps(CUDA, 10, *flags) for flags in (["--compile"], [])]
    means = [(state.totals / 10).tolist() for state in states]
    assert means[0] == pytest.approx(means[1], rel=0.02, abs=0.01)


@needs_gpu
def test_one_process_of_torchrun_has_the_bits_of_a_plain_one(dataroot, tmp_path):
    flags = ["--epochs", 2, "--device", "cuda", "--deterministic"]
    run_training(dataroot, tmp_path / "plain", *flags)
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "nccl", *flags]
    done = run_python(*torchrun(1), ROOT / "train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "plain", tmp_path / "nccl")


@needs_two_gpus
def test_two_processes_stay_equal_and_end(dataroot, tmp_path):
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run", "--epochs", 3, "--device", "cuda"]
    done = run_python(*torchrun(2), PROGRAMS / "spy_on_steps.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.time() - (tmp_path / "run" / "generator.params").stat().st_mtime < 60
    first, second = (load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_equal(*({name: t.cpu() for name, t in rank["netG"].items()} for rank in (first, second)))


@needs_two_gpus
def test_after_the_death_of_one_process_the_other_says_so_and_ends(dataroot, tmp_path):
    kill_one_of_two(dataroot, tmp_path, "--device", "cuda")


@needs_gpu
def test_inception_on_a_gpu_has_the_features_of_the_cpu(weights):
    """Random weights, 80 drawn faces: features within 1e-3 of the largest, FID within 1 %."""
    faces = torch.stack([torch.from_numpy(np.array(draw_face(0, i))).permute(2, 0, 1) for i in range(80)])
    features = {}
    for name in ("cpu", "cuda"):
        net, _ = load_inception("tf2015", 64, weights, name)
        features[name] = torch.cat([net(batch.to(name)).cpu() for batch in faces.split(16)])
    assert (features["cuda"] - features["cpu"]).abs().max() < 1e-3 * features["cpu"].abs().max()
    distances = [fid(both[:40], both[40:]) for both in features.values()]
    assert distances[1] == pytest.approx(distances[0], rel=0.01)


def test_faces_are_those_of_the_cpu(device):
    """Within 2 of 255 levels."""
    nets = [generator.load_generator(generator.PRETRAINED, name) for name in ("cpu", device)]
    cpu, other = (next(generator.sample(netG, range(16))).int() for netG in nets)
    assert (cpu - other).abs().max() <= 2


@needs_gpu
def test_the_projection_of_a_known_face_finds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 7, 14):
        face = next(generator.sample(generator.load_generator(generator.PRETRAINED), [seed]))
        to_pil(face[0]).save(f"{seed}.png")
    photos = ["3.png", "7.png", "14.png"]
    generator.main(["--params", str(generator.PRETRAINED), "--device", "cuda", "--project", *photos])
    found = [float(line.split("PSNR ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 3 and min(found) > 35, found


@needs_two_gpus
def test_the_second_gpu_gives_the_bits_of_the_first_and_leaves_it_alone(dataroot, tmp_path):
    before = torch.cuda.memory_allocated(0)
    for name in ("cuda:1", "cuda:0"):
        run_training(dataroot, tmp_path / name, "--epochs", 2, "--deterministic", "--device", name)
        assert name == "cuda:0" or torch.cuda.memory_allocated(0) == before
    assert_same_training(tmp_path / "cuda:0", tmp_path / "cuda:1")


@needs_gpu
def test_out_of_memory_while_recording_is_one_sentence():
    """The GPU can be used afterwards."""

    def step(x):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**42, device=x.device)

    explained = explain_out_of_memory("lower it")
    with pytest.raises(UserError, match="lower it"), explained, as_cuda_graph(step, [], CUDA) as launch:
        for _ in range(4):
            launch(torch.ones(1))
    assert torch.ones(2, device=CUDA).sum().item() == 2


@needs_gpu
def test_memory_is_constant_over_five_epochs_with_evaluations(dataroot, tmp_path, weights, monkeypatch):
    save_params, memory = train.save_params, []

    def save_and_note(*arguments):
        save_params(*arguments)
        memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    monkeypatch.setattr(train, "save_params", save_and_note)
    flags = ["--eval-every", 1, "--eval-flags", f"--inception tf2015 --dims 64 --num 9 --weights '{weights}'"]
    run_training(dataroot, tmp_path / "run", "--epochs", 5, "--device", "cuda", *flags)
    assert len(memory) == 5 and len(set(memory[2:])) == 1, memory
