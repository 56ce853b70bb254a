r"""Which answers are the same: pairs from MATH, GSM8K and public bug reports, each way round."""

import itertools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from estimators.canonical import canonicalise, comparable_values, group, is_same

# One canonical form each: all pairs within a row are equal.
CLASSES = [
    ("12.6", [r"12 \frac{3}{5}", r"12\frac{3}{5}", "12 3/5", r"12\frac35", "63/5", "126/10"]),
    ("-1.5", [r"-1\frac{1}{2}", "-1 1/2", "-3/2", "-1½", r"-\frac32", r"\dfrac{-3}{2}"]),
    ("137.5", [r"137 \frac{1}{2}", r"137\frac{1}{2}", "137½"]),
    ("0.5", [r"\frac12", r"\frac{1}2", r"\frac 1 2", r"\tfrac12", ".5", "0.50", "1/2", "**0.5**"]),
    ("-0.5", [r"-\frac{1}{2}", r"\frac{-1}{2}", "-1/2", "−0.5", "- 0.5", r"\frac{1}{-2}", "-.5"]),
    ("1/3", ["1/3", "2/6", r"\(\tfrac{1}{3}\)", r"\cfrac13", "(1/3)"]),
    ("5/9", [r"\frac 59", r"\frac59", r"\frac{5}9", "5 / 9"]),
    ("1", ["1.0", "1", "+1", "1.", r"\frac{3}{3}", r"\boxed{1}", "one", "100/100"]),
    ("1000", ["1,000", "1000.0", " 1000. ", "+1e3", r"1\,000", "1{,}000", "10^3", "1 000"]),
    ("11111111100", [r"11,\! 111,\! 111,\! 100", r"11,\!111,\!111,\!100", "11,111,111,100"]),
    ("0.0015", [r"1.5\times10^{-3}", r"1.5 \cdot 10^{-3}", "1.5e-3", "0.0015", "1.5*10^-3"]),
    ("0", ["0", "-0", "0.00", "0/7"]),
    (r"90^\circ", [r"90^\circ", r"90^{\circ}", "90°", "90 degrees", r"90\text{ degrees}"]),
    (r"50\%", ["50%", r"50\%", "50 %", "50 percent", r"50\text{ percent}", "50 pct"]),
    (r"5.4\text{$}", ["$5.40", r"\$5.40", "5.40 dollars", r"5.40\text{ dollars}", "5.40 USD"]),
    (r"5\text{cm}", ["5 cm", r"5\text{ cm}", "5cm", "5 centimeters", r"5~\mathrm{cm}"]),
    (r"15\text{cm^2}", [r"15\mbox{ cm}^2", r"15\text{ cm}^{2}", "15 square cm", "15 cm^2"]),
    (r"864\text{in^2}", [r"864 \mbox{ inches}^2", "864 square inches", r"864\text{ sq in}"]),
    (r"72\text{km/h}", ["72 km/h", "72 kilometers per hour", r"72\text{ kph}"]),
    (r"9.8\text{m/s^2}", [r"9.8\text{ m/s}^2", "9.8 m/s^2", "9.8 meters per second^2"]),
    (r"32348\text{$}", [r"\$32,\!348", "$32,348", "32348 dollars", r"\$ 32{,}348.00"]),
    ("4:30 pm", ["4:30 p.m.", "4:30 PM", r"4:30\text{ p.m.}", "4:30pm"]),
    (r"\{(2,3),(4,5)\}", ["(4,5), (2,3)", "(2, 3) and (4, 5)", r"\{(2,3),(4,5)\}"]),
    (r"12\text{apple}", ["12 apples", r"12\text{ apples}", "12 apple"]),
    ("18", ["18", r"18\text{ units}", "18 square units", "18.00"]),
    ("x=5", ["x=5", "x = 5", r"$x = 5$.", r"\boxed{x=5}", "x = 5.0", "x=10/2"]),
    (r"x=\{3,5\}", ["x=3, x=5", "x = 5 or x = 3", "x=3,5", r"x = 3 \text{ or } x = 5"]),
    ("y=2x+3", ["y=2x+3", "y = 2x + 3", r"y = 2 \cdot x + 3", r"\(y = 2x+3\)"]),
    ("y=x/2+2", [r"y = \frac{x}{2} + 2", "y=x/2+2"]),
    (r"\sqrt{2}", [r"\sqrt2", r"\sqrt{2}", r"\sqrt 2", "√2", "sqrt(2)", r"\sqrt{2}."]),
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"2 \sqrt3", r"2\cdot\sqrt{3}", "2√3", r"2*\sqrt{3}"]),
    (r"\sqrt[3]{2}", [r"\sqrt[3]{2}", r"\sqrt[3]2"]),
    (r"\pi/2", [r"\frac{\pi}{2}", r"\pi/2", r"\dfrac\pi2", "π/2"]),
    (r"288\pi", [r"288 \pi", r"288\pi", r"288 \cdot \pi", "288π"]),
    (r"\cot x", [r"\cot x", r"\cotx", r"\cot(x)", r"\cot{x}", "cot x"]),
    (r"(3,\pi/2)", [r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", r"\Big(3,\tfrac\pi2\Big)"]),
    ("(1,2)", ["(1, 2)", "(1,2)", r"\left(1,2\right)", r"( 1 ,\; 2 )", "(1.0, 4/2)"]),
    ("[0,1)", ["[0,1)", "[0, 1)", r"\left[0,1\right)"]),
    (r"\{1,2\}", [r"\{1,2\}", r"\{2, 1\}", "1, 2", "2 and 1", r"1 \text{ and } 2", "1;2"]),
    (r"\{-2,2\}", [r"\pm 2", r"\{2,-2\}", "-2, 2", "±2"]),
    (r"\{1+\sqrt{19},1-\sqrt{19}\}",
     [r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"]),
    (r"(0,9)\cup(9,36)", [r"(0,9) \cup (9,36)", r"(0,9)\cup(9,36)", "(0, 9) ∪ (9, 36)"]),
    (r"(-\infty,-0.5)\cup(-0.5,\infty)",
     [r"\left(-\infty,-\frac 12\right)\cup \left(-\frac 12,\infty\right)",
      r"(-\infty,-\frac{1}{2})\cup(-1/2,+\infty)"]),
    (r"\emptyset", [r"\emptyset", r"\varnothing", "∅", r"\{\}"]),
    (r"\infty", [r"\infty", "infinity", "∞", r"+\infty"]),
    (r"x\le3", [r"x \le 3", r"x\leq3", "x <= 3", "x≤3", r"x\leqslant 3"]),
    ("x>5", ["x > 5", r"x\gt5"]),
    (r"x\ne2", [r"x \neq 2", r"x\ne 2", "x != 2"]),
    (r"\begin{pmatrix}-1/3\\2/3\\5/3\end{pmatrix}",
     [r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
      r"\begin{pmatrix}-\frac{1}{3}\\\frac23\\5/3\end{pmatrix}",
      r"\left(\begin{array}{c}-1/3\\2/3\\5/3\end{array}\right)",
      r"\begin{bmatrix}-\frac13\\ \frac23\\ \frac53\end{bmatrix}"]),
    ("x^5-x^4+x-1", ["x^5 - x^4 + x - 1", "x^5-x^4+x-1", "x^{5} - x^{4} + x - 1", "x**5-x**4+x-1"]),
    ("6-5i", ["6 - 5i", "6-5i", r"6-5\cdot i"]),
    ("(x+1)/(2y)", [r"\frac{x+1}{2y}", "(x+1)/(2y)", r"\dfrac{x + 1}{2 y}"]),
    ("1010_2", ["1010_2", "1010_{2}", r"1010_{ 2 }"]),
    ("A", ["A", "a", "(A)", "A.", "a)", "**A**", r"\text{A}", "$A$", r"\text{(A)}", r"(\text{A})"]),
    ("A, C", ["A, C", "A,C", r"\text{A,C}"]),
    ("paris", ["Paris", " paris.", "**Paris**", "PARIS", r"\text{Paris}", r"\mbox{Paris}"]),
    ("new york", ["New  York", "new\nyork"]),
    ("5",
     ["5", "The answer is 5.", r"\(5\)", r"\[5\]", "$$5$$", r"\text{5}", "five", "{5}", "(5)"]),
    ("f(2)<f(1)<f(4)", ["f(2) < f(1) < f(4)", "f(2)<f(1)<f(4)"]),
    (None, ["", " ", ".", "$$", "**", None]),
]  # fmt: skip

# The same, though one of them says more.
SAME = [
    ("x=5", "5"), ("5", r"y=5"), ("5 cm", "5"), (r"90^\circ", "90"), ("50%", "50"), ("$5", "5"),
    (r"15\mbox{ cm}^2", "15"), (r"x \in [-2,7]", "[-2,7]"), ("f(x)=2x+1", "2x+1"), ("k = 15", "15"),
    (r"x=3, 5", r"\{3,5\}"), ("12 apples", "12"), ("Area = 12", "12"), ("x = 5 cm", "5"),
    (r"\angle ABC = 90^\circ", "90"), ("(x,y) = (3,5)", "(3,5)"), (r"a=\frac12", "0.5"),
    (r"\frac{270}7\text{ degrees}", "270/7"), ("3 and 5 cm", "3, 5"), ("5th", "5"),
]  # fmt: skip

DIFFERENT = [
    ("12 3/5", "123/5"), ("12 3/5", "36/5"), (r"12\frac{3}{5}", "7.2"), (r"3\frac12", "1.5"),
    ("f(2)", "f'(2)"), ("f(2)", "2"), ("x^2", "x2"), ("x^2", "2x"), ("50%", "0.5"), ("1/2", r"1\2"),
    ("10", "1010_2"), ("1010_2", "1010"), ("1010_2", "1010_3"), ("5 cm", "5 m"), ("5 cm", "5 cm^2"),
    ("5 cm", "5%"), ("$5", "5 cents"), ("12 apples", "12 oranges"), ("(1,2)", "12"), ("1,2", "12"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "1,2"), ("(1,234)", "1234"),
    ("1,234", "1, 234"),
    ("1, 200", "1,200"), ("x=5", "y=5"), ("x=5", "x=6"), ("y=2x+3", "2x+3"), ("y=2x+3", "y=2x"),
    ("x=3, y=5", "x=5, y=3"), ("f(x)=x", "g(x)=x"), ("5!", "5"), ("1/3", "0.3333333333333333"),
    ("A", "B"), ("0.1", "0.10000000000000001"), ("2 million", "2"), ("2 dozen", "2"), ("5x", "5"),
    (r"\sqrt{2}", "2"), (r"\sqrt{12}", r"\sqrt{1}2"), (r"2\sqrt{3}", r"\sqrt{23}"), ("-5", "5"),
    (r"\pm 2", "2"), ("[0,1)", "[0,1]"), ("[0,9)", "[0,1)"), (r"x \le 3", "x<3"), ("x>5", "x<5"),
    (r"\{1,2\}", r"\{1,2,3\}"), ("3, 3", "3"), ("A, C", "C, A"), (r"\Delta", r"\delta"),
    ("X^2+1", "x^2+1"), ("12:00", "1:00"), ("3:4", "3/4"), (r"\pi/2", "1.5707963"), ("2^3", "23"),
    (r"\begin{vmatrix}1\\2\end{vmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("x_2", "x^2"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("2e", "2e2"),
    (r"x^{10}", "x^10y"), (r"\frac{1}{2x}", r"\frac{1}{2}x"), ("x>2 or x<1", "x>2 and x<1"),
    ("yes", "no"), ("even", "odd"), ("4:30 p.m.", "4:30 a.m."), ("5 pm", "5"), ("5 a/b", "5"),
    ("2 m n", "2"),
    ("0.333...", "0.333"),
    (r"x\frac{-1}{2}", "x-0.5"), (r"\frac13 \cdot 10^2", r"\frac{1}{300}"),
    (r"2\frac{x}{3}", "2x3"),
    (r"a \times b", r"a \cdot b"), ("on", "no"), ("5 or more", "5"), ("1,000", "1.000"),
    (r"1 - \frac{1}{e}", r"1 + \frac{1}{e}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
]  # fmt: skip


@pytest.mark.parametrize(("canonical", "spellings"), CLASSES, ids=lambda value: repr(value)[:30])
def test_equal_answers_have_one_spelling(canonical, spellings):
    assert {spelling: canonicalise(spelling) for spelling in spellings} == dict.fromkeys(
        spellings, canonical
    )


@pytest.mark.parametrize(("one", "other"), SAME)
def test_who_leaves_out_a_name_or_a_unit_says_the_same(one, other):
    a, b = canonicalise(one), canonicalise(other)
    assert a != b
    assert is_same(a, b)
    assert is_same(b, a)
    assert len(set(group([a, b]).values())) == 1


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_stay_apart(one, other):
    a, b = canonicalise(one), canonicalise(other)
    assert not is_same(a, b)
    assert not is_same(b, a)
    assert len(set(group([a, b]).values())) == 2


def test_no_two_rows_of_the_table_are_the_same():
    rows = [canonical for canonical, _ in CLASSES if canonical is not None]
    same = {pair for pair in itertools.combinations(rows, 2) if is_same(*pair)}
    assert same == {(r"5\text{cm}", "x=5"), (r"5\text{cm}", "5"), ("x=5", "5")}


def test_units_count_only_where_two_are_named():
    assert group(["5", r"5\text{cm}", "x=5"]) == dict.fromkeys(
        ["5", r"5\text{cm}", "x=5"], r"5\text{cm}"
    )
    apart = ["5", r"5\text{cm}", r"5\text{m}"]
    assert group(apart) == {answer: answer for answer in apart}


@pytest.mark.parametrize("text", ["1/0", "1e999999999", "9" * 101, "1/1e999"])
def test_what_is_no_computable_number_stays_text(text):
    assert canonicalise(text) == text


def test_numbers_are_exact_beyond_float64():
    assert canonicalise("0.1") == canonicalise("1/10")
    assert canonicalise("9007199254740993") == "9007199254740993"


@pytest.mark.parametrize(
    ("one", "other", "values"),
    [
        ("(x+1)^2", "x^2+2x+1", ("(x+1)^2", "x^2+2x+1")),
        ("x=2\\sqrt{2}", "\\sqrt{8}", ("2\\sqrt{2}", "\\sqrt{8}")),
        ("1+x\\text{cm}", "x+1", ("1+x", "x+1")),
        ("0.1234567", "0.1234568", None),
        ("listen 1", "silent 1", None),
        ("x+1\\text{m}", "1+x\\text{cm}", None),
        ("x=\\sqrt{8}", "y=2\\sqrt{2}", None),
        ("x+1", "x+1", None),
    ],
)
def test_values_are_compared_where_a_computer_algebra_system_can(one, other, values):
    assert comparable_values(one, other) == values
    assert comparable_values(other, one) == (values and values[::-1])


number = st.from_regex(r"\A-?\$?[0-9]{1,30}(\.[0-9]{1,30})?(e-?[0-9]{1,3})?(/[0-9]{1,9})?%?\Z")
pieces = st.lists(
    st.sampled_from(
        [*'ab1,./-+$%*_`"(){}[]\\ \n−ßǰİ=x3Ae^\'|:;<½', r"\frac", r"\text{", r"\left", r"\boxed{",
         "{,}", "e9", r"\sqrt", r"\pm", r"\{", r"\}", r"\pi", " cm", " apples", "x=", r"\%",
         r"^\circ", "^{", "and", " or ", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", "12",
         "3/5", "10^", r"\times", r"\cdot", r"\infty", r",\!", "1,000", "two", r"\text{ m}", r"\in"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | number | pieces | pieces)
@example("1," * 600)
@example("\\" * 3 + ",,")
@example("x" * 990 + "1,1,1,1,1,1,1,1")
def test_canonicalising_twice_changes_nothing_more(answer):
    canonical = canonicalise(answer)
    assert canonicalise(canonical) == canonical
    assert canonical is None or canonical.strip()


@given(pieces, pieces)
def test_being_the_same_is_symmetric_and_grouping_follows_it(one, other):
    a, b = canonicalise(one) or "?", canonicalise(other) or "?"
    assert is_same(a, a)
    assert is_same(a, b) == is_same(b, a) == (len(set(group([a, b]).values())) == 1)


@given(st.fractions(max_denominator=10**6))
def test_fractions_and_their_decimals_have_one_spelling(fraction):
    spelled = canonicalise(str(fraction))
    assert canonicalise(f"{fraction.numerator * 7}/{fraction.denominator * 7}") == spelled
    whole, rest = divmod(abs(fraction), 1)
    if whole and rest and fraction > 0:
        assert canonicalise(rf"{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}") == spelled


HOSTILE = [
    "(", "{", r"\{", "[(", r"\frac", r"\frac{", r"\sqrt", r"\sqrt{", "^", "^{", "_{", "-", "+-",
    "$", "$1",
    r"\text{", r"\text{a}", r"\boxed{", r"\left", r"\left(", r"\begin{a}", r"\pm", ",", ", ",
    ",1", "1,",
    "1,111", "1 ", "1a", "1 a", "a ", "a.", "a=", "=", r"\\", "'", r"\,", "and ", "1 and ", "1/",
    "1 1/2 ",
    "10^", r"\times10", "e9", "°", "½", "answer ", "the answer is ", "*", "._", r"\cotx",
    r"\abcdefgh",
    r"\{1,2\},", "(1, 2)", "x=(", r"\in[",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_end(piece):
    for text in (piece * (999 // len(piece)), piece * 50_000, piece * (900 // len(piece)) + "x!"):
        canonical = canonicalise(text)
        assert canonicalise(canonical) == canonical
