"""The two tasks of LVRPO: reading an image, and drawing one.

Both have the methods of FillMask in grpo_train.py, which is all that the loop asks of a task.
Reading *is* FillMask, with other rewards. Drawing differs in what a completion is: the codes of an
image, which a VQ-VAE turns into pixels.
"""

import torch

from common.captions import load_image
from common.drawings import codes_of_drawings, drawings_of_codes, encode_drawing
from common.prompts import Example
from common.records import BadRecord
from grpo_train import FillMask


class Reading(FillMask):
    """Fill the mask of a caption, or answer a question, from the image."""

    name = "reading"


class Drawing(FillMask):
    """Draw what a prompt says; to imitate, it needs an image with each."""

    name = "drawing"
    medium = "image"
    flag = "--prompts"

    def __init__(self, args, root, policy, *rest):
        super().__init__(args, root, policy, *rest)
        self.medium_rows = policy.media["image"].rows
        self.max_length = policy.media["image"].length

    def encode(self, place, record):
        image = None
        if self.scorer is None:
            if not isinstance(record.get("image"), str):
                raise BadRecord("it has no image to imitate")
            image = load_image(self.root, record["image"], self.args.max_pixels)
        encoded = encode_drawing(self.policy.model, self.processor, record["prompt"])
        return Example(place, record, image, encoded)

    def tokens_of(self, prompt_tokens, group):
        """Tokens of a pass over a prompt and its drawings, for each of which it is repeated."""
        return self.medium_rows * group * (prompt_tokens + self.max_length)

    def decode(self, ids, mask):
        """Drawings as B lists of G PIL images."""
        images = drawings_of_codes(self.policy.model, self.policy.processor, ids)
        group = self.args.group_size
        return [images[i : i + group] for i in range(0, len(images), group)]

    def reward(self, examples, completions):
        """{component: (B, G)} of completions[b][g]."""
        return self.scorer([example.record for example in examples], completions)

    def sft_completions(self, examples):
        """ids and mask (B, S): the codes of the images that imitation learns to draw."""
        images = [example.image for example in examples]
        ids = codes_of_drawings(self.policy.model, self.policy.processor, images)
        return ids, torch.ones_like(ids)

    def heading(self, example):
        """What samples.txt shows of a prompt."""
        return example.record["prompt"]

    def describe(self, example, completion):
        """What samples.txt shows of a drawing: nothing, as samples/step-N.png does."""
        return ""
