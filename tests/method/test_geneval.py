"""GenEval's rules on objects made by hand: classes, counts, colours, positions, exclusions."""

import pytest

from common.geneval import clauses, graded, relations, verdict
from common.judges import Detection


def at(x, y, size=10, score=0.8, colour=None):
    """A square of this size around (x, y)."""
    half = size / 2
    return Detection((x - half, y - half, x + half, y + half), score, colour)


def asks(*include, tag="two_object", exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


DOG = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    "box, seen",
    [
        (at(10, 50), {"left of"}),
        (at(90, 50), {"right of"}),
        (at(50, 10), {"above"}),
        (at(50, 90), {"below"}),
        # on the diagonal, both: 38 of 40 by 40 is 0.67 on each axis
        (at(10, 10), {"left of", "above"}),
        (at(90, 90), {"right of", "below"}),
        # near the diagonal: x 38, y 18 of a length of 44.7, so 0.85 and 0.40
        (at(10, 30), {"left of"}),
        # within 0.1 of the summed sizes, 2 pixels: nowhere
        (at(51.5, 50), set()),
        (at(50, 50), set()),
        # just beyond it: 0.5 of 2.5 is 0.2, which is not more than a half
        (at(52.5, 50), set()),
        (at(55, 50), {"right of"}),
    ],
)
def test_where_a_square_stands_seen_from_one_in_the_middle(box, seen):
    assert relations(box.box, at(50, 50).box) == seen


def test_large_objects_must_be_further_apart():
    assert relations(at(60, 50, size=10).box, at(50, 50).box) == {"right of"}
    # 0.1 of 120: 10 is not enough
    assert relations(at(60, 50, size=110).box, at(50, 50).box) == set()


def test_a_class_must_be_found_often_enough_and_surely_enough():
    wanted = asks(DOG, {"class": "cat", "count": 2})
    objects = {"dog": [at(0, 0)], "cat": [at(9, 9), at(5, 5)]}
    assert verdict(objects, wanted)
    assert not verdict({**objects, "cat": [at(9, 9)]}, wanted)
    # more than asked for is no fault without an exclusion
    assert verdict({**objects, "dog": [at(0, 0), at(50, 50)]}, wanted)
    assert not verdict({**objects, "dog": [at(0, 0, score=0.3)]}, wanted)
    assert not verdict({}, wanted)


def test_a_prompt_about_numbers_needs_surer_objects_and_not_too_many():
    three = asks(
        {"class": "dog", "count": 3}, tag="counting", exclude=[{"class": "dog", "count": 4}]
    )
    sure = [at(20 * i, 0, score=0.95) for i in range(4)]
    assert verdict({"dog": sure[:3]}, three)
    assert not verdict({"dog": sure[:2]}, three)
    assert not verdict({"dog": sure}, three)
    # a fourth that is not sure does not count
    assert verdict({"dog": [*sure[:3], at(90, 0, score=0.85)]}, three)


def test_the_most_confident_objects_are_those_whose_colour_counts():
    red = asks({**DOG, "color": "red"}, tag="colors")
    found = [at(0, 0, score=0.5, colour="blue"), at(9, 9, score=0.7, colour="red")]
    assert verdict({"dog": found}, red)
    assert not verdict({"dog": found[:1]}, red)
    both = asks({"class": "dog", "count": 2, "color": "red"}, tag="colors")
    assert not verdict({"dog": found}, both)


def test_every_object_must_stand_so_to_every_one_of_its_target():
    wanted = asks(
        {"class": "bench", "count": 2},
        {**DOG, "position": ["right of", 0]},
        tag="position",
    )
    benches = [at(10, 50), at(30, 50)]
    assert verdict({"bench": benches, "dog": [at(80, 50)]}, wanted)
    # right of one of them only
    assert not verdict({"bench": benches, "dog": [at(20, 50)]}, wanted)
    # without its target there is no position
    assert not verdict({"bench": benches[:1], "dog": [at(80, 50)]}, wanted)


def test_clauses_say_what_is_missing_and_their_share_is_the_grade():
    wanted = asks(
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "position": ["below", 0]},
    )
    objects = {"circle": [at(50, 10, colour="blue")], "square": [at(50, 80)]}
    assert clauses(objects, wanted) == [
        ("1 circle", True),
        ("red circle", False),
        ("1 square", True),
        # of a circle that is not the one asked for
        ("square below circle", False),
    ]
    assert graded(objects, wanted) == 0.5 and not verdict(objects, wanted)
    objects["circle"] = [at(50, 10, colour="red")]
    assert graded(objects, wanted) == 1.0 and verdict(objects, wanted)
