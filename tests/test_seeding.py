"""Latents as functions of seeds and steps: support/seeding.py."""

import torch

from support.seeding import latents, step_latents


def test_latents_depend_only_on_their_seed():
    batch = latents(range(10))
    assert batch.shape == (10, 100, 1, 1) and batch.dtype == torch.float32
    assert torch.equal(batch[7], latents([7])[0])
    assert len({row.sum().item() for row in batch}) == 10
    assert torch.equal(step_latents(1, 5, 4), step_latents(1, 5, 4))
    assert not torch.equal(step_latents(1, 5, 4), step_latents(1, 6, 4))
