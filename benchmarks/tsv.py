"""A benchmark's TSV in VLMEvalKit's format: its records, their images, and the text that is asked.

An image is a field of the file (base64, often a megabyte), so reading a file keeps only where each
image is, and `load_images` goes back for it.
"""

import ast
import base64
import csv
import hashlib
import io
import json
import re
import string
from typing import NamedTuple

from common.captions import open_image
from common.records import BadRecord, fail

REQUIRED_COLUMNS = ("index", "question", "answer")
# an image field of at most so many characters is the index of the record whose image is reused
REFERENCE_LENGTH = 64
# copy j of a question with index i has the index i + j * COPY_STEP
COPY_STEP = 10**6
# more digits are a name: numbers so long are not even read by Python
MOST_DIGITS = 18
# the default of 128 kB is less than an image
MAX_FIELD = 2**31 - 1


class Table(NamedTuple):
    """What `read_tsv` keeps of a file."""

    columns: list  # names
    records: list  # (line number, dict | BadRecord), in the order of the file
    indices: list  # of all records, also of those that cannot be used
    image_offsets: dict  # {hash of an image field: byte offset of a record that holds it}


# ---------------------------------------------------------------- reading


def tsv_fields(path, offset=0):
    """Yields (byte offset, line number, fields) of the records of a TSV as pandas writes it.

    Starts at the byte `offset`, where a record must begin; lines are counted from there. A quoted
    field may hold line ends, so a record may be several lines: its number is that of the first.
    """
    csv.field_size_limit(MAX_FIELD)
    position = offset
    line = 0

    with open(path, "rb") as file:
        file.seek(offset)

        def decoded_lines():
            nonlocal position, line
            for raw in file:
                position += len(raw)
                line += 1
                # only the file's first line may begin with a byte order mark
                is_first = offset == 0 and line == 1
                encoding = "utf-8-sig" if is_first else "utf-8"
                yield raw.decode(encoding, errors="replace")

        record_offset = offset
        record_line = 1
        try:
            for fields in csv.reader(decoded_lines(), delimiter="\t"):
                yield record_offset, record_line, fields
                record_offset = position
                record_line = line + 1
        except csv.Error as error:
            fail(f"{path}: line {line}: {error}")


def read_tsv(path):
    """The `Table` of a benchmark's file.

    A record is a dict of its fields as text, with these added or changed:

        index    "5", also where pandas wrote "5.0" because the column had gaps
        number   the index as an int; None if it is a word, or too long for a number
        options  {letter: text} of the option columns that are not empty
        group    the question that this record asks: its g_index, or its index modulo 1,000,000
        copy     0 for the question itself; else which of CircularEval's rotations of it this is:
                 its index by 1,000,000, or 1 if the file has a column g_index
        image    hash of its image field, or the path in image_path, or ""

    Without g_index, indices are split only if some record repeats the options of another so. The
    words None, NA and nan are text like any other, which pandas would drop. A record that cannot be
    used is a BadRecord; a file that is no benchmark ends the program.
    """
    lines = tsv_fields(path)
    _, _, names = next(lines, (0, 0, []))
    columns = [name.replace("l2_category", "l2-category") for name in names]
    missing = sorted(set(REQUIRED_COLUMNS) - set(columns))
    if missing:
        fail(
            f"{path}: no column {', '.join(missing)}; a benchmark is a TSV of VLMEvalKit with "
            "answers"
        )

    records = []
    indices = {}  # {index: line of the first record that has it}
    images = {}  # {index: (hash of its image field, byte offset)}
    for offset, line, fields in lines:
        record = _parse_record(columns, fields, line, indices)
        if isinstance(record, dict) and len(record["image"]) > REFERENCE_LENGTH:
            digest = hashlib.sha256(record["image"].encode()).hexdigest()
            images[record["index"]] = (digest, offset)
            record["image"] = record["index"]
        records.append((line, record))

    if "g_index" not in columns:
        _undo_chance_copies(records)
    records = [(line, _resolve_image(record, columns, images)) for line, record in records]
    return Table(columns, records, list(indices), dict(images.values()))


def _parse_record(columns, fields, line, indices):
    """The dict of one record, or a BadRecord; its index is added to `indices`."""
    record = dict(zip(columns, fields))
    index = _whole(record.get("index", ""))
    first_line = line
    if index:
        first_line = indices.setdefault(index, line)
    if len(fields) != len(columns):
        hint = ""
        if any("\n" in field for field in fields):
            hint = ", over several lines: a quote that is not closed?"
        return BadRecord(f"record {index}: {len(fields)} columns instead of {len(columns)}{hint}")
    if not index:
        return BadRecord("the index is missing")
    if first_line != line:
        return BadRecord(f"record {index}: its index appears twice")

    record["index"] = index
    record["number"] = None
    record["group"] = index
    record["copy"] = 0
    if index.isdecimal() and len(index) <= MOST_DIGITS:
        record["number"] = int(index)
        record["group"] = str(record["number"] % COPY_STEP)
        record["copy"] = record["number"] // COPY_STEP
    if "g_index" in columns:
        record["group"] = _whole(record["g_index"]) or index
        record["copy"] = int(record["group"] != index)

    letters = string.ascii_uppercase
    record["options"] = {letter: record[letter] for letter in letters if record.get(letter)}
    image = record.get("image", "")
    record["image"] = image if len(image) > REFERENCE_LENGTH else _whole(image)
    return record


def _whole(index):
    """'5.0' is '5': pandas writes a column of integers as floats if it had gaps."""
    return re.sub(r"^(\d+)\.0+$", r"\1", index.strip())


def _undo_chance_copies(records):
    """Undoes group and copy of all records if none repeats the options of the one it would copy.

    Their indices are then just large numbers.
    """
    by_index = {record["index"]: record for _, record in records if isinstance(record, dict)}
    if any(_repeats_options(record, by_index) for record in by_index.values()):
        return
    for record in by_index.values():
        record["group"] = record["index"]
        record["copy"] = 0


def _repeats_options(record, by_index):
    """Whether a record has the options, in any order, of the record it would be a copy of."""
    original = by_index.get(record["group"])
    if not record["copy"] or not record["options"] or original is None:
        return False
    return sorted(record["options"].values()) == sorted(original["options"].values())


def _resolve_image(record, columns, images):
    """The record with `image` naming what `load_images` can load; a BadRecord if there is none."""
    if isinstance(record, BadRecord):
        return record
    if record["image"]:
        if record["image"] not in images:
            return BadRecord(
                f"record {record['index']}: its image is that of record {record['image']}, which "
                "has none"
            )
        digest, _ = images[record["image"]]
        record["image"] = digest
    elif record.get("image_path") and "image" not in columns:
        record["image"] = record["image_path"]
    return record


def parse_list(text):
    """The list that a field like "['a', 'b']" stands for, or None.

    None also for a list of what JSON does not know: a model may write [1, ...] or [{1, 2}].
    """
    text = text.strip()
    if not text.startswith("["):
        return None
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def load_images(path, column, offset, max_pixels):
    """The PIL images of the record at byte `offset`: its field `column` (a number) holds them.

    The field is base64, with or without "data:image/...;base64," before it, or a list of such in
    brackets. A BadRecord names the image that cannot be read, counted from 1.
    """
    _, _, fields = next(tsv_fields(path, offset))
    images = []
    for number, item in enumerate(parse_list(fields[column]) or [fields[column]], 1):
        text = str(item)
        _, _, after_marker = text.partition("base64,")
        encoded = "".join(after_marker.split() or text.split())
        try:
            data = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise BadRecord(f"image {number} is not base64 ({error})") from None
        images.append(open_image(io.BytesIO(data), number, max_pixels))
    return images


# ---------------------------------------------------------------- what is asked


def rotations(record):
    """Yields the k questions of CircularEval for a record with k options and a gold letter.

    In copy j the letter at place i holds option i + j: options A x, B y, C z are asked as xyz, yzx,
    zxy, and the gold letter B (y) becomes B, A, C.
    """
    letters = list(record["options"])
    texts = list(record["options"].values())
    gold_place = letters.index(record["truth"])

    for j in range(len(letters)):
        rotated = texts[j:] + texts[:j]
        if j == 0:
            index = record["index"]
        elif record["number"] is None:
            index = f"{record['index']}+{j}"
        else:
            index = str(record["number"] + j * COPY_STEP)
        yield {
            **record,
            "index": index,
            "copy": j,
            "options": dict(zip(letters, rotated)),
            "truth": letters[gold_place - j],
        }


def question_text(record, ending):
    """VLMEvalKit's prompt: hint, question, options, and the benchmark's request, `ending`.

    A question without options is asked as it is, and so is one of MathVista, whose text already
    has hint and options. The request is left out where the question contains its last words.
    """
    question = record["question"]
    is_mathvista = "choices" in record and "question_type" in record
    if not record["options"] or is_mathvista:
        last_words = ending.strip().rstrip(".").lower()[-9:]
        if last_words in question.lower():
            return question
        return question + ending

    hint = ""
    if record.get("hint"):
        hint = f"Hint: {record['hint']}\n"
    options = "".join(f"{letter}. {text}\n" for letter, text in record["options"].items())
    return f"{hint}Question: {question}\nOptions:\n{options}{ending}"
