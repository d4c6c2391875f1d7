"""The receiver's specification: real sockets, real TLS, real processes, real files.

Run with `python3 -m pytest`. Sections in the order of the module.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid

import pytest

import skype_webhook as sw

HERE = pathlib.Path(__file__).resolve().parent
KEY = "0ed0e01b-4f8f-93ee-45de-9695954a44a9"
SECRET = b"3627875e-7826-8a35-4b38-c54e8a4bb1f1"
CREDENTIAL = sw.Credential(KEY, SECRET)


# --- The sender's side, independent of the module ---


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def jws(header, payload, secret=SECRET):
    signed = base64url(header) + b"." + base64url(payload)
    return (signed + b"." + base64url(hmac.new(secret, signed, hashlib.sha256).digest())).decode()


def token(body, now=None, secret=SECRET, **claims):
    """Return a token as the getting-started page describes it; a claim given as None is left out."""
    now = int(time.time() if now is None else now)
    claims = {"jti": str(uuid.uuid4()), "iss": KEY, "sub": hashlib.sha256(body).hexdigest(), "exp": now + 10, "iat": now, **claims}
    return jws(b'{"alg":"HS256","typ":"JWT"}', json.dumps({k: v for k, v in claims.items() if v is not None}).encode(), secret)


def event(**fields):
    """Return the body of a new event, each call another; a field given as None is left out."""
    fields = {"previousStage": {"value": "InterviewCreated", "metadata": "1 - Interview was created"},
              "currentStage": {"value": "SchedulingTime", "metadata": "2000 - Pending interviewer time selection"},
              "event": "State", "timestamp": "2018-02-26T17:50:17.4862382Z", "interviewCode": str(uuid.uuid4()), **fields}
    return json.dumps({k: v for k, v in fields.items() if v is not None}).encode()


def post(body, *fields, authorization=None, length=True, path="/"):
    """Return the raw bytes of one delivery; `fields` are further header lines."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: {authorization or 'Bearer ' + token(body)}", *fields]
    return "\r\n".join(lines + [f"Content-Length: {len(body)}"] * length).encode("latin-1") + b"\r\n\r\n" + body


class Peer:
    """One connection that sends raw bytes and reads answers."""

    def __init__(self, port, tls=True, timeout=15):
        self.raw = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket = ssl._create_unverified_context().wrap_socket(self.raw, server_hostname="localhost") if tls else self.raw
        self.file = self.socket.makefile("rb")

    def send(self, data):
        self.socket.sendall(data)

    def answer(self, with_content=True):
        """Return (status, fields by lower-case name, content) of the next answer; (0, {}, b"") at the end."""
        try:
            line = self.file.readline()
        except OSError:
            line = b""
        if not line:
            return 0, {}, b""
        fields = {}
        while (field := self.file.readline().decode("latin-1").rstrip("\r\n")):
            name, _, value = field.partition(":")
            fields[name.lower()] = value.strip()
        length = int(fields.get("content-length", 0)) if with_content else 0
        return int(line.split()[1]), fields, self.file.read(length)

    def ended(self):
        """Tell whether the server has closed the connection in an orderly way."""
        try:
            return self.file.read(1) == b""
        except OSError:
            return False

    def close(self):
        self.file.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Return the paths of a P-256 certificate for localhost and of its key."""
    return sw.make_certificate(str(tmp_path_factory.mktemp("tls")))


class Server:
    """A receiver in a process of its own."""

    def __init__(self, folder, certificate, *flags, **environment):
        self.log = folder / "events.jsonl"
        self.errors = folder / f"stderr.{uuid.uuid4().hex}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SKYPE_", "LISTEN_", "NOTIFY_"))}
        tls = [] if "--behind-proxy" in flags else ["--cert", certificate[0], "--key", certificate[1]]
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "skype_webhook.py"), *tls, "--host", "127.0.0.1", "--port", "0", "--log", str(self.log), *flags],
                cwd=folder, stdout=subprocess.DEVNULL, stderr=errors,
                env={**clean, "SKYPE_API_KEY": KEY, "SKYPE_API_SECRET": SECRET.decode(), **environment})
        self.port = int(self.wait_for(r"listening on https?://[^ ]*:(\d+)/")[1])

    def stderr(self):
        return self.errors.read_text("utf-8", "replace")

    def wait_for(self, pattern, seconds=15):
        """Return the match of `pattern` in what the receiver has said, as soon as it is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            over = self.process.poll() is not None
            if match := re.search(pattern, self.stderr()):
                return match
            assert not over, f"ended with {self.process.returncode}: {self.stderr()}"
            time.sleep(0.005)
        raise AssertionError(f"no {pattern!r} within {seconds} s in: {self.stderr()}")

    def deliver(self, body, *fields, **options):
        """Deliver over a new connection; return (status, fields, content)."""
        tls = options.pop("tls", True)
        with Peer(self.port, tls) as peer:
            peer.send(post(body, *fields, **options))
            return peer.answer()

    def lines(self):
        return [json.loads(line) for line in self.log.read_bytes().splitlines() if line.strip()]

    def ids(self):
        return [line["id"] for line in self.lines()]

    def stop(self, number=signal.SIGTERM):
        """Send a signal; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def serve(tmp_path, certificate):
    """Return a function that starts a receiver; all are killed at the end of the test."""
    servers = []

    def start(*flags, **environment):
        servers.append(Server(tmp_path, certificate, *flags, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, certificate):
    """A receiver that all tests share which leave it as it was."""
    server = Server(tmp_path_factory.mktemp("shared"), certificate)
    yield server
    server.process.kill()
    server.process.wait()


# --- Verification ---


# --- Events and lines ---


# --- The journal ---


# --- HTTP: one connection ---


def test_the_documented_event_is_recorded_once(serve):
    server = serve()
    body = event()
    assert json.loads(server.deliver(body)[2]) == {"status": "recorded", "id": hashlib.sha256(body).hexdigest()}
    assert json.loads(server.deliver(body)[2])["status"] == "duplicate"
    assert server.ids() == [hashlib.sha256(body).hexdigest()]
    assert server.stop() == 0


# --- The server ---


# --- The live view ---


# --- Sender and timeline ---


# --- Settings and the command line ---
