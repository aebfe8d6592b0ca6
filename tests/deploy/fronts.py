"""The fronts of deploy/tls, run in the foreground by the real nginx and Caddy."""

import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.programs import free_port, require

TLS = Path(__file__).parents[2] / "deploy" / "tls"
KINDS = ("nginx", "caddy")
READY_TIMEOUT_S = 60
STOPPED_TIMEOUT_S = 30


@dataclass(frozen=True)
class Front:
    """A running front."""

    kind: str
    port: int
    certificate: Path
    """Of the front, signed by itself."""
    logs: Path
    """Folder of all its logs."""

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"https://127.0.0.1:{self.port}"

    def context(self) -> ssl.SSLContext:
        """What a client trusts: this front alone."""
        return ssl.create_default_context(cafile=self.certificate)

    def connect(self, protocol: str = "http/1.1") -> ssl.SSLSocket:
        """A connection of a client that speaks this protocol."""
        context = self.context()
        context.set_alpn_protocols([protocol])
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=READY_TIMEOUT_S)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    def log_with(self, text: str) -> str:
        """All its logs, as soon as this text is in them."""
        give_up_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            log = "".join(path.read_text() for path in sorted(self.logs.iterdir()))
            if text in log:
                return log
            assert time.monotonic() < give_up_s, f"{text} is not in:\n{log}"
            time.sleep(0.05)


@contextmanager
def running(
    kind: str, folder: Path, app_port: int, changes: Mapping[str, str] | None = None
) -> Iterator[Front]:
    """The front of this kind before an app, with some texts of its file changed."""
    program = require(kind, kind)
    certificate, key = make_certificate(folder)
    logs = folder / "logs"
    logs.mkdir()
    port = free_port()
    if kind == "nginx":
        file, own = "nginx.conf", _of_nginx(folder, logs, port)
        # Debian's nginx opens its usual log before it has read its file.
        command = [program, "-e", str(logs / "start.log"), "-g", "daemon off;", "-c"]
    else:
        file, own = "Caddyfile", _of_caddy(logs, port)
        command = [program, "run", "--adapter", "caddyfile", "--config"]
    text = (TLS / file).read_text()
    own |= {
        "127.0.0.1:8000": f"127.0.0.1:{app_port}",
        _line(text, "fullchain.pem"): str(certificate),
        _line(text, "privkey.pem"): str(key),
    }
    for old, new in {**own, **(changes or {})}.items():
        assert old in text, f"{old} is not in {file}"
        text = text.replace(old, new)
    (folder / file).write_text(text)
    env = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (logs / "output.log").open("w") as out:
        process = subprocess.Popen(
            [*command, str(folder / file)], stdout=out, stderr=subprocess.STDOUT, env=env
        )
    try:
        front = Front(kind, port, certificate, logs)
        _wait_until_ready(front, process)
        yield front
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOPPED_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # Caddy waits for calls that a failed test has left
            process.kill()
            process.wait()


def _of_nginx(folder: Path, logs: Path, port: int) -> dict[str, str]:
    is_root = os.getuid() == 0
    # The usual ones are of the package's user, which cannot reach a folder of a test.
    temporary = () if is_root else ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"    {name}_temp_path {folder / name};\n" for name in temporary)
    return {
        "http {\n": f"http {{\n{paths}",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{port} ssl http2;",
        "listen [::]:443 ssl http2;": "",
        "pid /run/nginx.pid;": f"pid {folder / 'nginx.pid'};",
        "user www-data;": "user www-data;" if is_root else "",
        "/var/log/nginx/": f"{logs}/",
    }


def _of_caddy(logs: Path, port: int) -> dict[str, str]:
    site = f"https://127.0.0.1:{port} {{\n\tbind 127.0.0.1"
    return {"\napi.example.com {": f"\n{site}", "/var/log/caddy/": f"{logs}/"}


def _line(text: str, file: str) -> str:
    """The path of a file with this name in a configuration."""
    [path] = {word.strip(";") for word in text.split() if word.strip(";").endswith(f"/{file}")}
    return path


def _wait_until_ready(front: Front, process: "subprocess.Popen[bytes]") -> None:
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_s:
        try:
            front.connect().close()
            return
        except OSError:
            time.sleep(0.05)
    log = "".join(path.read_text() for path in front.logs.iterdir())
    pytest.fail(f"{front.kind} did not come up:\n{log}")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "front of a test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file
