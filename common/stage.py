"""What makes a function a stage: flags, and a map over records that resumes."""

import argparse
import collections
import itertools
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from common.locks import lock_output
from common.ranks import barrier, broadcast, gather, setup_distributed
from common.records import (
    BadRecord,
    check_settings,
    fail,
    one_line,
    open_for_writing,
    read_jsonl,
    write_atomically,
    write_json,
)

# ---------------------------------------------------------------- flags


class RecipeParser(argparse.ArgumentParser):
    """Reads @recipe.txt as flags: several per line, and a # begins a comment."""

    def convert_arg_line_to_args(self, arg_line):
        return shlex.split(arg_line, comments=True)

    def error(self, message):
        super().error(one_line(message))


def make_parser(doc):
    """The parser of a stage, whose --help shows the docstring of the file."""
    return RecipeParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )


def parse(parser, argv=None):
    """Parses flags; recipes are read first, so that the command line overrides them."""
    argv = sys.argv[1:] if argv is None else argv
    recipes = [argument for argument in argv if argument.startswith("@")]
    flags = [argument for argument in argv if not argument.startswith("@")]
    return parser.parse_args(recipes + flags)


def number_between(low, high, kind=float):
    """An argparse type: a number of this kind from `low` to `high`."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


# more is not counted to by all that takes such a number, and never meant
positive_int = number_between(1, 2**31 - 1, int)


def non_negative(text):
    """argparse type: a number of at least 0 that fp32 can hold."""
    value = float(text)
    if not 0 <= value < 1e38:
        raise ValueError("negative or not finite")
    return value


def weight_type(components):
    """An argparse type: 'visual=1.5' -> ('visual', 1.5), of one of `components`."""

    def component_weight(text):
        name, _, weight = text.partition("=")
        if not weight:
            raise argparse.ArgumentTypeError(f"{text}: write NAME=WEIGHT, as {name}=1")
        if name not in components:
            known = ", ".join(components)
            raise argparse.ArgumentTypeError(f"{text}: no such component; there are {known}")
        return name, non_negative(weight)

    return component_weight


# ---------------------------------------------------------------- work in a thread


def prefetch(function, items):
    """Yields function(item) in order; a thread works on the next item while the caller uses one."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=_use_one_thread) as executor:
        # wait for the initializer. More OpenMP threads than cores make those of the caller
        # sleep between operators: training took twice as long
        executor.submit(int).result()
        torch.set_num_threads(threads)

        pending = None
        for item in items:
            following = executor.submit(function, item)
            if pending:
                yield pending.result()
            pending = following
        if pending:
            yield pending.result()


def _use_one_thread():
    # the first use of torch in this thread would otherwise undo the next line
    torch.get_num_threads()
    torch.set_num_threads(1)


# ---------------------------------------------------------------- a map over records that resumes


def map_records(records, start, out, settings, source, batch_size, finish=None):
    """Writes to `out` the records that a stage makes of `records`, in their order.

    records yields (number, dict or BadRecord). start() loads what the stage needs and returns
    prepare(record), the CPU work for one record, done ahead in a thread, and
    process([prepared, ...]) -> [[output record, ...], ...]. A BadRecord that prepare raises costs
    that record alone: it is named and counted.

    Every rank takes its share of each batch and rank 0 appends all to OUT.part, so that a kill
    costs one batch and the same command continues after it. finish(read), if given, yields the
    output records anew when all are there; read() iterates over them and may be called again.

    OUT.run.json keeps settings, counts and seconds. Returns {records, written, skipped}.
    """
    rank, world, _ = setup_distributed()
    files = _MapFiles(Path(out))
    if rank == 0:
        lock_output(files.out)
    barrier()  # nobody looks before it is ours
    is_same_run = check_settings(files.info, settings)
    if is_same_run and files.out.exists():
        return files.reuse(rank)
    if files.out.exists():
        fail(f"{out} exists and is not of this stage: choose another --out, or delete it")

    # a mistyped --model ends here and binds no settings
    prepare, process = start()
    began = time.time()
    barrier()  # nobody writes before all have looked
    done = 0
    if rank == 0:
        write_json(files.info, {"settings": settings})
        done = files.resume(is_same_run, batch_size * world)
    done = broadcast(done)

    def prepare_batch(batch):
        prepared = []
        for number, record in batch[rank::world]:
            item = record
            if not isinstance(record, BadRecord):
                try:
                    item = prepare(record)
                except BadRecord as error:
                    item = error
            prepared.append((f"{source}:{number}", item))
        return len(batch), prepared

    batches = _batches(itertools.islice(records, done, None), batch_size * world)
    bar = tqdm(desc=files.out.name, initial=done, unit=" record", disable=rank > 0, leave=False)
    with bar:
        for count, prepared in prefetch(prepare_batch, batches):
            lines = _in_order(gather(_results(prepared, process)), count)
            if rank == 0:
                files.append(lines)
            bar.update(count)

    counts = None
    if rank == 0:
        counts = files.complete(settings, finish, began)
    return broadcast(counts)


def _batches(records, size):
    while batch := list(itertools.islice(records, size)):
        yield batch


def _results(prepared, process):
    """A line of JSON, {"out": output records} or {"skipped": reason}, for each (name, item)."""
    good = [item for _, item in prepared if not isinstance(item, BadRecord)]
    outputs = iter(process(good) if good else ())
    lines = []
    for name, item in prepared:
        result = {"skipped": str(item)}
        if not isinstance(item, BadRecord):
            result = {"out": next(outputs)}
        try:
            line = json.dumps(result, ensure_ascii=False, allow_nan=False)
        except ValueError:
            # no file of ours may hold NaN or infinity
            result = {"skipped": "what the model makes of it is not finite"}
            line = json.dumps(result)
        if "skipped" in result:
            tqdm.write(f"skipped {name}: {result['skipped']}", file=sys.stderr)
        lines.append(line + "\n")
    return lines


def _in_order(results_of_ranks, count):
    """The results of all ranks in the order of the batch, of which rank r took every world-th."""
    world = len(results_of_ranks)
    return [results_of_ranks[i % world][i // world] for i in range(count)]


class _MapFiles:
    """OUT, OUT.part (a line per input record so far) and OUT.run.json of one map."""

    def __init__(self, out):
        self.out = out
        self.part = Path(f"{out}.part")
        self.info = Path(f"{out}.run.json")

    def reuse(self, rank):
        # its writer may have been killed just before this line
        self.part.unlink(missing_ok=True)
        try:
            counts = json.loads(self.info.read_text())["counts"]
            said = f"{int(counts['written'])} records, {int(counts['skipped'])} skipped"
        except (LookupError, TypeError, ValueError):
            fail(f"{self.info} lacks the counts: choose another --out, or delete {self.out}")
        if rank == 0:
            print(f"reused {self.out}: complete, {said}")
        return counts

    def resume(self, is_same_run, share):
        """Cuts OUT.part to whole batches, so that those after a kill are those without it.

        Returns the number of input records that are done.
        """
        if not is_same_run:
            self.part.unlink(missing_ok=True)
        self.part.touch()
        with open(self.part, "rb+") as file:
            whole_lines = sum(line.endswith(b"\n") for line in file)
            done = whole_lines // share * share
            file.seek(0)
            file.truncate(sum(map(len, itertools.islice(file, done))))
        if done:
            print(f"resuming {self.out} after record {done}")
        return done

    def append(self, lines):
        with open_for_writing(self.part, "a") as file:
            file.write("".join(lines))

    def results(self):
        """Yields the line of every input record so far."""
        for number, result in read_jsonl(self.part, ()):
            if isinstance(result, BadRecord) or not {"out", "skipped"} & set(result):
                fail(f"{self.part}:{number} is damaged: delete the file to start over")
            yield result

    def read(self):
        """Yields the output records so far."""
        for result in self.results():
            yield from result.get("out", ())

    def complete(self, settings, finish, began):
        """Writes OUT and OUT.run.json, removes OUT.part, and returns the counts."""
        counts = collections.Counter(records=0, written=0, skipped=0)
        for result in self.results():
            written = len(result.get("out", ()))
            counts.update(records=1, written=written, skipped="skipped" in result)

        seconds = round(time.time() - began, 1)
        write_json(self.info, {"settings": settings, "counts": counts, "seconds": seconds})
        records = self.read() if finish is None or not counts["written"] else finish(self.read)
        write_atomically(self.out, (json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        self.part.unlink()
        return counts


def require_output(out, counts, message):
    """Ends a stage that wrote no record.

    Its empty output is deleted, so that the same command works once the cause is removed.
    """
    if not counts["written"]:
        Path(out).unlink(missing_ok=True)
        Path(f"{out}.run.json").unlink(missing_ok=True)
        fail(message)
