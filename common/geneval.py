"""GenEval's verdict on a drawing: do the detected objects satisfy what the prompt asks for?

A prompt comes with requirements, a line of evaluation_metadata.jsonl:

    {"tag": "position", "prompt": "a photo of a dog right of a bench", "include": [
        {"class": "bench", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]}]}

"include" asks for at least `count` objects of a class, optionally all of one colour, or in a
position relative to the objects of an earlier requirement, here number 0. "exclude" asks for fewer
than `count`. A detector finds {class: [Detection, ...]}, the most confident first.

GenEval (arXiv 2310.11513) calls a drawing right if every requirement holds. `clauses` also says
which of them hold, for a graded reward: a class with its count is one clause, its colour another,
its position a third.
"""

# detections below these confidences do not count; a prompt about numbers needs surer ones
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
# at most so many objects of a class
MOST = 16
# share of the summed sizes of two objects by which their centres must differ
MARGIN = 0.1


def clauses(objects, metadata):
    """[(what is asked for, whether it holds), ...] of a drawing with these objects.

    objects: {class: [Detection, ...]}. One blue circle for "a red circle" gives
    [("1 circle", True), ("red circle", False)].
    """
    kept = confident(objects, metadata.get("tag") == "counting")
    result = []
    # the objects of each requirement, None if one of its clauses fails
    groups = []
    for wanted in metadata.get("include", ()):
        name = wanted["class"]
        found = kept.get(name, [])[: wanted["count"]]
        holds = [(f"{wanted['count']} {name}", len(found) == wanted["count"])]
        if "color" in wanted:
            of_colour = [d for d in found if d.colour == wanted["color"]]
            is_right = holds[0][1] and len(of_colour) == wanted["count"]
            holds.append((f"{wanted['color']} {name}", is_right))
        if "position" in wanted:
            relation, target = wanted["position"]
            is_right = all(ok for _, ok in holds) and stands(found, relation, groups[target])
            holds.append((f"{name} {relation} {metadata['include'][target]['class']}", is_right))
        groups.append(found if all(ok for _, ok in holds) else None)
        result += holds
    for unwanted in metadata.get("exclude", ()):
        name = unwanted["class"]
        fewer = len(kept.get(name, [])) < unwanted["count"]
        result.append((f"fewer than {unwanted['count']} {name}", fewer))
    return result


def verdict(objects, metadata):
    """Whether every clause holds."""
    return all(holds for _, holds in clauses(objects, metadata))


def graded(objects, metadata):
    """The share of clauses that hold, from 0 to 1."""
    held = [holds for _, holds in clauses(objects, metadata)]
    return sum(held) / len(held)


def confident(objects, is_counting):
    """The objects above the threshold, at most MOST of a class, the most confident first."""
    threshold = COUNTING_THRESHOLD if is_counting else THRESHOLD
    kept = {}
    for name, detections in objects.items():
        sure = [d for d in detections if d.score > threshold]
        kept[name] = sorted(sure, key=lambda d: -d.score)[:MOST]
    return kept


def stands(found, relation, targets):
    """Whether every object of `found` stands in this relation to every one of `targets`."""
    if targets is None:
        return False
    return all(relation in relations(d.box, target.box) for d in found for target in targets)


def relations(box, other):
    """Where `box` stands seen from `other`: a set of "left of", "right of", "above", "below".

    The offset of the centres is shortened on each axis by MARGIN of the summed sizes, and divided
    by the length of the full offset; more than half on an axis counts. So an object may be both
    left of and above another, and near ones stand nowhere.
    """
    offset = []
    shortened = []
    for axis in (0, 1):
        centre = (box[axis] + box[axis + 2]) / 2
        other_centre = (other[axis] + other[axis + 2]) / 2
        sizes = abs(box[axis + 2] - box[axis]) + abs(other[axis + 2] - other[axis])
        difference = centre - other_centre
        length = max(abs(difference) - MARGIN * sizes, 0.0)
        offset.append(difference)
        shortened.append(length if difference > 0 else -length)
    if max(map(abs, shortened)) < 1e-3:
        return set()

    norm = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    x, y = shortened[0] / norm, shortened[1] / norm
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, is_so in holds.items() if is_so}
