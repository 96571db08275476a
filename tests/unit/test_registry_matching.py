# SPDX-License-Identifier: Apache-2.0
"""Which pattern is for which image, by Kubernetes' rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_registry.matching import best_for, names_image


@pytest.mark.parametrize(
    ("pattern", "registry", "repository", "matches"),
    [
        ("reg.example", "reg.example", "team/app", True),
        ("https://reg.example", "reg.example", "team/app", True),
        ("https://reg.example/v1/", "reg.example", "team/app", True),
        ("REG.example", "reg.EXAMPLE", "team/app", True),
        ("reg.example/team", "reg.example", "team/app", True),
        ("reg.example/team/app", "reg.example", "team/app", True),
        ("reg.example/other", "reg.example", "team/app", False),
        ("reg.example:5000", "reg.example:5000", "team/app", True),
        ("reg.example:5000", "reg.example", "team/app", False),
        ("reg.example", "reg.example:5000", "team/app", False),
        ("*.example", "reg.example", "team/app", True),
        ("*.example", "a.reg.example", "team/app", False),
        ("*.*.example", "a.reg.example", "team/app", True),
        ("*.dkr.ecr.*.amazonaws.com", "1234.dkr.ecr.eu-west-1.amazonaws.com", "app", True),
        ("*.dkr.ecr.*.amazonaws.com", "1234.dkr.ecr.amazonaws.com", "app", False),
        ("sub*.example", "subdomain.example", "app", True),
        ("re?.example", "reg.example", "app", True),
        ("re[fg].example", "reg.example", "app", True),
        ("re[.example", "reg.example", "app", False),
        ("*", "reg.example", "app", False),
        ("https://index.docker.io/v1/", "docker.io", "library/app", True),
        ("docker.io", "registry-1.docker.io", "library/app", True),
        ("docker.io/library", "docker.io", "team/app", False),
        ("", "reg.example", "app", False),
        (".example", "reg.example", "app", False),
        ("*" * 500 + ".example", "a" * 60 + ".example", "app", True),
        ("a" * 2000, "a" * 2000, "app", False),
    ],
)
def test_patterns(pattern: str, registry: str, repository: str, *, matches: bool) -> None:
    """Host labels are globs, the port is exact, the path is a beginning."""
    assert names_image(pattern, registry, repository) is matches


def test_the_most_particular_pattern_wins() -> None:
    """Of several that fit, a longer path beats a shorter one, and a name beats a glob."""
    entries = [("*.example", 1), ("reg.example", 2), ("reg.example/team", 3), ("reg.example/team/app", 4), ("x", 5)]
    assert best_for(entries, "reg.example", "team/app") == 4
    assert best_for(entries, "reg.example", "team/other") == 3
    assert best_for(entries, "reg.example", "app") == 2
    assert best_for(entries, "two.example", "app") == 1
    assert best_for(entries, "two.other", "app") is None


@given(st.text(max_size=60), st.text(alphabet="ab.:*?[]-", max_size=40))
def test_any_text_is_a_pattern_or_none(pattern: str, registry: str) -> None:
    """No text breaks the matching."""
    assert names_image(pattern, registry, "team/app") in {True, False}
    assert names_image(registry, registry, pattern) in {True, False}
