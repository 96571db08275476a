# SPDX-License-Identifier: Apache-2.0
"""containerd's filter language: what it says, and that nothing else than `InvalidInput` comes of wrong ones."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidInput
from soci_snapshotter import filters
from soci_snapshotter.filters import parse_filter, parse_filters
from soci_snapshotter.state import Snapshot

REF = "containerd.io/snapshot.ref"
ONE = Snapshot(
    7,
    "default/3/sha256:aa",
    "committed",
    "default/1/base",
    {REF: "sha256:aa", "plain": "yes", "spaced": "a, b", "quoted": 'say "x"', "a.b.c": "deep"},
    1,
    2,
)
BARE = Snapshot(8, "k", "active", "", {}, 1, 1)


@pytest.mark.parametrize(
    ("text", "one", "bare"),
    [
        ("", True, True),
        ("  ", True, True),
        ("name", True, True),
        ("parent", True, True),
        ("labels", False, False),
        ("labels.plain", True, False),
        (f'labels."{REF}"', True, False),
        ("labels.a.b.c==deep", True, False),
        ('labels."a.b".c==deep', True, False),
        ("unknown", False, False),
        ("kind==committed", True, False),
        ("kind==active", False, True),
        ("kind!=committed", False, True),
        ("name==k", False, True),
        ("name=='k'", False, False),
        ('name=="k"', False, True),
        ("name!=k", True, False),
        ("labels.plain!=yes", False, True),
        ("labels.missing!=x", True, True),
        ("unknown!=x", True, True),
        ("unknown==x", False, False),
        ('labels.spaced=="a, b"', True, False),
        (r'labels.quoted=="say \"x\""', True, False),
        (r'name=="\x6b"', False, True),
        (r'name=="\153"', False, True),
        (r'name=="\u006b"', False, True),
        (r'name=="\U0000006b"', False, True),
        ("name~=^default/", True, False),
        ("name~=/^default\\//", True, False),
        ("name~=|^k$|", False, True),
        ('name~="sha256:[a-f]+$"', True, False),
        ("labels.missing~=^$", True, True),
        ("name~=(", False, False),
        ("name~=/a{9,1}/", False, False),
        ("kind==committed,labels.plain==yes", True, False),
        ("kind==committed,labels.plain==no", False, False),
        (" name == k, kind == active ", False, True),
    ],
)
def test_filter(text: str, *, one: bool, bare: bool) -> None:
    """Each form of the grammar matches what the grammar says, on a full snapshot and on a bare one."""
    matches = parse_filter(text)
    assert (matches(ONE), matches(BARE)) == (one, bare)


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "name,",
        ",name",
        "name==",
        "name=x",
        "name = x",
        "==x",
        "name==x y",
        ".name",
        "name.",
        "labels.==x",
        '"open',
        'name=="open',
        r'name=="\q"',
        r'name=="\ud800"',
        r'name=="\U00110000"',
        "name;kind",
        "name==a,,kind",
        "name~=(?i)x",
        r"name~=\pL",
        "name~=" + "(" * 60 + ")" * 60,
        "name~=(a{100}){100}",
        "x" * (filters.FILTER_LIMIT + 1),
    ],
)
def test_wrong_filters(text: str) -> None:
    """What breaks the grammar, or asks too much, is `InvalidInput`."""
    with pytest.raises(InvalidInput):
        parse_filter(text)


def test_what_containerd_sends() -> None:
    """The one filter that containerd itself sends after a remote Prepare finds the committed snapshot, no other."""
    text = f'kind == committed,labels."{REF}"==sha256:aa,parent==default/1/base'
    sent = f'labels."{REF}"==sha256:aa,parent=="default/1/base"'
    for form in (text, sent):
        matches = parse_filters([form])
        assert matches(ONE)
        assert not matches(BARE)
        assert not matches(Snapshot(9, "x", "committed", "other", ONE.labels, 1, 1))


def test_any_of_several() -> None:
    """Filters are or-ed; none at all match everything; too many are refused."""
    assert parse_filters([])(BARE)
    assert parse_filters(["name==k", "name==z"])(BARE)
    assert not parse_filters(["name==y", "name==z"])(BARE)
    with pytest.raises(InvalidInput):
        parse_filters(["name"] * (filters.FILTERS_LIMIT + 1))


@given(st.text(st.sampled_from('abn.,=!~"\\/|()[]*+?{}^$ \nx0é'), max_size=40) | st.text(max_size=60))
def test_never_anything_but_invalid_input(text: str) -> None:
    """Any text parses and answers, or is `InvalidInput`."""
    with suppress(InvalidInput):
        parse_filter(text)(ONE)


@given(st.text(max_size=20))
def test_quoted_values_round(value: str) -> None:
    """A value quoted as Go would quote it is found again."""
    quoted = "".join(f"\\U{ord(c):08x}" if not 0xD800 <= ord(c) < 0xE000 else "?" for c in value)
    plain = "".join(c if not 0xD800 <= ord(c) < 0xE000 else "?" for c in value)
    assert parse_filter(f'name=="{quoted}"')(Snapshot(1, plain, "active", "", {}, 1, 1))
