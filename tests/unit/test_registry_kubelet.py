# SPDX-License-Identifier: Apache-2.0
"""The kubelet's credential provider plugins: their configuration, real programs that behave well and badly, renewal."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from soci.errors import InvalidConfig, Unavailable
from soci_registry import KubeletProviders, Login, kubelet
from soci_registry.kubelet_config import Provider, parse_answer, read_providers, request_for

V1 = "credentialprovider.kubelet.k8s.io/v1"


def provider(**changes: Any) -> dict[str, Any]:
    one = {"name": "plugin", "matchImages": ["*.example"], "defaultCacheDuration": "1h", "apiVersion": V1}
    return {key: value for key, value in {**one, **changes}.items() if value is not None}


def document(*providers: Any, **changes: Any) -> dict[str, Any]:
    head = {"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1"}
    return {**head, "providers": list(providers), **changes}


def write(path: Path, found: object) -> Path:
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


def test_a_configuration_in_yaml(tmp_path: Path) -> None:
    """Everything that the kubelet's document allows is read, from YAML as people write it."""
    path = write(
        tmp_path / "config.yaml",
        f"""
# as for the kubelet
kind: CredentialProviderConfig
apiVersion: kubelet.config.k8s.io/v1
providers:
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
    defaultCacheDuration: "12h"
    apiVersion: {V1}
    args: [get-credentials]
    env:
      - name: AWS_PROFILE
        value: nodes
  - name: tokens
    matchImages: [reg.example/team]
    defaultCacheDuration: "0s"
    apiVersion: {V1}
    tokenAttributes: {{serviceAccountTokenAudience: x}}
""",
    )
    ecr, tokens = read_providers(path)
    assert ecr == Provider(
        "ecr-credential-provider",
        ("*.dkr.ecr.*.amazonaws.com",),
        V1,
        43200.0,
        ("get-credentials",),
        (("AWS_PROFILE", "nodes"),),
    )
    assert ecr.serves("1.dkr.ecr.eu-west-1.amazonaws.com", "app")
    assert not ecr.serves("reg.example", "team/app")
    assert tokens.wants_token
    assert "nodes" not in repr(ecr)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("{", "not YAML"),
        ("[]", "not an object"),
        ("a: &a [*a]", "not a CredentialProviderConfig"),
        ({"kind": "Pod"}, "not a CredentialProviderConfig"),
        (document(), "providers is not a list"),
        (document(*[provider(name=f"p{n}") for n in range(65)]), "providers is not a list"),
        (document("text"), r"providers\[0\]: name"),
        (document(provider(name="../sh")), "is no program's name"),
        (document(provider(name="..")), "is no program's name"),
        (document(provider(name="a/b")), "is no program's name"),
        (document(provider(matchImages=[])), "matchImages"),
        (document(provider(matchImages=[1])), "matchImages"),
        (document(provider(apiVersion="v9")), "apiVersion"),
        (document(provider(defaultCacheDuration="soon")), "defaultCacheDuration"),
        (document(provider(defaultCacheDuration=None)), "defaultCacheDuration"),
        (document(provider(args="x")), "args"),
        (document(provider(env=[{"name": "", "value": "hunter2"}])), "env"),
        (document(provider(), provider()), "same name"),
    ],
)
def test_slips_are_named(tmp_path: Path, found: object, says: str) -> None:
    """A configuration that cannot be used is an error that names file and key, without values of variables."""
    path = write(tmp_path / "config.yaml", found)
    with pytest.raises(InvalidConfig, match=says) as caught:
        read_providers(path)
    assert "hunter2" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    """A missing file, a folder and a file without end are errors of ours."""
    for path, says in ((tmp_path / "absent", "no such file"), (tmp_path, "regular"), (Path("/dev/zero"), "regular")):
        with pytest.raises(InvalidConfig, match=says):
            read_providers(path)
    with pytest.raises(InvalidConfig, match="more than"):
        read_providers(write(tmp_path / "large", "#" * 2_000_000))


def answer(**changes: Any) -> bytes:
    found = {
        "kind": "CredentialProviderResponse",
        "apiVersion": V1,
        "cacheKeyType": "Registry",
        "auth": {"*.example": {"username": "ada", "password": "hunter2"}},
    }
    return json.dumps({**found, **changes}).encode()


PLUGIN = Provider("plugin", ("*.example",), V1, 3600.0)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"hunter2", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a CredentialProviderResponse"),
        (answer(apiVersion="v0"), "not a CredentialProviderResponse"),
        (answer(cacheKeyType="hunter2"), "cacheKeyType"),
        (answer(cacheDuration="hunter2"), "cacheDuration"),
        (answer(auth={f"r{n}.example": {"username": "a", "password": "b"} for n in range(2000)}), "more than"),
    ],
)
def test_answers_that_are_none(said: bytes, says: str) -> None:
    """A plugin's answer that is none is refused without repeating it."""
    with pytest.raises(ValueError, match=says) as caught:
        parse_answer(said, PLUGIN)
    assert "hunter2" not in str(caught.value)


def test_an_answer(tmp_path: Path) -> None:
    """Logins are taken by pattern; a duration that is not named is the provider's; odd entries are passed over."""
    provided = parse_answer(
        answer(auth={"a": {"username": "x"}, "b": 1, "c": {"username": "u", "password": "p"}}), PLUGIN
    )
    assert (provided.logins, provided.seconds) == ((("c", Login("u", "p")),), None)
    assert parse_answer(answer(cacheDuration="10m", auth=None), PLUGIN).seconds == 600
    asked = json.loads(request_for(PLUGIN, "reg.example", "team/app"))
    assert asked == {"kind": "CredentialProviderRequest", "apiVersion": V1, "image": "reg.example/team/app"}


# --- programs


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Node:
    """A configuration, plugins in shell, and the source that uses them. Each run of a plugin is a line of ``runs``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.told: list[tuple[str, dict[str, object]]] = []
        self.source = KubeletProviders(folder / "config.yaml", folder / "bin", self.tell, self.clock)
        (folder / "bin").mkdir()

    def tell(self, what: str, /, **facts: object) -> None:
        self.told.append((what, facts))

    def configure(self, *providers: Any) -> None:
        write(self.folder / "config.yaml", document(*providers))

    def plugin(self, script: str, name: str = "plugin") -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\ncat >> {self.folder}/runs; echo >> {self.folder}/runs\n{script}")
        path.chmod(0o755)

    def answers(self, name: str = "plugin", **changes: Any) -> None:
        """The password of each answer is ``p`` and the number of the run."""
        said = answer(**{"auth": {"*.example": {"username": "ada", "password": "pNUMBER"}}, **changes}).decode()
        self.plugin(f"n=$(wc -l < {self.folder}/runs); echo '{said}' | sed s/NUMBER/$n/", name)

    @property
    def runs(self) -> list[str]:
        path = self.folder / "runs"
        return [json.loads(line)["image"] for line in path.read_text().splitlines()] if path.exists() else []

    async def password(self, registry: str, repository: str, *refused: str) -> str | None:
        login = await self.source.find(registry, repository, tuple(Login("ada", one) for one in refused))
        return None if login is None else login.secret


@pytest.fixture
def node(tmp_path: Path) -> Node:
    it = Node(tmp_path)
    it.configure(provider())
    return it


@pytest.mark.parametrize(
    ("kind", "passwords"),
    [("Image", ["p1", "p1", "p2", "p3"]), ("Registry", ["p1", "p1", "p1", "p2"]), ("Global", ["p1", "p1", "p1", "p1"])],
)
async def test_for_what_an_answer_holds(node: Node, kind: str, passwords: list[str]) -> None:
    """An answer is used again for its image, its registry or everything, as it says."""
    node.answers(cacheKeyType=kind)
    asked = (("reg.example", "a"), ("reg.example", "a"), ("reg.example", "b"), ("two.example", "a"))
    assert [await node.password(*image) for image in asked] == passwords
    assert node.runs[0] == "reg.example/a"
    assert await node.password("reg.other", "a") is None


@pytest.mark.parametrize(("duration", "seconds"), [("10m", 600), (None, 3600), ("0s", 0)])
async def test_a_login_is_renewed_after_its_time(node: Node, duration: str | None, seconds: float) -> None:
    """A login is asked for anew when its time, or else the provider's, is over."""
    node.answers(cacheDuration=duration)
    assert await node.password("reg.example", "a") == "p1"
    node.clock.now += seconds - 1 if seconds else 0
    assert await node.password("reg.example", "a") == ("p1" if seconds else "p2")
    node.clock.now += 1
    assert await node.password("reg.example", "a") == ("p2" if seconds else "p3")


async def test_a_refused_login_is_renewed(node: Node) -> None:
    """A login that the registry refused is asked for anew, though not twice in a few seconds."""
    node.answers()
    assert await node.password("reg.example", "a") == "p1"
    node.clock.now += kubelet.REFUSED_PAUSE_SECONDS
    assert await node.password("reg.example", "a", "p1") == "p2"
    assert await node.password("reg.example", "a", "p1", "p2") is None
    assert len(node.runs) == 2
    node.clock.now += kubelet.REFUSED_PAUSE_SECONDS
    assert await node.password("reg.example", "a", "p1", "p2") == "p3"


async def test_many_questions_are_one_run(node: Node) -> None:
    """However many images of a registry are asked for at once, the plugin runs once."""
    node.answers()
    got = await asyncio.gather(*(node.password("reg.example", f"app{n}") for n in range(10)))
    assert got == ["p1"] * 10
    assert len(node.runs) == 1


async def test_arguments_and_environment(node: Node) -> None:
    """A plugin gets its arguments and variables beside the process's own."""
    node.configure(provider(args=["get", "it"], env=[{"name": "WHO", "value": "ada"}]))
    said = answer(auth={"*.example": {"username": "USER", "password": "PASS"}}).decode()
    node.plugin(f"""echo '{said}' | sed "s/USER/$WHO/; s/PASS/$1-$2-${{PATH:+set}}/" """)
    assert await node.source.find("reg.example", "a") == Login("ada", "get-it-set")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo hunter2; exit 3", "exit code 3"),
        ("echo hunter2", "not JSON"),
        ("exec cat /dev/zero", "more than"),
        ("exec sleep 50", "no answer in"),
    ],
)
async def test_bad_plugins(node: Node, monkeypatch: pytest.MonkeyPatch, script: str, says: str) -> None:
    """A plugin that fails, floods or hangs is `Unavailable` within its limits, and the next one is asked first."""
    monkeypatch.setattr(kubelet, "PLUGIN_SECONDS_MAX", 1.0)
    monkeypatch.setattr(kubelet, "PLUGIN_ANSWER_BYTES_MAX", 10_000)
    node.plugin(script)
    with pytest.raises(Unavailable, match=f"provider plugin: .*{says}") as caught:
        await node.source.find("reg.example", "a")
    assert "hunter2" not in str(caught.value)
    node.configure(provider(), provider(name="second"))
    node.answers("second")
    assert (await node.password("reg.example", "a") or "").startswith("p")


async def test_what_cannot_be_run(node: Node) -> None:
    """A missing plugin is named; one that wants a token of the kubelet's is passed over, which is told once."""
    with pytest.raises(Unavailable, match="provider plugin: No such file"):
        await node.source.find("reg.example", "a")
    node.configure(provider(name="tokens", tokenAttributes={"x": 1}))
    for _ in range(2):
        assert await node.source.find("reg.example", "a") is None
    assert [facts for _, facts in node.told] == [{"provider": "tokens"}]
    (node.folder / "config.yaml").unlink()
    with pytest.raises(InvalidConfig, match=r"config\.yaml: No such file"):
        await node.source.find("reg.example", "a")


async def test_a_changed_configuration_is_seen(node: Node) -> None:
    """The file is read anew when it has changed, and answers of the old one are forgotten."""
    node.answers()
    assert await node.password("reg.example", "a") == "p1"
    node.configure(provider(matchImages=["*.other"]))
    assert await node.password("reg.example", "a") is None
    node.configure(provider(), provider(name="another"))
    assert await node.password("reg.example", "a") == "p2"
