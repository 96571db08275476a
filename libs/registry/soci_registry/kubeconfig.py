# SPDX-License-Identifier: Apache-2.0
"""How to reach a Kubernetes API server: a kubeconfig's current context, or the service account of our own pod."""

from __future__ import annotations

import base64
import binascii
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from soci.errors import InvalidConfig
from soci_registry.documents import items, read_document, read_file, table, text

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Cluster:
    """One API server and our access to it. Files are read anew for each connection: they are renewed under us."""

    server: str
    ca_file: str = ""
    ca_data: str = ""
    skip_verify: bool = False
    server_name: str = ""
    client_certificate: str = ""
    client_key: str = ""
    client_data: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)
    token: str = field(default="", repr=False)
    token_file: str = ""
    basic: tuple[str, str] = field(default=("", ""), repr=False)


def kubeconfig_path(configured: str, environment: Mapping[str, str]) -> Path:
    """The file that counts: the configured one, else ``$KUBECONFIG``'s first, else ``~/.kube/config``."""
    if configured:
        return Path(configured)
    listed = [part for part in environment.get("KUBECONFIG", "").split(os.pathsep) if part]
    return Path(listed[0]) if listed else Path(environment.get("HOME", "/root"), ".kube", "config")


def read_kubeconfig(path: Path) -> Cluster:
    """The current context of a kubeconfig. `FileNotFoundError` where there is none; `InvalidConfig` names the key."""
    document = read_document(path)
    current = text(document.get("current-context"))
    context = table(_named(document, "contexts", "context", current, path))
    cluster = table(_named(document, "clusters", "cluster", text(context.get("cluster")), path))
    user = table(_named(document, "users", "user", text(context.get("user")), path)) if context.get("user") else {}
    server = text(cluster.get("server")).rstrip("/")
    if urlsplit(server).scheme not in {"https", "http"} or not urlsplit(server).hostname:
        raise InvalidConfig(f"{path}: server is not an http or https URL")
    if user.get("exec") is not None or user.get("auth-provider") is not None:
        raise InvalidConfig(f"{path}: a user with exec or auth-provider; use a token, tokenFile or client certificate")
    folder = path.absolute().parent
    return Cluster(
        server=server,
        ca_file=_file(cluster, "certificate-authority", folder),
        ca_data=_decoded(cluster, "certificate-authority-data", path).decode(errors="replace"),
        skip_verify=cluster.get("insecure-skip-tls-verify") is True,
        server_name=text(cluster.get("tls-server-name")),
        client_certificate=_file(user, "client-certificate", folder),
        client_key=_file(user, "client-key", folder),
        client_data=(_decoded(user, "client-certificate-data", path), _decoded(user, "client-key-data", path)),
        token=text(user.get("token")),
        token_file=_file(user, "tokenFile", folder),
        basic=(text(user.get("username")), text(user.get("password"))),
    )


def in_cluster(environment: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> Cluster | None:
    """The API server of the cluster whose pod we are, by our service account; None outside of one."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port.isdigit() or not (folder / "token").exists():
        return None
    authority = f"[{host}]" if ":" in host else host
    return Cluster(f"https://{authority}:{port}", ca_file=str(folder / "ca.crt"), token_file=str(folder / "token"))


def _named(document: Mapping[str, Any], kinds: str, kind: str, name: str, path: Path) -> Any:
    for one in map(table, items(document.get(kinds))):
        if name and one.get("name") == name:
            return one.get(kind)
    raise InvalidConfig(f"{path}: {kinds} has no {name[:100]!r}")


def _file(entry: Mapping[str, Any], key: str, folder: Path) -> str:
    name = text(entry.get(key))
    return str(folder / name) if name else ""


def _decoded(entry: Mapping[str, Any], key: str, path: Path) -> bytes:
    try:
        return base64.b64decode(text(entry.get(key)), validate=False)
    except (binascii.Error, ValueError):
        raise InvalidConfig(f"{path}: {key} is not base64") from None


def authorization(cluster: Cluster) -> str | None:
    """The Authorization header; a token's file is read anew, as the kubelet renews it. Reads a file: in a thread."""
    token = cluster.token
    if cluster.token_file:
        try:
            token = read_file(Path(cluster.token_file), TOKEN_BYTES_MAX).decode().strip()
        except FileNotFoundError as error:
            raise InvalidConfig(f"{cluster.token_file}: no such file") from error
        except UnicodeDecodeError:
            raise InvalidConfig(f"{cluster.token_file}: not a token") from None
    if token:
        if not token.isascii() or not token.isprintable():
            raise InvalidConfig("the kubeconfig's token is no header's value")
        return f"Bearer {token}"
    if cluster.basic[0]:
        return "Basic " + base64.b64encode(":".join(cluster.basic).encode()).decode()
    return None


def tls_of(cluster: Cluster, scratch: Path) -> ssl.SSLContext:
    """The TLS context; ``scratch`` is a private folder for a moment's files. Reads files: in a thread.

    A cluster's own authority replaces the system's, as it does for kubectl.
    """
    try:
        context = ssl.create_default_context(
            cafile=cluster.ca_file if cluster.ca_file and not cluster.ca_data else None, cadata=cluster.ca_data or None
        )
        if cluster.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate, key = cluster.client_certificate, cluster.client_key
        if cluster.client_data[0]:
            # OpenSSL by way of ssl reads certificates from files alone.
            certificate, key = str(scratch / "client.crt"), str(scratch / "client.key")
            Path(certificate).write_bytes(cluster.client_data[0])
            Path(key).touch(mode=0o600)
            Path(key).write_bytes(cluster.client_data[1])
        if certificate:
            context.load_cert_chain(certificate, key or None, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidConfig(f"the kubeconfig's certificates cannot be used: {type(error).__name__}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")
