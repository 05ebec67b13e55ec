"""Random captions for property tests: what sentences and words of many scripts are made of."""

from hypothesis import strategies as st

PIECES = [
    *("The", "red", "Dr.", "e.g.", "U.S.", "3.5", "don't", ".", "...", "…", "!", "?"),
    *("。", "！", "？", "「", "」", '"', "”", "’", ")"),
    *("„", "“", "»", "«", " »", "‹"),
    *(",", " ", "  ", "\n", "\r\n", "\t", "\u2028", "é", "e\u0301"),
    *("红", "日本", "🙂", "👩‍👧", "שלום", "أحمر", "؟", "한국어"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60)
