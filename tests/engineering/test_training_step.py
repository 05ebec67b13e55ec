"""Which prompts, micro-batches and random numbers a training step takes."""

import torch

from common.prompts import Example
from common.training import pack, prompt_order, uniforms_of


def test_micro_batches_hold_every_example_once_within_the_budget():
    sizes = [7, 30, 12, 12, 50, 9, 31]
    examples = []
    for place, size in enumerate(sizes):
        examples.append(Example(place, {}, None, {"input_ids": torch.zeros(1, size)}))

    def tokens_of(prompt_tokens):
        return prompt_tokens + 10

    micro_batches = pack(examples, tokens_of, budget=100)
    places = [example.place for micro_batch in micro_batches for example in micro_batch]
    assert sorted(places) == list(range(7))
    packed = [[sizes[example.place] for example in batch] for batch in micro_batches]
    assert packed == [[50], [31, 30], [12, 12, 9, 7]]
    for lengths in packed:
        assert len(lengths) * (max(lengths) + 10) <= 100 or len(lengths) == 1
    # too large for any budget: alone
    assert [len(batch) for batch in pack(examples, tokens_of, budget=1)] == [1] * 7


def test_every_epoch_visits_every_prompt_once_in_a_new_order():
    seen = [i for step in range(1, 7) for i in prompt_order(step, 5, 10, seed=3)]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    # no state: any step by itself
    assert prompt_order(4, 5, 10, seed=3) == seen[15:20]


def test_uniforms_of_a_prompt_depend_on_its_place_and_not_on_its_batch():
    both = uniforms_of(7, [0, 1], 4, 5, 0)
    second = uniforms_of(7, [1], 4, 5, 0)
    assert torch.equal(both[4:], second)
    assert not torch.equal(both[:4], second)
    assert not torch.equal(uniforms_of(8, [1], 4, 5, 0), second)
    assert not torch.equal(uniforms_of(7, [1], 4, 5, 1), second)
