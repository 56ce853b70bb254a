import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from estimators.answers import ANSWER_FORMATS, canonicalise, extract, is_correct


def assert_extracts(answer_format, cases):
    assert {text: extract(text, answer_format) for text in cases} == cases


def test_the_formats_are_the_ones_of_the_api():
    assert list(ANSWER_FORMATS) == ["none", "last_number", "boxed", "choice", "final_line"]


def test_an_unknown_format_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'json'; valid: none, last_number, boxed, choice"):
        extract("42", "json")


def test_none_extracts_nothing():
    assert extract("The answer is 4.", "none") is None


def test_last_number_takes_the_last_number_as_it_is_written():
    cases = {
        "It is 1,234.5": "1,234.5",
        "the root is -7": "-7",
        "It costs $12.": "12",
        "a debt of -$7.50 or so": "-7.50",
        "so 3/4 of it": "3/4",
        "10 / 4 remain": "10 / 4",
        "2 + 3 = 5": "5",
        "8-3": "3",
        "x = (−4)": "−4",
        "about 6.02e23 of them": "6.02e23",
        "50% off": "50",
        "**42**": "42",
        "12 apples.\n\n#### 72": "72",
        "pick 1,2,3": "3",
        "0.5.": "0.5",
        "and .25 left": ".25",
        "the 3 roots of x2": "3",
        "1,2345": "2345",
    }
    assert_extracts("last_number", cases)


@pytest.mark.parametrize("text", ["", "no digits", "H2O", "٣", "-", "$"])
def test_last_number_abstains_without_a_number(text):
    assert extract(text, "last_number") is None


def test_boxed_takes_the_last_box_with_its_nested_braces():
    cases = {
        r"\boxed{5}": "5",
        r"first \boxed{1}, then $\boxed{\frac{1}{2}}$.": r"\frac{1}{2}",
        r"\boxed{\text{(B)}}": r"\text{(B)}",
        r"\boxed{\boxed{7}}": "7",
        r"\boxed{\{1, 2\}}": r"\{1, 2\}",
        r"\boxed {  9 }": "9",
        r"\fbox{3}": "3",
        r"\boxed{5}, as \boxed asks": "5",
        "\\boxed{a\nb}": "a\nb",
    }
    assert_extracts("boxed", cases)


@pytest.mark.parametrize("text", ["", "5", r"\boxed 5", r"\boxed{}", r"\boxed{1} \boxed{\frac{1}"])
def test_boxed_abstains_without_a_closed_last_box(text):
    assert extract(text, "boxed") is None


def test_choice_finds_the_letter():
    cases = {
        "(B)": "B",
        "B": "B",
        "B.": "B",
        "**B**": "B",
        "b": "B",
        "Answer: B": "B",
        "Answer: B.": "B",
        "answer: (c)": "C",
        "**Answer:** D": "D",
        "The correct answer is A.": "A",
        "The answer is A because cats sit.": "A",
        "The answer is option C, not (D)": "C",
        "The correct option is (E).": "E",
        "So the answer is \\boxed{\\text{B}}.": "B",
        "Hence $\\boxed{D}$": "D",
        "The answer is 'C'.": "C",
        "Option A is wrong. Answer: B (Paris)": "B",
        "The answer is A. No: the answer is B": "B",
        "B. Paris": "B",
        "B) Paris, since it is": "B",
        "Not (A), so it must be (C).": "C",
        "(A) one (B) two\nAnswer: A": "A",
        "Let me think.\n\nC\n": "C",
    }
    assert_extracts("choice", cases)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A cat sat",
        "The answer is a cat.",
        "Answer: A cat sat",
        "This is the answer. A is a letter",
        "A. red\nB. blue\nWho knows?",
        "The answer is not A",
        "answer: Berlin",
        "Answer: E = mc^2",
        "(F)",
    ],
)
def test_choice_abstains_without_a_stated_letter(text):
    assert extract(text, "choice") is None


def test_final_line_takes_the_last_line_that_is_not_blank():
    assert_extracts("final_line", {"a\n b \n\n  \n": "b", "one": "one", "": None, " \n\t": None})


@pytest.mark.parametrize(
    ("canonical", "spellings"),
    [
        (
            "1000",
            ["1,000", "1000.0", "1000", " 1000. ", "$1,000", r"\$1{,}000.00", "+1e3", "1\\,000"],
        ),
        (
            "0.5",
            ["1/2", "0.5", ".5", "0.50", r"\frac{1}{2}", r"$\dfrac{2}{4}$", "**0.5**", "3 / 6"],
        ),
        ("-0.5", ["-1/2", "−0.5", r"-\frac{1}{2}", r"\frac{-1}{2}", "- 0.5"]),
        ("1/3", ["1/3", "2/6", r"\(\tfrac{1}{3}\)"]),
        ("0", ["0", "-0", "0.00", "0/7"]),
        ("50", ["50", "50%", r"50\%", "50 %"]),
        ("3.14", ["3.14", "157/50", r"\boxed{3.14}", r"\text{3.14}"]),
        ("A", ["A", "a", "(A)", "A.", "a)", "**A**", r"\text{A}", "$A$"]),
        ("paris", ["Paris", " paris.", "**Paris**", "PARIS", r"\text{Paris}"]),
        ("new york", ["New  York", "new\nyork"]),
        ("(1, 2)", ["(1,2)", "(1, 2)", r"\left(1, 2\right)"]),
        (None, ["", " ", ".", "$$", "**", None]),
    ],
)
def test_equal_answers_have_one_spelling(canonical, spellings):
    assert {spelling: canonicalise(spelling) for spelling in spellings} == dict.fromkeys(
        spellings, canonical
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("50%", "0.5"),
        ("5 km", "5"),
        ("5!", "5"),
        ("1, 200", "1,200"),
        ("1/3", "0.3333333333333333"),
        (r"3\frac{1}{2}", "15.5"),
        ("A", "B"),
        ("0.1", "0.10000000000000001"),
    ],
)
def test_different_answers_stay_apart(one, other):
    assert canonicalise(one) != canonicalise(other)


@pytest.mark.parametrize("text", ["1/0", "1e999999999", "1e-999999999", "9" * 101, "1/1e999"])
def test_what_is_no_computable_number_stays_text(text):
    assert canonicalise(text) == text


def test_numbers_are_exact_beyond_float64():
    assert canonicalise("0.1") == canonicalise("1/10")
    assert canonicalise("9007199254740993") == "9007199254740993"


number = st.from_regex(r"\A-?\$?[0-9]{1,30}(\.[0-9]{1,30})?(e-?[0-9]{1,3})?(/[0-9]{1,9})?%?\Z")
pieces = st.lists(
    st.sampled_from(
        [*'ab1,./-+$%*_`"(){}[]\\ \n−ßǰİ', r"\frac", r"\text{", r"\left", r"\boxed{", "{,}", "e9"]
    )
).map("".join)


@given(st.text() | number | pieces)
@example("1," * 600)
@example("\\" * 3 + ",,")
@example("x" * 990 + "1,1,1,1,1,1,1,1")
def test_canonicalising_twice_changes_nothing_more(answer):
    canonical = canonicalise(answer)
    assert canonicalise(canonical) == canonical
    assert canonical is None or canonical.strip()


@given(st.fractions(max_denominator=10**6))
def test_fractions_and_their_decimals_have_one_spelling(fraction):
    spelled = canonicalise(str(fraction))
    assert canonicalise(f"{fraction.numerator * 7}/{fraction.denominator * 7}") == spelled


def test_correctness_compares_canonical_answers():
    assert is_correct("$1,000.00", "1000")
    assert is_correct("(b)", "B")
    assert not is_correct("42", "4")
    assert not is_correct("5 km", "5")


@pytest.mark.parametrize("answer", [None, "", "."])
def test_an_abstention_is_not_correct(answer):
    assert is_correct(answer, "4") is False


@pytest.mark.parametrize("reference", ["", " ", "$$"])
def test_an_empty_reference_is_refused(reference):
    with pytest.raises(ValueError, match="is empty; give the right answer"):
        is_correct("4", reference)


HOSTILE = [
    "1" * 100_000,
    "1," * 50_000,
    "1,111" * 20_000,
    "1/" * 50_000,
    "1 / " * 25_000,
    "1e" * 50_000,
    "-" * 100_000,
    "$" * 100_000,
    " " * 100_000,
    "\n" * 100_000,
    "A" + " " * 100_000 + "B",
    "{" * 100_000,
    "\\" * 100_001,
    "\\boxed{" * 14_000,
    "\\boxed" + " " * 100_000,
    "\\boxed" * 16_000,
    "\\frac{1" * 14_000,
    "\\text{" * 16_000,
    "answer" * 16_000,
    "answer " * 14_000,
    "answer: " + "(" * 100_000,
    "answer is option " * 6_000,
    "(A" * 50_000,
    "A." * 50_000,
    "*A\n" * 33_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:9]))
def test_hostile_texts_of_100_kb_cost_little(text):
    start = time.process_time()
    for answer_format in ANSWER_FORMATS:
        canonicalise(extract(text, answer_format))
    canonicalise(text)
    canonicalise(text[:1000])
    assert time.process_time() - start < 1.0


def test_a_digit_string_of_1_mb_costs_nothing():
    start = time.process_time()
    assert canonicalise("9" * 1_000_000) == "9" * 1_000_000
    assert time.process_time() - start < 1.0
