"""The prompts of a training step: records in a fixed order, encoded, this rank's share of them."""

from dataclasses import dataclass

from tqdm import tqdm

from common.records import BadRecord, fail
from common.training import prompt_order


@dataclass
class Example:
    """A record with what the model is asked about it; place: where in the step it is."""

    place: int
    record: dict
    image: object  # PIL
    prompt: dict  # of encode_prompt()


class Prompts:
    """Records as Examples. A record that cannot be used gives way to the next good one.

    encode(place, record) -> Example, or raises BadRecord; `bad` holds the indices of such records.
    """

    def __init__(self, records, encode, args, rank, world):
        self.records = records
        self.encode = encode
        self.count = args.prompts_per_step
        self.seed = args.seed
        self.rank = rank
        self.world = world
        self.bad = set()

    def examples_of_step(self, step):
        """This rank's share of a step; a rank without any gets the first prompt, with weight 0."""
        order = prompt_order(step, self.count, len(self.records), self.seed)
        places = range(self.count)[self.rank :: self.world] or [0]
        return [self.example(place, order[place]) for place in places]

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
                    fail("no record of --data can be used")
            index = (index + 1) % len(self.records)
