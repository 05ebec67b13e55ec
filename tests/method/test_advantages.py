"""Equation (2) against numbers worked out by hand, and the worked example of the docs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reward import advantages, semantic_credit

ROOT = Path(__file__).resolve().parents[2]


def test_advantages_by_hand():
    # means 1/2 and 1, standard deviations 3^-1/2 and 2
    components = {"a": torch.tensor([[1.0, 0, 0, 1], [4, 0, 0, 0]])}
    expected = torch.tensor([[0.866, -0.866, -0.866, 0.866], [1.5, -0.5, -0.5, -0.5]])
    actual = advantages(components, {"a": 1.0}, eps=1e-4)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)

    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [3, -1, -1, -1]])
    expected = centred / torch.tensor([[3**-0.5 + 0.1], [2.1]])
    torch.testing.assert_close(advantages(components, {"a": 1.0}), expected)
    unscaled = advantages(components, {"a": 2.0}, scale=False)
    torch.testing.assert_close(unscaled, 2 * centred)


def test_components_are_normalised_before_they_are_added_so_their_scales_do_not_decide():
    a = torch.tensor([[1.0, 0, 0.5, 0]])
    b = torch.tensor([[0.2, 0.9, 0.4, 0.4]])
    weights = {"a": 1.0, "b": 3.0}
    small, large = (advantages({"a": a, "b": b * k}, weights, eps=1e-4) for k in (1, 100))
    torch.testing.assert_close(small, large, atol=2e-3, rtol=0)

    only_a = advantages({"a": a}, {"a": 1.0}, eps=1e-4)
    only_b = advantages({"b": b}, {"b": 3.0}, eps=1e-4)
    torch.testing.assert_close(small, only_a + only_b)

    unscaled = [advantages({"a": a, "b": b * k}, weights, scale=False) for k in (1, 100)]
    assert not torch.allclose(*unscaled, atol=0.5)


def test_a_hair_between_two_right_answers_is_not_blown_up_to_right_and_wrong():
    hair = torch.tensor([[0.999, 0.998, 0.999, 0.998]])
    apart = torch.tensor([[0.999, 0.1, 0.999, 0.1]])
    of_hair, of_apart = (advantages({"visual": r}, {"visual": 1.0}) for r in (hair, apart))
    assert of_hair.abs().max() < 0.02 * of_apart.abs().max()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7, 2 / 3, 0.99])
def test_a_component_that_is_equal_for_the_whole_group_drops_out(value):
    """Rounding in the mean, divided by eps, must not become an advantage.

    zero_std_fraction counts advantages below 1e-6.
    """
    a = torch.tensor([[1.0, 0, 0, 0, 0, 0, 1, 0]])
    equal = torch.full((1, 8), value)
    assert advantages({"equal": equal}, {"equal": 1.0}).abs().max() < 1e-6
    both = advantages({"a": a, "equal": equal}, {"a": 1.0, "equal": 1.0})
    torch.testing.assert_close(both, advantages({"a": a}, {"a": 1.0}))


# ---------------------------------------------------------------- the worked example


def table_of_the_docs():
    """(answer or None, semantic, visual, A of semantic, A of both) of each line of the table."""
    text = (ROOT / "docs" / "rl_in_five_minutes.md").read_text(encoding="utf-8")
    lines = text.partition("| answer | semantic")[2].splitlines()[2:7]
    table = []
    for line in lines:
        answer, *numbers = line.strip("| ").split(" | ")
        if answer.startswith("("):
            answer = None
        table.append((answer, *(float(number.strip("* ")) for number in numbers)))
    return table


def test_the_worked_example_of_the_docs_is_what_the_reward_returns():
    table = table_of_the_docs()
    assert len(table) == 5
    answers, semantic, visual, alone, both = zip(*table)
    credits = [semantic_credit(a, "large red circle", "rouge_l") if a else 0.0 for a in answers]
    assert credits == pytest.approx(list(semantic), abs=0.005)

    components = {"semantic": torch.tensor([credits]), "visual": torch.tensor([visual])}
    A = advantages(components, {"semantic": 1.0})[0]
    assert A.tolist() == pytest.approx(list(alone), abs=0.005)
    A = advantages(components, {"semantic": 1.0, "visual": 1.5})[0]
    assert A.tolist() == pytest.approx(list(both), abs=0.005)


def test_the_script_prints_the_worked_example_of_the_docs():
    command = [sys.executable, str(ROOT / "reward.py")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    for answer, *numbers in table_of_the_docs():
        (line,) = [x for x in lines if x.startswith(f"{answer or '(no'} ")]
        assert [float(x) for x in line.split()[-4:]] == numbers
