"""Stage 1: which sentences of a caption need the picture?

The model reads image and caption as if it had written the caption (teacher forcing). The visual dependency of a
sentence s is the share of attention that its tokens pay to the picture (MMRPT, arXiv 2512.07203):

    D_vis(s) = 1/(|s| |L|)  sum_{l in L} sum_{t in s}   sum_{v in V} A_l(t, v) / sum_{x in V u T} A_l(t, x)        (1)

L = the chosen layers, V = the visual tokens, T = the caption's tokens, A_l = attention of layer l.
Ours, as no code was published: heads are averaged before the ratio; chat template, BOS and question are neither in V
nor in T (they are attention sinks); a word is scored by the steps that *produce* its tokens, A_l(t - 1, .), because what
position t attends to decides token t + 1.

    python score_dependency.py                                                   # the toy world
    python score_dependency.py --model Qwen/Qwen2.5-VL-3B-Instruct --data captions.jsonl --out scores.jsonl
    torchrun --nproc_per_node 8 score_dependency.py --model ... --data ... --out ...

in:   JSONL {id, image, caption}, or LLaVA / ShareGPT4V JSON, or COCO captions JSON
out:  JSONL {id, image, caption, sentences: [{text, start, end, score, ablation?, words: [{start, end, score, own}]}]}
      start and end count characters of the caption; score is in [0, 1]; ablation in nats a token; own is the share
      of a word's own rows, those that the score of its sentence is made of
      the first --page records also have attention: {rows, columns, sentences: [[share of each cell], ...]}, where in the
      picture the score of each sentence comes from, row by row from the top left; null where tokens have no such places
      OUT.html, a page to look at these
"""
import argparse
import base64
import collections
import contextlib
import ctypes
import datetime
import hashlib
import heapq
import html
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAPTION_PROMPT = "Describe this image in detail."
warnings.simplefilter("ignore", Image.DecompressionBombWarning)       # photos of 90 to 179 megapixels are read, larger refused


# ------------------------------------------------------------------- text: sentences and words as character spans

ABBREVIATION = re.compile(r"^\s*\d+\.$|(?:^|[\s(\"'“‘])"
                          r"(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|cf|fig|no|approx|ca|inc|co|mt|ave|dept|"
                          r"est|vol|pp|(?:[a-z]\.)*[a-z])\.$", re.IGNORECASE)
SENTENCE_END = re.compile(r"[。！？।؟۔]+[”’」』）]*|[.!?…]+[\"'”’)\]»]*(?=\s|$)|\n+")
CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
PUNCTUATION = (r"\s!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u060c\u061b\u061f\u06d4\u0964"
               r"\u2010-\u205e\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20")
WORD = re.compile(f"[{CJK}]|[^{CJK}{PUNCTUATION}]+(?:[.,:'’/&_-][^{CJK}{PUNCTUATION}]+)*")  # 3.5, don't, well-lit: one


def split_words(text, start=0, end=None):
    """Character spans of the words in text[start:end], without the punctuation around them; a CJK character is one."""
    return [m.span() for m in WORD.finditer(text, start, len(text) if end is None else end)]


def split_sentences(text):
    """Character spans of the sentences of `text`: in order, disjoint, trimmed, each with at least one word.

    They end after . ! ? … (and the quotes that close with them), after CJK full stops and at line ends; not after
    abbreviations and initials, inside decimals, or where the next word is lower-case.
    """
    spans, start = [], 0
    for end, mark in [*((m.end(), m[0]) for m in SENTENCE_END.finditer(text)), (len(text), "\n")]:
        following = text[end:].lstrip()[:1]
        if mark[0] in ".!?…" and following and (following.islower() or ABBREVIATION.search(text[start:end])):
            continue
        left = start + len(text[start:end]) - len(text[start:end].lstrip())
        if split_words(text, start, end):
            spans.append((left, left + len(text[left:end].rstrip())))
        start = end
    return spans


def tokens_of(span, offsets):
    """Indices of the tokens whose characters overlap `span`; offsets: one (start, end) a token."""
    return [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]


# ------------------------------------------------------------------- in: captions and pictures


class BadRecord(ValueError):
    """A record that cannot be used; the message says why. It is skipped, named and counted."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())                   # one line, whatever a library or a path says


def fail(message):
    raise SystemExit(f"error: {message}")


TEXT = ("image", "caption", "masked_caption", "sentence", "answer", "prediction")           # fields that must be strings


def read_jsonl(path, fields):
    """Yields (line number, dict with all `fields`), or (line number, BadRecord)."""
    if not Path(path).is_file():
        fail(f"{path} is a folder: name the file in it" if Path(path).is_dir() else f"{path}: no such file")
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\ud" in line.lower():                  # half a surrogate pair raises: no tokenizer and no file takes it
                    json.dumps(row, ensure_ascii=False).encode()
                missing = [f for f in fields if f not in row or f in TEXT and not isinstance(row[f], str)] if isinstance(
                    row, dict) else list(fields)
            except (ValueError, RecursionError) as e:
                row, missing = BadRecord(f"not JSON ({e})"), []
            yield number, BadRecord(f"lacks {', '.join(missing)}, or it is no text") if missing else row


def read_captions(path):
    """Yields (line or item number, {id, image, caption} or BadRecord) from any of the three formats; ids are unique."""
    rows, seen = read_jsonl(path, ()), set()
    if Path(path).suffix == ".json":
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            rows = enumerate(_coco(data) if isinstance(data, dict) else list(data) * isinstance(data, list), 1)
            if not isinstance(data, (dict, list)):
                raise TypeError(f"a {type(data).__name__}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            fail(f"{path}: neither a list of conversations nor COCO captions ({type(e).__name__}: {e})")
    for number, row in rows:
        try:
            if isinstance(row, BadRecord):
                raise row
            if "conversations" in row:                                                     # LLaVA, ShareGPT4V
                row["caption"] = next(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
            record = {"id": str(row["id"]), "image": row["image"], "caption": row["caption"]}
            if not (isinstance(record["image"], str) and isinstance(record["caption"], str)):
                raise BadRecord("image and caption must be strings")
            if record["id"] in seen:
                raise BadRecord(f"id {record['id']!r} stands twice")
            "".join(record.values()).encode()                         # half a surrogate pair raises: it could not be written
            seen.add(record["id"])
        except BadRecord as e:
            record = e
        except (KeyError, TypeError, StopIteration, UnicodeEncodeError) as e:
            record = BadRecord(f"not a caption record ({type(e).__name__} {e})")
        yield number, record


def _coco(data):
    captions, broken = collections.defaultdict(list), []
    for n, annotation in enumerate(data["annotations"], 1):
        text = annotation.get("caption")
        if isinstance(text, str) and "image_id" in annotation:
            captions[annotation["image_id"]].append(text.strip() + "." * (not text.strip().endswith((".", "!", "?"))))
        else:
            broken.append(BadRecord(f"annotation {n} lacks image_id or caption"))
    return [{"id": i.get("id"), "image": i.get("file_name"), "caption": " ".join(captions[i.get("id")])}
            for i in data["images"]] + broken


def image_root(given, data):
    """The folder that image paths are relative to: --image-root, or that of the data file."""
    if given and not Path(given).is_dir():                   # said once, not once a record
        fail(f"--image-root {given}: no such folder")
    return Path(given or Path(data).parent)


def load_image(root, name, max_pixels):
    """open_image() of root/name."""
    if os.path.isabs(name) or os.path.normpath(name).startswith(".."):           # links below the root may lead anywhere
        raise BadRecord(f"image {name} lies outside the image root {root}")
    return open_image(Path(root) / name, Path(root) / name, max_pixels)


def open_image(file, path, max_pixels):
    """PIL image of a file, called `path`, in RGB: upright (EXIF), first frame, transparency on white, at most max_pixels."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):                                    # convert() would clip all shades to white
                image = image.point(lambda shade: shade / 256).convert("L")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
    except FileNotFoundError:
        raise BadRecord(f"image {path} does not exist") from None
    except Exception as e:               # Pillow's decoders raise whatever a broken file leads them to: struct.error, KeyError
        raise BadRecord(f"image {path} cannot be read ({e})") from None
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    if scale < 1:     # resized here, because not every processor heeds from_pretrained(max_pixels=) (transformers#41955)
        width = max(1, min(int(image.width * scale), max_pixels))
        image = image.resize((width, max(1, min(int(image.height * scale), max_pixels // width))), Image.BICUBIC)
    return image


def ahead(function, items):
    """function(item) of the items in order; a thread works on the next one while the caller uses the last."""
    def alone():
        torch.get_num_threads()                        # else the first use of torch in this thread would undo the next line
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=alone) as thread:
        # more OpenMP threads than cores make those of the caller sleep between operators: training took twice as long
        thread.submit(int).result()
        torch.set_num_threads(threads)
        waiting = None
        for item in itertools.chain(items, [thread]):                     # the thread itself: no more items
            following = thread.submit(function, item) if item is not thread else None
            if waiting:
                yield waiting.result()
            waiting = following


# ------------------------------------------------------------------- out: JSONL that survives a kill, from all ranks


def distributed():
    """(rank, world size, device) of this process; joins the others if torchrun started it."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)               # PR_SET_PDEATHSIG: no rank writes on when torchrun was killed
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # torch#135712: torchrun's store still holds the addresses of dead ranks when it restarts them, hence the prefix. Nodes
        # may count restarts differently: several of them need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead
        one_node, timeout = os.environ.get("GROUP_WORLD_SIZE") == "1", datetime.timedelta(minutes=30)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"] if one_node else "0",
                                 next(dist.rendezvous("env://", timeout=timeout))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timeout)
    return rank, world, device


def fingerprint(path):
    """Short hash of a file, or of a checkpoint folder (names, sizes and last MB of its files); a hub id is its own."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        return str(path)
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as f:
            f.seek(max(0, file.stat().st_size - 2**20) if path.is_dir() else 0)
            while block := f.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing(path, mode="w"):
    """open(path, mode) for text; an error names the file, which that of a write to a full disk does not by itself."""
    try:
        with open(path, mode, encoding="utf-8") as f:
            yield f
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def write_atomically(path, lines):
    """Writes an iterable of strings; the file is there whole or not at all."""
    with writing(f"{path}.tmp") as f:
        f.writelines(lines)
        f.flush()
        os.fsync(f.fileno())                                     # or a power cut may leave the new name on an empty file
    os.replace(f"{path}.tmp", path)


def same_run(path, settings):
    """Whether `path`, a run.json, holds these settings; False if there is none. Another run's file ends the program."""
    if not Path(path).exists():
        return False
    try:
        old = dict(json.loads(Path(path).read_text(encoding="utf-8"))["settings"])
    except (ValueError, LookupError, TypeError):
        fail(f"{path} is not what a run writes there: choose another --out, or delete it")
    settings = json.loads(json.dumps(settings))                                # a tuple comes back as a list
    differs = [f"{k} was {old.get(k)}, is {settings.get(k)}" for k in {**old, **settings} if old.get(k) != settings.get(k)]
    if differs:
        fail(f"{path} belongs to another run ({'; '.join(differs)}): choose another --out, or delete it")
    return True


def map_jsonl(rows, start, out, settings, source, batch_size):
    """Writes to `out` the records that a stage makes of `rows`, which yields (number, dict or BadRecord), in their order.

    start() loads what the stage needs and returns prepare(row), the CPU work of one row, done ahead in a thread, and
    process([prepared, ...]) -> [[record, ...], ...]. A BadRecord that prepare raises costs that row alone: it is named and
    counted. Every rank takes its share of each batch and rank 0 appends all to OUT.part, so a kill costs one batch and the
    same command goes on behind it. OUT.run.json keeps settings, counts and seconds. Returns {rows, written, skipped}.
    """
    rank, world, _ = distributed()
    out, info, part = Path(out), Path(f"{out}.run.json"), Path(f"{out}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    known = same_run(info, settings)
    if known and out.exists():
        part.unlink(missing_ok=True)                             # its writer was killed just before it
        counts = json.loads(info.read_text())["counts"]
        print(f"reused {out}: complete, {counts['written']} records, {counts['skipped']} skipped") if not rank else None
        return counts
    if out.exists():
        fail(f"{out} exists and is not of this stage: choose another --out, or delete it")
    (prepare, process), began = start(), time.time()             # a mistyped --model ends here and binds no settings
    share, done = batch_size * world, [0]
    if world > 1:
        dist.barrier()                                           # nobody writes before all have looked
    if rank == 0:
        write_atomically(info, [json.dumps({"settings": settings}, indent=1)])
        if not known:                                            # not of these settings, if it is there at all
            part.unlink(missing_ok=True)
        part.touch()
        with open(part, "rb+") as f:                             # whole batches, so that batches after a kill are those
            done = [sum(line.endswith(b"\n") for line in f) // share * share]                           # without it
            f.seek(0)
            f.truncate(sum(map(len, itertools.islice(f, done[0]))))
        if done[0]:
            print(f"resuming {out} behind row {done[0]}")
    if world > 1:
        dist.broadcast_object_list(done)

    def load(batch):
        prepared = []
        for number, row in batch[rank::world]:
            try:
                if isinstance(row, BadRecord):
                    raise row
                prepared.append(prepare(row))
            except BadRecord as e:
                tqdm.write(f"skipped {source}:{number}: {e}", file=sys.stderr)
                prepared.append(e)
        return len(batch), prepared

    rows = itertools.islice(rows, done[0], None)
    batches = iter(lambda: list(itertools.islice(rows, share)), [])
    with tqdm(desc=out.name, initial=done[0], unit="row", disable=rank > 0) as bar:
        for count, prepared in ahead(load, batches):
            good = [p for p in prepared if not isinstance(p, BadRecord)]
            made = iter(process(good) if good else ())
            results = [{"skipped": str(p)} if isinstance(p, BadRecord) else {"out": next(made)} for p in prepared]
            if world > 1:
                gathered = [None] * world
                dist.all_gather_object(gathered, results)
                results = [gathered[i % world][i // world] for i in range(count)]
            if rank == 0:
                with writing(part, "a") as f:
                    f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results))
            bar.update(count)
    counts = [collections.Counter(rows=0, written=0, skipped=0)]
    if rank == 0:
        for _, row in read_jsonl(part, ()):
            counts[0].update(rows=1, written=len(row.get("out", ())), skipped="skipped" in row)
        write_atomically(info, [json.dumps({"settings": settings, "counts": counts[0],
                                            "seconds": round(time.time() - began, 1)}, indent=1)])
        write_atomically(out, (json.dumps(r, ensure_ascii=False) + "\n"
                               for _, row in read_jsonl(part, ()) for r in row.get("out", ())))
        part.unlink()
    if world > 1:
        dist.broadcast_object_list(counts)
    return counts[0]


def fail_if_empty(out, counts, message):
    """Ends a stage that wrote no record. Its empty output goes, so that the same command works once the cause is put right."""
    if not counts["written"]:
        for path in (out, f"{out}.run.json"):
            Path(path).unlink(missing_ok=True)
        fail(message)


LOST_PEER = re.compile("gloo.*(by peer|pipe)|ncclRemoteError", re.DOTALL | re.IGNORECASE)


def cli(main):
    """Runs a stage: a full disk, Ctrl-C or the end of another rank ends it in one line, as what was written is whole."""
    lost = False
    try:
        try:
            main()
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on from here")
        except OSError as e:
            fail(f"{e.filename or 'output'}: {e.strerror or e}; what was written stays, the same command goes on from there")
        except RuntimeError as e:
            if not (lost := bool(LOST_PEER.search(str(e)))):
                raise
            fail(f"rank {os.environ['RANK']}: another rank ended; its message says why")
        if dist.is_initialized():                                # not after an error: NCCL could wait for the others
            dist.destroy_process_group()
    except SystemExit as e:
        for bar in list(getattr(tqdm, "_instances", ())):        # or the message would stand behind it
            bar.close()
        if isinstance(e.code, str) and "TORCHELASTIC_ERROR_FILE" in os.environ:      # torchrun shows the earliest as the cause
            report = {"message": e.code, "extraInfo": {"timestamp": int(time.time()) + 60 * lost}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": report}))
        raise


# ------------------------------------------------------------------- the model: one sequence layout for all stages
#
#     [ padding | prompt with visual tokens ][ response | padding ]        prompts end, responses begin, at one column


def load_vlm(name, device, trust_remote_code=False, dtype=None):
    """(model in eval mode, processor) of a hub id or folder; dtype: bf16 on a GPU, fp32 on a CPU. Ends the program if unfit."""
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation="sdpa",
                                                            trust_remote_code=trust_remote_code)
    except Exception as e:             # transformers, tokenizers, safetensors and torch each raise their own for a broken file
        fail(f"{name} cannot be loaded as a vision-language model: {(str(e).strip() or type(e).__name__).splitlines()[0]}")
    for what, there in (("image processor", getattr(processor, "image_processor", None)),
                        ("chat template", getattr(processor, "chat_template", None)),
                        ("image token", getattr(model.config, "image_token_id", None)),
                        ("fast tokenizer", getattr(getattr(processor, "tokenizer", None), "is_fast", None))):
        if there is None or there is False:
            fail(f"{name} has no {what}: choose an instruction-tuned vision-language checkpoint")
    try:
        placed = processor.image_token in chat_prompt(processor, CAPTION_PROMPT)
    except Exception as e:                                                                      # whatever a template raises
        fail(f"{name}: its chat template cannot be used ({e})")
    if not placed:
        fail(f"{name}: its chat template places no image: choose an instruction-tuned vision-language checkpoint")
    return model.to(device).eval(), processor


def chat_prompt(processor, text, images=1):
    """The chat-formatted prompt: `images` picture placeholders, then `text`, then the opening of the answer."""
    if processor.image_token in text:
        raise BadRecord(f"the text contains the image token {processor.image_token}")
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def encode_prompt(model, processor, prompt, images, room=0):
    """What the processor makes of one prompt and its PIL images, if any: CPU tensors, input_ids (1, P), ... for join_prompts().

    Never truncates, which would cut through visual tokens: images without visual tokens, or a prompt that does not fit the
    model's positions with `room` tokens behind it, is a BadRecord. Needs no model pass, so a thread can do it ahead.
    """
    try:
        row = dict(processor(text=[prompt], images=[images] if images else None, return_tensors="pt"))
    except ValueError as e:                                  # a picture of 1000 x 1 pixels, a video token in the text
        raise BadRecord(f"the processor refuses it ({e})") from None
    length, visual = row["input_ids"].shape[1], (row["input_ids"] == model.config.image_token_id).sum()
    limit = model.config.get_text_config().max_position_embeddings
    if images and not visual:
        raise BadRecord("no visual tokens: does the chat template of this checkpoint place images?")
    if length + room > limit:
        raise BadRecord(f"prompt of {length} tokens, {visual} of them visual, with {room} behind it exceeds the model's "
                        f"{limit}: lower --max-pixels or shorten the text")
    return row


def join_prompts(model, rows):
    """Model inputs of B prompts of encode_prompt(): texts left-padded, pixel tensors zero-padded, as their processors do.

    Returns a dict on the model's device: input_ids, attention_mask (B, P), the family's pixel tensors, and position_ids
    (B, P), or (3, B, P) for the M-RoPE of Qwen-VL.
    """
    def padded(name, tensor, sizes):
        gaps = [size - have for size, have in zip(sizes, tensor.shape[1:])]
        sides = [(gap, 0) if name in ("input_ids", "attention_mask", "mm_token_type_ids") else (0, gap) for gap in gaps]
        value = model.config.get_text_config().pad_token_id or 0 if name == "input_ids" else 0
        return F.pad(tensor, [n for side in reversed(sides) for n in side], value=value)         # F.pad: last dimension first

    batch = {}
    for name in rows[0]:
        sizes = [max(s) for s in zip(*(row[name].shape[1:] for row in rows))]
        batch[name] = torch.cat([padded(name, row[name], sizes) for row in rows]).to(model.device)
    if hasattr(model.model, "get_rope_index"):     # explicit positions: rope_deltas kept on the model go stale (PR#43952)
        grids = {k: v for k, v in batch.items() if k in ("mm_token_type_ids", "image_grid_thw")}
        batch["position_ids"] = model.model.get_rope_index(batch["input_ids"], attention_mask=batch["attention_mask"],
                                                           **grids)[0]
    else:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batch.pop("mm_token_type_ids", None)           # only positions need it
    return batch


def encode_prompts(model, processor, prompts, images, room=0):
    """join_prompts() of encode_prompt() of each; images: a list of PIL images for each prompt."""
    return join_prompts(model, [encode_prompt(model, processor, p, i, room) for p, i in zip(prompts, images)])


def encode_responses(processor, texts, device, eos=None):
    """Right-padded ids and mask (B, S) of responses, and for each the character span of its tokens; eos is appended."""
    tokenizer, rows = processor.tokenizer, []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if processor.image_token_id in encoded.input_ids or not encoded.input_ids:
            raise BadRecord(f"the text contains the image token {processor.image_token}" if text else "the text is empty")
        rows.append((encoded.input_ids + ([] if eos is None else [eos]), encoded.offset_mapping))
    ids = torch.zeros(len(rows), max(len(r) for r, _ in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, _) in enumerate(rows):
        ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), 1
    return ids.to(device), mask.to(device), [offsets for _, offsets in rows]


def response_positions(position_ids, length):
    """Positions of `length` tokens that follow prompts at position_ids (B, P) or (3, B, P): (B, S) or (3, B, S).

    M-RoPE goes on behind the largest of its three coordinates, wherever in the prompt that stands.
    """
    last = position_ids.amax(-1, keepdim=True)
    if position_ids.ndim == 3:
        last = last.amax(0, keepdim=True).expand(3, -1, -1)
    return last + torch.arange(1, length + 1, device=position_ids.device)


def append_responses(batch, ids, mask):
    """The model inputs of prompts followed by responses (B, S): one plain pass over everything."""
    joined = {"input_ids": ids, "attention_mask": mask, "position_ids": response_positions(batch["position_ids"], ids.shape[1])}
    return {**batch, **{k: torch.cat([batch[k], v.to(batch[k].dtype)], -1) for k, v in joined.items()}}


def token_logps(logits, ids):
    """log p of ids (B, S) under logits (B, S, vocabulary), in fp32: (B, S), in nats."""
    return -F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)


# ------------------------------------------------------------------- the method: equation (1)


def visual_share(query, key, mask, scaling, visual, text, rows=256, cells=None):
    """The inner fraction of eq. (1) for one layer: sum_V A / sum_{V u T} A of the last R = S + 1 rows, S = text.shape[1].

    query (B, H, N, d), key (B, H_kv, N, d); mask: None (causal), boolean or additive (B, 1, N, N);
    visual (B, N) and text (B, S) are boolean. Returns (B, R) in fp32: the row that produces the first caption token, which
    has no T yet and hence share 1, then those of the caption. Of the N x N map only `rows` rows of the heads that share a
    key exist at a time. cells: None, or (B, R, N), to which the part of each visual key in the share of each row is added.
    """
    N, R, groups, shares = key.shape[2], text.shape[1] + 1, query.shape[1] // key.shape[1], []
    columns = torch.arange(N, device=key.device)
    sums = torch.stack([visual.float(), F.pad(text.float(), (N - text.shape[1], 0))], -1)            # (B, N, 2): V, T
    for start in range(N - R, N, rows):
        stop, total = min(start + rows, N), 0
        seen = columns <= columns[start:stop, None] if mask is None else mask[:, :, start:stop]
        for head in range(key.shape[1]):
            q = query[:, head * groups:(head + 1) * groups, start:stop].float()
            scores = q @ key[:, head:head + 1].float().transpose(-1, -2) * scaling                   # (B, groups, rows, N)
            scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
            total = total + scores.softmax(-1).sum(1) / query.shape[1]                               # heads averaged
        shares.append(total @ sums)                                                                  # (B, rows, 2)
        if cells is not None:
            cells[:, start - N + R:stop - N + R] += total * sums[:, None, :, 0] / shares[-1].sum(-1, keepdim=True)
    to_visual, to_text = torch.cat(shares, 1).unbind(-1)
    return to_visual / (to_visual + to_text)


def _recording_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The model's fast attention; layers marked by a Scorer also add their visual_share to it on the way."""
    scorer = getattr(module, "dependency_scorer", None)
    if scorer is not None:
        scorer.total = scorer.total + visual_share(query, key, attention_mask, scaling, scorer.visual, scorer.text,
                                                   cells=scorer.cells)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("visual_share", _recording_attention)
AttentionMaskInterface.register("visual_share", sdpa_mask)


class Scorer:
    """A loaded model whose chosen decoder layers record D_vis while they run. layers: indices, default upper-middle.

    ablation: also the log-prob gain of the image. Without it nothing above the last chosen layer is needed, nor kept.
    """

    def __init__(self, model, processor, layers=None, ablation=False):
        self.model, self.processor, self.ablation, self.cells = model, processor, ablation, None
        decoder, n = model.get_decoder(), len(model.get_decoder().layers)
        self.layers = layers or range(n // 2, max(n // 2 + 1, n * 3 // 4))
        if max(self.layers) >= n:
            fail(f"--layers: the decoder has layers 0 to {n - 1}")
        model.set_attn_implementation({"text_config": "visual_share"})
        for i in self.layers:
            decoder.layers[i].self_attn.dependency_scorer = self
        if not ablation:
            decoder.layers = decoder.layers[:max(self.layers) + 1]

    def prepare(self, image, caption):
        """The CPU work for one PIL image and caption, for __call__; raises BadRecord. A thread can do it ahead."""
        ids, _, offsets = encode_responses(self.processor, [caption], "cpu")
        pictures = [image] + [Image.new("RGB", image.size, (127, 127, 127))] * self.ablation
        prompt = chat_prompt(self.processor, CAPTION_PROMPT)
        return [encode_prompt(self.model, self.processor, prompt, [p], ids.shape[1]) for p in pictures], ids[0], offsets[0]

    @torch.no_grad()
    def __call__(self, prepared, maps=False):
        """Per caption of S tokens: (S + 1 visual shares, S log-prob gains of the image or None, S character spans).

        maps: and, as a fourth, (S, V): the share of each visual token in that of each caption token, of which it is the sum.
        """
        rows, ids, offsets = zip(*prepared)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(self.model.device)
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.model.device)

        def run(prompts, maps=False):
            batch = append_responses(join_prompts(self.model, prompts), ids, mask)
            self.cells = torch.zeros(len(ids), ids.shape[1] + 1, batch["input_ids"].shape[1]).to(ids.device) if maps else None
            self.total, self.visual, self.text = 0, batch["input_ids"] == self.model.config.image_token_id, mask.bool()
            hidden = self.model.model(**batch, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1:-1]
            if not self.ablation:
                return self.total / len(self.layers), None
            return self.total / len(self.layers), torch.cat([token_logps(self.model.lm_head(h), i)       # a row at a time:
                                                             for h, i in zip(hidden.split(1), ids.split(1))])  # S x vocabulary

        shares, with_image = run([r[0] for r in rows], maps)
        if maps:
            maps = [(cells[1:len(o) + 1, v] / len(self.layers)).cpu() for cells, v, o in zip(self.cells, self.visual, offsets)]
            self.cells = None
        gains = [None] * len(rows)
        if self.ablation:  # the cross-check: log p(token | image) - log p(token | grey image of the same size)
            gains = (with_image - run([r[1] for r in rows])[1]).tolist()
        return list(zip(shares.tolist(), gains, offsets, *([maps] if maps else [])))


def score_record(record, shares, gains, offsets):
    """The output record: shares (S + 1,) averaged over the rows of the tokens of each sentence and word ("own", for a word),
    and over the rows that produced each word."""
    def mean(values, span):
        inside = tokens_of(span, offsets)
        return round(sum(values[i] for i in inside) / len(inside), 6) if inside else None

    sentences = []
    for start, end in split_sentences(record["caption"]):
        sentence = {"text": record["caption"][start:end], "start": start, "end": end, "score": mean(shares[1:], (start, end))}
        if gains:
            sentence["ablation"] = mean(gains, (start, end))
        sentence["words"] = [{"start": s, "end": e, "score": mean(shares[:-1], (s, e)), "own": mean(shares[1:], (s, e))}
                             for s, e in split_words(record["caption"], start, end)]
        sentences.append(sentence)
    return {**record, "sentences": sentences}


def ranks(values):
    """The ranks of a sequence, from 1, ties at their mean rank: (N,) in fp64."""
    _, inverse, counts = torch.as_tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation of two sequences; nan if one is constant."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item() if len(x) > 1 else float("nan")


def show(path, count=5):
    """Prints the most and the least visual sentences of a scores file."""
    def sentences():
        return ((s["score"], row["id"], s["text"]) for _, row in read_jsonl(path, ("sentences",)) for s in row["sentences"])
    top, bottom = heapq.nlargest(count, sentences()), heapq.nsmallest(count, sentences())
    print("\nvisual dependency, most and least:")
    for score, name, text in [*top, *reversed(bottom)]:
        print(f"  {score:.3f} {'█' * round(score * 20):20s} {name:>8.8s}  {text[:70]}")


# ------------------------------------------------------------------- out: a page of pictures, captions and attention


# Ten steps of equal CIE lightness, pale to dark, so that they also keep their order in grey and for colour-blind readers
SCALE = "f8f4da d5e1b2 a4d098 68be8f 13a992 0a8f92 0b768b 135d81 2b4465 2b2f43".split()
HEAD = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1"><title>$title</title>
<meta http-equiv=Content-Security-Policy content="default-src 'none';img-src data:;style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<style>
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2128;--dim:#59636e;--line:#d8dee4}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171c;--ink:#e3e7ec;--dim:#98a2ad;--line:#30363d}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:0 auto;padding:1rem;background:var(--paper);color:var(--ink)}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
header p{max-width:46rem;margin:.4rem 0}small,figcaption{color:var(--dim)}
@media print{body{font-size:10pt;max-width:none;padding:0;print-color-adjust:exact}}
"""
PAGE = HEAD + """$light
@media screen and (prefers-color-scheme:dark){
$dark}
h2{grid-column:1/-1;font:600 .8rem system-ui;color:var(--dim);margin:0}
h2,.t,figcaption{overflow-wrap:anywhere}
.key{position:sticky;top:0;z-index:2;background:var(--paper);padding:.5rem 0;border-bottom:1px solid var(--line);font-size:.75rem;
 display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:center}
.key ol{display:flex;list-style:none;margin:0;padding:0;flex:0 1 28rem}.key li{flex:1;text-align:center;padding:.15rem .1rem;
 font-variant-numeric:tabular-nums}.bar{display:inline-block;width:7rem;height:1.1em;vertical-align:middle;margin:0 .4em;
 background:linear-gradient(90deg,$ramp)}
article{display:grid;grid-template-columns:26rem 1fr;gap:.4rem 1.6rem;padding:1.2rem 4px;margin:0 -4px;
 border-bottom:1px solid var(--line);content-visibility:auto;contain-intrinsic-size:auto 20rem}
figure{margin:0;display:grid;grid-template-columns:1fr 1fr;gap:.5rem;align-content:start}
figcaption{grid-column:1/-1;font-size:.75rem;
 line-height:1.35;min-height:2.7em;font-variant-numeric:tabular-nums}
figure img{display:block;width:100%;height:auto}.map{position:relative}.map:empty{display:none}
.map canvas{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated}.tiny img{image-rendering:pixelated}
.t{margin:0;align-self:start}.s{display:block;position:relative;padding-inline-start:4rem;min-height:2.7rem;cursor:pointer;
 white-space:pre-wrap;border-radius:4px}.s b{position:absolute;inset-inline-start:0;top:.12rem;font:600 .8rem/1 system-ui;
 padding:.35em .5em;border-radius:1em;font-variant-numeric:tabular-nums}.on b{outline:2px solid var(--ink);outline-offset:2px}
.s:focus-visible{outline:1px dashed var(--dim);outline-offset:3px}.w{display:inline-flex;flex-direction:column;align-items:center;
 max-width:100%}.w i{font-style:normal;padding:0 .2em;border-radius:3px;border-bottom:2px solid transparent;background-clip:padding-box}
.on i,.s:hover i{border-color:var(--ink)}.w small{font:.6rem/1.4 system-ui;user-select:none;font-variant-numeric:tabular-nums}
@media(max-width:56rem){article{grid-template-columns:1fr}}
@media print{.key{position:static}
 article{content-visibility:visible;break-inside:avoid;grid-template-columns:8.6cm 1fr}.on b{outline:0}
 .on i{border-color:transparent}}
</style>
<header><h1>Which sentences need the picture?</h1><p>A word is shaded by the share of attention that went to the picture, and not to
the caption so far, when the model wrote it. A sentence opens with the mean over its own tokens, its visual dependency D<sub>vis</sub>. Point
at one, tap it or step to it with Tab to see where in the picture that attention lay: the cells of a map add up to its score.</p>
<p><small>$title. The very first word has only the picture to look at, hence 1; further down, more text competes.</small></p></header>
<div class=key><span>share of attention</span><ol aria-label="lower end of each shade">$legend</ol>
<span>map: smallest cell of a sentence<span class=bar></span>largest</span></div><main>
<script>
const scale = "$scale".split(" ").map(c => [0, 2, 4].map(i => parseInt(c.substr(i, 2), 16)))
function show(s) {                                   // the map of a sentence, over a second view of its picture
  const item = s.closest("article"), box = item.querySelector(".map"), picture = item.querySelector("figure > img")
  item.querySelectorAll(".on").forEach(other => { other.classList.remove("on"); other.ariaPressed = false })
  s.classList.add("on"); s.ariaPressed = true
  if (!s.dataset.map || !picture) return
  if (!box.firstChild) box.append(Object.assign(picture.cloneNode(), {alt: "the map"}), document.createElement("canvas"))
  const canvas = box.lastChild, width = canvas.width = item.dataset.columns, height = canvas.height = item.dataset.rows
  const pen = canvas.getContext("2d"), cells = pen.createImageData(+width, +height)
  for (let i = 0; i < s.dataset.map.length; i++) {
    const x = (s.dataset.map.charCodeAt(i) - 63) / 63, at = Math.min(8, Math.floor(9 * x)), part = 9 * x - at
    cells.data.set([...scale[at].map((c, k) => c + part * (scale[at + 1][k] - c)), 215 - 145 * x], 4 * i)
  }
  pen.putImageData(cells, 0, 0)
  item.querySelector("figcaption").textContent = s.dataset.note
}
const first = item => { if (!item.querySelector(".on") && item.querySelector(".s")) show([...item.querySelectorAll(".s")].reduce(
  (a, b) => +b.firstChild.textContent > +a.firstChild.textContent ? b : a)) }                       // its most visual sentence
for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, e => { const s = e.target.closest?.(".s"); if (s && !s.matches(".on")) show(s) })
addEventListener("DOMContentLoaded", () => {
  const near = new IntersectionObserver(found => found.forEach(f => { if (f.isIntersecting) first(f.target) }), {
    rootMargin: "600px"})
  document.querySelectorAll("article").forEach(item => near.observe(item))
})
addEventListener("beforeprint", () => document.querySelectorAll("article").forEach(first))
</script>
"""
PAGE = PAGE.replace("$scale", " ".join(SCALE[::-1])).replace("$ramp", ",".join(f"#{c}" for c in SCALE[::-1]))
for mode, order in (("$light", SCALE), ("$dark", SCALE[::-1])):
    PAGE = PAGE.replace(mode, "".join(f".c{k}{{background:#{c};color:{'#000' if SCALE.index(c) < 6 else '#fff'}}}"
                                      for k, c in enumerate(order)))


def visual_grid(model, row):
    """(rows, columns, first) of one picture encoded by encode_prompt(): its visual tokens first ... first + rows * columns - 1
    show the whole of it, row by row. None where the family is not known to. Of a picture cut into tiles, the overview's."""
    kind, visual, first = model.config.model_type, int((row["input_ids"] == model.config.image_token_id).sum()), 0
    if "image_grid_thw" in row:                              # Qwen-VL: patches merged to squares of so many
        _, rows, columns = (n // model.config.vision_config.spatial_merge_size for n in row["image_grid_thw"][0].tolist())
    elif kind == "llava_onevision":                          # pack_image_features(): the overview comes first
        rows = columns = model.config.vision_config.image_size // model.config.vision_config.patch_size
    elif kind in ("idefics3", "smolvlm", "internvl"):        # tiles of equal size, and then the overview, if any
        size = visual // math.prod(row["pixel_values"].shape[:-3])
        rows, columns, first = math.isqrt(size), math.isqrt(size), visual - size
        rows = rows if rows * columns == size else 0
    else:
        return None
    return (rows, columns, first) if 0 < rows * columns <= visual - first else None


def attention_record(record, grid, offsets, cells):
    """{rows, columns, sentences} for the output record of score_record(): cells (S, V), averaged like its score."""
    if grid is None:
        return None
    rows, columns, first = grid
    cells = cells[:, first:first + rows * columns]
    means = [cells[tokens_of((s["start"], s["end"]), offsets)].mean(0).tolist() for s in record["sentences"]]
    return {"rows": rows, "columns": columns, "sentences": [[round(share, 5) for share in mean] for mean in means]}


def picture_uri(image, side=384):
    """(data: URI, width, height) of a PIL image, shrunk in place to `side` pixels, as the smaller of PNG and JPEG."""
    files = []
    image.thumbnail((side, side))
    for kind in ("PNG", "JPEG"):
        image.save(file := io.BytesIO(), kind, optimize=True)
        files.append(f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(files, key=len), *image.size


def page_item(record, root, low, high):
    """HTML of one record. A word has one of ten shades from low to high; a cell one of 64, smallest to largest of its sentence."""
    def shade(x):
        return f"c{min(9, max(0, int(10 * (x - low) / (high - low))))}"
    attention, caption, text, at = record["attention"], record["caption"], [], 0
    for k, s in enumerate(record["sentences"]):
        words, here = [], s["start"]
        for n, w in enumerate(s["words"]):
            short = f"{w['score']:.2f}".removeprefix("0")
            following = s["words"][n + 1]["start"] if n + 1 < len(s["words"]) else s["end"]
            mark = re.compile(r"\S*").match(caption, w["end"], following)         # punctuation stays on the line of its word
            words.append(f'{html.escape(caption[here:w["start"]])}<span class=w title="word {w["score"]:.4f}"><span>'
                         f'<i class={shade(w["score"])}>{html.escape(caption[w["start"]:w["end"]])}</i>{html.escape(mark[0])}</span>'
                         f'<small>{short}</small></span>')
            here = mark.end()
        data = f"sentence {k + 1}: {s['score']:.4f}" + (f", ablation {s['ablation']:+.3f} nats a token" if "ablation" in s else "")
        if attention:
            cells = attention["sentences"][k]
            low_cell, peak, total = min(cells), max(cells), sum(cells)
            place = divmod(cells.index(peak), attention["columns"])
            note = (f"Sentence {k + 1}, {s['score']:.3f}: {low_cell:.4f} to {peak:.4f} a cell, most in row {place[0] + 1}, "
                    f"column {place[1] + 1}")
            if total < 0.98 * s["score"]:
                note += f"; {total / s['score']:.0%} of it in this overview, the rest in close-ups"
            data += f'" data-note="{note}" data-map="' + "".join(
                chr(63 + round(63 * (c - low_cell) / (peak - low_cell or 1))) for c in cells)
        text.append(f'{html.escape(caption[at:s["start"]])}<span class=s tabindex=0 role=button title="{data}"><b class='
                    f'{shade(s["score"])}>{s["score"]:.3f}</b>{"".join(words)}{html.escape(caption[here:s["end"]])}</span>')
        at = s["end"]
    try:
        uri, width, height = picture_uri(load_image(root, record["image"], 2**20))
        picture = f'<img src="{uri}" width={width} height={height} alt="the picture">'
    except BadRecord as e:
        width = height = 0
        picture = f"<p>{html.escape(str(e))}</p>"
    grid = f' data-rows={attention["rows"]} data-columns={attention["columns"]}' if attention else ""
    tiny = " class=tiny" * (max(width, height) < 160)                            # enlarged without blur
    return (f'<article{grid}{tiny}><h2>{html.escape(record["id"])}</h2><figure>{picture}<div class=map></div><figcaption>'
            f'{"" if attention else "No map: the tokens of this model family have no known places."}</figcaption></figure>'
            f'<p class=t dir=auto>{"".join(text)}{html.escape(caption[at:])}</p></article>\n')


def write_page(scores, root, path, title):
    """The page: one file without any outside it, of the records of `scores` that have `attention`."""
    def records():
        return itertools.takewhile(lambda row: "attention" in row, (row for _, row in read_jsonl(scores, ("sentences",))))
    values = sorted(w["score"] for row in records() for s in row["sentences"] for w in s["words"])
    if not values:
        return
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]        # a few extremes would use up all shades
    low, high = (low, high) if high > low else (low - 0.05, low + 0.05)
    legend = "".join(f"<li class=c{k}>{low + (high - low) * k / 10:.2f}</li>" for k in range(10))
    head = PAGE.replace("$title", html.escape(title)).replace("$legend", legend)
    write_atomically(path, itertools.chain([head], (page_item(row, root, low, high) for row in records()), ["</main>\n"]))


def layer_list(text):
    """'14-16,20' -> [14, 15, 16, 20]; argparse makes one line of the ValueError of anything else."""
    layers = [i for part in text.split(",") for lo, _, hi in [part.partition("-")] for i in range(int(lo), int(hi or lo) + 1)]
    return layers or int("empty")


def positive(text):
    return int(text) if int(text) > 0 else int("not positive")


def amount(text):
    """A finite number of at least 0."""
    return float(text) if 0 <= float(text) < float("inf") else float("none")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="runs/toy/base", help="hub id or folder (%(default)s)")
    add("--data", default="runs/toy/train.jsonl", help="captions (%(default)s)")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--out", default="runs/toy/scores_train.jsonl", help="(%(default)s)")
    add("--layers", type=layer_list, help="decoder layers, from 0: 14-20 or 3,5,7 (upper-middle: the third quarter)")
    add("--batch-size", type=positive, default=16, help="captions a forward pass and rank; changes speed only (%(default)s)")
    add("--max-pixels", type=positive, default=1003520, help="larger images are shrunk: 1,280 tokens of 28 x 28 (%(default)s)")
    add("--limit", type=positive, help="only the first so many records")
    add("--page", type=int, default=50, help="so many records also get maps and a place in the page OUT.html (%(default)s)")
    add("--ablation", action="store_true", help="also score by log p(text|image) - log p(text|grey): one more pass")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = parser.parse_args()

    rank, _, device = distributed()
    settings = {"stage": "score_dependency", "model": fingerprint(args.model), "data": fingerprint(args.data),
                "layers": args.layers, "max_pixels": args.max_pixels, "limit": args.limit, "ablation": args.ablation,
                "page": args.page}
    root = image_root(args.image_root, args.data)

    def start():
        scorer = Scorer(*load_vlm(args.model, device, args.trust_remote_code), args.layers, args.ablation)
        print(f"{args.model} on {device}: layers {list(scorer.layers)}") if not rank else None

        def prepare(row_and_map):
            row, mapped = row_and_map
            if not split_sentences(row["caption"]):
                raise BadRecord("the caption has no words")
            return row, mapped, scorer.prepare(load_image(root, row["image"], args.max_pixels), row["caption"])

        def process(prepared):
            values, results = scorer([p for _, _, p in prepared], maps=any(mapped for _, mapped, _ in prepared)), []
            for (row, mapped, (prompts, _, _)), (shares, gains, offsets, *cells) in zip(prepared, values):
                results.append([score_record(row, shares, gains, offsets)])
                if mapped:
                    results[-1][0]["attention"] = attention_record(results[-1][0], visual_grid(scorer.model, prompts[0]),
                                                                   offsets, *cells)
            return results
        return prepare, process

    rows = itertools.islice(read_captions(args.data), args.limit)
    rows = ((number, row if isinstance(row, BadRecord) else (row, i < args.page)) for i, (number, row) in enumerate(rows))
    counts = map_jsonl(rows, start, args.out, settings, args.data, args.batch_size)
    fail_if_empty(args.out, counts, f"{args.data}: none of its {counts['rows']} records could be scored; it should hold "
                  "{id, image, caption}, and images relative to --image-root")
    if rank == 0:
        show(args.out)
        write_page(args.out, root, f"{args.out}.html", f"{'/'.join(Path(args.model).parts[-2:])} on {Path(args.data).name}")
        print(f"{args.out}: {counts['written']} captions scored, {counts['skipped']} skipped. "
              f"Next: build_masks.py --scores {args.out}")


if __name__ == "__main__":
    cli(main)
