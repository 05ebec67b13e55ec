"""The prompts of a training step: records in a fixed order, encoded, this rank's share of them."""

import contextlib
from dataclasses import dataclass, replace

from tqdm import tqdm

from common.records import BadRecord, fail
from common.training import prompt_order

# how often a step may hold the same prompt
MOST_REPEATS = 100
IDLE = -1  # the place of an Example that only keeps its rank in step with others


@dataclass
class Example:
    """A record with what the model is asked about it; place: where in the step it is."""

    place: int
    record: dict
    image: object  # PIL
    prompt: dict  # of encode_prompt()

    @property
    def is_idle(self):
        """Whether this has weight 0."""
        return self.place == IDLE

    def as_idle(self):
        """A copy of weight 0."""
        return replace(self, place=IDLE)


def two_lengths(encode, records, among=8):
    """The prompt of the first usable record, and the first of another length if there is one.

    encode(record) -> encode_prompt(), or raises BadRecord. Only `among` records are tried.
    """
    prompts = []
    for record in records[:among]:
        with contextlib.suppress(BadRecord):
            prompt = encode(record)
            # one with other tensors, as without an image, cannot share its pass
            if not prompts or prompt.keys() == prompts[0].keys():
                prompts.append(prompt)
        if prompts and prompts[-1]["input_ids"].shape != prompts[0]["input_ids"].shape:
            return [prompts[0], prompts[-1]]
    return prompts[:1]


class Prompts:
    """Records as Examples. A record that cannot be used gives way to the next good one.

    encode(place, record) -> Example, or raises BadRecord; `bad` holds the indices of such records.
    places: a range, of the prompts of a step those that come from here. flag: names their file.
    """

    def __init__(self, records, encode, places, seed, flag="--data"):
        if len(places) > MOST_REPEATS * len(records):
            # all of a step are encoded and kept in memory
            fail(
                f"--prompts-per-step asks for {len(places)} of {flag}, which holds {len(records)}: "
                "lower it"
            )
        self.records = records
        self.encode = encode
        self.places = places
        self.seed = seed
        self.flag = flag
        self.bad = set()

    def examples_of_step(self, step, rank=0, world=1):
        """This rank's share of a step: the places that leave its number when divided by world."""
        order = prompt_order(step, len(self.places), len(self.records), self.seed)
        examples = []
        for place, index in zip(self.places, order):
            if place % world == rank:
                examples.append(self.example(place, index))
        return examples

    def first(self):
        """The first Example that can be used."""
        return self.example(self.places[0], 0)

    def two_lengths(self):
        """One or two of the first encoded prompts, of different lengths if there are two."""
        return two_lengths(lambda record: self.encode(self.places[0], record).prompt, self.records)

    def example(self, place, index):
        """The Example of record `index`, or of the next one that can be used."""
        while True:
            record = self.records[index]
            try:
                if index not in self.bad:
                    return self.encode(place, record)
            except BadRecord as error:
                self.bad.add(index)
                tqdm.write(f"skipped record {record['id']}: {error}")
                if len(self.bad) == len(self.records):
                    fail(f"no record of {self.flag} can be used; of the last one: {error}")
            index = (index + 1) % len(self.records)
