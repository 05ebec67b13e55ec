"""JSONL in and out: records that may be bad, and files that are there whole or not at all."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# fields that must hold a string
TEXT_FIELDS = ("image", "caption", "masked_caption", "sentence", "answer", "prediction")
# in a checkpoint, what only a resume needs
TRAINER = "trainer.pt"
# characters of a message, which then fits into two lines of a terminal
LONGEST_MESSAGE = 200


class BadRecord(ValueError):
    """A record that cannot be used; the message says why. It is skipped, named and counted."""

    def __str__(self):
        return one_line(super().__str__())


def fail(message):
    """Ends the program with one line and exit status 1."""
    raise SystemExit(one_line(f"error: {message}"))


def one_line(text):
    """`text` in one line, whatever a library or a path says.

    The middle of a long text is left out, as its end says what to do.
    """
    line = " ".join(text.splitlines())
    if len(line) > LONGEST_MESSAGE:
        end = f" ... {line[-LONGEST_MESSAGE // 3 :]}"
        line = line[: LONGEST_MESSAGE - len(end)] + end
    return line


# ---------------------------------------------------------------- in


def require_file(path):
    """Ends the program unless `path` is a file that can be read more than once."""
    if Path(path).is_dir():
        fail(f"{path} is a folder: name the file in it")
    if not Path(path).exists():
        fail(f"{path}: no such file")
    if not Path(path).is_file():
        # a pipe would be waited for, and /dev/zero read, for ever
        fail(f"{path} is no regular file: copy what it holds into one, and name that")


def require_files(path):
    """require_file() of a path, if there is one, or of all that is in a folder."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [entry for entry in path.iterdir() if not entry.is_dir()]
    for file in files:
        # a broken link is not looked at
        if file.exists():
            require_file(file)


def read_jsonl(path, fields):
    """Yields (line number, dict with all `fields`), or (line number, BadRecord)."""
    require_file(path)
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parse_line(line, fields)


def _parse_line(line, fields):
    """The dict of one line of JSON, or a BadRecord."""
    try:
        record = json.loads(line)
        if "\\ud" in line.lower():
            # half a surrogate pair raises: no tokenizer and no file takes it
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not JSON ({error})")

    if not isinstance(record, dict):
        return BadRecord(f"not a JSON object with {', '.join(fields) or 'fields'}")
    return with_fields(record, fields)


def with_fields(record, fields):
    """The record, or a BadRecord that names those of `fields` that it lacks."""
    missing = [f for f in fields if not _has_field(record, f)]
    if missing:
        return BadRecord(f"lacks {', '.join(missing)}, or its type is wrong")
    return record


def _has_field(record, field):
    value = record.get(field)
    if field in TEXT_FIELDS:
        return isinstance(value, str)
    if field == "id":
        # it is part of the key under which a record is found again
        return isinstance(value, str) or type(value) is int
    return field in record


def load_records(path):
    """All records of a file that this program has written."""
    return [record for _, record in read_jsonl(path, ()) if isinstance(record, dict)]


# ---------------------------------------------------------------- out


@contextlib.contextmanager
def open_for_writing(path, mode="w"):
    """open(path, mode) for text. An error names the file, which that of a full disk does not."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path, strings):
    """Writes an iterable of strings; the file is there whole or not at all."""
    with open_for_writing(f"{path}.tmp") as file:
        file.writelines(strings)
        file.flush()
        # or a power cut may leave the new name on an empty file
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_json(path, value):
    """Writes one JSON value, indented, atomically."""
    write_atomically(path, [json.dumps(value, indent=1)])


# ---------------------------------------------------------------- which run a file belongs to


def fingerprint(path):
    """Short hash of a file, or of the files in a checkpoint folder: of their names and every byte.

    Weights are read whole, at about 1 GB per second and file, since a sample would miss a change of
    one tensor. A hub id, which is no path, is its own fingerprint.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    require_files(path)
    if not path.is_dir():
        return _digest(path).hexdigest()[:16]

    files = sorted(p for p in path.iterdir() if p.is_file() and p.name != TRAINER)
    with ThreadPoolExecutor() as executor:
        digests = [digest.digest() for digest in executor.map(_digest, files)]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _digest(file):
    """The hash of the name, size and content of a file."""
    digest = hashlib.sha256(f"{file.name} {file.stat().st_size}".encode())
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest


def check_settings(path, settings):
    """Whether `path`, a run.json, holds these settings; False if there is no such file.

    A file of another run ends the program, naming what differs: its outputs are not overwritten.
    """
    if not Path(path).exists():
        return False
    require_file(path)
    try:
        stored = dict(json.loads(Path(path).read_text(encoding="utf-8"))["settings"])
    except (ValueError, LookupError, TypeError, RecursionError):
        fail(f"{path} is not what a run writes there: choose another --out, or delete it")

    # a tuple comes back from JSON as a list
    settings = json.loads(json.dumps(settings))
    differences = []
    for name in {**stored, **settings}:
        if stored.get(name) != settings.get(name):
            differences.append(f"{name} was {stored.get(name)}, is {settings.get(name)}")
    if differences:
        fail(
            f"{path} belongs to another run ({'; '.join(differences)}): choose another --out, or "
            "delete it"
        )
    return True
