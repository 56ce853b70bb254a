import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimators.canonical import canonicalise
from estimators.consensus import (
    Vote,
    agreement,
    majority_vote,
    vote_correctness,
)

ballots = st.lists(
    st.sampled_from(["4", "5", "x=5", "y=5", "5\\text{cm}", "5\\text{m}", "A", "", " ", None]),
    max_size=12,
)


def test_the_most_frequent_answer_wins_without_needing_half():
    vote = majority_vote(["4", "5", "4", "6", "7"])
    assert vote == Vote("4", share=0.4, num_valid=5, num_samples=5, tie=False)


def test_a_tie_is_reported_as_a_tie_with_its_answers_sorted():
    vote = majority_vote(["5", "4", "6", "4", "5"])
    assert vote == Vote(None, share=0.4, num_valid=5, num_samples=5, tie=True, tied=("4", "5"))


def test_empty_and_unparsable_answers_abstain_and_never_win():
    vote = majority_vote([None, "", " \n", None, "4"])
    assert vote == Vote("4", share=1.0, num_valid=1, num_samples=5, tie=False)


@pytest.mark.parametrize("answers", [[], [None, "", " "]])
def test_a_vote_of_abstentions_has_no_answer_no_share_and_no_tie(answers):
    assert majority_vote(answers) == Vote(None, None, 0, len(answers), tie=False)


def test_votes_are_counted_on_the_canonical_answer():
    vote = majority_vote(canonicalise(a) for a in ["1,000", "1000.0", "0.5", "1/2", "1000", "A"])
    assert (vote.answer, vote.share) == ("1000", 0.5)


def test_answers_that_say_more_or_less_vote_together():
    vote = majority_vote(["5", "5\\text{cm}", "x=5", "6", "6"])
    assert (vote.answer, vote.share) == ("5\\text{cm}", 0.6)
    assert agreement(vote, majority_vote(["5"])) is True
    assert agreement(vote, majority_vote(["5\\text{m}"])) is False
    apart = majority_vote(["5", "5\\text{cm}", "5\\text{m}", "5\\text{m}"])
    assert (apart.answer, apart.share) == ("5\\text{m}", 0.5)


@given(ballots, st.randoms())
def test_permuting_the_samples_changes_nothing(answers, random):
    assert majority_vote(random.sample(answers, len(answers))) == majority_vote(answers)


@given(ballots)
def test_a_vote_has_an_answer_or_a_tie_or_no_valid_sample(answers):
    vote = majority_vote(answers)
    assert [vote.answer is not None, vote.tie, vote.num_valid == 0].count(True) == 1
    assert vote.tie == (len(vote.tied) > 1)


def test_agreement_compares_the_majorities():
    four, five = majority_vote(["4", "4", "5"]), majority_vote(["5"])
    assert agreement(four, majority_vote(["4"])) is True
    assert agreement(four, five) is False


@pytest.mark.parametrize("undecided", [["4", "5"], [None], []])
def test_agreement_is_unknown_when_either_side_has_no_majority(undecided):
    decided, undecided_vote = majority_vote(["4"]), majority_vote(undecided)
    assert agreement(decided, undecided_vote) is None
    assert agreement(undecided_vote, decided) is None
    assert agreement(undecided_vote, undecided_vote) is None


@pytest.mark.parametrize(
    ("answers", "correctness"),
    [(["4"], 1.0), (["5"], 0.0), (["4", "5"], 0.5), (["4", "5", "6"], 1 / 3), (["5", "6"], 0.0)],
)
def test_correctness_of_a_tie_is_the_fraction_of_its_answers_that_are_right(answers, correctness):
    assert vote_correctness(majority_vote(answers), lambda answer: answer == "4") == correctness


def test_correctness_of_abstentions_is_absent_not_0():
    assert vote_correctness(majority_vote([None]), lambda answer: True) is None
