"""Captions in the formats people have, and images as RGB.

JSONL {id, image, caption}; LLaVA / ShareGPT4V JSON, a list of {id, image, conversations}; COCO
captions JSON, whose captions of one image are joined. Image paths are relative to an image root.
"""

import collections
import json
import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from common.records import BadRecord, fail, read_jsonl, require_file

# Pillow starts Ghostscript for an EPS file, whatever its name is. JPEG includes the MPO of phones
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def read_captions(path):
    """Yields (line or item number, {id, image, caption} or BadRecord); ids are unique strings."""
    if Path(path).suffix == ".json":
        records = enumerate(_read_json(path), 1)
    else:
        records = read_jsonl(path, ())

    seen = set()
    for number, record in records:
        try:
            caption = _caption_record(record)
            if caption["id"] in seen:
                raise BadRecord(f"id {caption['id']!r} occurs twice")
            seen.add(caption["id"])
        except BadRecord as error:
            caption = error
        except (KeyError, TypeError, StopIteration, UnicodeEncodeError) as error:
            caption = BadRecord(f"not a caption record ({type(error).__name__} {error})")
        yield number, caption


def _caption_record(record):
    """{id, image, caption} of one record of any format."""
    if isinstance(record, BadRecord):
        raise record
    if "conversations" in record:
        turns = record["conversations"]
        record["caption"] = next(turn["value"] for turn in turns if turn["from"] == "gpt")

    caption = {"id": str(record["id"]), "image": record["image"], "caption": record["caption"]}
    if not isinstance(caption["image"], str) or not isinstance(caption["caption"], str):
        raise BadRecord("image and caption must be strings")
    # half a surrogate pair raises: it could not be written
    "".join(caption.values()).encode()
    return caption


def _read_json(path):
    """The records of a JSON file: a list of conversations, or COCO captions."""
    require_file(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(data, dict):
            return _coco_records(data)
        if isinstance(data, list):
            return data
        raise TypeError(f"a {type(data).__name__}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(
            f"{path}: neither a list of conversations nor COCO captions "
            f"({type(error).__name__}: {error})"
        )


def _coco_records(data):
    """One record per image, its captions joined, and a BadRecord per broken annotation."""
    captions = collections.defaultdict(list)
    broken = []
    for number, annotation in enumerate(data["annotations"], 1):
        text = annotation.get("caption")
        if not isinstance(text, str) or "image_id" not in annotation:
            broken.append(BadRecord(f"annotation {number} lacks image_id or caption"))
            continue
        text = text.strip()
        if not text.endswith((".", "!", "?")):
            text += "."
        captions[annotation["image_id"]].append(text)

    records = []
    for image in data["images"]:
        caption = " ".join(captions[image.get("id")])
        records.append({"id": image.get("id"), "image": image.get("file_name"), "caption": caption})
    return records + broken


# ---------------------------------------------------------------- images


def image_root(given, data):
    """The folder that image paths are relative to: --image-root, or that of the data file."""
    if given and not Path(given).is_dir():
        fail(f"--image-root {given}: no such folder")
    return Path(given or Path(data).parent)


def load_image(root, name, max_pixels):
    """open_image() of root/name; a path that leaves the root is a BadRecord."""
    # links below the root may lead anywhere
    if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
        raise BadRecord(f"image {name} lies outside the image root {root}")
    path = Path(root) / name
    if os.path.exists(path) and not os.path.isfile(path):
        # a pipe would be waited for
        raise BadRecord(f"image {path} is no regular file")
    return open_image(path, path, max_pixels)


def open_image(file, path, max_pixels):
    """PIL image of a file, called `path` in errors, in RGB and of at most `max_pixels`.

    It is upright (EXIF), the first frame, with transparency on white. Photos of 90 to 179
    megapixels are read; larger ones, and whatever Pillow cannot read, are a BadRecord.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image = _upright_rgb(image)
    except FileNotFoundError:
        raise BadRecord(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise BadRecord(f"image {path} cannot be read (it is broken, or none of {known})") from None
    except Exception as error:
        # Pillow's decoders raise whatever a broken file leads them to: struct.error, KeyError
        raise BadRecord(f"image {path} cannot be read ({error})") from None

    scale = (max_pixels / (image.width * image.height)) ** 0.5
    if scale < 1:
        # here, as not every processor heeds from_pretrained(max_pixels=) (transformers#41955)
        width = max(1, min(int(image.width * scale), max_pixels))
        height = max(1, min(int(image.height * scale), max_pixels // width))
        image = image.resize((width, height), Image.BICUBIC)
    return image


def _upright_rgb(image):
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # convert() would clip all shades to white
        image = image.point(lambda shade: shade / 256).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
