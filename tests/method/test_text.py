"""Sentences, words and tokens are character spans: whatever the text is, nothing is lost or cut."""

import pytest
from hypothesis import given, settings
from texts import TEXTS
from transformers import AutoProcessor

from common.text import phrase_counts, split_sentences, split_words, tokens_in_span


def cut(text, spans):
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("A dog. A cat! Red? Yes.", ["A dog.", "A cat!", "Red?", "Yes."]),
        ("no stop at the end", ["no stop at the end"]),
        (
            "Dr. Smith of the U.S. Army met Mr. Lee, Jr. Both e.g. Sir A. B. Hill vs. Rex.",
            ["Dr. Smith of the U.S. Army met Mr. Lee, Jr. Both e.g. Sir A. B. Hill vs. Rex."],
        ),
        (
            "See fig. 3 and approx. 5 of them. Two more.",
            ["See fig. 3 and approx. 5 of them.", "Two more."],
        ),
        (
            "It is 3.5 m tall. It costs $1,000.50. Fine.",
            ["It is 3.5 m tall.", "It costs $1,000.50.", "Fine."],
        ),
        ('The sign says "Stop." A man waits.', ['The sign says "Stop."', "A man waits."]),
        (
            "‘Go!’ she said. “No…” He left (at last.) Then rain.",
            ["‘Go!’ she said.", "“No…”", "He left (at last.)", "Then rain."],
        ),
        (
            "„Schön!“ Und: „Dr. Lang kam.“ Er ging. ‚Na?‘ »Ja.« »Nein!« sagt er.",
            ["„Schön!“", "Und: „Dr. Lang kam.“", "Er ging.", "‚Na?‘", "»Ja.«", "»Nein!« sagt er."],
        ),
        (
            "« Oui ! » Il part. «\u00a0Non\u00a0?\u00a0» dit-il. ”Bra!” Sedan. ¡Sr. Gil! «¿Ya?» Sí.",
            [
                *("« Oui ! »", "Il part.", "«\u00a0Non\u00a0?\u00a0» dit-il.", "”Bra!”", "Sedan."),
                *("¡Sr. Gil!", "«¿Ya?»", "Sí."),
            ],
        ),
        (
            "「Hello!」 Then 『yes.』 （Fine.） No",
            ["「Hello!」", "Then 『yes.』", "（Fine.）", "No"],
        ),
        ("Go. “Red” is it. Stop.“Go”", ["Go.", "“Red” is it.", "Stop.“Go”"]),
        (
            "It waits... and waits. Then... It goes.",
            ["It waits... and waits.", "Then...", "It goes."],
        ),
        (
            "他说：「你好。」红色的圆。是吗？3.5米！好",
            ["他说：「你好。」", "红色的圆。", "是吗？", "3.5米！", "好"],
        ),
        ("A title\nFirst line.\r\n\r\nSecond line", ["A title", "First line.", "Second line"]),
        (
            "A 🙂 smiles! 👩‍👩‍👧 is a family. 🎉",
            ["A 🙂 smiles!", "👩‍👩‍👧 is a family.", "🎉"],
        ),
        ("שלום עולם. זה עיגול אדום.", ["שלום עולם.", "זה עיגול אדום."]),
        ("هل هذا أحمر؟ نعم، إنه أحمر.", ["هل هذا أحمر؟", "نعم، إنه أحمر."]),
        ("यह लाल है। वह नीला है।", ["यह लाल है।", "वह नीला है।"]),
        ('उसने कहा "हाँ।" फिर गया। «هل هذا؟» نعم', ['उसने कहा "हाँ।"', "फिर गया।", "«هل هذا؟»", "نعم"]),
        ("1. A red circle.\n2. A blue star.", ["1. A red circle.", "2. A blue star."]),
        ("  ", []),
        ("... !", []),
        ("", []),
    ],
)
def test_a_text_is_split_where_a_reader_would(text, sentences):
    assert cut(text, split_sentences(text)) == sentences


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "A well-lit room: 3.5 m, 1,000 cats; don't!",
            ["A", "well-lit", "room", "3.5", "m", "1,000", "cats", "don't"],
        ),
        ("红色 circle，日本", ["红", "色", "circle", "日", "本"]),
        ("人々は5µm", ["人", "々", "は", "5µm"]),
        ("(שלום) “عالم”، naïve e\u0301t\u00e9", ["שלום", "عالم", "naïve", "e\u0301t\u00e9"]),
        ("… -- !?", []),
    ],
)
def test_words_come_without_the_punctuation_around_them(text, words):
    assert cut(text, split_words(text)) == words


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_sentences_are_trimmed_in_order_and_hold_every_word_exactly_once(text):
    sentences = split_sentences(text)
    words = split_words(text)
    for spans in (sentences, words):
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(edges)
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert all(part == part.strip() for part in cut(text, spans))

    assert [word for sentence in sentences for word in split_words(text, *sentence)] == words
    assert all(split_words(text, *sentence) for sentence in sentences)
    for i, character in enumerate(text):
        if "a" <= character.lower() <= "z":
            assert any(start <= i < end for start, end in words)


def test_the_tokens_of_a_span_are_those_that_share_a_character_with_it():
    offsets = [(0, 3), (3, 7), (7, 8), (8, 14)]  # "The| red|.| Circle"
    spans = [(4, 7), (0, 8), (2, 4), (7, 8), (14, 20)]
    tokens = [tokens_in_span(span, offsets) for span in spans]
    assert tokens == [[1], [0, 1, 2], [0, 1], [2], []]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint("qwen3_vl")).tokenizer


def test_an_emoji_of_many_byte_tokens_keeps_them_all(tokenizer):
    text = "red 👩‍👧 sign"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = tokens_in_span((4, 7), encoded.offset_mapping)
    assert len(inside) > 3
    assert tokenizer.decode([encoded.input_ids[i] for i in inside]).strip() == "👩‍👧"


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_every_word_and_sentence_gets_its_tokens_from_a_real_tokenizer(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded.offset_mapping
    for span in split_sentences(text) + split_words(text):
        inside = tokens_in_span(span, offsets)
        assert inside == list(range(inside[0], inside[-1] + 1))
        first_start, first_end = offsets[inside[0]]
        assert first_start <= span[0] < first_end


def test_phrases_are_counted_in_whole_words_and_once_per_text():
    texts = ["A Red circle. A red circle!", "A red, a blue circle.", "red circlet", "红色圆形"]
    phrases = ["red circle", "red", "circle", "色圆", "green"]
    assert phrase_counts(phrases, texts) == [1, 3, 2, 1, 0]
