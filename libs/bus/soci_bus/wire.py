# SPDX-License-Identifier: Apache-2.0
"""How a sentence looks on the bus: subjects, msgpack bodies, headers. Pure; nothing here touches a socket."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

import cattrs
import msgpack

from soci.digest import Digest, parse_digest
from soci.errors import InvalidInput, InvalidMessage, SociError, from_code
from soci.launch import LaunchId, TraceParent, parse_launch_id, parse_traceparent
from soci_bus.asks import Ask
from soci_bus.events import BY_NAME, Event

MESSAGE_LIMIT = (1 << 20) - (1 << 13)
"""Bytes of one message's body: nats-server's default ``max_payload``, less room for headers, which count there too
(a server closes the connection of who sends more). Span bytes never go by bus."""
ERROR_LIMIT = 4096
"""Bytes of an error's text that cross the bus."""
SHORTEST_ASK = 0.001
"""Seconds: an ask whose time is over on arrival gets this much."""
LATEST_NS = 1 << 63
"""Times of events are below this, in ns since 1970: the year 2262."""

TRACE_HEADER = "traceparent"
DEADLINE_HEADER = "Soci-Deadline"  # seconds that the asker still waits, as a decimal: clocks of nodes differ
ERROR_HEADER = "Soci-Error"  # the code of a soci.errors class; the body is then its text
TIME_HEADER = "Soci-Time"  # when an event happened, ns since 1970, by the writer's clock

Value = TypeVar("Value")
_TOKEN = re.compile(r"[^A-Za-z0-9_-]+")


def _exactly(*kinds: type) -> Callable[[Any, Any], Any]:
    """A hook that takes values of these types as they are; cattrs alone would make a text of anything."""

    def hook(value: Any, _kind: Any) -> Any:
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"not a {kinds[0].__name__}")
        return kinds[0](value)

    return hook


def _is_tuple(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is tuple


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ValueError("not a list")
    kinds = get_args(kind)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    return tuple(_converter.structure(item, kind) for item, kind in zip(value, kinds, strict=True))


_converter = cattrs.Converter(unstruct_collection_overrides={tuple: list}, detailed_validation=False)
_converter.register_structure_hook(str, _exactly(str))
_converter.register_structure_hook(int, _exactly(int))
_converter.register_structure_hook(bool, _exactly(bool))
_converter.register_structure_hook(float, _exactly(float, int))
# Digests become paths and launch ids become subjects: one that is none must not get past here.
_converter.register_structure_hook(Digest, lambda value, _: parse_digest(value))
_converter.register_structure_hook(LaunchId, lambda value, _: parse_launch_id(_exactly(str)(value, str)))
_converter.register_structure_hook_func(_is_tuple, _tuple)


def token(text: str) -> str:
    """``text`` as one subject token: what NATS gives a meaning (dots, wildcards, spaces) becomes ``_``."""
    return _TOKEN.sub("_", text)[:100] or "_"


def ask_subject(node: str, verb: str) -> str:
    """``soci.ask.<node>.<verb>``."""
    return f"soci.ask.{token(node)}.{verb}"


def notice_subject(node: str, word: str) -> str:
    """``soci.tell.<node>.<word>``; ``*`` as node subscribes to all."""
    return f"soci.tell.{_filter(node)}.{word}"


def job_subject(verb: str, job: str) -> str:
    """``soci.job.<verb>.<id>``; ``*`` as id subscribes to all."""
    return f"soci.job.{verb}.{_filter(job)}"


def event_subject(node: str, event: Event) -> str:
    """``soci.evt.<node>.<noun>.<id>.<happened>``."""
    return f"soci.evt.{token(node)}.{event.noun}.{token(event.id)}.{event.happened}"


def event_filter(noun: str = "*", id: str = "*", happened: str = "*") -> str:  # noqa: A002
    """The subject of all nodes' events that match; ``*`` matches all, and nothing else is a wildcard."""
    return f"soci.evt.*.{_filter(noun)}.{_filter(id)}.{_filter(happened)}"


def _filter(text: str) -> str:
    return text if text == "*" else token(text)


def encode(value: object) -> bytes:
    """A frozen message as msgpack; `InvalidMessage` where it would not fit a message or cannot be written."""
    try:
        body: bytes = msgpack.packb(_converter.unstructure(value), use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:  # a lone surrogate, an int beyond 64 bits
        raise InvalidMessage(f"{type(value).__name__} cannot be written: {type(error).__name__}") from error
    if len(body) > MESSAGE_LIMIT:
        raise InvalidMessage(f"{type(value).__name__} has {len(body)} bytes; a message holds {MESSAGE_LIMIT}")
    return body


def decode(body: bytes, cls: type[Value]) -> Value:
    """The message of class ``cls`` in ``body``. Unknown fields are passed over; anything else is `InvalidMessage`."""
    if len(body) > MESSAGE_LIMIT:
        raise InvalidMessage(f"a {cls.__name__} of {len(body)} bytes; a message holds {MESSAGE_LIMIT}")
    try:
        plain = msgpack.unpackb(body, raw=False)
        if type(plain) is not dict:
            raise ValueError("not a map")
        return _converter.structure(plain, cls)
    except (ValueError, TypeError, KeyError, InvalidInput, msgpack.UnpackException) as error:
        raise InvalidMessage(f"not a {cls.__name__}: {type(error).__name__} {str(error)[:100]}") from error


@dataclass(frozen=True, slots=True)
class Envelope:
    """An event as it was stored: where and when it happened, by its writer's clock, and its place in the stream."""

    event: Event
    node: str
    at_ns: int
    sequence: int = 0


def decode_event(subject: str, headers: dict[str, str] | None, body: bytes, sequence: int = 0) -> Envelope | None:
    """The event of a message, or None where its name is not known here (a newer writer)."""
    parts = subject.split(".")
    if len(parts) != 6 or parts[:2] != ["soci", "evt"]:
        raise InvalidMessage(f"not an event subject: {subject[:200]!r}")
    cls = BY_NAME.get((parts[3], parts[5]))
    if cls is None:
        return None
    try:
        at_ns = int((headers or {}).get(TIME_HEADER, "0"))
    except ValueError as error:
        raise InvalidMessage(f"{TIME_HEADER} of {subject[:200]} is not a number") from error
    if not 0 <= at_ns < LATEST_NS:
        raise InvalidMessage(f"{TIME_HEADER} of {subject[:200]} is no time")
    return Envelope(decode(body, cls), parts[2], at_ns, sequence)


def ask_headers(trace: TraceParent | None, timeout: float) -> dict[str, str]:
    """The headers of an ask."""
    headers = {DEADLINE_HEADER: f"{timeout:.3f}"}
    if trace:
        headers[TRACE_HEADER] = str(trace)
    return headers


def read_ask_headers(headers: dict[str, str] | None, longest: float) -> tuple[TraceParent | None, float]:
    """Trace and remaining seconds of an ask; an absent or odd deadline becomes ``longest``."""
    found = headers or {}
    try:
        timeout = float(found.get(DEADLINE_HEADER, longest))
    except ValueError:
        timeout = longest
    timeout = longest if math.isnan(timeout) else max(min(timeout, longest), SHORTEST_ASK)
    return parse_traceparent(found.get(TRACE_HEADER)), timeout


def write_error(error: SociError) -> tuple[dict[str, str], bytes]:
    """Headers and body of an answer that is an error."""
    return {ERROR_HEADER: error.code}, str(error).encode(errors="replace")[:ERROR_LIMIT]


def read_answer(headers: dict[str, str] | None, body: bytes, ask: Ask[Any]) -> Any:
    """The answer to ``ask``, or the error that the other side raised, raised again as the same class."""
    code = (headers or {}).get(ERROR_HEADER)
    if code is not None:
        raise from_code(code[:100], body[:ERROR_LIMIT].decode(errors="replace"))
    return decode(body, ask.answer)
