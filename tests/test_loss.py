"""Equations (3) to (5) against numbers worked out by hand."""
from math import exp

import pytest
import torch

from grpo_train import divisor, grpo_terms, token_weights

T = torch.tensor


def test_clipping_by_hand():
    """rho = 1.5 and 0.5 with advantages of both signs, eps 0.2: clipping binds only where it makes the term smaller."""
    logps = T([[1.5, 0.5]]).log()
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    term, _, clipped = grpo_terms(logps, old, T([1.0]), mask, 0.2, 0.2)
    assert term[0].tolist() == pytest.approx([1.2, 0.5]) and clipped[0].tolist() == [True, False]
    term, _, clipped = grpo_terms(logps, old, T([-1.0]), mask, 0.2, 0.2)
    assert term[0].tolist() == pytest.approx([-1.5, -0.8]) and clipped[0].tolist() == [False, True]
    term, *_ = grpo_terms(logps, old, T([1.0]), mask, 0.2, 0.28)                # DAPO's higher upper bound
    assert term[0].tolist() == pytest.approx([1.28, 0.5])


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    logps, ref = T([[-1.0, -1.0, -2.0]]), T([[-1.0, -2.0, -1.0]])
    term, kl, _ = grpo_terms(logps, logps.clone(), T([0.0]), torch.ones(1, 3), 0.2, 0.2, beta=0.1, ref=ref)
    assert kl[0].tolist() == pytest.approx([0, exp(-1) + 1 - 1, exp(1) - 1 - 1])
    assert torch.allclose(term, -0.1 * kl)


def test_garbage_at_padding_reaches_neither_loss_nor_gradient():
    logps = T([[-1.0, -300.0]], requires_grad=True)
    old, ref = T([[-1.0, 300.0]]), T([[-1.0, float("inf")]])
    term, kl, clipped = grpo_terms(logps, old, T([2.0]), T([[1, 0]]), 0.2, 0.2, beta=0.1, ref=ref)
    term.sum().backward()
    assert term.tolist() == [[2.0, 0.0]] and not kl[0, 1] and not clipped[0, 1]
    assert logps.grad.tolist() == [[2.0, 0.0]]


def test_log_ratios_are_kept_within_20_nats():
    term, kl, _ = grpo_terms(T([[0.0]]), T([[-1000.0]]), T([-1.0]), torch.ones(1, 1), 0.2, 0.2, beta=1.0, ref=T([[1000.0]]))
    assert term.isfinite().all() and kl.item() == pytest.approx(exp(20) - 21, rel=1e-5)


def test_the_loss_is_zero_and_its_gradient_is_not_with_one_update_a_rollout():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    advantage, mask = T([0.7, -0.7]), torch.ones(2, 2)
    term, *_ = grpo_terms(logps, logps.detach(), advantage, mask, 0.2, 0.2)
    loss = -(term * token_weights(mask, "grpo")).sum() / 2
    loss.backward()
    assert loss.item() == pytest.approx(0)
    assert logps.grad.flatten().tolist() == pytest.approx([-0.175, -0.175, 0.175, 0.175])     # A / (2 tokens x 2 completions)


def test_the_three_normalisations_by_hand():
    """Completions of 1 and 3 tokens, every term 1, budget 4: GRPO (1 + 1) / 2, Dr. GRPO 4 / (2 x 4), DAPO 4 / 4."""
    mask = T([[1, 0, 0], [1, 1, 1]])
    value = {kind: token_weights(mask, kind).sum().item() / divisor(kind, completions=2, tokens=4, max_new_tokens=4)
             for kind in ("grpo", "dr_grpo", "dapo")}
    assert value == {"grpo": pytest.approx(1), "dr_grpo": pytest.approx(0.5), "dapo": pytest.approx(1)}
    long = token_weights(mask, "grpo")[1, 0] / 2, token_weights(mask, "dapo")[1, 0] / 4, token_weights(mask, "dr_grpo")[1, 0] / 8
    assert [x.item() for x in long] == pytest.approx([1 / 6, 1 / 4, 1 / 8])     # the weight of one token of the longer one


@pytest.mark.parametrize("kind", ("grpo", "dr_grpo", "dapo"))
def test_micro_batches_add_up_to_the_whole_step(kind):
    """Sums per micro-batch, one division at the end; a mean per micro-batch would give something else (trl#3021)."""
    mask = T([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    term = torch.arange(12.0).view(3, 4)
    whole = (term * token_weights(mask, kind)).sum()
    parts = sum((term[i:i + 1] * token_weights(mask[i:i + 1], kind)).sum() for i in range(3))
    assert parts.item() == pytest.approx(whole.item())
