"""open_clip models: a text and an image as unit vectors."""

from pathlib import Path

import open_clip
import torch
from tqdm import tqdm

from common.captions import load_image
from common.records import BadRecord, fail, require_files
from common.stage import positive_int
from common.vlm import reason_of, require_finite


class Clip:
    """An open_clip model that judges how well a text fits an image.

    name: a model that open_clip knows, or a folder with open_clip_config.json and weights.
    weights: open_clip's pretrained tag or a file; not used for a folder. `truncated` counts the
    texts that filled the context, so that their ends may be lost.
    """

    def __init__(self, name, weights=None, device="cpu"):
        source = name
        if Path(name).is_dir():
            source = f"local-dir:{name}"
            weights = None
        elif weights:
            require_files(weights)
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                source, weights, device=device, require_pretrained=True
            )
            self.tokenizer = load_tokenizer(source)
        except Exception as error:
            # open_clip raises RuntimeError, KeyError, OSError and plain Exception for this
            reason = reason_of(error).partition(" Available:")[0]
            flags = f"--clip {name} {weights or ''}".strip()
            fail(f"{flags} cannot be loaded: {reason}")
        require_finite(f"--clip {name}", model)
        self.model = model.eval()
        self.device = device
        self.truncated = 0
        # open_clip's own SimpleTokenizer has no pad_token_id and pads with 0
        self.pad_id = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0

    @torch.no_grad()
    def logit_scale(self):
        """The factor of a cosine, in nats."""
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def image_features(self, images):
        """Unit vectors (N, D) of PIL images."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return self.model.encode_image(pixels, normalize=True).float()

    @torch.no_grad()
    def text_features(self, texts):
        """Unit vectors (N, D) of texts."""
        tokens = self.tokenizer(texts).to(self.device)
        # no padding left: the end was cut, or just fits
        self.truncated += int((tokens != self.pad_id).all(-1).sum())
        return self.model.encode_text(tokens, normalize=True).float()

    def grouped_text_features(self, texts):
        """(B, G, D): every distinct text is encoded once; None gets that of the first text."""
        distinct = {}
        for group in texts:
            for text in group:
                if text is not None:
                    distinct.setdefault(text, len(distinct))
        index = [[distinct.get(text, 0) for text in group] for group in texts]
        return self.text_features(list(distinct))[torch.tensor(index, device=self.device)]

    def report_truncated(self):
        """Says how many texts may have lost their ends, if any."""
        if self.truncated:
            tqdm.write(f"{self.truncated} texts filled CLIP's context: what was cut is not judged")


def load_tokenizer(name):
    """The tokenizer of an open_clip model; a folder cannot have code of its own run by asking so.

    Its open_clip_config.json may hold tokenizer_kwargs, which open_clip passes on as they are.
    """
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    if text.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(name, trust_remote_code=False)
    return open_clip.get_tokenizer(name)


def load_other_images(records, root, max_pixels, count):
    """The first `count` readable images of distinct names; fewer than two end the program."""
    images = []
    for name in dict.fromkeys(record["image"] for record in records):
        if len(images) == count:
            break
        try:
            images.append(load_image(root, name, max_pixels))
        except BadRecord:
            continue
    if len(images) < 2:
        fail(
            "comparing with other images needs --clip-others of at least 2, and as many readable "
            "images: there is nothing to compare with"
        )
    return images


def add_clip_flags(parser, clip="ViT-B-16", weights="datacomp_xl_s13b_b90k"):
    """Which CLIP judges images and text."""
    parser.add_argument(
        "--clip", default=clip, help="open_clip model name, or a folder (%(default)s)"
    )
    parser.add_argument(
        "--clip-weights",
        default=weights,
        help="open_clip tag or file; not for a folder (%(default)s)",
    )
    parser.add_argument(
        "--clip-others",
        type=positive_int,
        default=64,
        help="images that the PMI over images compares with (%(default)s)",
    )
