# SPDX-License-Identifier: Apache-2.0
"""Reading kubeconfigs, service accounts and image pull secrets."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from soci.errors import InvalidConfig
from soci_registry import Login, kube_login
from soci_registry.kube_login import SECRET_TYPE, SecretBook, parse_secret
from soci_registry.kubeconfig import Cluster, authorization, in_cluster, kubeconfig_path, read_kubeconfig, tls_of

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: here
contexts:
- name: other
  context: {cluster: c, user: nobody}
- name: here
  context:
    cluster: c
    user: me
clusters:
- name: c
  cluster:
    server: https://api.example:6443/prefix/
    certificate-authority: ca.crt
    tls-server-name: kubernetes
users:
- name: me
  user:
    token: hunter2
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config"
    path.write_text(text)
    return path


def test_a_kubeconfig(tmp_path: Path) -> None:
    """The current context's server and user are found, files from the kubeconfig's folder; the token is not shown."""
    cluster = read_kubeconfig(write(tmp_path, KUBECONFIG))
    assert cluster == Cluster(
        "https://api.example:6443/prefix", ca_file=f"{tmp_path}/ca.crt", server_name="kubernetes", token="hunter2"
    )
    assert "hunter2" not in repr(cluster)
    assert authorization(cluster) == "Bearer hunter2"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("current-context: here", "current-context: there", "contexts has no 'there'"),
        ("cluster: c\n", "cluster: d\n", "clusters has no 'd'"),
        ("user: me", "user: you", "users has no 'you'"),
        ("https://api", "ftp://api", "server is not an http"),
        ("token: hunter2", "exec: {command: hunter2}", "exec or auth-provider"),
        ("certificate-authority:", "certificate-authority-data:", "is not base64|cannot be used"),
        ("token: hunter2", "token: hunter2: bad", "not YAML, line"),
        ("kind: Config", "kind: !!python/object/apply:os.system [hunter2]", "not YAML"),
    ],
)
def test_kubeconfigs_that_cannot_be_used(tmp_path: Path, old: str, new: str, says: str) -> None:
    """What is wrong is named, without content of the file."""
    assert old in KUBECONFIG
    path = write(tmp_path, KUBECONFIG.replace(old, new))
    with pytest.raises(InvalidConfig, match=says) as caught:
        tls_of(read_kubeconfig(path), tmp_path)
    assert "hunter2" not in str(caught.value)


def test_users(tmp_path: Path) -> None:
    """A token's file is read at each use; a user name and password are Basic; nobody has no header."""
    (tmp_path / "token").write_text(" one\n")
    cluster = read_kubeconfig(write(tmp_path, KUBECONFIG.replace("token: hunter2", "tokenFile: token")))
    assert authorization(cluster) == "Bearer one"
    (tmp_path / "token").write_text("two")
    assert authorization(cluster) == "Bearer two"
    for content in (b"\xff", b"a\nb"):
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(InvalidConfig):
            authorization(cluster)
    (tmp_path / "token").unlink()
    with pytest.raises(InvalidConfig, match="no such file"):
        authorization(cluster)
    basic = read_kubeconfig(write(tmp_path, KUBECONFIG.replace("token: hunter2", "{username: ada, password: pw}")))
    assert authorization(basic) == "Basic " + base64.b64encode(b"ada:pw").decode()
    nobody = read_kubeconfig(write(tmp_path, KUBECONFIG.replace("    user: me\n", "")))
    assert authorization(nobody) is None


def test_where_the_kubeconfig_is() -> None:
    """The configured file, else the first of the environment's, else the home's."""
    assert kubeconfig_path("/etc/k", {"KUBECONFIG": "/a"}) == Path("/etc/k")
    assert kubeconfig_path("", {"KUBECONFIG": ":/a:/b"}) == Path("/a")
    assert kubeconfig_path("", {"HOME": "/home/ada"}) == Path("/home/ada/.kube/config")
    with pytest.raises(FileNotFoundError):
        read_kubeconfig(Path("/nonexistent/config"))


def test_our_own_pod(tmp_path: Path) -> None:
    """In a pod the service account is the way, outside of one there is none."""
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    assert in_cluster(environment, tmp_path) is None
    (tmp_path / "token").write_text("t")
    cluster = in_cluster(environment, tmp_path)
    assert cluster == Cluster("https://[fd00::1]:443", ca_file=f"{tmp_path}/ca.crt", token_file=f"{tmp_path}/token")
    assert in_cluster({}, tmp_path) is None


# --- secrets


def secret(auths: Any, name: str = "pull", namespace: str = "team", **changes: Any) -> dict[str, Any]:
    content = auths if isinstance(auths, bytes) else json.dumps({"auths": auths}).encode()
    return {
        "type": SECRET_TYPE,
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": "7"},
        "data": {".dockerconfigjson": base64.b64encode(content).decode()},
        **changes,
    }


def entry(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def test_a_secret() -> None:
    """Logins are taken out of a secret; entries without one are passed over."""
    name, version, entries = parse_secret(secret({"reg.example": entry("ada", "1"), "empty.example": {}, "odd": 1}))
    assert (name, version) == (("team", "pull"), "7")
    assert entries == (("reg.example", Login("ada", "1")),)


@pytest.mark.parametrize(
    "bad",
    [
        secret({}, type="Opaque"),
        secret(b"hunter2"),
        secret(b"[" * 100_000),
        secret(b'{"auths": "hunter2"}'),
        secret({"reg.example": {"auth": "hunter2"}}),
        secret({f"r{n}.example": entry("a", "b") for n in range(300)}),
        {**secret({}), "data": {".dockerconfigjson": "hunter2!"}},
        {**secret({}), "data": None},
        {},
    ],
)
def test_bad_secrets(bad: dict[str, Any]) -> None:
    """A bad secret is `ValueError`, and its content is not repeated."""
    with pytest.raises(ValueError) as caught:
        parse_secret(bad)
    assert "hunter2" not in str(caught.value)


def test_the_book_of_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best fitting login is found over all secrets, in the order of their names; refused ones are passed over."""
    book = SecretBook()
    assert book.put(("b", "one"), (("reg.example", Login("b", "1")), ("reg.example/team", Login("team", "2"))))
    assert book.put(("a", "one"), (("reg.example", Login("a", "3")),))
    assert book.find("reg.example", "team/app", ()) == Login("team", "2")
    assert book.find("reg.example", "app", ()) == Login("a", "3")
    assert book.find("reg.example", "app", (Login("a", "3"),)) == Login("b", "1")
    assert book.find("other.example", "app", ()) is None
    book.remove(("a", "one"))
    book.remove(("a", "absent"))
    assert book.find("reg.example", "app", ()) == Login("b", "1")
    monkeypatch.setattr(kube_login, "SECRETS_MAX", 2)
    assert book.put(("c", "one"), ())
    assert not book.put(("d", "one"), ())
    assert book.put(("c", "one"), (("x", Login("x", "y")),))  # in place of its older one
    monkeypatch.setattr(kube_login, "KEPT_BYTES_MAX", 100)
    assert not book.put(("c", "one"), (("x", Login("x", "y" * 100)),))
    assert len(book) == 1
