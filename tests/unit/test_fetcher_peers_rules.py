# SPDX-License-Identifier: Apache-2.0
"""What peers decide: who owns which spans, who is there, who is left aside, which requests are let in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.digest import Digest
from soci.errors import InvalidConfig, LimitExceeded, Unauthorized
from soci.span import Spans
from soci_bus.notices import PeerTold
from soci_fetcher import peers_auth, peers_members, peers_ring
from soci_fetcher.peers import parse_listen
from soci_fetcher.peers_auth import WINDOW, Asked, Guard, is_proven, read_secret, sign_notice
from soci_fetcher.peers_client import client_tls
from soci_fetcher.peers_door import server_tls
from soci_fetcher.peers_members import (
    ASIDE_MOST,
    DEAF_SECONDS,
    EVERY_LEAST,
    EVERY_MOST,
    LATE_MOST,
    LIAR_SECONDS,
    LIVES,
    Aside,
    Member,
    Members,
    interval,
    is_sound,
)
from soci_fetcher.peers_ring import Ring, blocks, key_of, run_of
from soci_fetcher.peers_source import hedge_coming, hedge_seconds

SECRET = b"s" * 32
NAMES = st.sets(st.text("abcdefghij0123456789-", min_size=1, max_size=12), min_size=1, max_size=30)
KEYS = st.integers(0, (1 << 64) - 1)


def told(node: str, start: str, number: int = 1, **changed: object) -> PeerTold:
    """A notice."""
    made = PeerTold(node, "http://10.0.0.1:4421", start, 1, number, 3.0, 1000.0, leaving=False, mac="")
    return replace(made, **changed)  # type: ignore[arg-type]


# --- the ring


def test_the_owners_of_known_keys() -> None:
    """They never change from one release to the next: nodes of both are in one cluster."""
    ring = Ring(f"node-{i}" for i in range(10))
    keys = [key_of(Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64), block) for block in range(6)]
    assert [ring.ranked(key, 1)[0][-1] for key in keys] == KNOWN_OWNERS
    assert ring.ranked(keys[0], 20)[0] == ring.ranked(keys[0], 2)[0]
    assert sorted(ring.ranked(keys[0], 20)) == list(ring.names)


KNOWN_OWNERS = ["1", "0", "0", "5", "6", "1"]


@given(NAMES, KEYS, st.text("xyz", min_size=1))
def test_who_comes_takes_keys_from_the_owner_alone(names: set[str], key: int, new: str) -> None:
    """A key moves to the new node or stays; where it leaves again all is as before, and the stand-in inherits."""
    before = Ring(names).ranked(key, 2)
    after = Ring({*names, new}).ranked(key, 3)
    assert tuple(name for name in after if name != new)[:2] == before
    assert len(set(before)) == len(before) == min(2, len(names))


def test_keys_are_shared_evenly() -> None:
    """Of many blocks, no node of fifty owns twice its share, and a key's stand-in is nobody's in particular."""
    ring = Ring(f"ip-10-0-0-{i}" for i in range(50))
    layer = Digest("sha256:" + "a" * 64)
    ranked = [ring.ranked(key_of(layer, layer, block), 2) for block in range(20_000)]
    for place in (0, 1):
        counts = [sum(pair[place] == name for pair in ranked) for name in ring.names]
        assert 320 < min(counts) <= max(counts) < 490
    assert len({second for first, second in ranked if first == ring.names[0]}) == 49


def geometry(starts: list[int], size: int) -> Spans:
    """Spans of which nothing but the compressed extents matters."""
    digest = Digest("sha256:" + "0" * 64)
    return Spans(size, size, (digest,) * len(starts), starts, [*starts[1:], size], starts, None)


def test_a_run_is_cut_at_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece lies in one block, by where its spans begin."""
    monkeypatch.setattr(peers_ring, "BLOCK_BYTES", 100)
    spans = geometry([10, 60, 99, 100, 350, 360], 400)
    assert list(blocks(spans, range(6))) == [(0, range(3)), (1, range(3, 4)), (3, range(4, 6))]
    assert list(blocks(spans, range(1, 3))) == [(0, range(1, 3))]
    assert list(blocks(spans, range(2, 4))) == [(0, range(2, 3)), (1, range(3, 4))]


def test_bytes_as_spans() -> None:
    """A range of bytes is a run where it begins and ends with spans, and nothing else."""
    spans = geometry([10, 60, 99], 400)
    assert run_of(spans, 10, 60) == range(1)
    assert run_of(spans, 60, 400) == range(1, 3)
    for start, end in ((10, 61), (11, 60), (0, 60), (60, 10), (60, 60), (10, 401), (-1, 60), (99, 99)):
        assert run_of(spans, start, end) is None


# --- members


def nodes(members: Members) -> list[str]:
    return list(members.nodes)


def test_who_is_there() -> None:
    """A node is there from its first notice until it leaves or falls silent; old and repeated notices change nothing."""
    members = Members(Member("me", "m1", "http://m"), 0.0)
    assert nodes(members) == ["me"]
    assert members.hear(told("a", "a1", 5), 1.0)
    assert not members.hear(told("a", "a1", 5), 2.0)
    assert not members.hear(told("a", "a1", 4, leaving=True), 2.0)
    assert nodes(members) == ["a", "me"]
    assert members.hear(told("a", "a1", 6, leaving=True), 3.0)
    assert nodes(members) == ["me"]
    assert not members.hear(told("a", "a1", 6), 3.5)
    assert not members.hear(told("a", "a1", 5), 3.5)
    assert members.hear(told("a", "a2", 1), 4.0)
    assert not members.expire(4.0 + LIVES * 3.0 - 0.1)
    for second in range(5, 16, 3):
        members.hear(told("me", "m1", second), second)
    assert members.expire(4.0 + LIVES * 3.0)
    assert nodes(members) == ["me"]


def test_several_processes_of_a_node() -> None:
    """The node is the unit; a key falls to one of its processes, and to the other one where that leaves."""
    members = Members(Member("me", "m1", "http://m"), 0.0)
    members.hear(told("me", "m2"), 1.0)
    members.hear(told("a", "a1"), 1.0)
    assert nodes(members) == ["a", "me"]
    ours = {member.start for key in range(64) for member in members.choose(key << 32) if member.node == "me"}
    assert ours == {"m1", "m2"}
    members.hear(told("me", "m2", 2, leaving=True), 2.0)
    chosen = [members.choose(key << 32) for key in range(64)]
    assert {member.start for pair in chosen for member in pair} == {"m1", "a1"}
    assert all(len(pair) == 2 for pair in chosen)


def test_a_bus_that_is_away_takes_nobody_with_it() -> None:
    """While nothing is heard all stay, for a long while; once it is back, each has its time to speak again."""
    members = Members(Member("me", "m1", "http://m"), 0.0)
    members.hear(told("a", "a1"), 1.0)
    members.hear(told("b", "b1"), 1.0)
    assert not members.expire(300.0)
    members.hear(told("me", "m1", 9), 300.0)
    assert not members.expire(300.0)
    members.hear(told("b", "b1", 2), 305.0)
    assert nodes(members) == ["a", "b", "me"]
    for second in (309.0, 312.0):
        members.hear(told("me", "m1", int(second)), second)
    assert members.expire(312.0)
    assert nodes(members) == ["b", "me"]
    assert members.expire(312.0 + DEAF_SECONDS + 1)
    assert nodes(members) == ["me"]


def test_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes when all places are taken is passed over; those who are there go on."""
    monkeypatch.setattr(peers_members, "MEMBERS_MAX", 3)
    members = Members(Member("me", "m1", "http://m"), 0.0)
    heard = [members.hear(told(f"n{i}", f"s{i}"), 1.0) for i in range(5)]
    assert heard == [True, True, False, False, False]
    assert members.hear(told("n0", "s0", 2, url="http://new"), 1.0)
    assert len(members.all()) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"url": url}
        for url in (
            "", "ftp://h:1", "http://", "http://h:0", "http://h:99999", "http://u:p@h:1", "http://h:1/path", "http://h:1?q",
            "http://h:1#f", "http://h\n:1", "http://[::1", "http://h:1" + "1" * 300, "http://ü:1", "h:1",
        )
    ]
    + [{"version": 2}, {"version": 0}, {"node": ""}, {"node": "n" * 300}, {"start": ""}, {"start": "s" * 300}]
    + [{"every": every} for every in (0.0, -1.0, EVERY_MOST + 1)],
)  # fmt: skip
def test_notices_beyond_all_bounds(changed: dict[str, object]) -> None:
    """What no process of ours would say is not taken in, proven or not."""
    assert is_sound(told("n", "s"))
    assert is_sound(told("n", "s", url="https://[::1]:4421"))
    assert not is_sound(replace(told("n", "s"), **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(("members", "seconds"), [(1, 3.01), (100, 4.0), (1000, 13.0), (100_000, EVERY_MOST)])
def test_how_often_a_process_tells(members: int, seconds: float) -> None:
    """In a large cluster each tells more rarely, so that nobody hears more than a hundred a second."""
    assert interval(members) == pytest.approx(seconds)
    assert interval(members) >= EVERY_LEAST
    assert members / interval(min(members, peers_members.MEMBERS_MAX)) <= 100 or members > peers_members.MEMBERS_MAX


def test_who_is_left_aside() -> None:
    """A failure costs a second, doubled each time up to a limit, and is forgotten after a success; a lie is not."""
    aside, peer, sibling = Aside(), Member("n", "s1", "u"), Member("n", "s2", "u")
    assert aside.allows(peer, 0.0)
    now = 0.0
    for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, ASIDE_MOST, ASIDE_MOST):
        assert aside.failed(peer, now) == seconds
        assert aside.failed(peer, now) == seconds  # several pieces were under way
        assert not aside.allows(peer, now + seconds - 0.1)
        assert aside.allows(sibling, now)
        now += seconds
        assert aside.allows(peer, now)
    aside.well(peer)
    assert aside.failed(peer, now) == 1.0
    aside.lied(peer, now)
    aside.well(peer)
    assert not aside.allows(peer, now + LIAR_SECONDS - 1)
    assert not aside.allows(sibling, now + 1)
    assert aside.allows(sibling, now + LIAR_SECONDS)


def test_a_peer_that_is_always_late() -> None:
    """To be outrun by the registry now and then is no failure; several times in a row is."""
    aside, peer = Aside(), Member("n", "s1", "u")
    for _ in range(3):
        assert [aside.late(peer, 0.0) for _ in range(LATE_MOST - 1)] == [False] * (LATE_MOST - 1)
        aside.well(peer)
    assert [aside.late(peer, 0.0) for _ in range(LATE_MOST)][-1]
    assert not aside.allows(peer, 0.5)


def test_the_book_of_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest records go."""
    monkeypatch.setattr(peers_members, "MEMBERS_MAX", 3)
    aside = Aside()
    for i in range(10):
        aside.failed(Member("n", f"s{i}", "u"), 0.0)
    assert [aside.allows(Member("n", f"s{i}", "u"), 0.5) for i in range(10)] == [True] * 7 + [False] * 3


# --- how long to wait


@pytest.mark.parametrize(
    ("size", "seen", "seconds"),
    [
        (4 << 20, (0.0, 0.0), 30.0),  # nothing known
        (4 << 20, (1e9, 0.001), 3.0),  # a fast registry: as for a silent peer
        (4 << 20, (4 << 20, 0.1), 8.8),  # a slow one: eight times what it needs
        (4 << 20, (1 << 10, 0.1), 30.0),  # a very slow one: not for ever
        (1 << 30, (1 << 10, 0.1), 258.0),  # bytes take their time whoever sends them
    ],
)
def test_the_wait_for_a_peer_that_waits(size: int, seen: tuple[float, float], seconds: float) -> None:
    """While a peer waits for the registry, a miss waits as the registry is, within bounds."""
    assert hedge_coming(size, seen) == pytest.approx(seconds)
    assert hedge_seconds(size) <= hedge_coming(size, seen)


# --- proofs


def signed(**changed: object) -> PeerTold:
    notice = replace(told("n", "s"), **changed)  # type: ignore[arg-type]
    return replace(notice, mac=sign_notice(SECRET, notice))


def test_notices_are_proven() -> None:
    """Of the same secret, lately, and exactly as it was signed."""
    notice = signed(at=1000.0)
    assert is_proven(SECRET, notice, 1000.0 + WINDOW)
    assert not is_proven(SECRET, notice, 1000.0 + WINDOW + 1)
    assert not is_proven(SECRET, notice, 1000.0 - WINDOW - 1)
    assert not is_proven(b"t" * 32, notice, 1000.0)
    assert not is_proven(SECRET, replace(notice, mac="\udcff"), 1000.0)
    for field, other in (
        ("node", "m"), ("url", "http://h:2"), ("start", "t"), ("version", 2), ("number", 2), ("every", 4.0),
        ("at", 1001.0), ("leaving", True), ("mac", ""),
    ):  # fmt: skip
        assert not is_proven(SECRET, replace(notice, **{field: other}), 1000.0), field  # type: ignore[arg-type]


def asked(**changed: str) -> Asked:
    made = Asked("GET", "/v1/x", "n", "me", "1000.0", peers_auth.new_nonce(), "r/i:1", "7", "miss")
    return replace(made, **changed)


def test_a_request_is_let_in_once() -> None:
    """Proven, for us, of now: yes; the same again, or with any part changed, or of another time: no."""
    guard = Guard(SECRET, "me")
    one = asked()
    headers = one.headers(SECRET)
    assert guard.admit("GET", "/v1/x", headers, 1000.0) == one
    refused = {
        "replay": ("GET", "/v1/x", headers, 1000.0),
        "not signed": ("GET", "/v1/y", asked().headers(SECRET), 1000.0),
        "not signed ": ("PUT", "/v1/x", asked().headers(SECRET), 1000.0),
        "not signed  ": ("GET", "/v1/x", asked().headers(b"t" * 32), 1000.0),
        "not signed   ": ("GET", "/v1/x", {}, 1000.0),
        "not signed    ": ("GET", "/v1/x", asked().headers(SECRET) | {"Soci-Mac": "\udcff"}, 1000.0),
        "another process": ("GET", "/v1/x", asked(to="you").headers(SECRET), 1000.0),
        "clocks differ": ("GET", "/v1/x", asked().headers(SECRET), 1000.0 + WINDOW + 1),
        "clocks differ ": ("GET", "/v1/x", asked(at="nan").headers(SECRET), 1000.0),
        "no time": ("GET", "/v1/x", asked(at="soon").headers(SECRET), 1000.0),
        "too long": ("GET", "/v1/x", asked(image="i" * 2000).headers(SECRET), 1000.0),
    }
    for why, (method, path, found, now) in refused.items():
        with pytest.raises(Unauthorized, match=why.strip()):
            guard.admit(method, path, found, now)
    for name in one.headers(SECRET):
        with pytest.raises(Unauthorized):
            guard.admit("GET", "/v1/x", asked().headers(SECRET) | {name: "1"}, 1000.0)


def test_the_book_of_nonces_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full book refuses, and has room again once its oldest are too old to be replayed; only proven requests fill it."""
    monkeypatch.setattr(peers_auth, "NONCES_MAX", 2)
    guard = Guard(SECRET, "me")
    with pytest.raises(Unauthorized):
        guard.admit("GET", "/v1/x", asked().headers(b"t" * 32), 1000.0)
    first = asked().headers(SECRET)
    guard.admit("GET", "/v1/x", first, 1000.0)
    guard.admit("GET", "/v1/x", asked().headers(SECRET), 1000.0)
    with pytest.raises(LimitExceeded):
        guard.admit("GET", "/v1/x", asked().headers(SECRET), 1000.0)
    guard.admit("GET", "/v1/x", asked(at="1031").headers(SECRET), 1001.0 + WINDOW)
    with pytest.raises(Unauthorized, match="clocks differ"):
        guard.admit("GET", "/v1/x", first, 1001.0 + WINDOW)


def test_the_secret_file(tmp_path: Path) -> None:
    """Long enough, and not for everybody's eyes; white space around the secret does not count."""
    file = tmp_path / "secret"
    file.write_bytes(b"x" * 32 + b"\n")
    file.chmod(0o600)
    assert read_secret(str(file)) == b"x" * 32
    file.chmod(0o440)
    assert read_secret(str(file)) == b"x" * 32
    for mode in (0o604, 0o620, 0o644, 0o666):
        file.chmod(mode)
        with pytest.raises(InvalidConfig, match="open to others"):
            read_secret(str(file))
    file.chmod(0o600)
    for content, why in ((b"x" * 31 + b"\n", "at least 32"), (b"", "at least 32"), (b"x" * 5000, "no file")):
        file.write_bytes(content)
        with pytest.raises(InvalidConfig, match=why):
            read_secret(str(file))
    for path, why in ((tmp_path, "no file"), (tmp_path / "absent", "No such file")):
        with pytest.raises(InvalidConfig, match=why):
            read_secret(str(path))


HEADERS = st.dictionaries(st.sampled_from([*peers_auth._NAMES.values(), peers_auth.MAC, "X"]), st.text(max_size=2000))


@given(st.text(max_size=200), HEADERS, st.floats(allow_nan=True))
def test_whatever_is_asked_is_refused_in_order(path: str, headers: dict[str, str], now: float) -> None:
    """No request without the secret gets in, and none ends but by `Unauthorized`."""
    with pytest.raises(Unauthorized):
        Guard(SECRET, "me").admit("GET", path, headers, now)


@given(st.text(max_size=50), st.floats(), st.floats())
def test_what_is_signed_and_odd_is_refused_in_order(at: str, now: float, every: float) -> None:
    """Nor does a time that is none, signed though it be, or a notice of strange numbers, end otherwise."""
    guard = Guard(SECRET, "me")
    with suppress(Unauthorized):
        guard.admit("GET", "/v1/x", asked(at=at).headers(SECRET), now)
    is_sound(told("n", "s", every=every, at=now))
    is_proven(SECRET, signed(every=every, at=now), now)


# --- the settings


@pytest.mark.parametrize(
    ("listen", "url", "tls", "bound", "address"),
    [
        ("10.0.0.7:4421", "", False, 4421, "http://10.0.0.7:4421"),
        ("10.0.0.7:4421", "", False, 4423, "http://10.0.0.7:4423"),
        ("10.0.0.7:4421", "", True, 4421, "https://10.0.0.7:4421"),
        ("[fd00::7]:4421", "", False, 4421, "http://[fd00::7]:4421"),
        ("0.0.0.0:4421", "http://node-7:4421", False, 4422, "http://node-7:4422"),
        ("0.0.0.0:4421", "http://node-7", False, 4422, "http://node-7:4422"),
        ("[::]:4421", "http://[fd00::7]:4421", False, 4422, "http://[fd00::7]:4422"),
        (":4421", "http://node-7:80", False, 4422, "http://node-7:80"),
        ("node-7:0", "", False, 1234, "http://node-7:1234"),
    ],
)
def test_the_address_that_others_are_told(listen: str, url: str, *, tls: bool, bound: int, address: str) -> None:
    """Where we listen, or what is set; the port is the one that was bound, unless something between changes it."""
    assert parse_listen(listen, url, tls=tls).told(bound, tls=tls) == address


@pytest.mark.parametrize(
    ("listen", "url", "tls", "why"),
    [
        ("4421", "", False, "set peer_url"),
        ("0.0.0.0:4421", "", False, "set peer_url"),
        ("[::]:4421", "", False, "set peer_url"),
        ("h", "", False, "not host:port"),
        ("h:x", "", False, "not host:port"),
        ("h:70000", "", False, "not host:port"),
        ("fd00::7:4421", "", False, "not host:port"),
        ("h:1", "h:1", False, "not an address"),
        ("h:1", "http://h:1/path", False, "not an address"),
        ("h:1", "http://h:99999", False, "not an address"),
        ("h:1", "https://h:1", False, "not http, for there is no peer_tls_cert"),
        ("h:1", "http://h:1", True, "not https, for there is a certificate"),
    ],
)
def test_addresses_that_are_none(listen: str, url: str, *, tls: bool, why: str) -> None:
    """They are refused at the start, with the setting's name."""
    with pytest.raises(InvalidConfig, match=why):
        parse_listen(listen, url, tls=tls)


def test_certificates_that_are_none(tmp_path: Path) -> None:
    """A file that is not there or holds no certificate is told; without one there is no TLS."""
    (tmp_path / "file").write_text("no certificate")
    for name in ("file", "absent"):
        path = str(tmp_path / name)
        for make in (server_tls, client_tls):
            with pytest.raises(InvalidConfig, match="peer_tls_cert"):
                make(path, path, "")
    assert server_tls("", "", "") is client_tls("", "", "") is None
