import time

import pytest

from estimators.answers import ANSWER_FORMATS, extract, is_correct
from estimators.canonical import canonicalise


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
        "so it is 12 3/5 m": "12 3/5",
        "It is 14{,}916.": "14,916",
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


@pytest.mark.parametrize("answer_format", [f for f in ANSWER_FORMATS if f != "none"])
def test_answers_are_read_behind_the_reasoning(answer_format):
    right, wrong = {"choice": ("B", "C")}.get(answer_format, ("4", "5"))
    thought, said = rf"Answer: {wrong}, so \boxed{{{wrong}}}", f"\\boxed{{{right}}}"
    shown = {"final_line": said}.get(answer_format, right)
    for text in (f"<think>{thought}</think>\n{said}", f"{thought}\n</think>\n\n{said}", said):
        assert extract(text, answer_format) == shown
    assert extract(f"a</think>b<think>{thought}</think>{said}", answer_format) == shown


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
def test_reasoning_that_never_ends_has_no_answer(answer_format):
    thought = r"Answer: B, so \boxed{4}"
    assert extract(f"<think>{thought}", answer_format) is None
    assert extract(f"<think>a</think><think>{thought}", answer_format) is None
    assert extract(thought, answer_format, starts_in_reasoning=True) is None
    assert extract(f"{thought}</think>", answer_format, starts_in_reasoning=True) is None


def test_correctness_compares_canonical_answers():
    assert is_correct("$1,000.00", "1000")
    assert is_correct("(b)", "B")
    assert is_correct("5 km", "5")
    assert not is_correct("42", "4")
    assert not is_correct("5 km", "5 m")


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
