# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of clients: the same answers as Python's where both know the form, and never a long wait."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidInput
from soci_snapshotter.regex import BadPatternError, Pattern

ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", "x", r"\.", "[a-c]", "^", r"\b"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{1,}", "*?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(PATTERNS, st.text("abc1x. ", max_size=12))
def test_agrees_with_re(pattern: str, text: str) -> None:
    """A search finds something exactly where Python's finds something."""
    assert Pattern(pattern).found_in(text) == bool(re.search(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("", "", True),
        ("^$", "", True),
        (r"\Aab\z", "ab", True),
        ("$", "x\n", True),
        ("a$", "a\n", False),
        (".", "\n", False),
        ("[]a]", "]", True),
        ("[^]]", "]", False),
        ("[a-]", "-", True),
        (r"[\d-]", "-", True),
        ("a{,3}", "a{,3}", True),
        ("a{2", "a{2", True),
        (r"\t", "\t", True),
        (r"\/", "/", True),
        ("a|", "zz", True),
        ("é", "café", True),
    ],
)
def test_corners(pattern: str, text: str, *, found: bool) -> None:
    """Borders, classes and braces as RE2 has them."""
    assert Pattern(pattern).found_in(text) is found


@pytest.mark.parametrize("pattern", ["(", ")", "a**", "*", "[a", "[b-a]", "a{3,2}", "a{1001}", "\\", r"\i", "a+++"])
def test_broken(pattern: str) -> None:
    """What is no regular expression is told apart."""
    with pytest.raises(BadPatternError):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "^(a|a)*$", "^(a|aa)+$", "(.*)*x", "a?" * 100 + "a" * 100 + "$"])
def test_no_pattern_takes_long(pattern: str) -> None:
    """What keeps a backtracking search busy for ever ends here (the suite's own timeout is the limit)."""
    assert not Pattern(pattern).found_in("a" * 2000 + "!")


@pytest.mark.parametrize("pattern", ["((((){1000}){1000}){1000}){1000}", "(((((a?){9}){9}){9}){9}){9}", "(" * 9999])
def test_no_pattern_grows(pattern: str) -> None:
    """Repeats of repeats end in a refusal or in a small program."""
    with suppress(InvalidInput):
        assert Pattern(pattern).found_in("")


@given(st.text(max_size=40))
def test_any_text(pattern: str) -> None:
    """Any text is a pattern, a broken one, or one that is refused."""
    with suppress(InvalidInput, BadPatternError):
        Pattern(pattern).found_in("some/text:1.2")
