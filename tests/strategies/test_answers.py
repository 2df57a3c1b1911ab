"""What counts as the answer of a text, and which answers are the same."""

import pytest

from hasten.strategies import answers
from hasten.values import UserError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("b = 21 ; c = 5 ; #### 5", "5"),
        ("#### 1,234.50", "1234.5"),
        ("#### -$3", "-3"),
        ("#### $ 18\n", "18"),
        ("#### 3/4", "3/4"),
        ("so 3 + 4 = 7\n#### 7\nQuestion: next 9", "7"),
        ("#### seven\nwords", None),  # a Markdown heading is no answer
        ("#### Step 2: add\n2 + 2 = 4", "4"),
        ("#### 1. First\nThe answer is 12.", "12"),
        ("it is\n#### Paris", "paris"),
        (r"thus \boxed{\frac{1}{2}} and 9", "1/2"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\sqrt{2} + \frac{a}{\sqrt{b}}}", r"\sqrt{2}+\frac{a}{\sqrt{b}}"),
        (r"\boxed{cut off {here", None),
        (r"\boxed{3} then \boxed{cut", "3"),
        (r"\fbox{4}", "4"),
        ("The answer is 42.", "42"),
        ("The answer is: -7", "-7"),
        ("the final answer is $1,000.00 a week. That is all 52 weeks.", "1000"),
        ("The answer is 1. No, the answer is 2.", "2"),
        ("The answer is new york. Or 7", "new york"),
        ("**Answer: 18 dollars**", "18"),
        ("first 3, then 4.5, in all 7.5.", "7.5"),
        ("3 - 5 = -2", "-2"),
        ("10-3", "3"),
        ("it costs $1,250,000", "1250000"),
        ("a list 1,2,3", "3"),
        ("no number", None),
        ("", None),
        ("   \n", None),
    ],
)
def test_auto(text, answer):
    assert answers.extract(text) == answer


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("hash", "#### 7.0 apples\n#### 8", "7.0 apples"),
        ("hash", "The answer is 7", None),
        ("hash", "####", None),
        ("boxed", r"$\boxed{ 7.0 }$ #### 8", "7"),
        ("boxed", "#### 8", None),
        ("last-number", "#### 8 but 9 in the end", "9"),
        ("last-number", "none", None),
        ("line", "reason\n  Blue \n\n", "blue"),
        ("line", "\n", None),
        (r"ans=(\w+)", "ans=A ans=B", "b"),
        (r"ans=(\w*)", "ans= ", None),
        (r"ans=(\w+)", "none", None),
    ],
)
def test_named_extractors_and_patterns(name, text, answer):
    assert answers.extractor(name)(text) == answer


@pytest.mark.parametrize(
    "same",
    [
        ("7", "7.0", "07", "+7", " 7. ", "$7", "7.00", r"\$7", "x = 7", "7%", "**7**"),
        ("1000", "1,000", "1,000.0", r"1,\!000"),
        ("0", "-0", "0.0", "-0.00", ".0"),
        ("0.5", ".5", "0.50", "+.5"),
        ("-3", "\u22123", "-3.0"),
        ("1/2", r"\frac{1}{2}", r"\dfrac12", r"\tfrac{1}{2}"),
        ("new york", "New York", "NEW  YORK.", r"\text{New York}"),
        ("(1,2)", "(1, 2)", r"\left( 1, 2 \right)"),
        ("x+1", "x + 1"),
        ("90", r"90^\circ", r"90^{\circ}"),
    ],
)
def test_the_same_answer_in_other_words(same):
    assert {answers.normalise(answer) for answer in same} == {answers.normalise(same[0])} == {same[0]}


@pytest.mark.parametrize(
    ("one", "other"),
    [("7", "-7"), ("7", "70"), ("0.5", "5"), ("1,2", "12"), ("1.5", "15"), ("x+1", "x-1"), ("(1,2)", "(12)"), ("1/2", "12")],
)
def test_different_answers_stay_different(one, other):
    assert answers.normalise(one) != answers.normalise(other)


@pytest.mark.parametrize("text", ["7.0", r"\frac12", "New  York.", "$1,000.50", r"\text{a b}", "x = 3", "-0"])
def test_normalising_twice_changes_nothing(text):
    assert answers.normalise(answers.normalise(text)) == answers.normalise(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [("hsh", "did you mean 'hash'"), ("(a)(b)", "exactly one group, not 2"), ("(a", "not a regular expression"), ("(?:a)", "not 0")],
)
def test_an_extractor_that_cannot_be_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        answers.extractor(name)
