"""Equations (3) to (5) against numbers worked out by hand."""

from argparse import Namespace
from math import exp

import pytest
import torch

from common.rollout import Rollout
from grpo_train import grpo_objective, imitation_objective, loss_normaliser, token_weights

T = torch.tensor


def objective_of(logps, old, advantage, mask=None, clip_eps=(0.2, 0.2), beta=0.0, ref=None):
    """grpo_objective() of plain tensors: logps, old and ref (N, S), advantage (N,)."""
    mask = torch.ones_like(logps) if mask is None else mask
    rollout = Rollout(None, mask, old_logps=old, ref_logps=ref, advantage=advantage)
    return grpo_objective(logps, rollout, Namespace(clip_eps=clip_eps, beta=beta))


def test_clipping_by_hand():
    """rho = 1.5 and 0.5, A of both signs, eps 0.2: clipping only ever lowers the objective."""
    logps = T([[1.5, 0.5]]).log()
    old = torch.zeros(1, 2)

    objective, _, clipped = objective_of(logps, old, T([1.0]))
    assert objective[0].tolist() == pytest.approx([1.2, 0.5])
    assert clipped[0].tolist() == [True, False]

    objective, _, clipped = objective_of(logps, old, T([-1.0]))
    assert objective[0].tolist() == pytest.approx([-1.5, -0.8])
    assert clipped[0].tolist() == [False, True]

    # DAPO's higher upper bound
    objective, _, _ = objective_of(logps, old, T([1.0]), clip_eps=(0.2, 0.28))
    assert objective[0].tolist() == pytest.approx([1.28, 0.5])


def test_the_advantage_of_a_group_reaches_every_token_of_its_own_completion():
    advantage = T([[1.0, -2.0], [3.0, 0.5]])  # (B, G)
    objective, _, _ = objective_of(torch.zeros(4, 2), torch.zeros(4, 2), advantage)
    assert objective.tolist() == [[1, 1], [-2, -2], [3, 3], [0.5, 0.5]]


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    logps = T([[-1.0, -1.0, -2.0]])
    ref = T([[-1.0, -2.0, -1.0]])
    objective, kl, _ = objective_of(logps, logps.clone(), T([0.0]), beta=0.1, ref=ref)
    assert kl[0].tolist() == pytest.approx([0, exp(-1) + 1 - 1, exp(1) - 1 - 1])
    assert torch.allclose(objective, -0.1 * kl)


def test_garbage_at_padding_reaches_neither_loss_nor_gradient():
    logps = T([[-1.0, -300.0]], requires_grad=True)
    old = T([[-1.0, 300.0]])
    ref = T([[-1.0, float("inf")]])
    mask = T([[1, 0]])
    objective, kl, clipped = objective_of(logps, old, T([2.0]), mask, beta=0.1, ref=ref)
    objective.sum().backward()
    assert objective.tolist() == [[2.0, 0.0]]
    assert not kl[0, 1]
    assert not clipped[0, 1]
    assert logps.grad.tolist() == [[2.0, 0.0]]


def test_log_ratios_are_kept_below_20_nats():
    far = T([[-1000.0]])
    objective, kl, _ = objective_of(T([[0.0]]), far, T([-1.0]), beta=1.0, ref=-far)
    assert objective.isfinite().all()
    assert kl.item() == pytest.approx(exp(20) - 21, rel=1e-5)


def test_a_policy_far_above_its_reference_is_still_pulled_back():
    """30 nats above: exp(-30) - (-30) - 1 = 29, whose slope is 1. Padding has none."""
    logps = T([[0.0, 0.0]], requires_grad=True)
    ref = T([[-30.0, -1000.0]])
    mask = T([[1, 0]])
    _, kl, _ = objective_of(logps, logps.detach(), T([0.0]), mask, beta=1.0, ref=ref)
    kl.sum().backward()
    assert kl[0].tolist() == pytest.approx([29, 0])
    assert logps.grad[0].tolist() == pytest.approx([1, 0])


def test_the_loss_is_zero_and_its_gradient_is_not_with_one_update_per_rollout():
    logps = T([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    objective, _, _ = objective_of(logps, logps.detach(), T([0.7, -0.7]))
    loss = -(objective * token_weights(torch.ones(2, 2), "grpo", 4)).sum() / 2
    loss.backward()
    assert loss.item() == pytest.approx(0)
    # A / (2 tokens x 2 completions)
    assert logps.grad.flatten().tolist() == pytest.approx([-0.175, -0.175, 0.175, 0.175])


def test_imitation_maximises_the_mean_log_prob_of_the_given_tokens():
    """Log-probs -1, -2 and -3 of three tokens in two completions have the mean -2."""
    logps = T([[-1.0, -2.0], [-3.0, -100.0]])
    mask = T([[1, 1], [1, 0]])
    objective, kl, clipped = imitation_objective(logps, mask)
    N = loss_normaliser("sft", completions=2, tokens=3)
    assert ((objective * token_weights(mask, "sft", 9)).sum() / N).item() == pytest.approx(-2)
    assert not kl.any()
    assert not clipped.any()


def test_the_three_normalisations_by_hand():
    """Completions of 1 and 3 tokens, objective 1 for each token, at most 4 tokens.

    GRPO (1 + 1) / 2, Dr. GRPO (1 / 4 + 3 / 4) / 2, DAPO 4 / 4.
    """
    mask = T([[1, 0, 0], [1, 1, 1]])
    value = {}
    weight_in_longer = {}  # of one token of the longer completion
    for kind in ("grpo", "dr_grpo", "dapo"):
        N = loss_normaliser(kind, completions=2, tokens=4)
        weights = token_weights(mask, kind, max_length=4) / N
        value[kind] = weights.sum().item()
        weight_in_longer[kind] = weights[1, 0].item()
    assert value == pytest.approx({"grpo": 1, "dr_grpo": 0.5, "dapo": 1})
    assert weight_in_longer == pytest.approx({"grpo": 1 / 6, "dr_grpo": 1 / 8, "dapo": 1 / 4})


@pytest.mark.parametrize("kind", ("grpo", "dr_grpo", "dapo"))
def test_micro_batches_add_up_to_the_whole_step(kind):
    """Sums per micro-batch, one division at the end (trl#3021: a mean per micro-batch differs)."""
    mask = T([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    objective = torch.arange(12.0).view(3, 4)
    whole = (objective * token_weights(mask, kind, 4)).sum()
    parts = []
    for i in range(3):
        one = slice(i, i + 1)
        parts.append((objective[one] * token_weights(mask[one], kind, 4)).sum())
    assert sum(parts).item() == pytest.approx(whole.item())
