"""Numbers and foreign text as people read them."""

from __future__ import annotations

from trimtab.reports.shared import words

FORMS = [
    (words.percent(0.8534), "85.3 %"),
    (words.percent(None), "–"),
    (words.percent(0.9998), "99.98 %"),
    (words.percent(0.00004), "0.004 %"),
    (words.percent(0.996, 0), "99.6 %"),
    (words.percent(1.0), "100.0 %"),
    (words.percent(1 - 1e-12), "100.0 %"),
    (words.percent(-1e-9), "0.0 %"),
    (words.percent(0.0, 0), "0 %"),
    (words.points(0.124, 0.853), "+72.9"),
    (words.points(0.5, 0.469), "−3.1"),
    (words.points(0.5, 0.50001), "0.0"),
    (words.points(None, 0.5), "–"),
    (words.small_percent(35, 1000), "3.50 %"),
    (words.small_percent(123, 1_000_000), "0.0123 %"),
    (words.small_percent(0, 10), "0.00 %"),
    (words.small_percent(1, 0), "0.00 %"),
    (words.count(4884480), "4,884,480"),
    (words.headed("macro F1 on FPB"), "Macro F1 on FPB"),
    (words.headed("chrF"), "chrF"),
    (words.counted(1, "row"), "1 row"),
    (words.counted(1200, "row"), "1,200 rows"),
    (words.signed(12345.67, 1), "+12,345.7"),
    (words.number(0.41234), "0.412"),
    (words.number(12.345), "12.35"),
    (words.number(9.9996), "10.00"),
    (words.number(999.96), "1,000"),
    (words.number(-0.1234), "−0.123"),
    (words.number(0.00012), "1.20e-04"),
    (words.number(12345.6), "12,346"),
    (words.number(float("inf")), "inf"),
    (words.duration(12.34), "12.3 s"),
    (words.duration(59.97), "1 min 00 s"),
    (words.duration(822.4), "13 min 42 s"),
    (words.duration(3661), "1 h 01 min"),
    (words.size(999), "999 bytes"),
    (words.size(9_790_000), "9.8 MB"),
    (words.size(123_456), "123 kB"),
    (words.size(999_999), "1.0 MB"),
    (
        words.options({"rank": 16, "alpha": 32.0, "magnitude": True, "seed": None}),
        ["rank 16", "alpha 32", "magnitude on", "seed none"],
    ),
]


def test_forms() -> None:
    assert [(said, expected) for said, expected in FORMS if said != expected] == []


def test_a_shortened_text_keeps_both_ends_and_whole_words() -> None:
    text = "The beginning of the tale, " + "and on " * 100 + "then the question?"
    short = words.shorten(text, 80)
    assert len(short) <= 80
    assert short.startswith("The beginning of the tale, and on")
    assert short.endswith("then the question?")
    assert all(word in text.split() for word in short.split() if word != "…")


def test_a_text_without_spaces_is_shortened_all_the_same() -> None:
    short = words.shorten("x" * 500, 60)
    assert 50 <= len(short) <= 60
