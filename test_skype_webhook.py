"""The receiver's specification: real sockets, real TLS, real processes, real files.

Run with `python3 -m pytest`. Sections in the order of the module.
"""
from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import hmac
import http.server
import itertools
import json
import math
import os
import pathlib
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
import urllib.parse
import uuid

import pytest

import skype_webhook as sw

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = [sys.executable, str(HERE / "skype_webhook.py")]
KEY = "0ed0e01b-4f8f-93ee-45de-9695954a44a9"
SECRET = b"3627875e-7826-8a35-4b38-c54e8a4bb1f1"
CREDENTIAL = sw.Credential(KEY, SECRET)
OURS = {"SKYPE_API_KEY": KEY, "SKYPE_API_SECRET": SECRET.decode()}
CLEAN = {name: value for name, value in os.environ.items()
         if not name.startswith(("SKYPE_", "LISTEN_", "NOTIFY_"))}


# --- The sender's side, independent of the module ---


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def sign(text, secret=SECRET):
    """Return header and payload, as base64url, with their signature."""
    return f"{text}.{base64url(hmac.new(secret, text.encode(), hashlib.sha256).digest()).decode()}"


def jws(header, payload, secret=SECRET):
    return sign(f"{base64url(header).decode()}.{base64url(payload).decode()}", secret)


def json_of(members):
    """Return an object as JSON; a member that is None is left out."""
    given = {name: value for name, value in members.items() if value is not None}
    return json.dumps(given).encode()


def token_of(body, now=None, secret=SECRET, **claims):
    """Return a token as the getting-started page says; a claim given as None is left out."""
    now = int(time.time() if now is None else now)
    dated = {"jti": str(uuid.uuid4()), "iss": KEY, "sub": sha256(body), "exp": now + 10, "iat": now}
    return jws(b'{"alg":"HS256","typ":"JWT"}', json_of({**dated, **claims}), secret)


def new_event(**fields):
    """Return the body of a new event, each call another; a field given as None is left out."""
    return json_of({
        "previousStage": {"value": "InterviewCreated", "metadata": "1 - Interview was created"},
        "currentStage": {"value": "SchedulingTime", "metadata": "2000 - Pending interviewer time"},
        "event": "State",
        "timestamp": "2018-02-26T17:50:17.4862382Z",
        "interviewCode": str(uuid.uuid4()),
        **fields})


def post(body, *fields, authorization=None, length=True, path="/"):
    """Return the raw bytes of one delivery; `fields` are further header lines."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *fields]
    lines.append(f"Authorization: {authorization or 'Bearer ' + token_of(body)}")
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(body):
    """Return the raw bytes of one delivery up to its body, which is to follow in chunks."""
    return post(body, "Transfer-Encoding: chunked", length=False)[:-len(body)]


class Peer:
    """One connection that sends raw bytes and reads answers."""

    def __init__(self, port, tls=True, timeout=30):
        self.raw = socket.create_connection(("127.0.0.1", port), timeout)
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = self.raw
        self.file = self.socket.makefile("rb")
        if tls:
            self.start_tls()

    def start_tls(self):
        context = ssl._create_unverified_context()
        context.options &= ~0x80  # OP_IGNORE_UNEXPECTED_EOF, which 3.9 sets: a closure alert is due
        self.socket = context.wrap_socket(
            self.raw, server_hostname="localhost", suppress_ragged_eofs=False)
        self.file = self.socket.makefile("rb")

    def send(self, data):
        self.socket.sendall(data)

    def answer(self, with_content=True):
        """Return status, fields by lower-case name and content of the next answer; 0 at the end."""
        try:
            line = self.file.readline()
        except OSError:
            line = b""
        if not line:
            return 0, {}, b""
        fields = {}
        for field in iter(lambda: self.file.readline().decode("latin-1").rstrip("\r\n"), ""):
            name, _, value = field.partition(":")
            fields[name.lower()] = value.strip()
        length = int(fields.get("content-length", 0)) if with_content else 0
        return int(line.split()[1]), fields, self.file.read(length)

    def ask(self, data):
        """Send a request; return the status of the answer, 0 if there is none."""
        self.send(data)
        return self.answer()[0]

    def ended(self):
        """Return whether the server has closed the connection in an orderly way."""
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


# --- The receiver's side: processes, and what can be done to them ---


def make_certificate(folder, *more):
    """Return the paths of a new P-256 certificate for localhost and of its key."""
    cert = str(folder / "cert.pem")
    key = str(folder / "key.pem")
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    words += ["-keyout", key, "-out", cert, *more]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    return cert, key


def make_dated_certificate(folder, begin, end, name="localhost"):
    """Return the paths of a certificate from `begin` to `end` (days), and of its key."""
    _, key = make_certificate(folder)
    (folder / "index").touch()
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=this\n[this]\ndatabase=index\nnew_certs_dir=.\nrand_serial=yes\n"
        f"policy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n"
        f"[names]\nsubjectAltName=DNS:{name}\n")
    for words in (["req", "-new", "-key", key, "-subj", f"/CN={name}", "-out", "request"],
                  ["ca", "-config", "ca.cnf", "-selfsign", "-keyfile", key, "-in", "request",
                   "-startdate", f"{begin}000000Z", "-enddate", f"{end}000000Z", "-md", "sha256",
                   "-batch", "-notext", "-out", "dated.pem"]):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    return str(folder / "dated.pem"), key


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The paths of a certificate for localhost and of its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


# The program with other limits. It has to be __main__, or it gives its signals back at the end.
WITH_LIMITS = ("import json, sys, skype_webhook as sw\n"
               "vars(sw).update(json.loads(sys.argv.pop(1)), __name__='__main__')\n"
               "sys.exit(sw.main())")


class Server:
    """A receiver in a process of its own; `limits` replace the module's that take too long."""

    def __init__(self, folder, certificate, *flags, limits=None, **environment):
        self.log = folder / "events.jsonl"
        self.errors = folder / f"stderr.{uuid.uuid4().hex}"
        words = list(PROGRAM)
        if limits:
            assert limits.keys() <= vars(sw).keys()
            words = [sys.executable, "-c", WITH_LIMITS, json.dumps(limits)]
        if "--behind-proxy" not in flags:
            words += ["--cert", certificate[0], "--key", certificate[1]]
        words += ["--host", "127.0.0.1", "--port", "0", "--log", str(self.log), *flags]
        environment = {**CLEAN, **OURS, "PYTHONPATH": str(HERE), **environment}
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                words, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        self.port = int(self.wait_for(r"listening on https?://[^ ]*:(\d+)/")[1])

    def stderr(self):
        return self.errors.read_text("utf-8", "replace")

    def wait_for(self, pattern, seconds=30):
        """Return the match of `pattern` in what the receiver has said, as soon as it is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            over = self.process.poll() is not None
            if match := re.search(pattern, self.stderr()):
                return match
            assert not over, f"ended with {self.process.returncode}: {self.stderr()}"
            time.sleep(0.005)
        raise AssertionError(f"no {pattern!r} within {seconds} s in: {self.stderr()}")

    def deliver(self, body, *fields, tls=True, **options):
        """Deliver over a new connection; return (status, fields, content)."""
        with Peer(self.port, tls) as peer:
            peer.send(post(body, *fields, **options))
            return peer.answer()

    def becomes(self, body):
        """Deliver; return what the answer says has become of the event."""
        return json.loads(self.deliver(body)[2])["status"]

    def hang_up(self, said):
        """Send SIGHUP, and wait until the receiver has said something once more."""
        count = self.stderr().count(said)
        self.process.send_signal(signal.SIGHUP)
        assert until(lambda: self.stderr().count(said) > count), self.stderr()

    def lines(self):
        return lines_in(self.log)

    def ids(self):
        return ids_in(self.log)

    def limit(self, what, size=None):
        """Set a limit of setrlimit(2) to so many bytes or descriptors; None lifts it again."""
        resource = pytest.importorskip("resource")
        if not hasattr(resource, "prlimit"):
            pytest.skip("needs Linux' prlimit")
        kind = getattr(resource, f"RLIMIT_{what}")
        _, hard = resource.prlimit(self.process.pid, kind)
        resource.prlimit(self.process.pid, kind, (hard if size is None else size, hard))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """Send SIGTERM; return the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(40)


@pytest.fixture
def serve(tmp_path, certificate):
    """Return a function that starts a receiver; all are killed at the end of the test."""
    servers = []

    def serve_one(*flags, folder=tmp_path, **options):
        servers.append(Server(folder, certificate, *flags, **options))
        return servers[-1]

    yield serve_one
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, certificate):
    """A receiver that all tests share which leave it as it was."""
    server = Server(tmp_path_factory.mktemp("shared"), certificate)
    yield server
    server.kill()


@contextlib.contextmanager
def faulty(server, rule, path=None, anywhere=False):
    """Let system calls on the log or its folder, on `path`, or all, fail or take long.

    The rule is strace's, for instance `fdatasync:error=EIO:when=1`.
    """
    words = [program("strace"), "-f", "-o", os.devnull, "-p", str(server.process.pid)]
    words.append(f"--inject={rule}")
    if not anywhere:
        paths = [path] if path else [server.log, server.log.parent]
        words += [f"--trace-path={each}" for each in paths]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        said = tracer.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"needs leave to trace a process: {said}")
        try:
            yield
        finally:
            tracer.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                tracer.wait(20)
            tracer.kill()  # it waits for a call that it holds up


def readme(heading, number=0):
    """Return a block of the README below `heading`: what is printed there is what the tests run."""
    below = (HERE / "README.md").read_text("utf-8").partition(heading)[2]
    return re.findall(r"^```\w*\n(.*?)^```$", below, re.MULTILINE | re.DOTALL)[number]


def replaced(text, values):
    """Return a recipe with a test's paths and ports in the place of its own; it has each."""
    for old, new in values.items():
        assert old in text, old
        text = text.replace(old, str(new))
    return text


def program(name):
    """Return the path of a program, or skip the test; Debian keeps some out of a user's PATH."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    return path or pytest.skip(f"{name} is not installed")


def free_port():
    """Return a port for a program that cannot choose one, outside the range of connections."""
    while True:
        port = secrets.choice(range(10_000, 32_000))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a program; its output is shown if the test failed."""
    processes = []

    def launch_one(name, *words, **options):
        with open(tmp_path / "programs", "ab") as said:
            processes.append(subprocess.Popen(
                [program(name), *map(str, words)], **{"stdout": said, "stderr": said, **options}))
        return processes[-1]

    yield launch_one
    for process in processes:
        with process:  # which closes its pipes, and waits for it
            process.kill()
    print((tmp_path / "programs").read_text("utf-8", "replace") if processes else "")


class Command:
    """A command in a process of its own that goes on; `launch` is the fixture."""

    def __init__(self, launch, folder, *words, program=PROGRAM, **environment):
        self.out, self.err = (folder / f"{name}.{uuid.uuid4().hex}" for name in ("out", "err"))
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = launch(*program, *words, cwd=folder, env={**CLEAN, **environment},
                                 stdin=subprocess.PIPE, stdout=out, stderr=err)

    def says(self, pattern):
        """Return the match of a pattern in stdout, as soon as it is there."""
        def found():
            return re.search(pattern, self.out.read_text("utf-8"))

        assert until(found), (pattern, self.out.read_text(), self.err.read_text())
        return found()

    def is_told(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def ended(self, signal_number=None):
        """End it by a signal, or by the end of stdin; return (exit code, stdout, stderr)."""
        if signal_number:
            self.process.send_signal(signal_number)
        self.process.stdin.close()
        code = self.process.wait(30)
        assert "Traceback" not in self.err.read_text()
        return code, self.out.read_text("utf-8"), self.err.read_text("utf-8")


def gather(count, act):
    """Return `count` threads that do `act`."""
    threads = [threading.Thread(target=act, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


LATE = 10  # seconds; an answer that takes longer is none


def outcome_of(port, body, secret):
    """Deliver over a connection of its own; return "recorded" or "duplicate", or what came instead.

    "cut" and "503" are what a restart may lead to; anything else is garbage.
    """
    try:
        with Peer(port, timeout=LATE) as peer:
            peer.send(post(body, authorization="Bearer " + token_of(body, secret=secret)))
            status, _, content = peer.answer()
            answer = json.loads(content) if status == 200 else {}
    except OSError:
        return "cut"
    except Exception as error:
        return repr(error)
    if status in (0, 503):
        return "503" if status else "cut"
    return answer["status"] if answer.get("id") == sha256(body) else f"{status} {content!r}"


@contextlib.contextmanager
def delivering(port, threads=6, secret=lambda: SECRET, tries=1):
    """Deliver new events; yield the ids of those acknowledged, and what became of the others."""
    acknowledged = []
    refused = []
    over = threading.Event()

    def send():
        while not over.wait(0.01):
            body = new_event()
            outcomes = [outcome_of(port, body, secret())]
            while len(outcomes) < tries and outcomes[-1] in ("cut", "503"):
                over.wait(0.05)
                outcomes.append(outcome_of(port, body, secret()))
            if outcomes[-1] in ("recorded", "duplicate"):
                acknowledged.append(sha256(body))
            else:
                refused.append(outcomes)

    senders = gather(threads, send)
    try:
        yield acknowledged, refused
    finally:
        over.set()
        for sender in senders:
            sender.join()


def until(condition, seconds=30):
    """Wait until `condition` holds; return whether it did in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


def grows(found, by):
    """Wait until `found` has `by` members more than now."""
    size = len(found) + by
    assert until(lambda: len(found) >= size), (len(found), size)


def lines_in(*paths):
    """Return the events of logs; a blank line is what a torn one was sealed to."""
    lines = b"".join(path.read_bytes() for path in paths).splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def ids_in(*paths):
    return [event["id"] for event in lines_in(*paths)]


def run(*words, cwd, **environment):
    """Run one command to its end; return (exit code, stdout, stderr)."""
    done = subprocess.run(
        [*PROGRAM, *map(str, words)], cwd=cwd, env={**CLEAN, "TZ": "UTC", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def get(server, path="/", *fields):
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *fields, "", ""]
    with Peer(server.port) as peer:
        peer.send("\r\n".join(lines).encode())
        return peer.answer()


@contextlib.contextmanager
def as_nobody():
    """Be a user who may not read everything: root would."""
    ours = os.geteuid()
    if ours == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(ours)


def replace_log(log, how):
    """Take a log away as a rotation does, or somebody who removes it."""
    if how == "remove":
        log.unlink()
    elif how in ("rename", "create"):
        log.rename(log.with_name("events.jsonl.1"))
        if how == "create":
            log.touch(0o600)
    else:
        shutil.copyfile(log, log.with_name("events.jsonl.1"))
        os.truncate(log, 0)


def open_files(server, name):
    """Return the paths of the open files of a receiver whose names begin like this."""
    paths = []
    for link in pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has been closed meanwhile
            paths.append(os.readlink(link))
    return [path for path in paths if os.path.basename(path).startswith(name)]


def has_read(server, peer):
    """Return whether the receiver has read all that a peer has sent."""
    sockets = pathlib.Path("/proc/net/tcp")
    if not sockets.exists():
        pytest.skip("needs Linux' /proc")
    ends = f":{server.port:04X} .*:{peer.socket.getsockname()[1]:04X} "
    lines = [line for line in sockets.read_text().splitlines() if re.search(ends, line)]
    return any(line.split()[4].endswith(":00000000") for line in lines)


def basic(password):
    return "Authorization: Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


def line_of(body, recorded=0):
    return sw.format_line(sw.parse_event(body), body, recorded)


def numbered_line(number, size=0):
    """Return id and line of an event."""
    body = b'{"n":%d,"x":"%b"}' % (number, b"y" * size)
    return sha256(body), line_of(body)


def fails(error):
    """Return a function that raises an error, whatever it is given."""
    return unittest.mock.Mock(side_effect=error)


def connect(server, count):
    return [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(count)]


def status_of(server, body, **token):
    """Deliver with a token that `token_of` makes by these arguments; return the status."""
    return server.deliver(body, authorization="Bearer " + token_of(body, **token))[0]


def stores_at(port):
    """Return whether a delivery to a port of ours is answered with 200."""
    with Peer(port) as peer:
        return peer.ask(post(new_event())) == 200


def deliver_new(server, count=1, **fields):
    """Deliver so many new events; return their ids."""
    bodies = [new_event(**fields) for _ in range(count)]
    assert [server.deliver(body)[0] for body in bodies] == [200] * count
    return [sha256(body) for body in bodies]


def write_env(path, **settings):
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    path.chmod(0o600)


def cpu_time(server):
    """Return the time of a receiver, the user's and the system's, in 10 ms."""
    stat = pathlib.Path(f"/proc/{server.process.pid}/stat")
    if not stat.exists():
        pytest.skip("needs Linux' /proc")
    return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))


def rests(server):
    """Return whether the receiver takes next to no processor time for half a second."""
    before = cpu_time(server)
    time.sleep(0.5)
    return cpu_time(server) - before < 5


@pytest.fixture
def in_process(tmp_path, monkeypatch, capfd):
    """Return a function that runs one command within the test's own process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # `main` sets its own

    def run_main(*words, **environment):
        """Return (exit code, stdout, stderr)."""
        for name, value in {**OURS, **environment}.items():
            monkeypatch.setenv(name, value)
        return sw.main(words), *capfd.readouterr()

    return run_main


PASSWORD = "p\u00e4ssw\u00f6rt"
README = (HERE / "README.md").read_text("utf-8")
CUT_OFF = (ConnectionError, ssl.SSLError)  # and not: a timeout of our own
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


# --- Verification ---

NOW = 1_519_343_720
BODY = b'{"event":"State"}'
HEADER = b'{"alg":"HS256","typ":"JWT"}'
# Of the getting-started page, and of RFC 7515 appendix A.1.
PUBLISHED = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJqdGkiOiJkODY2MWExNC00YjdjLTVmZGEtMjIyNy05YjA1NWZjZjVi"
    "MTAiLCJpc3MiOiIwZWQwZTAxYi00ZjhmLTkzZWUtNDVkZS05Njk1OTU0YTQ0YTkiLCJzdWIiOiI0NDEzNmZhMzU1YjM2"
    "NzhhMTE0NmFkMTZmN2U4NjQ5ZTk0ZmI0ZmMyMWZlNzdlODMxMGMwNjBmNjFjYWFmZjhhIiwiZXhwIjoxNTE5MzQzNzI0"
    "LCJpYXQiOjE1MTkzNDM3MTR9.4KSookeDh2d_Vujy_bUiA2n0yKY39inaIc1laWjDt6Q")
RFC7515_A1 = (
    "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0"
    "dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
RFC7515_A1_KEY = base64.urlsafe_b64decode(
    "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow==")


def check(authorization, body=BODY, now=NOW, credentials=(CREDENTIAL,), leeway=1.0):
    return sw.verify(authorization, body, credentials, now, leeway)


def refusal(authorization, *args, **options):
    """Return why a token is refused."""
    with pytest.raises(sw.Rejected) as caught:
        check(authorization, *args, **options)
    assert caught.value.status == 401
    return caught.value.detail


def payload(body=BODY, now=NOW, **claims):
    """Return the payload of a good token, with other claims as given."""
    good = {"iss": KEY, "sub": sha256(body), "exp": now + 10, "iat": now}
    return json.dumps({**good, **claims}).encode()


def bearer(body=BODY, now=NOW, header=HEADER, secret=SECRET, **claims):
    """Return the Authorization field of a good token, with what is given instead."""
    return "Bearer " + jws(header, payload(body, now, **claims), secret)


def bearer_of(claims):
    return "Bearer " + jws(HEADER, claims)


def flip(token, bit):
    """Return base64url with a bit of its last character flipped; the lowest is spare."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) ^ bit]


def base64_sub(body):
    return base64url(hashlib.sha256(body).digest()).decode()


NESTED = b'{"a":' + b"[" * 2900 + b"]" * 2900 + b"}"
UTF16 = HEADER.decode().encode("utf-16")
TWO_ALGS = b'{"alg":"none","alg":"HS256"}'
LONG_EXP = b'"exp": 1' + b"0" * 5000

# Each row changes one thing in a valid delivery: the Authorization field as a function of its good
# token, its body and the time; a word of the refusal.
ATTACKS = {
    "no field": (lambda t, b, n: None, "no Authorization"),
    "empty": (lambda t, b, n: "", "Bearer"),
    "Basic": (lambda t, b, n: "Basic " + t, "Bearer"),
    "no scheme": (lambda t, b, n: t, "Bearer"),
    "two tokens": (lambda t, b, n: f"Bearer {t}, Bearer {t}", "signature"),
    "a word after it": (lambda t, b, n: f"Bearer {t} x", "signature"),
    "two segments": (lambda t, b, n: "Bearer " + t.rpartition(".")[0], "signature"),
    "four segments": (lambda t, b, n: f"Bearer {t}.x", "signature"),
    "empty signature": (lambda t, b, n: "Bearer " + t.rpartition(".")[0] + ".", "signature"),
    "padding": (lambda t, b, n: f"Bearer {t}=", "signature"),
    "another signature": (lambda t, b, n: "Bearer " + flip(t, 32), "signature"),
    "non-canonical signature": (lambda t, b, n: "Bearer " + flip(t, 1), "signature"),
    "junk in it": (lambda t, b, n: f"Bearer {t[:5]}!{t[5:]}", "signature"),
    "not ASCII": (lambda t, b, n: f"Bearer {t}\xe9", "signature"),
    "over 8 KiB": (lambda t, b, n: bearer(b, n, x="y" * 9000), "longer"),
    "another secret": (lambda t, b, n: bearer(b, n, secret=b"other"), "signature"),
    "empty secret": (lambda t, b, n: bearer(b, n, secret=b""), "signature"),
    "alg none": (lambda t, b, n: bearer(b, n, b'{"alg":"none"}'), "HS256"),
    "alg hs256": (lambda t, b, n: bearer(b, n, b'{"alg":"hs256"}'), "HS256"),
    "alg HS512": (lambda t, b, n: bearer(b, n, b'{"alg":"HS512"}'), "HS256"),
    "no alg": (lambda t, b, n: bearer(b, n, b'{"typ":"JWT"}'), "HS256"),
    "crit": (lambda t, b, n: bearer(b, n, b'{"alg":"HS256","crit":["exp"]}'), "critical"),
    "header a list": (lambda t, b, n: bearer(b, n, b'["HS256"]'), "header"),
    "header UTF-16": (lambda t, b, n: bearer(b, n, UTF16), "header"),
    "two algs": (lambda t, b, n: bearer(b, n, TWO_ALGS), "header"),
    "payload a list": (lambda t, b, n: bearer_of(b"[]"), "payload"),
    "payload nested deep": (lambda t, b, n: bearer_of(NESTED), "token's"),
    "a claim twice": (lambda t, b, n: bearer_of(payload(b, n)[:-1] + b',"iat":1}'), "payload"),
    "NaN": (lambda t, b, n: bearer(b, n, x=float("nan")), "payload"),
    "iss null": (lambda t, b, n: bearer(b, n, iss=None), "issuer"),
    "another iss": (lambda t, b, n: bearer(b, n, iss="x"), "issuer"),
    "IsS": (lambda t, b, n: bearer(b, n, iss=KEY.upper()), "issuer"),
    "iss a list": (lambda t, b, n: bearer(b, n, iss=[KEY]), "issuer"),
    "iat null": (lambda t, b, n: bearer(b, n, iat=None), "iat"),
    "exp null": (lambda t, b, n: bearer(b, n, exp=None), "exp"),
    "iat a bool": (lambda t, b, n: bearer(b, n, iat=True), "iat"),
    "exp huge": (lambda t, b, n: bearer(b, n, exp=10**400), "exp"),
    "5000 digits": (lambda t, b, n: bearer_of(payload(b, n).replace(b'"exp": ', LONG_EXP)), "exp"),
    "exp Arabic digits": (lambda t, b, n: bearer(b, n, exp="\u0669" * 10), "exp"),
    "exp 1_0": (lambda t, b, n: bearer(b, n, exp="9_999_999_999"), "exp"),
    "expired": (lambda t, b, n: bearer(b, n - 60), "expired"),
    "not begun": (lambda t, b, n: bearer(b, n + 60), "begins in"),
    "nbf ahead": (lambda t, b, n: bearer(b, n, nbf=n + 60), "nbf"),
    "nbf a list": (lambda t, b, n: bearer(b, n, nbf=[]), "nbf"),
    "sub null": (lambda t, b, n: bearer(b, n, sub=None), "sub"),
    "sub of another body": (lambda t, b, n: bearer(b + b" ", n), "sub"),
    "sub cut": (lambda t, b, n: bearer(b, n, sub=sha256(b)[:-1]), "sub"),
    "sub in base64": (lambda t, b, n: bearer(b, n, sub=base64_sub(b)), "sub"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_change_is_refused(attack):
    good = token_of(BODY, NOW)
    assert check("Bearer " + good)["iss"] == KEY
    change, word = ATTACKS[attack]
    assert word in refusal(change(good, BODY, NOW))


def test_one_change_is_refused_over_tls(shared):
    for attack, (change, word) in ATTACKS.items():
        body = new_event()
        before = shared.log.read_bytes()
        authorization = change(token_of(body), body, int(time.time()))
        lines = ["POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        if authorization is not None:
            lines.append(f"Authorization: {authorization}")
        with Peer(shared.port) as peer:
            peer.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            status, fields, content = peer.answer()
        assert status == 401 and word in json.loads(content)["detail"], attack
        challenge = "Bearer" if authorization is None else "Bearer error="
        assert fields["www-authenticate"].partition('"')[0] == challenge, attack
        assert shared.log.read_bytes() == before and shared.deliver(body)[0] == 200, attack


@pytest.mark.parametrize("claims", [
    {"iat": NOW * 1000, "exp": (NOW + 10) * 1000},
    {"iat": str(NOW * 1000)},
    {"iat": str(NOW), "exp": f"{NOW + 10}.5"},
    {"iat": NOW + 0.5},
    {"nbf": NOW},
    {"sub": sha256(BODY).upper()},
    {"x": {"y": [1]}},
    {"exp": 1e13},
], ids=str)
def test_documented_and_vendor_forms_of_claims_pass(claims):
    check("bEaReR  " + jws(HEADER, payload(**claims)))


def test_a_long_number_that_no_check_reads_refuses_no_token():
    long = b',"x":' + b"9" * 4400 + b"}"  # more digits than int() takes
    check(bearer(header=HEADER[:-1] + long))
    check(bearer_of(payload()[:-1] + long))


@pytest.mark.parametrize("leeway", [0, 1.0, 5])
def test_a_token_is_good_within_its_leeway(leeway):
    for now in (NOW - leeway + 0.01, NOW + 10 + leeway - 0.01):
        check(bearer(), now=now, leeway=leeway)


@pytest.mark.parametrize("late", [0, 298.5, 2400, 3600, 3 * 86400, 1e9])
def test_a_token_beyond_its_leeway_is_refused_with_the_seconds(late):
    for now in (NOW - 1 - late, NOW + 11 + late):
        detail = refusal(bearer(), now=now)
        assert f" {late:.1f} s more than" in detail and "clocks of sender and receiver" in detail


def test_no_token_is_good_at_a_time_that_is_no_number():
    assert "time" in refusal(bearer(), now=float("nan"))


@pytest.mark.parametrize("key", [KEY.upper(), "{" + KEY + "}", "{" + KEY.upper() + "}"])
def test_a_key_that_differs_only_in_case_or_braces_is_told(key):
    ours = (sw.Credential(key, SECRET),)
    signed = refusal(bearer(), credentials=ours)
    assert signed.startswith("issuer") and "only in upper and lower case or in braces" in signed
    unsigned = refusal(bearer(secret=b"other"), credentials=ours)
    assert unsigned.startswith("signature") and "case" not in unsigned


def test_the_checks_are_made_in_their_order():
    def field(secret, alg, crit, **claims):
        return "Bearer " + jws(json_of({"alg": alg, "crit": crit}), json_of(claims), secret)

    wrong = {"secret": b"other", "alg": "none", "crit": [], "iss": "x", "nbf": NOW + 60, "sub": "x"}
    mended = {}
    for word, mend in (
            ("does not match", {"secret": SECRET}),
            ("HS256", {"alg": "HS256"}),
            ("critical", {"crit": None}),
            ("issuer", {"iss": KEY}),
            ("exp", {"exp": NOW + 10}),
            ("iat", {"iat": NOW}),
            ("nbf", {"nbf": NOW}),
            ("sub", {"sub": sha256(BODY)})):
        assert word in refusal(field(**{**wrong, **mended}))
        mended.update(mend)
    check(field(**mended))


def test_a_previous_credential_needs_its_own_key_and_secret():
    both = (CREDENTIAL, sw.Credential("old", b"old secret"))
    check(bearer(iss="old", secret=b"old secret"), credentials=both)
    assert "issuer" in refusal(bearer(iss="old"), credentials=both)


@pytest.mark.parametrize("known", [b"", b"paste-your-api-secret-here"])
def test_a_secret_that_everybody_knows_verifies_nothing(known):
    ours = (sw.Credential(KEY, known),)
    assert "signature" in refusal(bearer(secret=known), credentials=ours)


def test_tokens_from_outside():
    assert "signature" in refusal("Bearer " + PUBLISHED, b"{}")
    for issuer, word in ((KEY, "issuer"), ("joe", "iat")):
        ours = (sw.Credential(issuer, RFC7515_A1_KEY),)
        assert word in refusal("Bearer " + RFC7515_A1, credentials=ours)


# The vectors of Wycheproof (json_web_signature_test.json, Apache-2.0) that part verifiers. A good
# signature gets as far as the payload, which is no JSON. 357 to 359 are valid. 372 and 373 hold a
# character that is not of base64: Wycheproof takes them, we do not. 374 sets spare bits of its
# payload, and 375 signs what is so written.
# Each row: its number, the token behind the first segment, a word of the refusal.
WYCHEPROOF = "eyJraWQiOiJoczI1Ni1rZXkiLCJhbGciOiJIUzI1NiJ9"


@pytest.mark.parametrize(("number", "rest", "word"), [
    (357, ".VGVzdA.c1LROH7eNQwUT8KMVEO52VC3WZ9e_AnDWbZ7aMmowV8", "payload"),
    (358, ".VDIxMzI1NjY4.AAAAtBuQqoI9HuBeAsgjL4nx8sCGYJa5-G2OrureLO4", "payload"),
    (359, ".VDgxMjM0MTM.____ETVRY0lRV9XgQeYX6ixdGT0NLHYb-wZem_ifJ5k", "payload"),
    (372, "?.VGVzdA.c1LROH7eNQwUT8KMVEO52VC3WZ9e_AnDWbZ7aMmowV8", "not three"),
    (373, ".VGVzdA?.c1LROH7eNQwUT8KMVEO52VC3WZ9e_AnDWbZ7aMmowV8", "not three"),
    (374, ".AB.8sL_ycV8G_D-K_2A3I0EW3NoPMeQzv13cAzuHlQ5TAE", "does not match"),
    (375, ".AB.9phoKDvkBMAqTgeVIYeqAi6-lvC0pbKg9ER--3T97w0", "payload"),
])
def test_a_vector_gets_as_far_as_its_signature_is_good(number, rest, word):
    text = "Bearer " + WYCHEPROOF + rest
    assert word in refusal(text, credentials=(sw.Credential(KEY, bytes(32)),)), number


@pytest.mark.parametrize("spell", [lambda good: flip(good, 1), "{}AAA".format], ids=["bits", "AAA"])
@pytest.mark.parametrize("at", [0, 1], ids=["header", "payload"])
def test_a_signed_segment_in_a_second_spelling_is_refused(at, spell):
    padded = payload() + b" " * (-len(payload()) % 3 + 1)  # its last character has spare bits
    segments = [base64url(HEADER + b" ").decode(), base64url(padded).decode()]
    check("Bearer " + sign(".".join(segments)))
    segments[at] = spell(segments[at])
    assert ("header", "payload")[at] in refusal("Bearer " + sign(".".join(segments)))


def test_a_token_of_8_kib_is_the_longest():
    longest, longer = (jws(HEADER, payload().ljust(size)) for size in (6083, 6084))
    assert (len(longest), len(longer)) == (8192, 8193)
    check("Bearer  " + longest)
    assert "longer" in refusal("Bearer " + longer)


def test_a_refusal_s_text_is_its_status_and_detail():
    assert str(sw.Rejected(401, "why", ("WWW-Authenticate", "Bearer"))) == "401: why"


def test_a_secret_is_not_in_the_text_of_what_holds_it():
    settings = sw.Settings(api_secret="hush", view_password="hush")
    assert "hush" not in repr([sw.Credential(KEY, b"hush"), settings])


# --- Events and lines ---


JSON = "application/json"
OCTETS = "application/octet-stream"

# Each row: a body that no reader of the log should meet as it is, its media type, and the reason
# that the warning names.
ODD_BODIES = [
    (b"", OCTETS, "is empty"),
    (b" \r\n", OCTETS, "is empty"),
    (b"[]", JSON, "is not an object"),
    (b"1", JSON, "is not an object"),
    (b"null", JSON, "is not an object"),
    (b'"x"', JSON, "is not an object"),
    (b'["\\ud800"]', JSON, "unpaired surrogate escape and is not an object"),
    (b'{"interviewCode":"\\ud800"}', JSON, "unpaired surrogate escape"),
    (b'{"interviewCode":"\\udc00"}', JSON, "unpaired surrogate escape"),
    (b'{"interviewCode":"\\ud800\\ud800"}', JSON, "unpaired surrogate escape"),
    (b'{"interviewCode":"\\udc00\\ud800"}', JSON, "unpaired surrogate escape"),
    (b'{"interviewCode":"\\ud800x"}', JSON, "unpaired surrogate escape"),
    (b'{"interviewCode":"\\\\\\uDBFF"}', JSON, "unpaired surrogate escape"),
    (b"{", OCTETS, "is not JSON"),
    (b"{} x", OCTETS, "goes on"),
    (b'{"a":NaN}', OCTETS, "holds NaN"),
    (b'{"a":-Infinity}', OCTETS, "holds -Infinity"),
    (b'{"a":01}', OCTETS, "is not JSON"),
    (b"{'a':1}", OCTETS, "is not JSON"),
    (b'{"a":"\n"}', OCTETS, "is not JSON"),
    (b'{"a":1,}', OCTETS, "is not JSON"),
    (b'{"a":"\\x"}', OCTETS, "is not JSON"),
    (b"\x0b{}", OCTETS, "is not JSON"),
    (b"{}\x1c", OCTETS, "goes on"),
    ("{}\xa0".encode(), OCTETS, "goes on"),
    (b"\xef\xbb\xbf{}", JSON, "byte order mark"),
    (b"\xef\xbb\xbf[]", JSON, "byte order mark and is not an object"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", OCTETS, "byte order mark and is not JSON"),
    (b"\xef\xbb\xbf", OCTETS, "byte order mark and is empty"),
    ('{"a":1}'.encode("utf-16"), OCTETS, "UTF-16"),
    ('{"a":1}'.encode("utf-32-le"), OCTETS, "holds NULs"),
    (b'{"a":"\xff"}', OCTETS, "is not UTF-8"),
    (b'{"a":"\xed\xa0\x80"}', OCTETS, "is not UTF-8"),
    (b"[" * 64 + b"]" * 64, JSON, "is not an object"),
    (b"[" * 65 + b"]" * 65, OCTETS, "deeper than 64"),
    (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", OCTETS, "deeper than 64"),
    (b'{"a":' + b"[" * 100_000, OCTETS, "deeper than 64"),
    (b'{"a":' * 9000 + b"1" + b"}" * 9000, OCTETS, "deeper than 64"),
]


@pytest.mark.parametrize(("body", "media_type", "reason"), ODD_BODIES,
                         ids=[repr(body[:20]) for body, _, _ in ODD_BODIES])
def test_what_is_no_strict_object_is_recorded_as_base64(body, media_type, reason):
    (warning,) = [each for each in sw.parse_event(body).warnings if "data_base64" in each]
    envelope = json.loads(line_of(body))
    assert reason in warning and envelope["datacontenttype"] == media_type
    assert base64.b64decode(envelope["data_base64"]) == body and envelope["id"] == sha256(body)
    assert envelope["type"] == "com.skype.interviews.unknown"
    assert not {"data", "subject", "time"} & set(envelope)


def test_a_body_behind_a_byte_order_mark_fills_the_envelope():
    body = b"\xef\xbb\xbf" + new_event(interviewCode="1c519c56")
    envelope = json.loads(line_of(body))
    assert (envelope["subject"], envelope["time"]) == ("1c519c56", "2018-02-26T17:50:17.4862382Z")
    assert (envelope["type"], envelope["datacontenttype"]) == ("com.skype.interviews.State", JSON)
    assert sw.parse_event(body).stage == "SchedulingTime"
    assert base64.b64decode(envelope["data_base64"]) == body


def test_every_verified_body_is_recorded_once(serve):
    server = serve()
    for body, _, reason in ODD_BODIES:
        assert [server.becomes(body), server.becomes(body)] == ["recorded", "duplicate"], body[:20]
        server.wait_for(rf" recorded - - \(kept as data_base64, .*{reason}")
    assert server.ids() == [sha256(body) for body, _, _ in ODD_BODIES]


# Each row: a reader, and what prints the subjects that it finds in the log at sys.argv[1].
READERS = {
    "pandas": "print(*pandas.read_json(sys.argv[1], lines=True).subject.dropna())",
    "polars": "print(*polars.read_ndjson(sys.argv[1])['subject'].drop_nulls())",
    "duckdb": "print(*duckdb.read_json(sys.argv[1]).filter('subject NOT NULL').df().subject)",
    "cloudevents.core.formats.json":
        "from cloudevents.core.v1.event import CloudEvent\n"
        "read = cloudevents.core.formats.json.JSONFormat().read\n"
        "events = [read(CloudEvent, line) for line in open(sys.argv[1], 'rb')]\n"
        "print(*(event.get_subject() for event in events if event.get_subject()))",
}


@pytest.fixture(scope="module")
def odd_log(tmp_path_factory):
    """A log that holds every odd body between two documented events."""
    path = tmp_path_factory.mktemp("odd") / "events.jsonl"
    odd = [body for body, _, _ in ODD_BODIES]
    bodies = [new_event(interviewCode="first"), *odd, new_event(interviewCode="last")]
    path.write_bytes(b"".join(line_of(body) for body in bodies))
    return path


def test_jq_reads_on_behind_odd_bodies(odd_log):
    words = [program("jq"), "-r", ".subject | values", str(odd_log)]
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"first\nlast\n"


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_reads_on_behind_odd_bodies(odd_log, reader):
    pytest.importorskip(reader)
    code = f"import sys, {reader}\n{READERS[reader]}"
    words = [sys.executable, "-c", code, str(odd_log)]
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"first last\n"


@pytest.mark.parametrize("piece", [
    b'\\"', b"[],", b"[", b'"[",', b'"",', b"\\\\", b"[" * 64 + b"]" * 64 + b","], ids=repr)
def test_what_costs_most_to_look_through_takes_no_second(piece):
    body = b'{"a":["' + piece * (2**20 // len(piece))
    begun = time.monotonic()
    sw.parse_event(body)
    sw.parse_event(body.replace(b'["', b"[", 1))
    assert time.monotonic() - begun < 2


# Each row: a text, JSON or not, and how deep its brackets are nested.
@pytest.mark.parametrize(("text", "level"), [
    (b"", 0),
    (b"[{}]", 2),
    (b"[][][]", 1),
    (b'{"a":{"b":[]}}', 3),
    (b'[""]', 1),
    (b'["[[[", [] ]', 2),
    (b'["[", "[", [[]]]', 3),
    (rb'["\"[[[", []]', 2),
    (rb'["\\", [[]]]', 3),
    (b'["[[[', 1),
    (rb'["\"[[[', 1),
    (b'["[\\', 1),
    (b"[]]]][[", 1),
    (b"[\x01\xff\x01]", 1),
], ids=repr)
def test_the_level_of_brackets_is_that_of_those_outside_strings(text, level):
    assert sw._is_deep(text, level - 1) and not sw._is_deep(text, level)


def test_a_deep_body_overflows_no_small_stack():
    code = """if True:
        import threading, skype_webhook as sw
        threading.stack_size(128 * 1024)
        body = b'{"a":' * 9000 + b"1" + b"}" * 9000
        thread = threading.Thread(target=lambda: print(sw.parse_event(body).content_type))
        thread.start()
        thread.join()"""
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert said == f"{OCTETS}\n"


@pytest.mark.parametrize("body", [
    b"{}",
    b' \r\n{"a":1}\n',
    b'{"a":1,"a":2}',
    b'{"a":1e400,"b":-0.0,"c":' + b"9" * 5000 + b"}",
    b'{"a":' + b"[" * 63 + b"]" * 63 + b"}",
    b'{"a":"' + b"[" * 1000 + b'"}',
    b'{"a":"\\ud83d\\ude00"}',  # a pair
    b'{"a":"\\\\ud800"}',  # a backslash, and no escape behind it
    b'{"event":5,"currentStage":"x","interviewCode":{},"timestamp":[]}',
    b'{"event":"a b","currentStage":{"value":"New"},"timestamp":"2018-02-30T00:00:00Z"}',
], ids=lambda body: repr(body[:20]))
def test_an_odd_event_is_recorded_byte_for_byte_with_a_warning(body):
    assert sw.parse_event(body).warnings
    line = line_of(body)
    assert line.startswith(b'{"specversion":"1.0","id":"%b","source":' % sha256(body).encode())
    data = body.replace(b"\r", b" ").replace(b"\n", b" ")
    assert line.endswith(b',"data":%b}\n' % data) and line.count(b"\n") == 1


# Each row: a member, its value, and what is said of it.
@pytest.mark.parametrize(("field", "value", "warning"), [
    ("event", "a b", "event is missing or not a plain word"),
    ("interviewCode", 5, "interviewCode is missing or not plain text"),
    ("timestamp", "x", "timestamp is missing or not an RFC 3339 time"),
    ("previousStage", None, "previousStage.value is missing"),
    ("currentStage", {"value": "New"}, "currentStage.value 'New' is not a documented stage"),
])
def test_what_is_not_as_documented_is_named(field, value, warning):
    assert sw.parse_event(new_event(**{field: value})).warnings == (warning,)


def test_the_documented_event_becomes_this_line():
    body = new_event(interviewCode="1c519c56")
    assert not sw.parse_event(body).warnings
    assert line_of(body, 1_519_343_720.25).decode() == (
        f'{{"specversion":"1.0","id":"{sha256(body)}","source":"https://interviews.skype.com",'
        '"type":"com.skype.interviews.State","subject":"1c519c56",'
        '"time":"2018-02-26T17:50:17.4862382Z","recordedtime":"2018-02-22T23:55:20.250000Z",'
        f'"datacontenttype":"application/json","data":{body.decode()}}}\n')


ATTRIBUTES = {"interviewCode": "subject", "timestamp": "time", "event": "type"}
UNFIT = {
    "interviewCode": ["", "a\nb", "\x7f", 5, "\x85", "\ufffe", "\ufdd0", "\U0010ffff", "x" * 1025],
    "timestamp": [
        "2018-02-26 17:50:17Z", "2018-02-26T17:50:17", "2018-02-26T25:50:17Z", 0,
        "\u0662018-02-26T17:50:17Z", "2018-02-26T17:50:17+24:00", "2018-02-26T17:50:17+01",
        "2018-02-26T17:50:17,5Z", "2018-02-26T17:50:17.Z", "2018-02-26T24:00:00Z",
        "2018-02-26T17:50:61Z", "2018-02-29T00:00:00Z", "2018-02-26T17:50:17Z\n",
        "20180226T175017Z", f"2018-02-26T17:50:17.{'1' * 44}Z"],
    "event": ["x" * 65, "a\"b", None, "State\n", "", "\u00e9"],
}
FIT = {
    "interviewCode": [" ", '"\\', "\u2028\xa0\U0001f600", "x" * 1024],
    "timestamp": [
        "2018-02-26t17:50:17z", "2016-12-31T23:59:60Z", "2020-02-29T00:00:00-23:59",
        f"2018-02-26T17:50:17.{'1' * 43}Z", "0001-01-01T00:00:00+01:00"],
    "event": ["x" * 64, ".a_B-9"],
}


def each_value(table):
    return [(field, value) for field, values in table.items() for value in values]


@pytest.mark.parametrize(("field", "value"), each_value(UNFIT))
def test_what_fits_no_attribute_is_left_out(field, value):
    envelope = json.loads(line_of(new_event(**{field: value})))
    due = "com.skype.interviews.unknown" if field == "event" else "left out"
    assert envelope.get(ATTRIBUTES[field], "left out") == due


@pytest.mark.parametrize(("field", "value"), each_value(FIT))
def test_what_fits_an_attribute_is_there_as_sent(field, value):
    body = new_event(**{field: value})
    recorded = line_of(body)
    due = "com.skype.interviews." + value if field == "event" else value
    assert json.loads(recorded)[ATTRIBUTES[field]] == due
    assert recorded.count(b"\n") == 1 and not sw.parse_event(body).warnings


@pytest.mark.parametrize(("recorded", "text"), [
    (0, "1970-01-01T00:00:00.000000Z"),
    (1.0, "1970-01-01T00:00:01.000000Z"),
    (1_600_000_000.9999998, "2020-09-13T12:26:41.000000Z"),
    (1_600_000_000.000001, "2020-09-13T12:26:40.000001Z"),
    (253_402_300_799, "9999-12-31T23:59:59.000000Z"),
])
def test_a_recordedtime_has_six_digits(recorded, text):
    assert json.loads(line_of(b"{}", recorded))["recordedtime"] == text


# --- The contract by other means than the module's, against mutants of a delivery ---


def reject(constant):
    raise ValueError(constant)


def once(pairs):
    """Return the members of an object none of whose names comes twice."""
    members = dict(pairs)
    return members if len(members) == len(pairs) else reject("a name comes twice")


def decode(text, members=once):
    """Return the value of strict JSON, numbers as float, objects as `members` makes them."""
    return json.loads(text, parse_constant=reject, parse_int=float, object_pairs_hook=members)


def depth(value):
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def seconds_of(date):
    """Return a date in seconds; from 10^11 on, it is in milliseconds."""
    if isinstance(date, str) and date.strip() == date:
        date = decode(date)
    if not isinstance(date, float) or not math.isfinite(date):
        reject(date)
    return date / 1000 if date >= 10**11 else date


def part_of(segment):
    """Return the object that a segment is; it has one spelling."""
    standard = segment.replace("-", "+").replace("_", "/") + "=" * (-len(segment) % 4)
    data = base64.b64decode(standard, validate=True)
    return decode(data.decode()) if base64url(data).decode() == segment else reject(segment)


def is_valid(text, body, now):
    """Return whether a token is good for its body."""
    signed = text.rpartition(".")[0]
    try:
        header, claims = map(part_of, signed.split("."))
        begin = max(seconds_of(claims["iat"]), seconds_of(claims.get("nbf", claims["iat"])))
        return all((
            len(text) <= 8192,
            text == sign(signed),
            header["alg"] == "HS256",
            "crit" not in header,
            max(depth(header), depth(claims)) <= 64,
            claims["iss"] == KEY,
            begin - 1 < now < seconds_of(claims["exp"]) + 1,
            claims["sub"].lower() == sha256(body),
        ))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def value_of(body):
    """Return the value of strict JSON at most 64 deep, behind a byte order mark, too, or OCTETS."""
    try:
        value = decode(body.decode("utf-8-sig"), dict)
    except ValueError:
        return OCTETS
    return value if depth(value) <= 64 else OCTETS


def has_lone_surrogate(body):
    try:
        json.dumps(decode(body.decode(), list), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


MUTANTS = 14_000
PIECES = [
    *rb"\ud800 \uDC00 \ud83d\ude00 \u0000 \n \\ \" \/ \x".split(),
    *rb'[ ] { } " , : . NaN -Infinity 1e400 -0 01 1. +1 1_0 {} "" "":1,'.split(),
    *b"\r,\n,\0,\x7f,\xc2\x85,\xe2\x80\xa8,\xef\xbb\xbf,\xed\xa0\x80,\xff".split(b","),
    b"9" * 4301,
    *[b"[" * 70 + b"]" * 70] * 3,
]
VALUES = [
    None, True, 0, -1, 1e11, 10**400, float("nan"), NOW, NOW * 1000, (), (NOW,),
    f"{NOW}.5", f"{NOW}e3", f" {NOW}", f"+{NOW}", "", "\ud800", "x\ny", "\u2028", "HS256", "none",
    "a.b-c_D9", "x" * 65, KEY.upper(), "2018-02-26t17:50:17+23:59", "2018-02-29T00:00:00Z",
]


def swap_a_value(rng, data):
    """Return a JSON object with another value of one of its members."""
    members = json.loads(data)
    inner = [value for value in members.values() if isinstance(value, dict)]
    chosen = rng.choice([members, *inner])
    chosen[rng.choice(["crit", "nbf", *chosen])] = rng.choice(VALUES)
    return json.dumps(members, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def mutate(rng, data):
    """Return a JSON object with another value somewhere, or with some of its bytes changed."""
    if rng.random() < 0.4:
        return swap_a_value(rng, data)

    begin = rng.randrange(len(data))
    other = rng.randrange(len(data))
    words = [match.span() for match in re.finditer(rb'"[^"]*"|\d+|\S', data)]
    begin, end = rng.choice([(begin, begin + rng.randrange(1, 12)), rng.choice(words)])
    before, cut, after = data[:begin], data[begin:end], data[end:]
    rest = before + after
    piece = rng.choice(PIECES)
    flipped = bytes([data[begin] ^ (1 << rng.randrange(8))])
    return rng.choice((
        before + flipped + data[begin + 1:],
        rest,
        before + cut + cut + after,
        rest[:other] + cut + rest[other:],
        before + piece + cut + after,
        before + piece + after,
    ))


def mutants(count):
    """Yield what has changed, token and body of `count` deliveries that differ from a good one."""
    rng = random.Random(7515)
    good = new_event(interviewCode="1c519c56")
    places = ("header", "payload", "payload", "token", "body", "signed body", "signed body")
    for _, what in zip(range(count), itertools.cycle(places)):
        body = mutate(rng, good) if what.endswith("body") else good
        if what.endswith("body") and rng.random() < 0.1:
            utf16 = body.decode("latin-1").encode("utf-16")
            body = rng.choice([b"\xef\xbb\xbf" + body, utf16, b"[" + body + b"]"])
        claims = payload(body if what == "signed body" else good)
        text = jws(mutate(rng, HEADER) if what == "header" else HEADER,
                   mutate(rng, claims) if what == "payload" else claims)
        if what == "token":
            at = rng.randrange(len(text))
            piece = rng.choice(("", "A", "=", ".", "+", "\xe9", text[at:] + text[at]))
            text = text[:at] + piece + text[at + rng.randrange(2):]
        yield what, text, body


def test_mutants_of_a_delivery_are_accepted_as_the_contract_says():
    accepted = collections.Counter()
    for what, text, body in mutants(MUTANTS):
        try:
            is_accepted = isinstance(check("Bearer " + text, body), dict)
        except sw.Rejected as refused:
            is_accepted = refused.status != 401
        assert is_accepted == is_valid(text, body, NOW), (text, body)
        accepted[what, is_accepted] += 1
    for what in ("header", "payload"):
        assert min(accepted[what, True], accepted[what, False]) > MUTANTS // 500


def test_mutants_of_a_body_are_recorded_as_the_contract_says():
    kept = collections.Counter()
    for body in [body for what, _, body in mutants(MUTANTS) if what.endswith("body")]:
        value = value_of(body)
        marked = body.startswith(b"\xef\xbb\xbf")
        fit = isinstance(value, dict) and not marked and not has_lone_surrogate(body)
        data = b'"data_base64":"%b"' % base64.b64encode(body)
        if fit:
            data = b'"data":' + body.replace(b"\r", b" ").replace(b"\n", b" ")
        media_type = OCTETS if value is OCTETS else JSON
        recorded = line_of(body)
        end = f'Z","datacontenttype":"{media_type}",'.encode() + data
        assert recorded.endswith(end + b"}\n") and recorded.count(b"\n") == 1, body
        assert json.loads(recorded, parse_int=float)["id"] == sha256(body), body
        kept[media_type, fit] += 1
    assert min(kept[JSON, True], kept[JSON, False], kept[OCTETS, False]) > MUTANTS // 100


# --- The journal: its file alone ---


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


@pytest.fixture
def journal(log):
    with sw.Journal(log) as journal:
        yield journal


WHOLE_LINE = numbered_line(0)[1]
OTHER_LINE = WHOLE_LINE.replace(b"https://interviews.skype.com", b"https://example.org")


def test_one_event_by_64_threads_is_written_once(log, journal):
    together = threading.Barrier(64)
    results = []

    def append():
        together.wait()
        for number in range(20):
            results.append(journal.append(*numbered_line(number)))

    for thread in gather(64, append):
        thread.join()
    assert (results.count(True), results.count(False)) == (20, 63 * 20)
    assert len(log.read_bytes().splitlines()) == 20


def test_the_last_65_536_ids_are_remembered_and_older_ones_not(log):
    start = b'{"specversion":"1.0","id":"%064x","source":"https://interviews.skype.com"}\n'
    log.write_bytes(b"".join(start % number for number in range(65_537)))
    with sw.Journal(log) as journal:
        def append(number):
            return journal.append(f"{number:064x}", numbered_line(number)[1])

        assert [append(1), append(0), append(1), append(3)] == [False, True, True, False]


def test_ids_are_read_back_from_the_last_64_mib_of_a_log_alone(log):
    with open(log, "wb") as file:
        file.write(WHOLE_LINE)
        for mib in range(1, 66):
            file.seek(mib * 2**20)
            file.write(b"\n")  # and a hole
        file.write(numbered_line(1)[1])
    with sw.Journal(log) as journal:
        assert [journal.append(*numbered_line(number)) for number in (1, 0)] == [False, True]


def test_a_torn_tail_of_every_length_is_sealed(log):
    torn = numbered_line(1)[1]
    for length in range(1, len(torn)):
        lacks_its_newline = length == len(torn) - 1
        log.write_bytes(WHOLE_LINE + torn[:length])
        with sw.Journal(log) as journal:
            assert journal.append(*numbered_line(1)) != lacks_its_newline
        sealed = b"" if lacks_its_newline else b" " * length + b"\n"
        assert log.read_bytes() == WHOLE_LINE + sealed + torn


def test_the_deepest_event_that_lacks_only_its_newline_is_kept(log):
    whole = line_of(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")
    log.write_bytes(whole[:-1])
    sw.Journal(log).close()
    assert log.read_bytes() == whole


def test_a_first_line_that_was_torn_after_pages_is_sealed(log):
    said = []
    log.touch(0o600)
    log.write_bytes(numbered_line(0, 100_000)[1][:90_000])
    sw.Journal(log, said.append).close()
    assert log.read_bytes() == b" " * 90_000 + b"\n"
    assert said == [f"sealed {log}: its last 90000 bytes were not a whole line (a crash?)"]


def test_a_log_that_ends_in_an_overlong_line_stays_as_it_is(log, monkeypatch):
    monkeypatch.setattr(sw, "RECENT_BYTES", 4096)
    log.write_bytes(b"x" * 5000)
    with pytest.raises(sw.JournalError, match="longer than any event"):
        sw.Journal(log)
    assert log.read_bytes() == b"x" * 5000


def test_a_new_log_is_private_and_locked(log):
    with sw.Journal(log):
        assert log.stat().st_mode & 0o777 == 0o600
        with pytest.raises(sw.JournalError, match="another process"):
            sw.Journal(log)
    sw.Journal(log).close()


# Each row: what stands behind the last newline, and what it is taken for.
@pytest.mark.parametrize(("tail", "kind"), [
    (b"", "nothing"),
    (WHOLE_LINE[:-1], "event"),
    (WHOLE_LINE[:-1] + b"   ", "event"),
    (WHOLE_LINE[:-2], "torn"),
    (WHOLE_LINE[:-2] + bytes(4096), "torn"),
    (WHOLE_LINE[:50], "torn"),
    (b'{"specversion":"1.0","id":"', "torn"),
    (b'{"spec', "torn"),
    (b'{"spec' + b" " * 4096 + bytes(4096), "torn"),
    (b"{", "torn"),
    (b" ", "torn"),
    (b" \0\0 ", "torn"),
    (b"{}", "foreign"),
    (b'{"name":"my-app"}', "foreign"),
    (b'{"specversion":"1.0","id":"1","source":"https://example.org"}', "foreign"),
    (OTHER_LINE[:-1], "foreign"),
    (b' {"spec', "foreign"),
    (bytes(4096) + WHOLE_LINE[:-1], "foreign"),
    (b"x", "foreign"),
], ids=lambda each: repr(each)[:40])
def test_a_tail_is_told_apart(tail, kind):
    assert sw.classify_tail(tail) == kind


NOT_OURS = {
    "no newline": b'{"name":"my-app"}',
    "newline": b'{"name":"my-app"}\n',
    "an object": b"{}",
    "env file": b"SKYPE_API_KEY=k\nSKYPE_API_SECRET=hush",
    "binary": bytes(range(256)) * 99,
    "zeroed beginning": bytes(4096) + WHOLE_LINE[50:],
    "database": b"SQLite format 3\0" + bytes(8176),
    "archive": gzip.compress(WHOLE_LINE),
    "log": b"GET / 200\nGET / 404\n",
    "blank and a word": b"\n\nword\n",
    "events of others": OTHER_LINE * 3,
    "one event of others": OTHER_LINE[:-1],
}


@pytest.fixture(params=NOT_OURS)
def not_ours(request):
    """The content of a file that is somebody else's."""
    return NOT_OURS[request.param]


def test_a_file_of_somebody_else_is_refused_as_it_is(log, not_ours):
    log.write_bytes(not_ours)
    with pytest.raises(sw.JournalError, match="no log of this program"):
        sw.Journal(log)
    assert log.read_bytes() == not_ours


def test_a_file_of_others_renamed_to_the_path_stays_as_it_is(log, not_ours):
    with sw.Journal(log) as journal:
        assert journal.append(*numbered_line(0))
        log.with_suffix(".others").write_bytes(not_ours)
        log.with_suffix(".others").rename(log)
        for act in (lambda: journal.append(*numbered_line(1)), journal.check):
            with pytest.raises(sw.JournalError, match="no log of this program"):
                act()
        assert log.read_bytes() == not_ours
        log.unlink()
        journal.check()
        assert journal.append(*numbered_line(1)) and not journal.append(*numbered_line(0))


def test_a_file_of_others_copied_over_the_log_stays_as_it_is(log, not_ours):
    with sw.Journal(log) as journal:
        assert journal.append(*numbered_line(0, 50))
        log.write_bytes(not_ours)
        with pytest.raises(sw.JournalError, match="no log of this program"):
            journal.append(*numbered_line(1))
        assert log.read_bytes() == not_ours


@pytest.mark.parametrize("content", [
    b"",
    b"\n",
    b" \n\n",
    bytes(5000),
    b" \n" + bytes(5000) + b"\n{",
    b"\n" + WHOLE_LINE[:-2],
], ids=lambda content: repr(content)[:20])
def test_a_file_of_blanks_and_a_torn_line_is_ours(log, content):
    log.write_bytes(content)
    with sw.Journal(log) as journal:
        assert journal.append(*numbered_line(1))
    assert log.read_bytes().replace(b"\0", b" ").split() == [numbered_line(1)[1].strip()]


def test_of_a_log_whose_end_is_blank_the_beginning_is_looked_at(log, monkeypatch):
    monkeypatch.setattr(sw, "RECENT_BYTES", 4096)
    log.write_bytes(WHOLE_LINE + b" " * 4000 + b"\n")  # of which the event's end is read back
    sw.Journal(log).close()
    log.write_bytes(b"x\n" + b" " * 5000 + b"\n")
    with pytest.raises(sw.JournalError, match="no log of this program"):
        sw.Journal(log)


def test_a_stray_fragment_in_our_log_gets_its_newline_and_stays(log):
    said = []
    log.touch(0o600)
    log.write_bytes(WHOLE_LINE + b"stray")
    with sw.Journal(log, said.append) as journal:
        assert log.read_bytes() == WHOLE_LINE + b"stray\n"
        with open(log, "ab") as file:
            file.write(b"another")
        assert journal.append(*numbered_line(1))
    assert log.read_bytes() == WHOLE_LINE + b"stray\nanother\n" + numbered_line(1)[1]
    assert [text.partition("its last ")[2] for text in said] == [
        f"{size} bytes are no event; they got a newline, and stay" for size in (5, 7)]


def test_a_line_with_nuls_is_not_remembered_and_told(log):
    said = []
    log.touch(0o600)
    torn = bytearray(numbered_line(1, 9000)[1])
    torn[4096:8192] = bytes(4096)
    log.write_bytes(numbered_line(0)[1] + torn + numbered_line(2)[1])
    with sw.Journal(log, said.append) as journal:
        events = [numbered_line(0), numbered_line(1, 9000), numbered_line(2)]
        assert [journal.append(*event) for event in events] == [False, True, False]
    assert len(said) == 1 and "lines that hold NULs (a crash?): 1;" in said[0]


IO_ERROR = OSError(errno.EIO, "I/O error")


def cut_writes(monkeypatch, size):
    """Let writes take so many bytes and no more."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:size]))


def test_what_others_wrote_over_a_refused_batch_stays(log, monkeypatch, journal):
    refused = numbered_line(1, 20_000)
    others = b"x" * 9000
    assert journal.append(*numbered_line(0))
    cut_writes(monkeypatch, 9000)
    monkeypatch.setattr(sw.LogFile, "seal", fails(IO_ERROR))  # it cannot be blanked now
    with pytest.raises(sw.JournalError, match="9000 of"):
        journal.append(*refused)
    monkeypatch.undo()

    with open(log, "r+b") as file:
        file.seek(4096)
        file.write(others)
    assert journal.append(*refused)
    blank = b" " * (4096 - len(WHOLE_LINE))
    assert log.read_bytes() == WHOLE_LINE + blank + others + b"\n" + refused[1]


def test_a_log_that_is_replaced_while_it_is_opened_is_refused(log, monkeypatch):
    real = os.open

    def replace(path, flags, mode):
        descriptor = real(path, flags, mode)
        if flags & os.O_CREAT:
            log.rename(log.with_suffix(".1"))
            log.write_bytes(b"x")
        return descriptor

    monkeypatch.setattr(os, "open", replace)
    with pytest.raises(sw.JournalError, match="replaced"):
        sw.Journal(log)
    assert log.read_bytes() == b"x"


# Each row: what stands at the path, and what is said of it.
@pytest.mark.parametrize(("kind", "said"), [
    ("folder", "it is a folder; a log is a regular file"),
    ("pipe", "it is a named pipe"),
    ("device", "it is a device"),
    ("archive", "it is compressed"),
    ("no folder", "No such file or directory; make its folder first"),
])
def test_what_cannot_be_a_log_is_named_and_refused(log, kind, said):
    make = {
        "folder": log.mkdir,
        "pipe": lambda: os.mkfifo(log),
        "device": lambda: log.symlink_to("/dev/full"),
        "archive": lambda: log.write_bytes(NOT_OURS["archive"]),
        "no folder": lambda: None,
    }
    make[kind]()
    with pytest.raises(sw.JournalError, match=said):
        sw.Journal(log / "x" if kind == "no folder" else log)


# Each row: a name of the log, and what is said of it; a file "log" is there, and a pipe 1 is.
@pytest.mark.parametrize(("name", "said"), [
    ("new/", "Is a directory; name a file"),
    ("log/", "Not a directory; name a file"),
    ("/proc/self/fd/1", "it is a named pipe"),
])
def test_a_name_that_no_log_can_have_is_refused_at_the_start(tmp_path, name, said):
    (tmp_path / "log").touch()
    code, _, err = run("--behind-proxy", "--port", "0", "--log", name, cwd=tmp_path, **OURS)
    assert code == 2 and f"error: --log {name}: {said}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_log_that_may_not_be_written_says_who_has_to(tmp_path):
    tmp_path.chmod(0o555)
    with as_nobody(), pytest.raises(sw.JournalError, match="denied; the user that runs this"):
        sw.Journal(tmp_path / "log")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"),
                    reason="mounts a file")
def test_a_mounted_log_that_was_removed_outside_takes_nothing(log):
    outside = log.with_name("outside.jsonl")
    outside.touch()
    log.touch()
    subprocess.run(["mount", "--bind", outside, log], check=True)
    try:
        with sw.Journal(log) as journal:
            assert journal.append(*numbered_line(0))
            outside.unlink()
            append = functools.partial(journal.append, *numbered_line(1))
            for act in (append, journal.check, functools.partial(sw.Journal, log)):
                with pytest.raises(sw.JournalError, match="mount the folder"):
                    act()
            assert log.read_bytes() == WHOLE_LINE
    finally:
        subprocess.run(["umount", log], check=True)


def test_a_dangling_link_gets_its_target_made_in_a_synced_folder(log, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino))
    folder = log.with_name("folder")
    folder.mkdir()
    log.symlink_to(folder / "events")
    with sw.Journal(log) as journal:
        assert journal.append(*numbered_line(0))
        (folder / "events").rename(folder / "events.1")
        assert journal.append(*numbered_line(1)) and not journal.append(*numbered_line(0))
    assert (folder / "events").read_bytes() == numbered_line(1)[1] and log.is_symlink()
    assert synced == {folder.stat().st_ino}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize(("module", "call", "said"), [
    (sw.fcntl, "flock", "nothing keeps a second receiver off"),
    (os, "fsync", "a power cut can take a log that was just begun"),
])
def test_a_filesystem_without_locks_or_folder_syncs_is_warned_of(
        log, monkeypatch, module, call, said, code):
    warnings = []
    monkeypatch.setattr(module, call, fails(OSError(code, os.strerror(code))))
    with sw.Journal(log, warnings.append) as journal:
        assert journal.append(*numbered_line(0))
    assert len(warnings) == 1 and said in warnings[0]


@pytest.mark.parametrize(("code", "synced"), [(errno.ENOTSUP, True), (errno.EIO, False)])
def test_where_macos_cannot_sync_fully_fsync_does(log, monkeypatch, code, synced):
    calls = []
    monkeypatch.setattr(sw.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(sw.fcntl, "fcntl", fails(OSError(code, os.strerror(code))))
    monkeypatch.setattr(os, "fdatasync", calls.append)
    with contextlib.suppress(sw.JournalError), sw.Journal(log) as journal:
        journal.append(*numbered_line(0))
    assert bool(calls) == synced


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_log_that_others_can_read_is_warned_about(log, mode, warned):
    said = []
    log.touch()
    log.chmod(mode)
    sw.Journal(log, said.append).close()
    assert (len(said), "chmod o-r" in "".join(said)) == (warned, warned)


# Each row: how a log that was rotated before is rotated, and what is then in the old file.
@pytest.mark.parametrize(("how", "is_moved"), [
    ("rename", True),
    ("create", True),
    ("copytruncate", True),
    ("remove", False),
])
def test_a_rotation_is_followed_and_the_ids_are_kept(log, journal, how, is_moved):
    assert journal.append(*numbered_line(0))
    log.unlink()
    assert journal.append(*numbered_line(1))
    replace_log(log, how)
    assert journal.append(*numbered_line(2))
    assert not any(journal.append(*numbered_line(number)) for number in range(3))
    assert log.read_bytes() == numbered_line(2)[1]
    old = log.with_name("events.jsonl.1")
    assert not is_moved or old.read_bytes() == numbered_line(1)[1]


WHOLE = WHOLE_LINE + numbered_line(1)[1]


@pytest.mark.parametrize(("changed", "kept"), [
    (WHOLE + b"foreign", WHOLE + b"foreign\n"),
    (WHOLE + b"foreign\n", WHOLE + b"foreign\n"),
    (WHOLE[:-1], WHOLE),
    (WHOLE_LINE + b'{"spec', WHOLE_LINE + b" " * 6 + b"\n"),
    (b"", b""),
], ids=["part of a line", "a line", "no newline", "cut", "emptied"])
def test_a_log_that_others_change_gets_whole_lines(log, journal, changed, kept):
    assert journal.append(*numbered_line(0)) and journal.append(*numbered_line(1))
    log.write_bytes(changed)
    assert journal.append(*numbered_line(2)) and journal.append(*numbered_line(3))
    assert log.read_bytes() == kept + numbered_line(2)[1] + numbered_line(3)[1]


def test_a_failed_write_is_blanked_and_the_next_succeeds(log, monkeypatch, journal):
    synced = []
    assert journal.append(*numbered_line(0))
    monkeypatch.setattr(os, "fdatasync", lambda _: synced.append(log.read_bytes()))
    cut_writes(monkeypatch, 10)
    with pytest.raises(sw.JournalError, match="10 of"):
        journal.append(*numbered_line(1))
    steps = (bytes(10), b" " * 10, b" " * 10 + b"\n")
    assert synced == [WHOLE_LINE + left for left in steps]
    monkeypatch.undo()
    assert journal.append(*numbered_line(1))
    journal.check()
    assert log.read_bytes() == synced[-1] + numbered_line(1)[1]


def test_no_pages_left_of_a_refused_line_make_an_event(log, monkeypatch):
    refused = numbered_line(1, 20_000)
    versions = [WHOLE_LINE + refused[1][:9000]]  # the file at each sync, and what is there before
    with sw.Journal(log) as journal:
        assert journal.append(*numbered_line(0))
        monkeypatch.setattr(os, "fdatasync", lambda _: versions.append(log.read_bytes()))
        cut_writes(monkeypatch, 9000)
        with pytest.raises(sw.JournalError, match="9000 of"):
            journal.append(*refused)
    monkeypatch.undo()

    for old, new in zip(versions, versions[1:]):
        for pages in itertools.product((old, new), repeat=3):  # a crash may leave each page old
            starts = range(0, 3 * 4096, 4096)
            log.write_bytes(b"".join(page[at:at + 4096] for page, at in zip(pages, starts)))
            with sw.Journal(log) as journal:
                assert journal.append(*refused) and not journal.append(*numbered_line(0))


def test_the_first_pages_of_a_log_are_durable_one_by_one(log, monkeypatch, journal):
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda _: synced.append(log.stat().st_size))
    assert journal.append(*numbered_line(0, 9000)) and journal.append(*numbered_line(1, 9000))
    whole = len(numbered_line(0, 9000)[1])
    assert synced == [4096, 2 * 4096, whole, 2 * whole]


@pytest.fixture
def torn_log(log, monkeypatch, journal):
    """The path to which a log has been rotated that ends in a torn line: it could not be ended."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]) if len(data) > 10 else 0)
    with pytest.raises(sw.JournalError, match="10 of"):
        journal.append(*numbered_line(1))
    monkeypatch.undo()
    log.rename(log.with_suffix(".1"))
    return log.with_suffix(".1")


def test_a_torn_line_is_ended_after_a_rotation_at_the_latest(log, journal, torn_log):
    assert journal.append(*numbered_line(1))
    assert (torn_log.read_bytes(), log.read_bytes()) == (b" " * 10 + b"\n", numbered_line(1)[1])


def test_a_rotated_log_that_cannot_be_sealed_holds_nothing_up(log, monkeypatch, journal, torn_log):
    real = os.write  # the old log's disk is full, say, and the new one is on another
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data) if len(data) > 10 else 0)
    assert journal.append(*numbered_line(2)) and log.read_bytes() == numbered_line(2)[1]


def test_a_sync_of_a_rotated_log_that_fails_is_final(log, monkeypatch, journal, torn_log):
    monkeypatch.setattr(os, "fdatasync", fails(IO_ERROR))
    with pytest.raises(sw.JournalError, match="sync: I/O error"):
        journal.append(*numbered_line(4))
    assert journal.fatal and not log.exists()


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_log_whose_sync_fails_at_the_start_is_refused(log, monkeypatch, call):
    log.write_bytes(WHOLE_LINE)  # perhaps unsynced: a duplicate has to be durable
    monkeypatch.setattr(os, call, fails(IO_ERROR))
    with pytest.raises(sw.JournalError, match="I/O error"):
        sw.Journal(log)
    monkeypatch.undo()
    sw.Journal(log).close()  # it has been let go


# Each row: whose call fails, which, how, and what is in the log then.
@pytest.mark.parametrize(("owner", "call", "error", "left"), [
    (os, "fdatasync", IO_ERROR, b""),
    (os, "write", MemoryError(), b""),
    (sw.Journal, "_remember", MemoryError(), WHOLE_LINE.strip()),
], ids=["a sync", "a fault", "a fault while a batch is settled"])
def test_a_sync_that_fails_or_a_fault_is_final(
        log, journal, monkeypatch, owner, call, error, left):
    ended = threading.Event()
    journal.on_fatal = ended.set
    monkeypatch.setattr(owner, call, fails(error))
    append = functools.partial(journal.append, *numbered_line(0))
    for act in (append, append, journal.check):
        with pytest.raises(sw.JournalError, match="I/O error|MemoryError"):
            act()
        monkeypatch.undo()  # for the first time is the last
    assert ended.wait(30) and log.read_bytes().strip() == left


@pytest.fixture
def fill_disk(monkeypatch):
    """A function that fills the disk as an ext4: a file's last block has room, but none follows."""
    real = os.write

    def write(descriptor, data):
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    return functools.partial(monkeypatch.setattr, os, "write", write)


def test_a_check_needs_room_for_a_whole_block(log, monkeypatch, journal, fill_disk):
    append = functools.partial(journal.append, *numbered_line(1, 1000))
    fill_disk()
    for act in (append, journal.check, journal.check):
        with pytest.raises(sw.JournalError, match="No space"):
            act()
    monkeypatch.undo()
    journal.check()
    fill_disk()
    journal.check()  # it writes nothing while all is well
    for act in (append, journal.check):
        with pytest.raises(sw.JournalError, match="No space"):
            act()
    assert log.read_bytes() == b" " * 4095 + b"\n"


@pytest.fixture
def stall(monkeypatch):
    """Two events: one is set by a sync that begins, and syncs go on once the other is set."""
    syncing = threading.Event()
    go_on = threading.Event()

    def sync(_):
        syncing.set()
        go_on.wait(60)

    monkeypatch.setattr(os, "fdatasync", sync)
    yield syncing, go_on
    go_on.set()


def test_append_check_and_close_wait_no_longer_than_their_time(journal, stall, monkeypatch):
    monkeypatch.setattr(sw, "CHECK_SECONDS", 0.1)
    begun = time.monotonic()
    for act in (lambda: journal.append(*numbered_line(1), 0.1), journal.check):
        with pytest.raises(sw.JournalError, match="within 0.1 s"):
            act()
    for seconds in (0.1, 15):  # the second one finds it closed, and does not wait
        monkeypatch.setattr(sw, "CLOSE_SECONDS", seconds)
        journal.close()
    with pytest.raises(sw.JournalError, match="closed"):
        journal.append(*numbered_line(2))
    with pytest.raises(sw.JournalError, match="another process"):  # for its thread has the file
        sw.Journal(journal.path)
    assert time.monotonic() - begun < 6


def test_what_is_pending_is_written_before_the_end(log, journal, stall):
    syncing, go_on = stall
    results = []
    threads = gather(1, lambda: results.append(journal.append(*numbered_line(1))))
    assert syncing.wait(30)
    with pytest.raises(sw.JournalError, match="within"):
        journal.append(*numbered_line(2), 0.1)  # it waits for the next batch
    threads += gather(1, journal.close)
    assert until(lambda: journal._closing)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert results == [True] and log.read_bytes() == numbered_line(1)[1] + numbered_line(2)[1]


def test_an_append_that_gave_up_keeps_nobody_asleep(journal, stall):
    syncing, go_on = stall
    results = []
    numbers = iter(range(2, 12))
    threads = gather(1, lambda: results.append(journal.append(*numbered_line(0))))
    assert syncing.wait(30)
    with pytest.raises(sw.JournalError, match="within"):
        journal.append(*numbered_line(1), 0.1)
    threads += gather(10, lambda: results.append(journal.append(*numbered_line(next(numbers)))))
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 11 and not journal.append(*numbered_line(1))


def test_an_append_that_close_waits_no_longer_for_can_still_land(log, journal, stall, monkeypatch):
    syncing, go_on = stall
    results = []

    def append():
        with pytest.raises(sw.JournalError, match="before the receiver had to stop"):
            journal.append(*numbered_line(1))
        results.append("refused")

    threads = gather(1, append)
    assert syncing.wait(30)
    monkeypatch.setattr(sw, "CLOSE_SECONDS", 0.1)
    journal.close()
    threads[0].join(30)
    assert results == ["refused"]
    go_on.set()
    copy = shutil.copy(log, log.with_suffix(".copy"))
    with sw.Journal(copy) as again:
        assert not again.append(*numbered_line(1))


def test_what_waited_for_a_sync_that_failed_is_refused_too(log, monkeypatch):
    go_on = threading.Event()
    syncs = []

    def fail_once(_):
        syncs.append(go_on.wait(60))
        if len(syncs) == 1:
            raise OSError(errno.EIO, "I/O error")

    with sw.Journal(log) as journal:
        monkeypatch.setattr(os, "fdatasync", fail_once)
        for number in (1, 2):  # 1 is being synced, 2 waits
            with pytest.raises(sw.JournalError, match="within"):
                journal.append(*numbered_line(number), 0.1)
        go_on.set()
        with pytest.raises(sw.JournalError, match="I/O error"):
            journal.append(*numbered_line(2))
    assert not log.read_bytes().strip()


def test_what_waits_for_a_stalled_disk_is_bounded(journal, stall, monkeypatch):
    monkeypatch.setattr(sw, "BACKLOG_BYTES", 1000)
    for number in (1, 2):  # 1 is being synced, 2 waits
        with pytest.raises(sw.JournalError, match="within"):
            journal.append(*numbered_line(number, 1000), 0.1)
        assert stall[0].wait(30)
    with pytest.raises(sw.JournalError, match="too much waits"):
        journal.append(*numbered_line(3, 1000))


def test_whatever_a_crash_leaves_is_sealed_and_nothing_lost(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / ".ci"))
    crash_states = pytest.importorskip("crash_states")
    with crash_states.new_folder() as folder:
        try:
            for state in itertools.islice(crash_states.all_states(3, folder), 1000):
                assert crash_states.broken_promises(state, folder / "left") == [], state.files()
        except crash_states.CannotTrace as error:
            pytest.skip(str(error))


# --- The journal of a running receiver: kills, full disks, calls that fail ---


def kill_under_load(server):
    """Kill a receiver amid deliveries; return the ids of what it has acknowledged."""
    acknowledged = []

    def send():
        with contextlib.suppress(OSError, ValueError, AssertionError):
            while True:
                with Peer(server.port, timeout=5) as peer:
                    for size in [0] * 19 + [200_000]:  # a write that takes long enough to be torn
                        body = new_event(metadata="x" * size)
                        if peer.ask(post(body)) != 200:
                            return
                        acknowledged.append(sha256(body))

    senders = gather(8, send)
    grows(acknowledged, 100)
    server.kill()
    for sender in senders:
        sender.join()
    return acknowledged


def test_sigkill_under_load_loses_nothing_and_tail_shows_it(serve, launch, tmp_path):
    log, seen, said = (tmp_path / name for name in ("events.jsonl", "seen", "said"))
    log.touch(0o600)
    with open(seen, "wb") as out, open(said, "wb") as err:
        launch("tail", "-n", "+1", "-F", log, stdout=out, stderr=err)
    acknowledged = [event_id for _ in range(4) for event_id in kill_under_load(serve())]

    server = serve()
    last = new_event()
    assert server.deliver(last)[0] == 200 and server.stop() == 0
    assert until(lambda: sha256(last).encode() in seen.read_bytes()[-1000:])
    ids = server.ids()
    assert len(ids) == len(set(ids)) and set(acknowledged) <= set(ids)
    whole = r'^{"specversion":"1.0","id":"(\w+)".*}$'  # a torn line ends in spaces
    shown = re.findall(whole, seen.read_text("utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(ids) and not said.read_bytes()


# Each row: the system call at which the process is killed, whether the event is written short (by a
# limit), and what becomes of it when it is sent again. A short one is then blanked from the end of
# its last page, ended and synced: the calls 2 to 5.
@pytest.mark.parametrize(("call", "short", "outcome"), [
    ("write:signal=SIGKILL:when=1", False, "recorded"),
    ("fdatasync:signal=SIGKILL:when=1", False, "duplicate"),
    ("write:signal=SIGKILL:when=2", True, "recorded"),
    ("write:signal=SIGKILL:when=3", True, "recorded"),
    ("write:signal=SIGKILL:when=4", True, "recorded"),
    ("write:signal=SIGKILL:when=5", True, "recorded"),
])
def test_a_kill_at_any_step_leaves_whole_lines(serve, call, short, outcome):
    server = serve()
    body = new_event(metadata="x" * 20_000)
    assert server.deliver(new_event())[0] == 200
    before = server.log.read_bytes()
    if short:
        server.limit("FSIZE", len(before) + 9000)
    with faulty(server, call):
        assert server.deliver(body)[0] == 0 and server.process.wait(30) == -signal.SIGKILL
    torn = server.log.read_bytes()[len(before):]
    assert len(torn) == 9000 or not short
    assert torn.endswith(b"\n") == (outcome == "duplicate")

    server = serve()
    assert ("sealed" in server.stderr()) == short
    assert server.becomes(body) == outcome
    assert len(server.ids()) == 2 and server.log.read_bytes().startswith(before)


def test_a_full_disk_is_503_until_there_is_space(serve):
    server = serve()
    refused = new_event(metadata="x" * 3000)
    server.limit("FSIZE", 2000)
    answers = [server.deliver(new_event()) for _ in range(8)]
    statuses = [status for status, _, _ in answers]
    taken = statuses.index(503)
    assert statuses == [200] * taken + [503] * (8 - taken) and answers[-1][1]["retry-after"]
    assert server.deliver(refused)[0] == 503
    with Peer(server.port) as peer:
        assert peer.ask(HEALTH) == 503
        server.limit("FSIZE")
        assert peer.ask(HEALTH) == 200
    assert server.becomes(refused) == "recorded"
    assert len(server.ids()) == taken + 1 and server.stop() == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounts a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_503_until_it_is_freed_over_a_restart(serve, small_disk):
    bodies = [new_event(pad="x" * 3000) for _ in range(8)]
    log = small_disk / "log"
    filler = small_disk / "filler"
    server = serve("--log", log)
    assert server.deliver(bodies[0])[0] == 200
    with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
        while True:
            file.write(b"x" * 4096)
    assert [server.deliver(body)[0] for body in bodies[1:4]] == [503] * 3
    server.kill()
    assert not log.read_bytes().endswith(b"\n")  # there was no room to end what a short write left
    server = serve("--log", log)
    assert "No space left" in server.stderr()
    with Peer(server.port) as peer:
        assert [peer.ask(request) for request in (HEALTH, post(bodies[4]))] == [503, 503]
        filler.unlink()
        assert peer.ask(HEALTH) == 200
    assert [server.becomes(body) for body in bodies] == ["duplicate"] + ["recorded"] * 7
    assert server.stop() == 0 and len(ids_in(log)) == len(bodies)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_a_write_that_fails_is_503_and_needs_no_restart(serve, code):
    server = serve()
    refused = new_event()
    assert server.deliver(new_event())[0] == 200
    with Peer(server.port) as peer:
        with faulty(server, f"write:error={code}"):
            assert [server.deliver(refused)[0] for _ in range(2)] == [503] * 2
            assert peer.ask(HEALTH) == 503
        assert peer.ask(HEALTH) == 200
    assert [server.becomes(refused) for _ in range(2)] == ["recorded", "duplicate"]
    assert len(server.ids()) == 2 and server.stop() == 0


def test_a_rotated_log_whose_close_fails_holds_nothing_up(serve):
    server = serve()
    assert server.deliver(new_event())[0] == 200
    old = server.log.rename(server.log.with_suffix(".1"))
    with faulty(server, "close:error=EIO", old):
        assert [server.deliver(new_event())[0] for _ in range(2)] == [200, 200]
    assert server.deliver(new_event())[0] == 200
    assert (len(ids_in(old)), len(server.ids()), server.stop()) == (1, 3, 0)


@pytest.mark.parametrize("limit", ["STORE_SECONDS", "ANSWER_SECONDS"])
def test_an_event_that_is_stored_late_is_503_then_a_duplicate(serve, limit):
    server = serve(limits={limit: 1})
    late = new_event()
    with Peer(server.port) as peer:
        with faulty(server, "fdatasync:delay_enter=15000000:when=1"):
            assert peer.ask(post(late)) == 503
        assert until(lambda: peer.ask(HEALTH) == 200) and server.becomes(late) == "duplicate"


# Each row: the rule that makes a sync fail, and whether the log is rotated before it, to a file
# that logrotate has made.
@pytest.mark.parametrize(("call", "rotated"), [
    ("fdatasync:error=EIO", False),
    ("fdatasync:error=EIO:when=1", False),
    ("fdatasync:error=ENOSPC:when=1", True),
    ("fsync:error=EIO:when=1", True),
])
def test_a_sync_that_fails_ends_the_process_and_stores_nothing(serve, call, rotated):
    server = serve(limits={"STOP_GRACE": 0.1, "LOOK_SECONDS": 60})
    refused = new_event()
    with Peer(server.port) as idle, Peer(server.port) as sender:
        assert idle.ask(post(new_event())) == sender.ask(post(new_event())) == 200
        if rotated:
            server.log.rename(server.log.with_suffix(".1"))
            server.log.touch(0o600)
        with faulty(server, call):
            sender.send(post(refused) * 2)
            assert [sender.answer()[0] for _ in range(2)] == [503] * 2
            assert server.process.wait(30) == 1
    assert "start again" in server.stderr() and len(server.ids()) == (0 if rotated else 2)
    assert serve().becomes(refused) == "recorded"


# --- HTTP: one connection ---


def test_the_documented_event_is_recorded_once(serve):
    server = serve()
    body = new_event()
    for status in ("recorded", "duplicate"):
        answer = json.loads(server.deliver(body)[2])
        assert answer == {"status": status, "id": sha256(body)}
    (event,) = server.lines()
    assert (event["id"], event["data"]) == (sha256(body), json.loads(body))
    assert server.stop() == 0
    said = server.stderr()
    assert "1 recorded, 1 duplicate, 0 refused" in said
    assert re.search(r"127\.0\.0\.1:\d+ recorded SchedulingTime [0-9a-f-]{36} [0-9.]+ ms\n", said)
    assert SECRET.decode() not in said and "eyJ" not in said


# A valid delivery in both framings. Each case below replaces one thing in it and names the statuses
# of the answers on that connection; behind it a second, good delivery is pipelined. A lone 200
# stands for (200, 200): the second one has to be read as such. Any other lone status is a refusal:
# the second one must neither be answered nor recorded, and the connection is closed.
SIZED = ("POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
         "Content-Length: 17\r\n\r\n{body}")
CHUNKED = ("POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
           "Transfer-Encoding: chunked\r\n\r\n11\r\n{body}\r\n0\r\n\r\n")
LENGTH = "Content-Length: 17"
CODING = "Transfer-Encoding: chunked"


def swaps(old, due, values, form="{}"):
    """Return a row for each value: what is replaced, by what, and the statuses that are due."""
    return [(old, form.format(value), due) for value in values]


BEFORE_HOST = "{}\r\nHost"
REQUEST_LINES = [
    ("", "", 200),
    ("POST", "\r\nPOST", 200),  # an empty line before it
    *swaps("POST", 400, [
        "\r\n\r\nPOST", "\nPOST", "\rPOST", "\0POST", " POST", " \r\nPOST", "\xef\xbb\xbfPOST",
        "PO\0ST", "PO(ST", "POST\x80", ""]),
    *swaps("POST", 405, ["post", "MKCOLA", "GET"]),
    ("POST /", "GET /x", 404),
    ("POST /", "CONNECT x:443", 400),
    ("POST", "GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST", (405, 200, 200)),
    *swaps("/ ", 200, [  # targets in absolute form, with a query, of 8 KiB
        "http://x/ ", "HTTPS://x ", "http://x?a=/b ", "http://y:1/ ", "/?a=b?c ",
        "/?" + "a" * 8190 + " "]),
    *swaps("/ ", 414, ["/?" + "a" * 8191 + " ", "/" + "a" * 20_000 + " "]),
    ("/ HTTP/1.1", "/" + "a" * 8192, 414),
    *swaps("/ ", 404, ["ftp://x/ ", "// ", "/. ", "/%2f ", "/\\ ", "/#a "]),
    ("POST /", "OPTIONS *", 404),
    *swaps("/ ", 400, [
        "http:/// ", "* ", "x:443 ", "?x ", "? ", "x ", "/a b ", "/\0 ", "/\x7f ", "/\xe9 ", "/\r ",
        "/\n ", "/  ", "/\t", "/\f"]),
    *swaps(" /", 400, ["  /", "\t/"]),
    (" / ", " ", 400),
    *swaps("1.1", 400, [
        "1.1 ", "1.1\t", "1.1 x", "1.1\0", "0.9", "1", "1.", ".1", "1.10", "01.1", "1.1.1", "+1.1",
        "1,1", "1.\xb9", "909876543210.0", "2"]),
    *swaps("1.1\r\n", 400, ["1.1\n", "1.1\r", "1.1\r\r\n", "1.1\r\n "]),
    *swaps("HTTP", 400, ["http", "IHTTP"]),
    (" HTTP/1.1", "", 400),
    ("HTTP/", "HTTP /", 400),
    ("HTTP/1.1", "RTSP/1.0", 400),
    ("1.1", "1.0", (200,)),
    ("1.1", "1.2", 200),
    *swaps("1.1", 505, ["2.0", "9.9"]),
    ("POST / HTTP/1.1\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),  # HTTP/2 by prior knowledge
    ("POST /", "\x16\x03\1\2\0\1\0\1\xfc\x03\x03", 400),  # TLS in TLS
]
FIELDS = [
    *swaps("Host: x\r\n", 400, ["", "Host: x\r\nHost: x\r\n", "Host:\r\nHost: x\r\n"]),
    ("1.1\r\nHost: x", "1.0", (200,)),
    ("/ HTTP/1.1\r\nHost: x", "http://x/ HTTP/1.1", 400),
    *swaps("Host: x", 200, ["", " x:8443", " [::1]:8443", "x", " \t x\t "], form="Host:{}"),
    *swaps("Host: x", 400, ["x, y", "x/y", "y@x", "x y", "x:y", "\xe9"], form="Host: {}"),
    ("Host:", "Host :", 400),
    *swaps("Host", 200, [
        "X:", "X: \xff\xe2\x82\xac", "!#$%&'*+-.^_`|~09azAZ: y",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
        "Connection: upgrade\r\nUpgrade: websocket",
        "Connection: Content-Length, Authorization", "Connection: closed",
        "Expect: 100-Continue"], form=BEFORE_HOST),
    *swaps("Host", 400, [
        "X : y", "X\t: y", "X", ": y", "X Y: z", "X@: y", "X\0: y", "X\1: y", "X\rY: z", "X\nY: z",
        "\xe9: y", "X: y\r\n z", "X: y\r\n\tz", " X: y", "X\r\n : y", " ", "X: y\nZ: z",
        "X: y\rZ: z", "X: y\r", "X: y\0", "X: \x7f", "X: \v", "X: y\fz", "X: \x1b[2J",
    ], form=BEFORE_HOST),
    ("17\r\n", "17\r\n \r\n", 400),  # a fold of nothing at the end
    *swaps("17\r\n\r\n", 400, ["17\r\n\n", "17\r\n\r", "17\n\r\n", "17\r\n\r\r\n", "17\r\n"]),
    ("Host", "X: y\r\n" * 61 + "Host", 200),
    ("Host", "X: y\r\n" * 62 + "Host", 431),
    ("Host", "X: " + "y" * 16_384 + "\r\nHost", 431),
    ("Authorization: Bearer {token}\r\n", "", 401),
    ("Authorization: Bearer {token}\r\nContent-Length: 17\r\n\r\n{body}",
     "Content-Length: 0\r\n\r\n", (401, 200)),
    *swaps("Host", 401, ["Authorization: Bearer {token}", "Authorization:"], form=BEFORE_HOST),
    *swaps("Host", 417, [
        "Expect: 200-ok", "Expect: 100-continue, x", "Expect:"], form=BEFORE_HOST),
    *swaps("Host", (200,), [
        "Connection: keep-alive, ,Close", "Connection: close\t",
        "Connection: x\r\nConnection: close"], form=BEFORE_HOST),
    *swaps("1.1", (200,), ["1.0\r\nExpect: 100-continue", "1.0\r\nConnection: close, keep-alive"]),
    ("1.1", "1.0\r\nConnection: Keep-Alive", 200),
]
LENGTHS = [
    *swaps("17", 200, ["000017", "0" * 5000 + "17"]),
    (": 17", ":\t17\t ", 200),
    ("Content-L", "content-l", 200),
    *swaps(LENGTH, 400, [
        "Content-Length: 17", "Content-Length: 0", CODING, "Transfer-Encoding: identity",
        "Transfer-Encoding:", "Transfer-Encoding: x", "transfer-encoding:chunked",
        "Transfer-Encoding : chunked", " Transfer-Encoding: chunked",
        "X: y\nTransfer-Encoding: chunked", "X: y\rTransfer-Encoding: chunked",
        "X:\nTransfer-Encoding: chunked", "Transfer-Encoding\r\n : chunked",
        "Transfer-Encoding:\vchunked", "\0Transfer-Encoding: chunked",
        "Transfer-Encoding\0: chunked"], form=LENGTH + "\r\n{}"),
    *swaps(LENGTH, 400, ["content-length: 5", "Content-Length:", CODING], form="{}\r\n" + LENGTH),
    *swaps(LENGTH, 200, [
        "Transfer_Encoding: chunked", "TE: chunked, trailers"], form=LENGTH + "\r\n{}"),
    ("1.1", f"1.0\r\n{CODING}", 400),
    *swaps("17", 413, ["1048577", str(2**32 + 17), str(2**64 + 17), "9" * 5000]),
    (f"{LENGTH}\r\n", "", 411),
    ("Content-L", "Content_L", 411),
    *swaps("Content-L", 400, [" Content-L", "Content\rL"]),
    ("Length:", "Length :", 400),
    *swaps("17", (401, 400), ["16", "0"]),
    ("17", "18", (401, 405)),
    *swaps("17", 400, [
        "+17", "-17", "17.0", "1_7", "0x11", "1e1", "17h", "1 7", "17 17", "17,17", "17, 17", "17;",
        '"17"', "", "x", "\v17", "17\f", "17\xa0", "\x8517", "1\xb2", "\xd9\xa1\xd9\xa7", "17\0",
        "17\r\n 17", "\r\n 17", "17\n", "\r17", "1\r7"]),
]
CODINGS = [
    ("", "", 200),
    ("chunked", "\tcHuNkEd ", 200),
    ("1.1", "1.0", 400),
    *swaps(CODING, 400, ["Content-Length: 0", "Content-Length:"], form=CODING + "\r\n{}"),
    *swaps("chunked", 501, [
        "", "identity", "gzip", "xchunked", "chunkedx", "chunked chunked", "chunked, chunked",
        "chunked,", ",chunked", "gzip, chunked", "chunked, gzip", "identity, chunked",
        "chunked, identity", "chunked;a=b", '"chunked"', "chunked\xa0", "\x85chunked",
        "chun\xe2\x84\xaaed", "chunked\r\nTransfer-Encoding: cow",
        "cow\r\ntransfer-encoding: chunked", "chunked\r\nTransfer-Encoding:",
        "chunked\r\nTransfer-Encoding: chunked"]),
    *swaps("chunked", 400, [
        "chunked\0", "\vchunked", "chunked\f", "\r\n chunked", "chunked\r\n x", "chunked\n",
        "\nchunked", "chunked\r"]),
]
CHUNKS = [
    ("11\r\n{body}", "1\r\n{\r\n010\r\n{rest}", 200),
    *swaps("11", 200, [
        "0" * 5000 + "11", "11;a", "11;a;b=c", '11 ;\ta = "b;c"', '11;a="\\"\\\\\xff";b=""',
        "11;" + "a" * 8189]),
    *swaps("11", 400, [
        "10", "12", "", "h", "1g", "x11", "0x11", "+11", "-11", "1_1", "1.1", "11.0", "11,", "11 a",
        " 11", "\t11", "11 ", "11\t", "11\v", "11\f", "11\xa0", "\xd9\xa1\xd9\xa1", "11\0", "11\r",
        "11\n", "11 \n ", "11\r\r", "11\n\r", "11;a\n", "11;a\nb", "11;a\rb", "11;a\0", "11;\x7f",
        "11;", "11; ", "11;;a", "11;a=", "11;=a", "11;a b", '11;a="b', '11;a="b"c', '11;a="b\\"',
        "11;a=b c", "11;\n", "11;" + "a" * 8190]),
    *swaps("11\r\n", 400, ["11\n", "11\r", "11;a\n"]),
    *swaps("11", 413, ["100001", "100000011", "10000000000000011", "f" * 8192]),
    *swaps("{body}\r\n", 400, [
        "\n", "\r", "\r\r\n", "", "xx", "xx\r\n", "\rx", "x\n", "\r\n\r\n"], form="{{body}}{}"),
    *swaps("0\r\n\r\n", 400, [
        "", "-0\r\n\r\n", "0\n\r\n", "0\r\n\n", "0\r\n\r", "0\r\n\r\r\n", "0\r\n"]),
    *swaps("0\r\n\r\n", 200, ["000;a=b\r\n\r\n", "0\r\n\r\n\r\n"]),
    *swaps("0\r\n\r\n", (200, 400), ["0\r\n\r\n\r\n\r\n", "0\r\n\r\n0\r\n\r\n"]),
    *swaps("0\r\n\r\n", 200, [  # trailers, also such as must not be there; 64, and of 16 KiB
        "X: y\r\nZ:\r\n", "Content-Length: 5\r\nTransfer-Encoding: x\r\nHost: y\r\n",
        "X: y\r\n" * 64, "X: " + "y" * (16_384 - 7) + "\r\n"], form="0\r\n{}\r\n"),
    *swaps("0\r\n\r\n", 431, [
        "X: y\r\n" * 65, "X: " + "y" * (16_384 - 6) + "\r\n"], form="0\r\n{}\r\n"),
    *swaps("0\r\n\r\n", 400, [
        "X", "X : y", ": y", " X: y", "X: y\r\n z", "X: y\nZ: z", "X: y\rZ: z", "X: \0", "X: \v",
        "X\xe9: y", "X: y\r"], form="0\r\n{}\r\n\r\n"),
]
SIZED_ROWS = [*REQUEST_LINES, *FIELDS, *LENGTHS]
CHUNKED_ROWS = [*CODINGS, *CHUNKS]
FRAMING = {f"{old!r:.40} {new!r:.50} {len(new)}": (SIZED, old, new, due)
           for old, new, due in SIZED_ROWS}
FRAMING |= {f"chunked {old!r:.40} {new!r:.50} {len(new)}": (CHUNKED, old, new, due)
            for old, new, due in CHUNKED_ROWS}
assert len(FRAMING) == len(SIZED_ROWS) + len(CHUNKED_ROWS)  # no two have one name


def framed(case):
    """Return the bytes of a row with the good delivery behind it, and the statuses that are due."""
    base, old, new, due = FRAMING[case]
    assert not old or base.count(old) == 1
    text = f'{{"a":"{random.getrandbits(36):09x}"}}'
    raw = base.replace(old, new) if old else base
    raw = raw.replace("{token}", token_of(text.encode()))
    raw = raw.replace("{rest}", text[1:]).replace("{body}", text)
    if due == 200:
        due = (200, 200)
    elif not isinstance(due, tuple):
        due = (due,)
    return raw.encode("latin-1") + post(new_event(), "Connection: close", path="/?next"), due


@pytest.mark.parametrize("case", FRAMING)
def test_framing(shared, case):
    raw, due = framed(case)
    before = shared.log.read_bytes()
    with Peer(shared.port, timeout=5) as peer:  # sooner than the receiver's own deadline
        peer.send(raw)
        for status in due:
            answered, fields, content = peer.answer()
            assert answered == status, content
            assert "Python" not in fields["server"]
            if status >= 400:
                assert json.loads(content)["status"] == status
                assert fields["content-type"] == "application/problem+json"
        assert fields["connection"] == "close" and peer.ended()
    assert len(shared.log.read_bytes().splitlines()) == len(before.splitlines()) + due.count(200)
    assert shared.deliver(new_event())[0] == 200


HEAD_IN_CHUNKS = CHUNKED.partition("11\r\n")[0]


@pytest.mark.parametrize("beginning", [
    "\n",
    "POST / HTTP/1.1\nHost: x\n\n",
    "POST / HTTP/1.1\r\nX: y\rZ",
    "POST / HTTP/1.1\r\nX: \0",
    HEAD_IN_CHUNKS + "11\n",
    HEAD_IN_CHUNKS + "11;a\rb",
    HEAD_IN_CHUNKS + "1" * 9000,
], ids=lambda text: repr(text[-20:]))
def test_what_can_never_become_a_request_is_refused_at_once(shared, beginning):
    with Peer(shared.port) as peer:
        raw = beginning.replace("{token}", token_of(b"")).encode()
        assert peer.ask(raw) == 400 and peer.ended()


def in_chunks(body):
    """Return the raw bytes of a delivery in three chunks, with an extension and a trailer."""
    pieces = (body[:1], body[1:100], body[100:])
    chunks = [b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return chunked(body) + b"".join(chunks) + b"0\r\nX: y\r\n\r\n"


def test_a_delivery_is_one_wherever_it_is_cut(shared):
    body = new_event()
    with Peer(shared.port) as peer:  # a record at a time is what the receiver reads
        for raw in (b"\r\n" + post(body), in_chunks(body)):
            cuts = [(raw[:at], raw[at:]) for at in range(1, len(raw))]
            for pieces in [*cuts, [bytes([byte]) for byte in raw]]:
                for piece in pieces:
                    peer.send(piece)
                assert json.loads(peer.answer()[2])["id"] == sha256(body), pieces


def test_two_empty_lines_byte_by_byte_are_refused(shared):
    with Peer(shared.port) as peer:
        with contextlib.suppress(OSError):
            for byte in b"\r\n\r\n" + post(new_event()):
                peer.send(bytes([byte]))
        assert peer.answer()[0] == 400


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(("size", "due"), [(2**20, 200), (2**20 + 1, 413)])
def test_a_body_may_be_as_long_as_the_cap(shared, size, due, chunks):
    body = new_event(x="y" * (size - len(new_event(x=""))))
    with Peer(shared.port) as peer:
        sent = chunked(body) + b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
        assert peer.ask(sent if chunks else post(body)) == due


@pytest.mark.parametrize(("size", "due"), [(1000, 200), (1001, 413)])
def test_the_framing_of_a_body_may_be_as_long_as_the_cap(serve, size, due):
    server = serve("--max-body", "1000")
    body = new_event()
    first = b"%x" % len(body)
    last = b"0;" + b"a" * (size - len(first) - len("\r\n" * 4) - len("0;"))
    with Peer(server.port) as peer:
        peer.send(chunked(body) + b"\r\n".join([first, body, last, b"", b""]))
        status, _, content = peer.answer()
        assert status == due and (b"chunk lines" in content) == (due == 413)


def seconds_of_an_answer(peer):
    begun = time.monotonic()
    body = new_event()
    peer.send(post(body)[:-len(body)])
    assert peer.ask(body) == 200
    return time.monotonic() - begun


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="this system has no TCP_QUICKACK")
@pytest.mark.parametrize("count", [1, 2])
def test_a_sender_with_nagle_waits_for_no_delayed_ack(shared, count):
    def seconds():
        with Peer(shared.port) as peer:
            peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
            return [seconds_of_an_answer(peer) for _ in range(count)][-1]

    assert any(seconds() < 0.035 for _ in range(50))  # a delayed one takes 40 ms, each time


def test_a_continue_comes_unless_the_body_has_come(shared):
    body = new_event()
    head = post(body, "Expect: 100-continue")[:-len(body)]
    with Peer(shared.port) as peer:
        peer.send(post(body) + head)
        assert [peer.answer()[0], peer.answer()[0]] == [200, 100]
        peer.send(body + head + body)
        assert [peer.answer()[0], peer.answer()[0]] == [200, 200]
    with Peer(shared.port) as peer:
        peer.send(head.replace(b"HTTP/1.1", b"HTTP/1.0"))  # which has no 100
        assert not select.select([peer.socket], [], [], 0.1)[0] and peer.ask(body) == 200


@pytest.mark.parametrize(("old", "new", "due"), [
    (rb"Bearer \S+", b"Bearer a.b.c", 401),
    (b"Length: ", b"Length: 9999", 413),
    (b"Content-Length", b"X", 411),
    (b"POST /", b"POST /x", 404),
    (b"POST", b"PUT", 405),
])
def test_no_continue_comes_after_a_bad_head(shared, old, new, due):
    body = new_event()
    head = post(body, "Expect: 100-continue")[:-len(body)]
    with Peer(shared.port) as peer:
        assert peer.ask(re.sub(old, new, head)) == due and peer.ended()


def test_pipelined_requests_are_answered_in_order(shared):
    bodies = [new_event() for _ in range(20)]
    with Peer(shared.port) as peer:
        peer.send(b"".join(map(post, bodies)) + HEALTH + HEALTH.replace(b"GET", b"HEAD"))
        answers = [json.loads(peer.answer()[2])["id"] for _ in bodies]
        assert answers == list(map(sha256, bodies))
        assert peer.answer()[::2] == (200, b'{"status":"ok"}')
        status, fields, _ = peer.answer(with_content=False)
        assert (status, fields["content-length"]) == (200, "15")
        refused = post(new_event(), authorization="Bearer " + token_of(new_event()))
        assert [peer.ask(refused), peer.ask(post(new_event()))] == [401, 200]


# Each row: a request's version and Connection field, and that of the answer.
@pytest.mark.parametrize(("version", "option", "answered"), [
    ("1.1", "", None),
    ("1.1", "Connection: x, Close\r\n", "close"),
    ("1.0", "", "close"),
    ("1.0", "Connection: Keep-Alive\r\n", "keep-alive"),
])
def test_a_connection_is_kept_as_asked_and_the_answer_says_so(shared, version, option, answered):
    with Peer(shared.port) as peer:
        peer.send(f"GET /healthz HTTP/{version}\r\nHost: x\r\n{option}\r\n".encode())
        status, fields, _ = peer.answer()
        assert (status, fields.get("connection")) == (200, answered)
        assert peer.ended() if answered == "close" else peer.ask(HEALTH) == 200


@pytest.mark.parametrize(("method", "target", "status", "allow"), [
    ("GET", "/", 405, "POST"),
    ("HEAD", "/", 405, "POST"),
    ("PUT", "/healthz", 405, "GET, HEAD"),
    ("GET", "/events", 404, None),
    ("HEAD", "/x", 404, None),
    ("OPTIONS", "*", 404, None),
    ("GET", "/x", 404, None),
])
def test_other_methods_and_paths_are_refused(shared, method, target, status, allow):
    with Peer(shared.port) as peer:
        peer.send(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = peer.answer(with_content=method != "HEAD")
        assert (answer[0], answer[1].get("allow")) == (status, allow)
        assert peer.ask(HEALTH) == 200


def test_a_line_that_is_no_field_is_named_by_its_number(shared):
    assert b"header line 2 is not a field" in get(shared, "/healthz", "no field")[2]


def test_a_refused_sender_of_a_large_body_reads_its_answer(shared):
    body = b"x" * 7_000_000  # more than the kernel takes for us, less than DRAIN_BYTES
    with Peer(shared.port) as peer:
        assert peer.ask(post(body)) == 413 and peer.ended()


@pytest.mark.parametrize("limits", [
    {"DRAIN_SECONDS": 60},
    {"DRAIN_SECONDS": 0.5, "DRAIN_BYTES": 2**40},
], ids=["by bytes", "by time"])
def test_a_refused_sender_that_never_ends_is_cut_off(serve, limits):
    server = serve("--request-timeout", "60", limits=limits)
    begun = time.monotonic()
    with Peer(server.port) as peer, pytest.raises(CUT_OFF):
        assert peer.ask(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n") == 401
        while time.monotonic() < begun + 15:
            peer.send(b"x" * 65_536)
    assert server.deliver(new_event())[0] == 200


def test_a_refused_body_is_drained_in_large_pieces():
    ours, theirs = socket.socketpair()

    def send():
        theirs.sendall(bytes(4 * 2**20))
        theirs.close()

    with ours, theirs:
        (sender,) = gather(1, send)
        connection = sw.Connection(ours, ("127.0.0.1", 1), 60)
        connection.socket = unittest.mock.Mock(wraps=ours)
        connection.end(unread=True)
        sender.join()
        reads = [call for call in connection.socket.mock_calls if call[0].startswith("recv")]
        assert len(reads) < 4 * 2**20 / 16_384


def test_a_peer_that_takes_a_byte_at_a_time_is_cut_off():
    slow = unittest.mock.Mock(send=lambda data: time.sleep(0.01) or 1)
    connection = sw.Connection(slow, ("127.0.0.1", 1), 60)
    with pytest.raises(sw.Disconnected):
        connection.send(bytes(300), 0.1)


def ask_for_key_update(peer):
    """Have the receiver change its key of TLS 1.3 (RFC 8446 section 4.6.3).

    Python has no call for it, but OpenSSL has. The pointer to its structure is what stands in
    CPython's object behind its header and a reference.
    """
    place = id(peer.socket._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    ctypes.CDLL(ssl._ssl.__file__).SSL_key_update(ctypes.c_void_p.from_address(place), 1)
    peer.socket.do_handshake()


def test_a_peer_that_asks_for_key_updates_alone_is_closed(shared):
    with Peer(shared.port) as peer:
        for _ in range(3):
            for _ in range(8):
                ask_for_key_update(peer)
            assert peer.ask(post(new_event())) == 200
        with pytest.raises(CUT_OFF):
            for _ in range(5000):
                ask_for_key_update(peer)
    assert shared.deliver(new_event())[0] == 200


def test_an_empty_line_after_a_delivery_is_no_request(serve):
    server = serve()
    with Peer(server.port) as peer:
        assert peer.ask(post(new_event()) + b"\r\n") == 200
        assert peer.ask(b"\r\n" + post(new_event()) + b"\r\n") == 400
    with Peer(server.port) as peer:
        assert peer.ask(post(new_event()) + b"\r\n") == 200
    assert server.stop() == 0
    assert "2 recorded, 0 duplicate, 1 refused" in server.stderr()


def test_plain_http_is_told_to_use_https(shared):
    with Peer(shared.port, tls=False) as peer:
        peer.send(post(new_event(pad="x" * 100_000)))  # more than is read at once
        status, fields, content = peer.answer()
        assert status == 400 and fields["content-type"].startswith("text/plain")
        assert b"https" in content and peer.ended()


@pytest.mark.parametrize("header", [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 443\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12),
], ids=["version 1", "version 2"])
@pytest.mark.parametrize("flags", [(), ("--behind-proxy",)], ids=["TLS", "plain"])
def test_the_proxy_protocol_is_named(serve, flags, header):
    server = serve(*flags)
    with Peer(server.port, tls=False) as peer:
        assert peer.ask(header + post(new_event())) == 400 and peer.ended()
    server.wait_for("refused 400 .*the PROXY protocol is not spoken here; turn it off in the proxy")
    assert not server.ids()


@pytest.mark.parametrize(("size", "due"), [(16_384, 200), (16_385, 431)])
def test_a_head_of_16_kib_is_the_longest_however_late_its_end(shared, size, due):
    head = HEALTH[:-2] + b"X: " + b"x" * (size - len(HEALTH) - 5) + b"\r\n\r\n"
    assert len(head) == size
    with Peer(shared.port) as peer:
        peer.send(head[:-1])
        assert until(lambda: has_read(shared, peer))
        assert peer.ask(head[-1:]) == due


def test_the_end_comes_with_the_answer_to_an_unread_body(serve):
    server = serve("--behind-proxy", limits={"DRAIN_SECONDS": 20})
    with Peer(server.port, tls=False, timeout=5) as peer:
        assert peer.ask(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n") == 401
        assert peer.ended()


@pytest.mark.parametrize(("version", "ciphers", "taken"), [
    ("TLSv1_3", "DEFAULT", True),
    ("TLSv1_2", "ECDHE+AESGCM", True),
    ("TLSv1_2", "ECDHE-ECDSA-AES128-SHA256", True),
    ("TLSv1_2", "ECDHE-ECDSA-AES128-SHA", False),
    ("TLSv1_1", "ALL", False),
])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_versions_and_ciphers_of_tls_are_refused_by_an_alert(shared, version, ciphers, taken):
    context = ssl._create_unverified_context()
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    due = contextlib.nullcontext() if taken else pytest.raises(ssl.SSLError, match="(?i)alert")
    with due, socket.create_connection(("127.0.0.1", shared.port), 30) as raw:
        peer = context.wrap_socket(raw)
        assert peer.version() == version.replace("_", ".")
        peer.close()


def test_pipelined_answers_do_not_wait_for_each_other(shared):
    with Peer(shared.port) as peer:
        pauses = []
        for _ in range(30):
            begun = time.monotonic()
            peer.send(post(new_event()) + HEALTH)
            assert [peer.answer()[0], peer.answer()[0]] == [200, 200]
            pauses.append(time.monotonic() - begun)
    assert sorted(pauses)[20] < 0.03  # with Nagle, 40 ms


def test_no_session_ticket_is_made(shared):
    with Peer(shared.port) as peer:
        assert peer.ask(HEALTH) == 200 and not peer.socket.session.has_ticket


def test_a_closure_alert_is_answered_by_one_at_once(shared):
    with Peer(shared.port) as peer:
        assert peer.ask(HEALTH) == 200
        begun = time.monotonic()
        peer.socket.unwrap()  # it waits for the receiver's alert, and keeps the socket open
        assert time.monotonic() - begun < 5


def test_a_half_closed_sender_is_answered(shared):
    with Peer(shared.port) as peer:
        peer.send(post(new_event())[:-1])
        socket.socket.shutdown(peer.socket, socket.SHUT_WR)
        assert peer.answer()[0] == 400


# --- The server: places, deadlines, its end ---


def test_mute_peers_keep_nobody_waiting(serve):
    server = serve("--request-timeout", "60")
    peers = []
    for number in range(600):
        peers.append(socket.create_connection(("127.0.0.1", server.port)))
        if number % 2:
            with contextlib.suppress(OSError):
                peers[-1].sendall(b"\x16\x03\x01\x02\x00\x01")  # how a TLS client begins
        if number % 50 == 49:
            assert server.deliver(new_event())[0] == 200
    assert len(os.listdir(f"/proc/{server.process.pid}/task")) <= 256 + 3
    for peer in peers:
        peer.close()
    assert server.stop() == 0


def drip_stages():
    """Return how a peer begins, and what it goes on to send, a bit at a time, by stage."""
    begin = chunked(BODY)
    return {
        "request line": (b"POST ", b"/"),
        "late": (b"POST ", b"/"),  # it takes its time for the handshake already
        "fields": (b"POST / HTTP/1.1\r\n", b"X: y\r\n"),
        "body": (post(b"x" * 9999)[:-9999], b"x"),
        "continued": (post(b"x" * 99, "Expect: 100-continue")[:-99], b" "),
        "chunk size": (begin, b"0"),
        "extension": (begin + b"1;", b"x"),
        "data": (begin + b"fff\r\n", b"x"),
        "chunks": (begin, b"1\r\nx\r\n"),
        "trailer": (begin + b"0\r\n", b"X: y\r\n"),
        "next": (post(new_event()) + b"POST ", b"/"),
        "silent": (b"", b""),
        "mute": (b"", b""),  # it does not even shake hands
    }


def drip_by_drip(server, stage, first, more):
    """Return the status that a peer gets, 0 for none, and whether that took the two seconds."""
    begun = time.monotonic()
    with Peer(server.port, tls=stage not in ("late", "mute"), timeout=10) as peer:
        if stage == "late":
            time.sleep(1.2)
            peer.start_tls()
        peer.send(first)
        if stage in ("next", "continued"):
            assert peer.answer()[0] == (200 if stage == "next" else 100)
        while not select.select([peer.socket], [], [], 0.05)[0] and time.monotonic() < begun + 5:
            peer.send(more)
        return peer.answer()[0], 2 <= time.monotonic() - begun < 3.1


def test_drip_by_drip_every_stage_has_the_same_time_in_all(serve):
    server = serve("--request-timeout", "2")
    pieces = drip_stages()
    with concurrent.futures.ThreadPoolExecutor(len(pieces)) as pool:
        drips = {stage: pool.submit(drip_by_drip, server, stage, *each)
                 for stage, each in pieces.items()}
    found = {stage: each.result() for stage, each in drips.items()}
    unanswered = {"silent": (0, True), "mute": (0, True)}
    assert found == {**dict.fromkeys(pieces, (408, True)), **unanswered}
    assert server.deliver(new_event())[0] == 200


def test_a_connection_that_has_delivered_may_be_idle_for_longer(serve):
    server = serve("--request-timeout", "0.5", limits={"IDLE_SECONDS": 1.6})
    with Peer(server.port) as other, Peer(server.port) as proven:
        assert (other.ask(HEALTH), proven.ask(post(new_event()))) == (200, 200)
        begun = time.monotonic()
        assert other.ended() and 0.4 <= time.monotonic() - begun < 1.5
        time.sleep(0.3)  # in all longer than the time of a request, which begins only now
        assert proven.ask(post(new_event())) == 200
        begun = time.monotonic()
        assert proven.ended() and 1.5 <= time.monotonic() - begun < 3


def test_behind_a_proxy_a_connection_may_be_idle_at_first(serve):
    server = serve("--behind-proxy", "--request-timeout", "0.5", limits={"IDLE_SECONDS": 3})
    with Peer(server.port, tls=False) as peer:
        time.sleep(1)
        raw = post(new_event())
        peer.send(raw[:9])
        begun = time.monotonic()
        assert peer.answer()[0] == 408 and 0.4 <= time.monotonic() - begun < 2


def test_a_request_that_begins_as_the_idle_time_ends_is_answered(serve):
    server = serve("--request-timeout", "1", limits={"IDLE_SECONDS": 0.4})

    def deliver(step):
        with Peer(server.port) as peer:
            assert peer.ask(post(new_event())) == 200
            raw = post(new_event())
            time.sleep(0.3 + step / 200)
            with contextlib.suppress(OSError):  # it may be closed already: then there is no answer
                peer.send(raw[:9])
                time.sleep(0.2)
                peer.send(raw[9:])
            return peer.answer()[0]

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert set(pool.map(deliver, range(40))) == {0, 200}


def test_a_lower_request_timeout_is_that_of_new_connections(serve, tmp_path):
    env = tmp_path / "env"
    env.write_text("SKYPE_REQUEST_TIMEOUT=60\n")
    server = serve("--env-file", env)
    with Peer(server.port) as before:
        env.write_text("SKYPE_REQUEST_TIMEOUT=0.5\n")
        server.hang_up("read again")
        with Peer(server.port) as half:
            half.send(b"POST ")
            assert half.answer()[0] == 408
        assert before.ask(post(new_event())) == 200


def send_until_cut_off(peer):
    """Send deliveries, and take no answer; a peer that took them would get a closure alert."""
    delivery = post(new_event()) * 100
    with pytest.raises(CUT_OFF):
        while True:  # for as long as it takes to fill every buffer on the way
            peer.send(delivery)
    with pytest.raises(CUT_OFF):
        peer.file.read()


def test_a_peer_that_takes_no_answers_is_cut_off(serve):
    server = serve("--request-timeout", "0.5")
    with Peer(server.port, timeout=15) as peer:
        send_until_cut_off(peer)
    assert server.deliver(new_event())[0] == 200


def test_the_longest_waiting_connection_makes_room(serve):
    server = serve("--max-connections", "3")
    peers = [Peer(server.port) for _ in range(3)]
    assert peers[0].ask(post(new_event())) == 200
    assert server.deliver(new_event())[0] == 200
    assert peers[1].answer()[0] == 0
    assert [peer.ask(post(new_event())) for peer in (peers[0], peers[2])] == [200, 200]
    for peer in peers:
        peer.close()


def test_of_senders_that_have_delivered_the_longest_waiting_goes(serve):
    server = serve("--max-connections", "2")
    with Peer(server.port) as first, Peer(server.port) as second:
        assert [peer.ask(post(new_event())) for peer in (first, second)] == [200, 200]
        assert server.deliver(new_event())[0] == 200
        assert first.answer()[0] == 0 and second.ask(post(new_event())) == 200


@contextlib.contextmanager
def storing(server, seconds):
    """Yield a peer whose event is being stored: the next sync takes so many seconds."""
    rule = f"fdatasync:delay_enter={seconds * 1_000_000}:when=1"
    with Peer(server.port) as peer, faulty(server, rule):
        peer.send(post(new_event()))
        assert until(lambda: server.log.stat().st_size)
        yield peer


def test_a_newcomer_at_a_stop_waits_for_nobody_who_stores(serve):
    server = serve("--max-connections", "1")
    with storing(server, 8) as sender, connect(server, 1)[0] as newcomer:
        server.process.terminate()
        newcomer.settimeout(5)
        assert newcomer.recv(1) == b""
        assert sender.answer()[0] == 200


def test_a_flood_evicts_its_oldest_but_nobody_who_stores(serve):
    server = serve("--max-connections", "4", "--request-timeout", "60")
    flood = []
    with storing(server, 1) as sender:
        for number in range(12):
            flood += connect(server, 1)
            assert number < 3 or flood[number - 3].recv(1) == b""
        assert not select.select(flood[-3:], [], [], 0)[0]
        assert sender.answer()[0] == 200
    for peer in flood:
        peer.close()
    assert server.stop() == 0


def test_the_only_connection_keeps_its_place_while_it_stores(serve):
    server = serve("--max-connections", "1")
    with storing(server, 1) as sender:
        (other,) = connect(server, 1)
        assert sender.answer()[0] == 200
        other.close()


def test_a_flood_is_evicted_without_a_pause(serve):
    server = serve("--max-connections", "4")
    flood = connect(server, 100)
    begun = time.monotonic()
    assert server.deliver(new_event())[0] == 200 and time.monotonic() - begun < 5
    for peer in flood:
        peer.close()


def test_who_was_evicted_amid_its_request_is_not_told_of(serve):
    server = serve("--max-connections", "1")
    with Peer(server.port) as half:
        half.send(post(new_event())[:-1])
        assert until(lambda: has_read(server, half))
        assert server.deliver(new_event())[0] == 200 and half.answer()[0] == 0
    assert server.stop() == 0
    server.wait_for("stopped: 1 recorded, 0 duplicate, 0 refused")


FAULT = "refused 500 the receiver has a fault; send it again (fault "


def test_a_fault_costs_its_request_alone_and_is_told(serve):
    server = serve("--max-connections", "1", limits={"CHUNK_LINE_LIMIT": None})
    for _ in range(2):
        with Peer(server.port) as peer:
            assert peer.ask(chunked(BODY)) == 500 and peer.ended()
        assert server.deliver(new_event())[0] == 200
    assert server.stop() == 0
    assert server.stderr().count(FAULT + "TypeError in ") == 2
    assert "2 recorded, 0 duplicate, 2 refused" in server.stderr()


def test_eight_answers_without_an_event_end_a_connection(serve):
    server = serve()
    with Peer(server.port) as peer:
        peer.send(HEALTH * 7 + post(new_event()) + HEALTH * 9)
        answers = [peer.answer() for _ in range(16)]
        assert [status for status, _, _ in answers] == [200] * 16
        assert ["connection" in fields for _, fields, _ in answers] == [False] * 15 + [True]
        assert peer.ended()


def test_a_proxy_may_have_more_answers_without_an_event(serve):
    with Peer(serve("--behind-proxy").port, tls=False) as peer:
        peer.send(HEALTH * 20)
        assert [peer.answer()[0] for _ in range(20)] == [200] * 20


def test_evictions_are_told_and_counted(serve):
    server = serve("--max-connections", "2", limits={"STOP_GRACE": 0.1})
    flood = connect(server, 12)
    server.wait_for("evicted [0-9]+ connections, .* raise --max-connections")
    assert server.deliver(new_event())[0] == 200 and server.stop() == 0
    assert re.search("stopped: 1 recorded, 0 duplicate, 0 refused, 1[0-2] evicted", server.stderr())
    assert server.stderr().count("raise --max-connections") == 1
    for peer in flood:
        peer.close()


def test_an_accept_that_fails_for_its_peer_evicts_nobody(serve):
    server = serve("--max-connections", "2")
    with Peer(server.port) as idle, faulty(server, "accept4:error=EPROTO:when=1..3", anywhere=True):
        assert server.deliver(new_event())[0] == 200
        assert idle.ask(post(new_event())) == 200
    assert server.stop() == 0
    assert "0 evicted" in server.stderr() and "cannot accept" not in server.stderr()


def deliver_two_and_stop(port, answers):
    """Deliver two large events at once, and end this process' receiver."""
    assert until(lambda: listens(port))
    with Peer(port, tls=False) as one, Peer(port, tls=False) as other:
        for peer in (one, other):
            peer.send(post(new_event(pad="x" * 100_000)))
        answers += [one.answer()[0], other.answer()[0]]
    os.kill(os.getpid(), signal.SIGTERM)


def test_large_events_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    parse = sw.parse_event
    port = free_port()
    answers = []

    def parse_slowly(body):
        time.sleep(0.3)
        return parse(body)

    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sw, "parse_event", parse_slowly)
    begun = time.monotonic()
    gather(1, lambda: deliver_two_and_stop(port, answers))
    assert sw.main(["--behind-proxy", "--port", str(port)]) == 0
    assert answers == [200, 200] and time.monotonic() - begun > 0.6


def test_refusals_are_told_a_hundred_times_a_second(serve):
    server = serve("--behind-proxy")
    with Peer(server.port, tls=False) as peer:
        peer.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" * 1000)
        assert [peer.answer()[0] for _ in range(1000)] == [401] * 1000
    assert server.stop() == 0
    told = re.findall("^([0-9T:-]+).*refused 401", server.stderr(), re.MULTILINE)
    untold = re.findall("Z ([0-9]+) more refused", server.stderr())
    assert untold and len(told) + sum(map(int, untold)) == 1000
    assert max(map(told.count, told)) <= 100


def test_each_second_has_its_own_share_of_refusals(capfd, monkeypatch):
    reporter = sw.Reporter()
    for second in (1, 2, 3):
        monkeypatch.setattr(sw.time, "time", unittest.mock.Mock(return_value=float(second)))
        for _ in range(sw.REFUSALS_TOLD + second):
            reporter.tell("x", "refused")
    reporter.flush()
    assert re.findall("Z ([0-9]+) more refused", capfd.readouterr().err) == ["1", "2", "3"]


def test_how_many_lines_nobody_took_is_told_to_the_next_reader(capfd, monkeypatch):
    reporter = sw.Reporter()
    nobody_reads = unittest.mock.Mock(return_value=False)
    monkeypatch.setattr(sw, "write_stderr", nobody_reads)
    for _ in range(2):
        reporter.tell("lost")
        reporter.flush()
    monkeypatch.setattr(sw, "REPORT_LIMIT", 0)
    reporter.tell("dropped", "refused")

    monkeypatch.undo()
    for message in ("one", "two"):
        reporter.tell(message)
        reporter.flush()
    said = [line[25:] for line in capfd.readouterr().err.splitlines()]
    assert said == ["3 lines before this one were lost: nobody read stderr", "one", "two"]


def test_a_fault_without_a_place_is_told_by_its_kind_alone():
    assert sw.describe_fault(ValueError("hush")) == "fault ValueError: please report it"


def test_a_fault_of_the_reporter_costs_one_line(capfd):
    reporter = sw.Reporter()
    reporter.tell(None)
    assert until(lambda: "reporter fault AttributeError in " in capfd.readouterr().err)
    reporter.tell("after it")
    reporter.flush()
    assert capfd.readouterr().err.endswith("Z after it\n")


def test_a_request_is_judged_by_the_settings_that_it_began_with(serve, tmp_path):
    env = tmp_path / "env"
    env.write_text(f"SKYPE_VIEW_PASSWORD={PASSWORD}\n", "utf-8")
    server = serve("--env-file", env)
    with Peer(server.port) as begun, Peer(server.port) as empty:
        for peer, password in ((begun, PASSWORD), (empty, "")):
            peer.send(f"GET / HTTP/1.1\r\nHost: x\r\n{basic(password)}\r\n".encode())
            assert until(lambda peer=peer: has_read(server, peer))
        env.write_text("")
        server.hang_up("read again")
        assert [peer.ask(b"\r\n") for peer in (begun, empty)] == [200, 401]
    assert get(server, "/", basic(PASSWORD))[0] == 405


def test_a_kept_sender_that_has_delivered_outlives_a_flood(serve):
    server = serve("--max-connections", "4")
    with Peer(server.port) as kept:
        for _ in range(3):
            assert kept.ask(post(new_event())) == 200
            flood = connect(server, 12)
            evicted = flood[:-3]  # although they came later
            assert [peer.recv(1) for peer in evicted] == [b""] * 9
            for peer in flood:
                peer.close()
    assert server.stop() == 0


def connect_and_reset(server, count, sent=b""):
    """Let peers come, send something and reset, before the receiver accepts the first of them."""
    server.process.send_signal(signal.SIGSTOP)
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", server.port), 5) as gone:
            gone.sendall(sent)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.process.send_signal(signal.SIGCONT)
    assert server.deliver(new_event())[0] == 200


def test_a_peer_in_no_hurry_outlives_a_storm_of_resets(serve):
    server = serve("--max-connections", "8")
    with Peer(server.port) as patient:
        connect_and_reset(server, 300)
        assert patient.ask(post(new_event())) == 200
    assert server.stop() == 0


def client_hello():
    outgoing = ssl.MemoryBIO()
    client = ssl._create_unverified_context().wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def test_a_reset_behind_a_client_hello_costs_no_handshake(serve):
    server = serve()
    hello = client_hello()
    stat, folder = (pathlib.Path(f"/proc/{server.process.pid}/{name}") for name in ("stat", "fd"))
    if not stat.exists():
        pytest.skip("needs Linux' /proc")
    descriptors = len(os.listdir(folder))

    def ticks(sent):  # of CPU that 400 of them cost
        before = sum(map(int, stat.read_text().split()[13:15]))
        connect_and_reset(server, 400, sent)
        assert until(lambda: len(os.listdir(folder)) <= descriptors)
        return sum(map(int, stat.read_text().split()[13:15])) - before

    ticks(b"")  # starts the threads
    # A tick is 10 ms; 1,200 handshakes take over 20 of them.
    assert sum(ticks(hello) - ticks(b"") for _ in range(3)) < 8
    assert server.stop() == 0


def test_without_descriptors_the_longest_waiting_gives_way(serve):
    server = serve("--request-timeout", "60")
    server.limit("NOFILE", len(os.listdir(f"/proc/{server.process.pid}/fd")) + 4)
    mute = connect(server, 30)
    server.wait_for("cannot accept: .*LimitNOFILE")
    assert [server.deliver(new_event())[0] for _ in range(4)] == [200] * 4
    assert server.stderr().count("cannot accept") == 1
    server.limit("NOFILE")
    for peer in mute:
        peer.close()
    assert server.deliver(new_event())[0] == 200 and server.stop() == 0


def test_an_accept_that_the_system_forbids_is_told(serve):
    server = serve()
    address = ("127.0.0.1", server.port)
    forbidden = faulty(server, "accept4:error=EPERM", anywhere=True)
    with forbidden, socket.create_connection(address):
        server.wait_for("cannot accept: Operation not permitted; .*forbid it")
        assert rests(server)
    assert server.deliver(new_event())[0] == 200
    assert server.stop() == 0 and "0 evicted" in server.stderr()


def number_in_status(server, name):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])


def test_without_threads_the_longest_waiting_gives_way(serve):
    server = serve("--request-timeout", "60")

    def limit_threads():  # no room for one more stack
        server.limit("AS", number_in_status(server, "VmSize") * 1024 + 4 * 2**20)

    limit_threads()
    mute = connect(server, 1)  # not even this one gets a thread
    server.wait_for("cannot start a thread: .*TasksMax=")
    mute[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    server.limit("AS")
    assert mute[0].recv(12) == b"HTTP/1.1 400"  # although nobody else came
    limit_threads()
    mute += connect(server, 30)
    assert [server.deliver(new_event())[0] for _ in range(4)] == [200] * 4
    assert number_in_status(server, "Threads") < 10
    for peer in mute:
        peer.close()
    assert server.stop() == 0


def test_sigterm_answers_what_was_sent_whole(serve):
    server = serve()
    with Peer(server.port) as whole, Peer(server.port) as half, Peer(server.port) as idle:
        assert [peer.ask(post(new_event())) for peer in (whole, half, idle)] == [200] * 3
        half.send(post(new_event())[:-1])
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        whole.send(post(new_event()) * 2 + post(new_event()))
        assert [whole.answer()[0] for _ in range(3)] == [200] * 3
        assert whole.answer()[0] == idle.answer()[0] == 0
        assert half.answer()[0] == 503
    assert server.stop() == 0
    assert "5 recorded, 1 duplicate, 1 refused" in server.stderr()


# Whether the second one has been read by the time that the first is answered.
@pytest.mark.parametrize("flags", [(), ("--behind-proxy",)], ids=["read", "not read"])
def test_sigterm_answers_a_second_request_that_had_arrived(serve, flags):
    server = serve(*flags)
    first = post(new_event())
    if flags:  # all that is read at once, and no more; the body's length has four digits now
        first = post(new_event(pad="x" * (4095 - len(post(new_event(pad=""))))))
        assert len(first) == 4096
    with Peer(server.port, tls=not flags) as peer:
        assert peer.ask(post(new_event())) == 200
        server.process.send_signal(signal.SIGSTOP)
        peer.send(first)
        peer.send(post(new_event()))
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        assert [peer.answer()[0] for _ in range(3)] == [200, 200, 0]


def test_sigterm_answers_who_waits_to_be_accepted(serve):
    server = serve("--behind-proxy")
    server.process.send_signal(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server.port, tls=False)) for _ in range(20)]
        for peer in peers:
            peer.send(post(new_event()))
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        assert [peer.answer()[0] for peer in peers] == [200] * 20


def test_sigterm_waits_only_so_long_for_a_disk_that_has_stalled(serve):
    server = serve(limits={"STOP_SECONDS": 0.5, "CLOSE_SECONDS": 0.5})
    with storing(server, 15) as sender:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopped: 0 recorded, 0 duplicate, 1 refused", 10)
        assert sender.answer()[0] == 503
    assert server.stop() == 0


def test_sigterm_waits_only_so_long_for_who_takes_no_answer(serve):
    server = serve("--request-timeout", "1", limits={"STOP_SECONDS": 60})
    with Peer(server.port, timeout=15) as peer:
        server.process.terminate()
        send_until_cut_off(peer)
    assert server.stop() == 0


def test_a_sigterm_before_the_port_opens_is_obeyed(tmp_path):
    code = """if True:
        import os, signal, sys, skype_webhook as sw
        listen = sw.open_listeners

        def stop_and_listen(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return listen(*args)

        sw.open_listeners = stop_and_listen
        sys.exit(sw.main(sys.argv[1:]))"""
    words = [sys.executable, "-c", code, "--behind-proxy", "--port", "0",
             "--log", str(tmp_path / "events.jsonl")]
    done = subprocess.run(words, cwd=HERE, env={**CLEAN, **OURS}, stderr=subprocess.PIPE,
                          timeout=30, check=True)
    assert b"stopped: 0 recorded" in done.stderr


def test_sigusr1_and_sigusr2_change_nothing(serve):
    server = serve()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        server.process.send_signal(number)
        assert server.deliver(new_event())[0] == 200
    assert server.stop() == 0 and len(server.stderr().splitlines()) == 5


def test_a_storm_of_signals_loses_none_and_changes_no_exit_code(serve):
    server = serve()
    storm = time.monotonic() + 0.3
    while time.monotonic() < storm:
        os.kill(server.process.pid, signal.SIGHUP)
    os.kill(server.process.pid, signal.SIGTERM)
    while server.process.poll() is None and time.monotonic() < storm + 30:
        os.kill(server.process.pid, signal.SIGHUP)
    assert server.process.returncode == 0
    assert "read again" in server.stderr() and "stopped:" in server.stderr()


# --- Certificates ---


def padded_pair(folder):
    """Return the bytes of a new certificate and its key, of the same size each time."""
    return [pathlib.Path(path).read_bytes().ljust(1000, b"\n") for path in make_certificate(folder)]


def served_certificate(server):
    with Peer(server.port) as peer:
        return peer.socket.getpeercert(binary_form=True)


def swap_links(live, cert, key):
    """certbot: new files in an archive, then the links to them are replaced, one by one."""
    for name, data in (("c.pem", cert), ("k.pem", key)):
        archived = live / uuid.uuid4().hex
        archived.write_bytes(data)
        (live / "new").symlink_to(archived.name)
        (live / "new").replace(live / name)


def write_in_place(live, cert, key):
    """acme.sh: `cat > file`, the key first; here with the sizes and times before, as by rsync."""
    for name, data in (("k.pem", key), ("c.pem", cert)):
        before = (live / name).stat()
        (live / name).write_bytes(data)
        os.utime(live / name, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("renew", "limits"), [
    (swap_links, {}),  # by the receiver's own pace: it looks every two seconds
    (write_in_place, {"LOOK_SECONDS": 0.1}),
], ids=["certbot", "acme.sh"])
def test_a_renewed_certificate_is_served_within_seconds(serve, tmp_path, renew, limits):
    swap_links(tmp_path, *padded_pair(tmp_path))
    cert = str(tmp_path / "c.pem")
    key = str(tmp_path / "k.pem")
    server = serve("--cert", cert, "--key", key, limits=limits)
    first = served_certificate(server)
    with Peer(server.port) as kept:
        renew(tmp_path, *padded_pair(tmp_path))
        assert until(lambda: served_certificate(server) != first, 10)
        assert kept.ask(post(new_event())) == server.deliver(new_event())[0] == 200
    server.wait_for("the new certificate")
    assert "warning" not in server.stderr()


def test_half_a_renewal_changes_nothing_until_it_is_whole(serve, tmp_path):
    cert, key = make_certificate(tmp_path)
    server = serve("--cert", cert, "--key", key, limits={"LOOK_SECONDS": 0.1})
    first = served_certificate(server)
    (tmp_path / "new").mkdir()
    new_cert, new_key = make_certificate(tmp_path / "new")
    shutil.copy(new_cert, cert)
    server.wait_for("do not belong together; the old certificate stays")
    assert served_certificate(server) == first
    shutil.copy(new_key, key)
    assert until(lambda: served_certificate(server) != first)
    assert server.deliver(new_event())[0] == 200


def test_a_certificate_that_vanishes_at_a_load_changes_nothing(serve, tmp_path):
    cert, key = make_certificate(tmp_path)
    server = serve("--cert", cert, "--key", key)
    with faulty(server, "openat:error=ENOENT:when=2", cert):  # the first looks whether it is PEM
        server.hang_up("cert.pem, --key")
    assert "No such file or directory; the old settings stay in force" in server.stderr()
    assert server.deliver(new_event())[0] == 200


# Each row: the first and the last day of a certificate, and the warning as any OpenSSL words it.
@pytest.mark.parametrize(("begin", "end", "said"), [
    ("20200101", "20200102", "certificate has expired; senders refuse it, so renew it"),
    ("20400101", "20400102", "certificate is not yet valid.*; look at this machine's clock first"),
])
def test_a_certificate_out_of_its_time_is_served_with_a_warning(serve, tmp_path, begin, end, said):
    cert, key = make_dated_certificate(tmp_path, begin, end)
    server = serve("--cert", cert, "--key", key)
    server.wait_for(f"warning: --cert {cert}: {said}")
    assert server.deliver(new_event())[0] == 200


def test_a_certificate_for_another_purpose_is_warned_of(tmp_path, capfd):
    sw.load_context(*make_certificate(tmp_path, "-addext", "extendedKeyUsage=clientAuth"))
    sw.REPORTER.flush()
    said = capfd.readouterr().err
    assert re.search("purpose; senders refuse it; have another one issued", said), said


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A folder with an authority, certificates that it has signed, and odd pairs."""
    folder = tmp_path_factory.mktemp("authority")
    p256 = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    for line in (f"req -x509 {p256} -subj /CN=ca -keyout ca.key -out ca.pem",
                 "req -x509 -newkey rsa:2048 -subj /CN=rsa -keyout rsa.key -out rsa.pem",
                 "req -x509 -newkey rsa:512 -subj /CN=small -keyout small.key -out small.pem",
                 f"req {p256} -subj /CN=localhost -keyout leaf.key -out request",
                 "x509 -req -in request -CA ca.pem -CAkey ca.key -set_serial 1 -out leaf.pem",
                 "x509 -req -in request -CA ca.pem -CAkey ca.key -set_serial 2 -sha1 -out sha1.pem",
                 "x509 -in leaf.pem -outform der -out der.pem"):
        words = [*line.split(), *(["-nodes"] if line.startswith("req") else [])]
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    for name in ("ca", "rsa"):
        both = (folder / f"{name}.pem").read_bytes() + (folder / "leaf.pem").read_bytes()
        (folder / f"{name}_first.pem").write_bytes(both)
    return folder


# Each row: a certificate, a key, and what the error says of them.
@pytest.mark.parametrize(("cert", "key", "said"), [
    ("ca_first.pem", "leaf.key", "the first certificate in the file (that has to be your own"),
    ("rsa_first.pem", "leaf.key", "the first certificate in the file (that has to be your own"),
    ("leaf.pem", "rsa.key", "do not belong together"),
    ("small.pem", "small.key", "the key is too small"),
    ("sha1.pem", "leaf.key", "outdated hash"),
    ("der.pem", "leaf.key", "openssl converts other formats"),
])
def test_a_pair_that_cannot_be_served_says_why(authority, cert, key, said):
    pair = (str(authority / cert), str(authority / key))
    if cert == "sha1.pem":
        # 3.0 refuses it; older and the newest versions leave that to the peer.
        with contextlib.suppress(ssl.SSLError):
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*pair)
            pytest.skip("this OpenSSL serves SHA-1")
    with pytest.raises(sw.SettingsError) as caught:
        sw.load_context(*pair)
    assert said in str(caught.value) and cert in str(caught.value)


# --- Signals, secrets, a proxy in front, listeners of systemd, other systems ---


def test_a_receiver_that_was_sent_a_signal_goes_back_to_sleep(serve):
    server = serve()
    server.hang_up("read again")
    assert rests(server)


def test_deliveries_whose_lines_are_dropped_are_counted(serve):
    server = serve(limits={"REPORT_LIMIT": 0})
    assert server.deliver(new_event())[0] == 200
    assert server.stop() == 0
    assert "stopped: 1 recorded" in server.stderr()
    assert not re.search(r"\d recorded \w", server.stderr())


@pytest.fixture
def wakeup():
    """The socket that a program which calls `main` is woken by at a signal, as asyncio is."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    with reader, writer:
        signal.set_wakeup_fd(writer.fileno())
        yield writer
        signal.set_wakeup_fd(-1)


def test_a_program_that_calls_main_has_its_signals_back(in_process, wakeup):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def stop():
        if until(lambda: signal.getsignal(signal.SIGHUP) != before[2]):
            os.kill(os.getpid(), signal.SIGTERM)

    (stopper,) = gather(1, stop)
    assert in_process("--behind-proxy", "--port", "0")[0] == 0
    stopper.join()
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == wakeup.fileno()


def test_sighup_reads_the_settings_again_if_all_are_right(serve, tmp_path):
    env = tmp_path / "skype.env"
    write_env(env, SKYPE_API_SECRET=SECRET.decode())
    server = serve("--env-file", str(env), SKYPE_API_SECRET="")
    write_env(env, SKYPE_API_SECRET="new", SKYPE_API_SECRET_PREVIOUS=SECRET.decode(),
              SKYPE_MAX_CONNECTIONS=1)
    server.hang_up("read again; a restart is needed for: max_connections")
    with Peer(server.port) as one, Peer(server.port) as two:
        assert [peer.ask(HEALTH) for peer in (one, two, one)] == [200] * 3
    body = new_event()
    assert status_of(server, body) == status_of(server, body, secret=b"new") == 200
    write_env(env, SKYPE_API_SECRET="newest", SKYPE_LEEWAY="x")
    server.hang_up("the old settings stay")
    assert server.deliver(new_event())[0] == 200
    assert server.stderr().count("read again") == 1


def test_sighup_takes_a_new_secret_beside_what_needs_a_restart(serve, tmp_path):
    env = tmp_path / "skype.env"
    write_env(env, SKYPE_API_SECRET=SECRET.decode())
    server = serve("--env-file", str(env), SKYPE_API_SECRET="")
    write_env(env, SKYPE_API_SECRET="new", SKYPE_BEHIND_PROXY="yes")
    server.hang_up("read again; a restart is needed for: behind_proxy")
    assert status_of(server, new_event(), secret=b"new") == 200


def test_sighup_without_a_secret_keeps_the_old_one(serve, tmp_path):
    env = tmp_path / "skype.env"
    write_env(env, SKYPE_API_SECRET=SECRET.decode())
    server = serve("--env-file", str(env), SKYPE_API_SECRET="")
    write_env(env)
    server.hang_up("SKYPE_API_SECRET is not set; put it into .env")
    assert server.deliver(new_event())[0] == 200


def test_a_secret_in_the_environment_may_be_any_bytes(serve):
    server = serve(SKYPE_API_SECRET="\udcff\udcfe", SKYPE_API_SECRET_PREVIOUS="\udcfd")
    for secret in (b"\xff\xfe", b"\xfd"):
        assert status_of(server, new_event(), secret=secret) == 200


def test_a_start_with_closed_descriptors_keeps_the_log_to_events(certificate, launch, tmp_path):
    def begin(*command):
        shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
        return launch(*shell, *PROGRAM, *command, env={**CLEAN, **OURS})

    log = tmp_path / "events.jsonl"
    port = free_port()
    tls = ("--cert", certificate[0], "--key", certificate[1])
    receiver = begin(*tls, "--host", "127.0.0.1", "--port", port, "--log", log)
    assert until(lambda: listens(port))
    assert stores_at(port)
    url = f"https://localhost:{port}/"
    assert begin("send", url, "--ca", certificate[0], "--count", 2).wait(30) == 0
    assert begin("timeline", log).wait(30) == 0
    receiver.terminate()
    assert receiver.wait(30) == 0
    assert len(ids_in(log)) == 3


@pytest.fixture
def full_pipe():
    """The writing end of a pipe that takes nothing more, since nobody reads it."""
    unread, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(full, b"x" * 4096):
            pass
    os.set_blocking(full, True)
    yield full
    os.close(unread)
    os.close(full)


def test_a_stderr_that_nobody_reads_keeps_nobody_waiting(certificate, launch, tmp_path, full_pipe):
    port = free_port()
    words = ["--cert", certificate[0], "--key", certificate[1], "--host", "127.0.0.1",
             "--port", port, "--log", tmp_path / "events.jsonl", "--max-connections", 2]
    receiver = launch(*PROGRAM, *words, stderr=full_pipe, env={**CLEAN, **OURS})
    assert until(lambda: listens(port))
    begun = time.monotonic()
    for _ in range(20):
        for no_tls in (b"\x16\x03\x01\x00\x05hello", HEALTH):
            with Peer(port, tls=False) as peer:
                peer.send(no_tls)
                peer.file.read()
    assert stores_at(port)
    assert time.monotonic() - begun < 10  # a write to stderr takes half a second to give up
    receiver.terminate()
    assert receiver.wait(30) == 0


# Each row: whether a proxy is in front, the address that is given, the status, and what is told.
@pytest.mark.parametrize(("proxied", "given", "status", "told"), [
    (False, "203.0.113.9", 200, r" 127\.0\.0\.1:\d+ recorded "),
    (True, "198.51.100.1, 203.0.113.9", 200, r" 203\.0\.113\.9 recorded "),
    (True, "203.0.113.9, evil\x1b[2J", 400, r" 127\.0\.0\.1:\d+ refused 400"),
    (True, "nonsense", 200, r" 127\.0\.0\.1:\d+ recorded "),
])
def test_a_proxy_alone_is_believed_about_the_address(serve, proxied, given, status, told):
    server = serve("--behind-proxy") if proxied else serve()
    field = f"X-Forwarded-For: {given}"
    assert server.deliver(new_event(), field, tls=not proxied)[0] == status
    server.wait_for(told)


@pytest.mark.parametrize(("value", "address"), [
    ("203.0.113.9", "203.0.113.9"),
    ("198.51.100.1, 203.0.113.9", "203.0.113.9"),
    ("203.0.113.9:4711", "203.0.113.9"),
    ("2001:DB8::1", "2001:db8::1"),
    ("[2001:db8::1]", "2001:db8::1"),
    ("[2001:db8::1]:4711", "2001:db8::1"),
    ("::ffff:203.0.113.9", "203.0.113.9"),
    ("fe80::1%any text", None),
    ("[fe80::1%1]:4711", None),
    ("203.0.113.9:port", None),
    ("203.0.113", None),
    ("unknown", None),
    ("203.0.113.9,", None),
    ("", None),
])
def test_the_address_that_a_proxy_saw_is_its_last_one(value, address):
    assert sw.forwarded_for({"x-forwarded-for": value}) == address


# The flag for its configuration, the signal that ends it once all is answered, the configuration.
# Each logs a line a request: the receiver's status or - or <NOSRV>|its own status|request line.
PROXIES = {
    "nginx": ("-c", signal.SIGQUIT, """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors; events {{}}
http {{
    log_format requests '$upstream_status|$status|$request'; access_log {folder}/requests requests;
    client_body_temp_path {folder}; proxy_temp_path {folder};
    fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
    client_header_timeout 200ms; client_body_timeout 200ms;
    lingering_close off; lingering_timeout 200ms;
    large_client_header_buffers 4 32k; client_max_body_size 2m;
    upstream receiver {{ server 127.0.0.1:{receiver}; keepalive 8; }}
    server {{ listen 127.0.0.1:{port}; location / {{
        proxy_pass http://receiver; proxy_http_version 1.1;
        proxy_set_header Connection ""; proxy_next_upstream off; }} }}
}}
"""),
    "haproxy": ("-f", signal.SIGUSR1, """
defaults
    mode http
    option http-buffer-request
    http-reuse always
    timeout connect 2s
    timeout server 5s
    timeout client 200ms
    timeout http-request 200ms
frontend proxy
    bind 127.0.0.1:{port}
    log stdout format raw local0
    log-format "%s|%ST|%r"
    default_backend receivers
backend receivers
    server receiver 127.0.0.1:{receiver}
"""),
}


def pass_framings_through(proxy, launch, folder, receiver):
    """Send all of FRAMING through a proxy; return what it has logged by the end."""
    flag, ending, configuration = PROXIES[proxy]
    port = free_port()
    logged = folder / "requests"
    text = configuration.format(folder=folder, port=port, receiver=receiver)
    (folder / "configuration").write_text(text)
    with open(logged, "wb") as requests:
        process = launch(proxy, flag, folder / "configuration", stdout=requests)
    assert until(lambda: listens(port))
    for case in FRAMING:
        raw, due = framed(case)
        # It can be refused before it is sent whole.
        with Peer(port, tls=False) as peer, contextlib.suppress(OSError):
            peer.send(raw)
            if due == (413,):  # more was promised than is sent
                peer.raw.shutdown(socket.SHUT_WR)
            peer.file.read()
    process.send_signal(ending)
    process.wait(30)
    return logged.read_bytes().decode("latin-1")


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_and_the_receiver_see_the_same_requests(serve, launch, tmp_path, proxy):
    server = serve("--behind-proxy")
    logged = pass_framings_through(proxy, launch, tmp_path, server.port)
    assert server.stop() == 0
    requests = re.findall(r"^([^|\n]+)\|([^|\n]+)\|(.*)$", logged, re.MULTILINE)
    handed_on = [(request, status) for receiver, status, request in requests
                 if receiver not in ("-", "<NOSRV>")]
    told = server.stderr()
    counts = re.search(r"(\d+) recorded, (\d+) duplicate, (\d+) refused", told).groups()
    # HAProxy 3 begins a CONNECT with a body.
    given_up = told.count("the request ended before it was whole")
    assert len(handed_on) == sum(map(int, counts)) - given_up > 200
    assert {status for request, status in handed_on if request == "POST /?next HTTP/1.1"} == {"200"}


def hushed_tokens(body):
    """Return a good token for a body, and bad ones that hold "hush" where they can."""
    now = int(time.time())
    good = token_of(body)
    return [
        good,
        token_of(body, secret=b"hush"),
        token_of(body, now - 60),
        token_of(body, iss="hush"),
        token_of(body, sub="hush"),
        good[:-1],
        good + "=",
        good + " hush",
        jws(b'{"alg":"hush"}', payload(body, now)),
        jws(HEADER, payload(body, now)[:-1] + b',"hush":hush}'),
    ]


def hushed_requests(body, tokens):
    """Return requests that hold tokens and "hush" in each place, the page's password among them."""
    fields = ["X-Hush: hush", "Hush", "X: hush\x1b\0", "Expect: hush", "Content-Length: hush",
              "Host: hush", "X: " + "hush" * 5000, f"Authorization: Bearer {tokens[0]}"]
    heads = [f"GET / HTTP/1.1\r\nHost: x\r\n{basic(password)}\r\n\r\n"
             for password in ("hush-password", "hush")]
    return [
        *(post(body, authorization=f"Bearer {token}") for token in tokens[1:]),
        *(post(body, field) for field in fields),
        post(body),
        post(body, authorization=tokens[0]),
        post(body, path="/hush?hush"),
        post(body).replace(b"POST", b"HUSH"),
        post(body, "Transfer-Encoding: hush", length=False),
        chunked(body) + b"hush\r\n",
        chunked(body) + b"0\r\nhush\r\n\r\n",
        post(new_event(currentStage={"value": "\x1b[2J\u202e\r\n"}, interviewCode="\x9b\u2066")),
        *(head.encode() for head in heads),
    ]


def answers_to(server, requests):
    """Return all that the answers to some requests show, but for the page's text."""
    shown = b""
    for request in requests:
        with Peer(server.port) as peer:
            peer.send(request)
            status, fields, content = peer.answer()
        is_page = "html" in fields["content-type"]
        shown += repr((status, fields)).encode() + (b"" if is_page else content)
    return shown


def test_no_secret_token_or_unchecked_text_is_shown_anywhere(serve):
    server = serve(SKYPE_VIEW_PASSWORD="hush-password")
    body = new_event()
    tokens = hushed_tokens(body)
    requests = hushed_requests(body, tokens)
    shown = pathlib.Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    shown += answers_to(server, requests)
    assert server.stop() == 0

    told = server.errors.read_bytes()
    # The page is not told of; that it listens, stops, and has stopped, is.
    assert re.fullmatch(rb"([ -~]*\n){%d}" % (len(requests) + 2), told)
    shown += told + server.log.read_bytes()
    signatures = [part.encode() for token in tokens for part in token.split(".")[2:]]
    needles = [SECRET, b"hush", b"eyJ", *signatures]
    assert [each for each in needles if each in shown or each in shown.lower()] == []


START_ON = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture
def start_on(launch, certificate, tmp_path):
    """Return a function that starts a receiver as systemd does, with its listener as descriptor 3.

    It returns the process and the first line that it says.
    """
    tls = ("--cert", certificate[0], "--key", certificate[1])

    def start(listener, count="1"):
        told = tmp_path / f"told.{uuid.uuid4().hex}"
        number = listener.fileno()
        words = (sys.executable, "-c", START_ON, number, *PROGRAM[1:], *tls)
        environment = {**CLEAN, **OURS, "LISTEN_FDS": count}
        with open(told, "wb") as errors:
            process = launch(*words, cwd=tmp_path, env=environment, stderr=errors,
                             pass_fds=[number])
        assert until(lambda: b"\n" in told.read_bytes())
        return process, told.read_text().partition("\n")[0]

    return start


@pytest.mark.parametrize(("host", "urls"), [
    ("127.0.0.1", "https://127.0.0.1:{0}/"),
    ("::", "https://[::]:{0}/, https://0.0.0.0:{0}/"),
])
def test_a_passed_socket_is_taken_over_and_named(start_on, host, urls):
    families = {"family": socket.AF_INET6, "dualstack_ipv6": True} if host == "::" else {}
    with socket.create_server((host, 0), **families) as listener:
        process, first = start_on(listener)
        port = listener.getsockname()[1]
        assert f"listening on {urls.format(port)}, log " in first
        process.terminate()
        assert process.wait(40) == 0


@pytest.mark.parametrize(("count", "listens_at", "why"), [
    ("x", ("127.0.0.1", 0), "not a count"),
    ("0", ("127.0.0.1", 0), "not a count"),
    ("2", ("127.0.0.1", 0), "LISTEN_FDS=2: "),
    ("1", None, "not a listening TCP socket"),
])
def test_an_odd_passed_socket_ends_the_start_with_one_line(start_on, count, listens_at, why):
    with socket.create_server(listens_at) if listens_at else socket.socket() as passed:
        process, first = start_on(passed, count)
        assert why in first
        assert process.wait(40) == 2


@pytest.mark.parametrize(("pid", "named"), [({"LISTEN_PID": "1"}, "1"), ({}, r"\(no LISTEN_PID\)")])
def test_listening_sockets_for_another_process_are_warned_of(serve, pid, named):
    server = serve(LISTEN_FDS="x", **pid)
    ours = server.process.pid
    server.wait_for(f"warning: LISTEN_FDS=x is for process {named}, and this is {ours}: ")
    assert server.deliver(new_event())[0] == 200


def test_the_backlog_of_a_passed_socket_is_left_to_the_successor(start_on):
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        process, _ = start_on(listener)
        process.send_signal(signal.SIGSTOP)
        for _ in range(20):
            stack.enter_context(socket.create_connection(listener.getsockname(), 30))
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(40) == 0
        listener.setblocking(False)
        for _ in range(17):  # it takes one at each turn until it sees the signal
            listener.accept()[0].close()


def test_restarts_on_a_passed_socket_refuse_no_connection(start_on, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        process, _ = start_on(listener)
        with delivering(listener.getsockname()[1]) as (acknowledged, refused):
            for _ in range(3):
                grows(acknowledged, 50)
                process.terminate()
                assert process.wait(40) == 0
                process, _ = start_on(listener)
        process.terminate()
        assert process.wait(40) == 0
    assert refused == []
    assert sorted(ids_in(tmp_path / "events.jsonl")) == sorted(acknowledged)


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_what_happens(serve, tmp_path, abstract):
    path = f"\0skype_webhook_test.{uuid.uuid4()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(10)
        server = serve(NOTIFY_SOCKET=path.replace("\0", "@"))
        assert systemd.recv(100) == b"READY=1"
        before = time.monotonic_ns() // 1000
        server.process.send_signal(signal.SIGHUP)
        moment = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", systemd.recv(100))[1]
        assert before <= int(moment) <= time.monotonic_ns() // 1000
        assert systemd.recv(100) == b"READY=1"
        assert server.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"


def test_a_notify_socket_that_is_not_there_costs_a_warning(serve, tmp_path):
    server = serve(NOTIFY_SOCKET=str(tmp_path / "missing"))
    server.wait_for("warning: NOTIFY_SOCKET .*missing.*READY=1")
    assert server.deliver(new_event())[0] == 200


AS_ON_WINDOWS = """
import os, signal, sys
sys.modules["fcntl"] = None
del os.fdatasync, os.O_DIRECTORY, signal.SIGHUP
"""
AS_ON_MACOS = """
import fcntl, os, socket
del os.fdatasync
fcntl.F_FULLFSYNC = 51
fcntl.fcntl = lambda fd, what: os.write(2, b"synced by %d\\n" % what)
accept = socket.socket.accept
def accept_as_on_macos(listener):
    accepted, address = accept(listener)
    os.set_blocking(accepted.fileno(), False)
    return accepted, address
socket.socket.accept = accept_as_on_macos
"""


@pytest.mark.parametrize(("changes", "said"), [
    (AS_ON_WINDOWS, "warning: on this system no lock .* log that was just begun .* restart only"),
    (AS_ON_MACOS, "(synced by 51\n)+.* recorded "),
], ids=["windows", "macos"])
def test_other_systems_serve_and_say_what_they_lack(serve, tmp_path, changes, said):
    (tmp_path / "sitecustomize.py").write_text(changes)
    server = serve(PYTHONPATH=str(tmp_path))
    assert server.deliver(new_event())[0] == 200
    server.log.rename(tmp_path / "rotated")
    assert server.deliver(new_event())[0] == 200
    assert len(server.ids()) == 1
    server.wait_for(said)
    assert server.stop() == 0


def test_a_connection_that_came_non_blocking_is_awaited_asleep(serve, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AS_ON_MACOS)
    server = serve(PYTHONPATH=str(tmp_path))
    with Peer(server.port) as peer:
        assert rests(server)
        assert peer.ask(post(new_event())) == 200


def test_windows_is_told_that_an_open_log_cannot_be_renamed(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        told = sw.missing_promises()
    assert "the log cannot be renamed while it is open" in told


# --- The live view ---


class Stream(Peer):
    """A viewer of raw server-sent events."""

    def __init__(self, port, path="/events", *fields):
        super().__init__(port)
        head = [f"GET {path} HTTP/1.1", "Host: localhost", basic(PASSWORD), *fields, "", ""]
        self.send("\r\n".join(head).encode())
        self.status = self.answer()[0]

    def next(self):
        """Return (id, data) of the next event; heartbeats are passed over."""
        found = {}
        read = ""
        end = time.monotonic() + 20
        while read != "\n" or "id" not in found:
            read = self.file.readline().decode()
            assert read and time.monotonic() < end, "it has ended, or has heartbeats alone"
            name, _, value = read.rstrip("\n").partition(": ")
            found[name] = value
        return found["id"], json.loads(found["data"])

    def take(self, count):
        """Return the log's ids of so many next events."""
        return [self.next()[1]["id"] for _ in range(count)]

    def hear(self, count):
        """Wait for so many heartbeats."""
        for _ in range(count):
            assert [self.file.readline() for _ in range(3)] == [
                b"event: heartbeat\n", b"data: {}\n", b"\n"]


def view_status(server):
    """Return the status that one more viewer gets, who then leaves."""
    with Stream(server.port) as stream:
        return stream.status


def test_without_a_password_there_is_no_live_view(serve):
    server = serve("--path", "/hook")
    assert [get(server, path)[0] for path in ("/", "/events")] == [404, 404]
    assert get(server, "/hook")[1]["allow"] == "POST"


@pytest.fixture
def view(serve):
    """A receiver with the live view, whose viewers look often."""
    return serve(SKYPE_VIEW_PASSWORD=PASSWORD, limits={"VIEW_PAUSE": 0.02})


@pytest.fixture
def beating(serve):
    """A receiver with the live view, which sends a heartbeat with each look at the log."""
    limits = {"VIEW_PAUSE": 0.02, "HEARTBEAT_SECONDS": 0.0}
    return serve(SKYPE_VIEW_PASSWORD=PASSWORD, limits=limits)


@pytest.mark.parametrize("path", ["/", "/events"])
def test_the_view_needs_its_password(view, path):
    for field in ("X: none", "Authorization: Bearer x", "Authorization: Basic x",
                  basic(""), basic(PASSWORD + "x")):
        status, fields, _ = get(view, path, field)
        assert status == 401
        assert fields["www-authenticate"] == 'Basic realm="skype_webhook", charset="UTF-8"'


def test_after_too_many_wrong_passwords_the_right_one_waits(view):
    for _ in range(sw.WRONG_PASSWORDS):
        assert get(view, "/", basic("w\u2603rong"))[0] == 401
    status, fields, _ = get(view, "/", basic(PASSWORD))
    assert status == 429 and 0 < int(fields["retry-after"]) <= 60
    assert view.deliver(new_event())[0] == 200


def ask_as(server, address, password):
    """Ask for the page behind a proxy that names this address; return the status."""
    head = f"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {address}\r\n{basic(password)}\r\n\r\n"
    with Peer(server.port, tls=False) as peer:
        return peer.ask(head.encode())


def test_wrong_passwords_are_counted_by_network(serve):
    server = serve("--behind-proxy", SKYPE_VIEW_PASSWORD=PASSWORD, limits={"WRONG_PASSWORDS": 1})
    statuses = {
        "192.0.2.1": 401,
        "::ffff:192.0.2.1": 429,
        "192.0.2.2": 401,
        "2001:db8::1": 401,
        "2001:db8::2": 429,
        "2001:db8:0:1::1": 401,
    }
    assert {each: ask_as(server, each, "wrong") for each in statuses} == statuses


def test_guesses_from_many_networks_lock_out_no_known_one(serve):
    limits = {"WRONG_PASSWORDS": 2, "WRONG_PASSWORDS_IN_ALL": 3}
    server = serve("--behind-proxy", SKYPE_VIEW_PASSWORD=PASSWORD, limits=limits)
    assert ask_as(server, "192.0.2.9", PASSWORD) == 200
    assert [ask_as(server, f"192.0.2.{host}", "wrong") for host in range(4)] == [401, 401, 401, 429]
    assert ask_as(server, "192.0.2.8", PASSWORD) == 429
    passwords = (PASSWORD, "wrong", "wrong", PASSWORD)
    assert [ask_as(server, "192.0.2.9", each) for each in passwords] == [200, 401, 401, 429]


def test_the_share_of_wrong_passwords_is_anew_each_minute():
    guesses = sw.Guesses()
    for _ in range(sw.WRONG_PASSWORDS):
        assert not guesses.are_too_many("192.0.2.1", 59)
        guesses.note("192.0.2.1", right=False)
    assert guesses.are_too_many("192.0.2.1", 59) and not guesses.are_too_many("192.0.2.1", 60)


def test_the_page_names_the_url_to_deliver_to(serve):
    page = get(serve("--path", "/a&b", SKYPE_VIEW_PASSWORD=PASSWORD), "/", basic(PASSWORD))[2]
    assert b"send '<span id=\"origin\"></span>/a&amp;b' --insecure" in page


def test_the_page_has_a_strict_policy(view):
    status, fields, page = get(view, "/", basic(PASSWORD).replace("Basic", "bASIC "))
    assert status == 200 and page.startswith(b"<!doctype html>")
    script = page.partition(b"<script>")[2].partition(b"</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = fields["content-security-policy"]
    for due in (digest, "default-src 'none'", "frame-ancestors 'none'"):
        assert due in policy
    assert "unsafe" not in policy
    assert fields["cache-control"] == "no-store"
    assert fields["referrer-policy"] == "no-referrer"
    assert fields["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("path", "field"), [
    ("/events", "Last-Event-ID: {}"),
    ("/events?after={}", "X: {}"),
])
def test_who_comes_back_with_an_id_goes_on_behind_it(view, path, field):
    ids = deliver_new(view, 3)
    with Stream(view.port) as stream:
        places = [stream.next()[0] for _ in ids]
    for count, place in enumerate(places, 1):
        with Stream(view.port, path.format(place), field.format(place)) as stream:
            ids += deliver_new(view)
            assert stream.take(len(ids) - count) == ids[count:]


def test_the_header_s_id_wins_over_that_of_the_query(view):
    ids = deliver_new(view, 3)
    with Stream(view.port) as stream:
        first, second = [stream.next()[0] for _ in range(2)]
    with Stream(view.port, f"/events?after={first}", f"Last-Event-ID: {second}") as stream:
        assert stream.take(1) == ids[2:]


@pytest.mark.parametrize("change", ["rename", "copytruncate", "remove"])
def test_a_viewer_follows_the_log_into_its_next_file(view, change):
    before = deliver_new(view)
    with Stream(view.port) as stream:
        assert stream.take(1) == before
        replace_log(view.log, change)
        after = deliver_new(view)
        assert stream.take(1) == after


@pytest.mark.parametrize("change", ["rename", "copytruncate", "remove"])
def test_an_id_of_a_rotated_log_leads_to_the_present_start(view, change):
    deliver_new(view, 3)
    with Stream(view.port) as stream:
        first = stream.next()[0]
    replace_log(view.log, change)
    ids = deliver_new(view, 4)
    with Stream(view.port, f"/events?after={first}") as stream:
        assert stream.take(4) == ids


# %s is the part of an id that names the log.
@pytest.mark.parametrize("place", [
    "0", "1", "-0", "gone-1", "%s", "%s-", "%s--1", "%s-99999999", "%s-" + "9" * 5000, "%C3%A4-1"])
def test_an_id_that_names_no_place_here_leads_to_the_start(view, place):
    ids = deliver_new(view)
    with Stream(view.port) as stream:
        log = stream.next()[0].partition("-")[0]
    with Stream(view.port, f"/events?after={place.replace('%s', log)}") as stream:
        assert stream.take(1) == ids


def test_a_viewer_of_a_log_that_cannot_be_read_gets_503(view):
    deliver_new(view)
    with faulty(view, "read:error=EIO"):
        assert get(view, "/events", basic(PASSWORD))[0] == 503
    view.wait_for(r"503 the log cannot be read \(.*Input/output error\)")
    assert view_status(view) == 200


def test_a_stream_ends_with_a_reason_when_its_log_cannot_be_read(view):
    with Stream(view.port) as stream:
        stream.take(len(deliver_new(view)))
        with faulty(view, "read:error=EIO"):
            assert stream.ended()
    view.wait_for("live view: the log cannot be read: Input/output error\n")
    assert "fault" not in view.stderr()


def test_logs_that_begin_blank_on_one_inode_are_told_apart(view):
    def copytruncated(number):
        os.truncate(view.log, 0)
        with open(view.log, "ab") as file:
            file.write(b" " * 500 + b"\n" + numbered_line(number)[1])

    view.log.write_bytes(b" " * 500 + b"\n" + numbered_line(1)[1])
    with Stream(view.port) as stream:
        for number in (2, 3):
            stream.next()
            copytruncated(number)
        assert stream.take(1) == [numbered_line(3)[0]]


def test_logs_that_begin_alike_are_told_apart(view):
    lines = [line_of(new_event()) for _ in range(2)]
    view.log.write_bytes(b" " * 500 + b"\n" + lines[0])
    with Stream(view.port) as stream:
        place, first = stream.next()
    view.log.rename(view.log.with_name("events.jsonl.1"))
    view.log.write_bytes(b" " * 500 + b"\n" + lines[1])
    with Stream(view.port, f"/events?after={place}") as stream:
        assert stream.next()[1] == json.loads(lines[1]) != first


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux' /proc")
def test_a_viewer_of_a_log_with_520_rotations_has_it_open_once(view):
    deliver_new(view)
    own = len(open_files(view, "events.jsonl"))
    with Stream(view.port) as stream:
        place = stream.next()[0]
    for number in range(520):
        view.log.with_name(f"events.jsonl.{number}").write_bytes(numbered_line(number)[1])
    assert until(lambda: len(open_files(view, "events.jsonl")) == own)
    with Stream(view.port, f"/events?after={place}") as stream:
        ids = deliver_new(view)
        assert stream.take(1) == ids
        assert len(open_files(view, "events.jsonl")) == own + 1


def test_a_viewer_waits_for_the_end_of_a_line(beating):
    _, whole = numbered_line(1)
    with Stream(beating.port) as stream, open(beating.log, "ab", 0) as file:
        file.write(whole[:100])
        stream.hear(10)  # of looks at half a line
        file.write(whole[100:])
        assert stream.next()[1] == json.loads(whole)


def test_a_viewer_reads_on_in_a_rotated_file_until_the_next(beating):
    before = numbered_line(1)
    during = numbered_line(2)
    with Stream(beating.port) as stream, open(beating.log, "ab", 0) as file:
        file.write(before[1])
        assert stream.take(1) == [before[0]]
        beating.log.rename(beating.log.with_name("events.jsonl.1"))
        beating.log.touch(0o600)
        stream.hear(10)  # of looks at both files
        file.write(during[1])  # as the receiver does if it looked just before the rotation
        assert stream.take(1) == [during[0]]
        after = deliver_new(beating)
        assert stream.take(1) == after


def test_a_line_may_be_longer_than_a_viewer_reads_at_once(view):
    first = deliver_new(view, currentStage="x" * 1_048_200)
    assert view.log.stat().st_size > sw.VIEW_BYTES
    with Stream(view.port) as stream:
        assert stream.take(1) == first
        second = deliver_new(view, currentStage="x" * 1_048_200)
        assert stream.take(1) == second


def test_the_stream_has_the_lines_of_events_alone(view):
    odd = line_of(new_event()).replace(b"}", b"\r}")  # a CR would end its line in the stream
    good = [line_of(new_event()) for _ in range(2)]
    view.log.write_bytes(good[0] + odd + b"foreign\n" + b" " * 99 + b"\n" + good[1])
    with Stream(view.port) as stream:
        assert [stream.next()[1] for _ in good] == list(map(json.loads, good))


def test_head_of_the_stream_answers_as_get_would_and_ends(view):
    with Peer(view.port) as peer:
        peer.send(f"HEAD /events HTTP/1.1\r\nHost: x\r\n{basic(PASSWORD)}\r\n\r\n".encode())
        status, fields, _ = peer.answer(with_content=False)
        assert (status, fields["cache-control"]) == (200, "no-store")
        assert fields["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in fields  # GET has none either (RFC 9110 section 8.6)
        assert peer.ended()


def test_a_log_that_was_emptied_is_read_from_its_start(view):
    lines = [line_of(new_event()) for _ in range(5)]
    view.log.write_bytes(b"".join(lines[:2]))
    with Stream(view.port) as stream:
        assert [stream.next()[1] for _ in range(2)] == list(map(json.loads, lines[:2]))
        with open(view.log, "r+b", 0) as file:  # at once, as it looks to who was not looking
            file.write(b"".join(lines[2:]))
        assert [stream.next()[1] for _ in range(3)] == list(map(json.loads, lines[2:]))


def test_without_an_id_the_stream_begins_with_recent_events(view):
    lines = [line_of(new_event(interviewCode=f"code {number}")) for number in range(3000)]
    view.log.write_bytes(b"".join(lines))
    recent = next(n for n in range(3000) if sum(map(len, lines[n:])) <= 2**20)
    with Stream(view.port) as stream:
        codes = [stream.next()[1]["subject"] for _ in range(recent, 3000)]
    assert codes == [f"code {number}" for number in range(recent, 3000)]


def test_the_most_recent_event_is_sent_however_long_it_is(view):
    lines = [line_of(new_event()) for _ in range(4000)]
    last = line_of(new_event(currentStage="x" * 1_500_000))
    view.log.write_bytes(b"".join(lines) + last)
    recent = next(n for n in range(4000) if sum(map(len, [*lines[n:], last])) < 2 * 2**20)
    with Stream(view.port) as stream:
        assert stream.next()[1] == json.loads(lines[recent])


def test_sixteen_viewers_take_no_place_and_delay_no_end(serve):
    server = serve("--max-connections", "2", SKYPE_VIEW_PASSWORD=PASSWORD)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.port)) for _ in range(16)]
        assert [stream.status for stream in streams] == [200] * 16
        assert view_status(server) == 503
        assert server.deliver(new_event())[0] == 200
        streams[-1].next()  # so that nothing is left unread, which would reset the connection
        streams[-1].close()
        assert until(lambda: view_status(server) == 200, 10)
        begun = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begun < 10


def test_a_stop_ends_a_stream_in_order(serve):
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD)
    with Stream(server.port) as stream:
        assert stream.status == 200
        server.process.terminate()
        assert stream.file.read() == b""  # up to the closure alert of TLS: else this raises
    assert server.process.wait(40) == 0


def test_a_stop_waits_for_no_viewer_that_takes_nothing(serve):
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD, limits={"VIEW_BYTES": 2**25})
    # More than the kernel takes for it.
    server.log.write_bytes(b"".join(numbered_line(number, 2**20)[1] for number in range(20)))
    with Stream(server.port) as stream:
        assert stream.status == 200
        begun = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begun < 5


def test_a_viewer_that_takes_nothing_loses_its_place(serve):
    server = serve("--request-timeout", "0.5", SKYPE_VIEW_PASSWORD=PASSWORD,
                   limits={"VIEWERS": 1, "VIEW_BYTES": 2**25})
    # More than the kernel takes for it.
    server.log.write_bytes(b"".join(numbered_line(number, 2**20)[1] for number in range(20)))
    with Stream(server.port) as stream:
        assert stream.status == 200 and view_status(server) == 503
        assert until(lambda: view_status(server) == 200, 5)


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux' /proc")
def test_a_viewer_s_machine_is_asked_whether_it_is_still_there(view):
    with Stream(view.port) as stream:
        ours, its = (f"0100007F:{port:04X}" for port in (view.port, stream.socket.getsockname()[1]))

        def timers():
            rows = map(str.split, pathlib.Path("/proc/net/tcp").read_text().splitlines())
            return [row[5][:2] for row in rows if row[1:3] == [ours, its]]

        assert until(lambda: timers() == ["02"])  # keepalive (proc(5))


def test_a_silent_stream_has_a_heartbeat_that_a_script_can_hear(serve):
    limits = {"HEARTBEAT_SECONDS": 0.3, "VIEW_PAUSE": 0.02}
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD, limits=limits)
    begun = time.monotonic()
    with Stream(server.port) as stream:
        stream.hear(2)
        assert time.monotonic() - begun > 0.6


def test_a_stream_ends_when_the_password_changes(serve, tmp_path):
    (tmp_path / ".env").write_text(f"SKYPE_VIEW_PASSWORD={PASSWORD}\n")
    server = serve()
    with Stream(server.port) as stream:
        (tmp_path / ".env").write_text("SKYPE_VIEW_PASSWORD=another\n")
        server.hang_up("read again")
        assert until(stream.ended)
    assert get(server, "/", basic(PASSWORD))[0] == 401
    assert get(server, "/", basic("another"))[0] == 200


class Browser:
    """Headless Chromium, driven over a pipe (DevTools protocol: JSON, NUL ends a message)."""

    def __init__(self, folder):
        there, self.to = os.pipe()
        self.back, back = os.pipe()
        command = [program("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--ignore-certificate-errors", "--no-first-run",
                   "--disable-background-networking", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", *command],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self.buffer = b""
        self.number = 0
        self.events = []
        self.session = {}
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        hasten = "const slow = setInterval; setInterval = act => slow(act, 50)"
        self.call("Page.addScriptToEvaluateOnNewDocument", source=hasten)

    def call(self, method, **params):
        """Return the result of a method of the protocol; keep the events that come before it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def next_message(self):
        while b"\0" not in self.buffer:
            received = os.read(self.back, 65536)
            assert received, "the browser has ended"
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"]
        return result.get("value")

    def texts(self, selector):
        """Return the texts of the elements that a selector finds."""
        return self.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")

    def cell(self, number):
        """Return the text of the first row's nth cell."""
        return self.texts("#rows tr:first-child > *")[number]

    def wait_for(self, script):
        assert until(lambda: self.run(script)), (script, self.run("document.body.innerText"))

    def wait_for_rows(self, count):
        self.wait_for(f"document.querySelectorAll('#rows tr').length == {count} && !changed.size")

    def open(self, port, password):
        """Open the live view, and wait until it is connected."""
        self.events.clear()
        password = urllib.parse.quote(password)
        self.call("Page.navigate", url=f"https://viewer:{password}@localhost:{port}/")
        self.wait_for("document.querySelector('#state')?.className == 'live'")

    def check(self, port):
        """Check that the page threw and logged nothing, and loaded nothing from elsewhere."""
        noise = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        assert [e for e in self.events if e["method"] in noise and "401" not in json.dumps(e)] == []
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        ours = re.compile(rf"https://([^@/]*@)?localhost:{port}/|data:")
        assert urls and all(map(ours.match, urls)), urls

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(view, browser):
    """The page of a log, in a browser; what it throws or loads from elsewhere fails the test."""
    browser.open(view.port, PASSWORD)
    yield browser
    browser.check(view.port)


def show(view, page, *bodies):
    """Deliver events of as many interviews, and wait until each has its row."""
    for body in bodies:
        assert view.deliver(body)[0] == 200
    page.wait_for_rows(len(bodies))


def time_ago(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%S.1234567Z", time.gmtime(time.time() - seconds))


def test_a_delivery_appears_without_a_reload(view, page):
    page.wait_for("!document.querySelector('#empty').hidden")
    show(view, page, new_event(interviewCode="code"))
    assert page.cell(0) == "code"
    assert page.cell(1).startswith("S?SchedulingTimecandidate or interviewer is asked")
    assert page.run("document.querySelector('#empty').hidden")


@pytest.mark.parametrize("text", [
    '<script>alert(1)</script>"><img src=x onerror=alert(2)>',
    "\u202etxet",
    "x" * 10_000,
], ids=["markup", "bidi", "long"])
def test_hostile_text_stays_text_in_its_place(view, page, text):
    stage = {"value": text, "metadata": text}
    body = new_event(interviewCode=text[:999], previousStage=stage, currentStage=stage)
    show(view, page, body)
    shown = text.replace("\u202e", "\\u202e")
    assert page.cell(0) == shown[:999]
    assert shown[:100] in page.cell(1) and page.cell(1).endswith(shown)
    assert page.texts("img, #rows script") == []
    for width in (390, 1280):
        screen = {"height": 800, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", width=width, **screen)
        assert page.run("document.documentElement.scrollWidth") <= width


def test_a_path_has_times_and_gaps(view, page):
    started = {"value": "InterviewStarted"}
    failed = {"value": "InterviewFailed"}
    deliver_new(view, interviewCode="code", timestamp="2018-02-26T17:50:17Z")
    deliver_new(view, interviewCode="code", timestamp="2018-02-26T19:53:17Z",
                previousStage=started, currentStage=failed)
    page.wait_for("document.querySelectorAll('#rows li').length == 2")
    first, second = page.texts("#rows li")
    assert first.startswith("S?SchedulingTime") and first.endswith("2 h 3 min")
    assert second.startswith("gap: came from InterviewStartedI!InterviewFailed")
    assert len(page.texts(".gap")) == 1


@pytest.mark.parametrize(("seconds", "shown"), [
    (-20, r"just now"),
    (20, r"just now"),
    (200, r"3 min ago"),
    (3500, r"58 min ago"),
    (3700, r".*\d:\d\d.*"),
    (400 * 86400, r".*20\d\d.*\d:\d\d.*"),
])
def test_a_young_time_is_relative_and_exact_on_hover(view, page, seconds, shown):
    sent = time_ago(seconds)
    show(view, page, new_event(timestamp=sent))
    assert re.fullmatch(shown, page.cell(3))
    title = page.run("document.querySelector('time').title")
    assert re.fullmatch(rf"{sent}\nrecorded 20[^ ]*Z", title)


def test_a_relative_time_grows_while_the_page_is_open(view, page):
    show(view, page, new_event(timestamp=time_ago(20)))
    change = f"each => {{ each.dateTime = '{time_ago(320)}' }}"
    page.run(f"document.querySelectorAll('time').forEach({change})")
    assert until(lambda: page.cell(3) == "5 min ago" and page.cell(2).endswith("5 min ago"))


def test_the_twelve_stages_have_marks_of_their_own(view, page):
    show(view, page, *[new_event(currentStage={"value": stage}) for stage in sw.STAGES])
    assert len(set(page.texts("td:nth-child(2) .mark"))) == 12
    assert len(page.texts("td:nth-child(2) .Failed")) == 3


@pytest.mark.parametrize(("stage", "mark"), [
    ("InterviewRescheduled", "I\u2013"),
    ("Postponed2", "\u2013"),
    ("waiting", "\u2013"),
])
def test_a_documented_stage_of_another_form_has_a_mark(view, page, stage, mark):
    page.run(f"STAGES.set('{stage}', 'a new one')")
    show(view, page, new_event(currentStage={"value": stage}))
    assert page.cell(1) == f"{mark}{stage}a new one"


NO_OBJECT = "\u2013no stageits body is no plain JSON object: see the log"
NO_STAGE = "\u2013no stagethe event names no stage"
NEW_STAGE = "\u2013InterviewPostponednot a documented stage"


# Each row: a body, and what is shown as its code and as its stage.
@pytest.mark.parametrize(("body", "code", "stage"), [
    (b"{}", "no interview code", NO_STAGE),
    (b'{"interviewCode":"c","currentStage":7}', "c", NO_STAGE),
    (b'{"interviewCode":"c","currentStage":{"value":"InterviewPostponed"}}', "c", NEW_STAGE),
    (b'\xef\xbb\xbf{"interviewCode":"c"}', "c", NO_OBJECT),
    (b"[1]", "no interview code", NO_OBJECT),
    (b"no JSON \xff", "no interview code", NO_OBJECT),
])
def test_an_event_without_a_known_stage_is_shown_and_says_why(view, page, body, code, stage):
    show(view, page, body)
    assert [page.cell(0), page.cell(1)] == [code, stage]


def test_a_line_that_a_page_cannot_read_is_counted(view, page):
    view.log.write_bytes(line_of(new_event())[:-2] + b"\n" + line_of(new_event()))
    page.wait_for_rows(1)
    assert page.texts("#note") == ["1 of 1 interviews, 1 lines of the log could not be read"]


def test_two_hundred_interviews_are_listed_newest_change_first(view, page):
    codes = [f"code {number:03}" for number in range(200)]
    with open(view.log, "wb") as log:
        for number, code in enumerate(codes):
            log.write(line_of(new_event(interviewCode=code, timestamp=time_ago(9000 - number))))
    page.wait_for_rows(200)
    assert page.texts("#rows a") == codes[::-1]
    deliver_new(view, interviewCode="code 007", timestamp=time_ago(0))
    assert until(lambda: page.cell(0) == "code 007")


def test_a_page_follows_a_rotation_and_keeps_the_focus(view, page):
    show(view, page, new_event(interviewCode="before"))
    page.run("document.querySelector('#rows a').focus()")
    replace_log(view.log, "rename")
    deliver_new(view, interviewCode="after", timestamp=time_ago(0))
    page.wait_for_rows(2)
    assert page.cell(0) == "after"
    assert page.run("document.activeElement.textContent") == "before"


@pytest.mark.parametrize(("part", "rows"), [("two", 1), ("interview%20", 2), ("%", 0), ("", 2)])
def test_the_hash_of_an_address_is_a_filter(view, page, part, rows):
    codes = ("interview one", "interview two")
    show(view, page, *[new_event(interviewCode=code) for code in codes])
    page.run(f"location.hash = '{part}'")
    page.wait_for_rows(rows)


def test_a_page_that_hears_nothing_goes_on_where_it_was(view, page):
    show(view, page, new_event())
    page.run("source.first = true; wait = 100; heard = 0")
    page.wait_for("!source.first && document.querySelector('#state').className == 'live'")
    assert page.run("source.url").endswith(f"-{view.log.stat().st_size}")
    deliver_new(view)
    page.wait_for_rows(2)


def test_a_page_that_is_sent_an_event_twice_shows_it_once(view, page):
    show(view, page, new_event())
    page.run("source.close(); last = ''; connect()")
    deliver_new(view)
    page.wait_for_rows(2)
    assert len(page.texts("#rows li")) == 2


def test_a_page_hears_the_heartbeat(serve, browser):
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD, limits={"HEARTBEAT_SECONDS": 0.3})
    browser.open(server.port, PASSWORD)
    earlier = browser.run("heard -= 1000")
    browser.wait_for(f"heard > {earlier + 1000}")
    browser.check(server.port)


def test_a_page_says_that_its_receiver_has_gone(serve, browser):
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD)
    browser.open(server.port, PASSWORD)
    assert server.stop() == 0
    browser.wait_for("document.querySelector('#state').textContent == 'reconnecting'")


# --- The sender ---


def sent_to(port, *words, cwd, **environment):
    """Run `send` to this port of ours; return (exit code, stdout, stderr)."""
    url = f"https://localhost:{port}/"
    return run("send", url, *words, cwd=cwd, **{**OURS, **environment})


def test_send_delivers_and_says_what_became_of_it(serve, certificate, tmp_path):
    server = serve()
    words = ("--ca", certificate[0], "--stage", "InterviewStarted")
    code, out, err = sent_to(server.port, *words, cwd=tmp_path)
    (line,) = server.lines()
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"recorded {line['id']} in .* ms\n", out)
    assert line["data"]["currentStage"]["value"] == "InterviewStarted"


def test_send_delivers_a_file_as_it_is(serve, tmp_path):
    server = serve()
    body = new_event()
    (tmp_path / "event.json").write_bytes(body)
    for outcome in ("recorded", "duplicate"):
        code, out, _ = sent_to(server.port, "--insecure", "--file", "event.json", cwd=tmp_path)
        assert code == 0 and out.startswith(f"{outcome} {sha256(body)} in ")
    assert server.ids() == [sha256(body)]


def test_send_delivers_many_and_says_how_fast(serve, tmp_path):
    server = serve()
    words = ("--insecure", "--count", 50, "--concurrency", 4)
    code, out, _ = sent_to(server.port, *words, cwd=tmp_path)
    assert code == 0 and out.startswith("50 delivered, 0 refused in ")
    assert len(server.ids()) == 50


def test_a_certificate_that_send_distrusts_is_named_by_both(serve, tmp_path):
    server = serve()
    code, out, err = sent_to(server.port, cwd=tmp_path)
    assert (code, out) == (1, "") and "--ca" in err
    server.wait_for("TLS handshake failed: .*--cert the full chain")


def test_many_sends_of_which_none_arrives_have_no_latency(tmp_path):
    words = ("--insecure", "--count", 9, "--concurrency", 2)
    code, out, err = sent_to(free_port(), *words, cwd=tmp_path)
    assert code == 1 and "is the receiver running there?" in err
    assert re.fullmatch(r"0 delivered, 2 refused in [0-9.]+ s\n", out)


def test_a_refused_send_says_why_and_ends_with_1(serve, tmp_path):
    port = serve().port
    code, out, err = sent_to(port, "--insecure", cwd=tmp_path, SKYPE_API_SECRET="other")
    assert (code, out) == (1, "") and "401" in err and "signature" in err


# Each row: a certificate's first and last day, its name, and what the sender is told to do.
@pytest.mark.parametrize(("begin", "end", "name", "said"), [
    ("20200101", "20200102", "localhost", "certificate has expired.*look at this machine's clock"),
    ("20400101", "20400102", "localhost", "not yet valid.*look at this machine's clock"),
    ("20200101", "20400102", "other.host", "a name that it was issued for"),
])
def test_send_says_what_a_certificate_lacks(serve, tmp_path, begin, end, name, said):
    cert, key = make_dated_certificate(tmp_path, begin, end, name)
    server = serve("--cert", cert, "--key", key)
    code, out, err = sent_to(server.port, "--ca", cert, cwd=tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1) and re.search(said, err)


# Each row: a URL, and what the sender is told to look at.
@pytest.mark.parametrize(("url", "said"), [
    ("https://localhost:1/", "refused; is the receiver running there?"),
    ("https://no.such.host.invalid/", "is the name in the URL right?"),
])
def test_send_says_what_to_look_at_where_nobody_answers(tmp_path, url, said):
    code, out, err = run("send", url, cwd=tmp_path, **OURS)
    assert (code, out, err.count("\n")) == (1, "", 1) and said in err


def test_a_silence_is_said_to_be_a_firewall_s_perhaps():
    said = sw.describe_no_answer(socket.timeout("timed out"))
    assert said == "timed out; does a firewall keep the port closed?"


def test_send_delivers_to_the_path_and_query_of_its_url(serve, tmp_path):
    url = f"https://localhost:{serve('--path', '/hook').port}/hook?a=b"
    code, out, err = run("send", url, "--insecure", cwd=tmp_path, **OURS)
    assert (code, out[:9], err) == (0, "recorded ", "")


def test_send_says_that_plain_http_is_spoken_there(serve, tmp_path):
    server = serve("--behind-proxy")
    code, out, err = sent_to(server.port, "--insecure", cwd=tmp_path)
    assert (code, out) == (1, "") and "does not speak HTTPS" in err


@pytest.mark.parametrize(("busy", "says_so"), [(0.7, True), (0.5, False)])
def test_send_says_that_it_was_the_limit_where_it_was(busy, says_so):
    tally = sw.Tally()
    tally.add(200, {}, 1.0)
    text = tally.describe(1.0, busy)
    assert ("the sender itself was the limit" in text) == says_so
    assert text.startswith("1 delivered, 0 refused in 1.00 s: 1/s, p50 1.00 ms, p99 1.00 ms")


def test_send_is_not_the_limit_of_a_slow_disk(serve, tmp_path):
    server = serve()
    words = ("--insecure", "--count", 100, "--concurrency", 8)
    with faulty(server, "fdatasync:delay_enter=50000"):
        code, out, _ = sent_to(server.port, *words, cwd=tmp_path)
    assert code == 0 and out.startswith("100 delivered") and "the limit" not in out


def test_an_interrupted_send_says_what_was_delivered(serve, launch, certificate, tmp_path):
    server = serve()
    words = (f"https://localhost:{server.port}/", "--ca", certificate[0], "--count", "1000000")
    sender = Command(launch, tmp_path, "send", *words, **OURS)
    assert until(lambda: server.log.read_bytes().count(b"\n") > 20)
    code, out, err = sender.ended(signal.SIGINT)
    assert (code, err) == (1, "error: interrupted\n")
    assert 20 <= int(out.split()[0]) <= len(server.ids())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["send", "timeline", "fetch"])
def test_a_stdout_that_is_full_ends_with_1_and_one_line(shared, service, tmp_path, command):
    shared.deliver(new_event())
    service.has("x", reply(200, b"{}"))
    words = {
        "send": (f"https://localhost:{shared.port}/", "--insecure"),
        "timeline": (shared.log,),
        "fetch": ("x", "--url", service.url, "--insecure"),
    }[command]
    environment = {**CLEAN, **OURS, "PYTHONUNBUFFERED": ""}  # or each print fails
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, command, *words], cwd=tmp_path, env=environment,
                              stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: {command}: No space left on device\n")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["send", "--help"]])
def test_help_that_nobody_reads_ends_with_1_and_one_line(tmp_path, words):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = subprocess.run([*PROGRAM, *words], stdout=closed, stderr=subprocess.PIPE, text=True,
                              env={**CLEAN, "PYTHONUNBUFFERED": ""}, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.fullmatch("error: (serve|send): Broken pipe\n", done.stderr)


# Each row: what is wrong with a start or a command, which says so, and its exit code.
@pytest.mark.parametrize(("words", "code"), [
    (["--frobnicate"], 2),
    (["--cert", "missing"], 2),
    (["send", "https://localhost:1/"], 1),
    (["timeline", "odd"], 0),
], ids=str)
def test_a_stderr_that_is_full_changes_no_exit_code(tmp_path, words, code):
    (tmp_path / "odd").write_bytes(b"odd\n")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=full, cwd=tmp_path,
                              env={**CLEAN, **OURS, "PYTHONUNBUFFERED": ""}, check=False)
    assert (done.returncode, done.stdout) == (code, b"")


@pytest.mark.parametrize("words", [("send",), ("fetch", "x", "--url")])
@pytest.mark.parametrize(("url", "outcome"), [
    ("https://localhost:99999/", 2),
    ("https://localhost:x/", 2),
    ("https://[::1/", 2),
    ("https://localhost/\xe4", 2),
    ("https://a b/", 2),
    ("localhost:8443", 2),
    (f"https://{'a' * 64}.example/", 1),
    ("https://a..b/", 1),
])
def test_what_is_no_url_is_said_in_a_line(tmp_path, words, url, outcome):
    code, out, err = run(*words, url, cwd=tmp_path, **OURS)
    assert (code, out, err.count("\n")) == (outcome, "", 1)
    assert err.startswith("error: ") and "fault" not in err


@pytest.mark.parametrize(("code", "answer"), [
    (1, b"\x1b[2J\r\n\r\n"),
    (1, b"HTTP/1.1 \x1b[2J\r\n\r\n"),
    (0, b'HTTP/1.1 200 OK\r\n\r\n{"id":"\\u001b[2J\\u202e"}'),
    (1, b'HTTP/1.1 400 No\r\n\r\n{"detail":"\\u001b[2J\\u202e"}'),
])
def test_what_a_hostile_receiver_answers_is_shown_escaped(tmp_path, code, answer):
    def serve_once():
        with listener.accept()[0] as peer:
            peer.recv(65536)
            peer.sendall(answer)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):  # a close with data unread would reset
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        gather(1, serve_once)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        ended, *said = run("send", url, cwd=tmp_path, **OURS)
    text = "".join(said)
    assert ended == code
    assert "\\x1b[2J" in text and not re.search("[\x1b\u202e\r]", text)


PAGE_ADDRESS = r"\Athe live page, in a browser:  https://demo:([\w-]{20,})@127\.0\.0\.1:(\d+)/\n"
REMOVED = r"\nremoved (.+)\n\Z"


@pytest.fixture
def demo(launch, tmp_path):
    """Return a function that starts `demo`; its folder is made in one whose name has a space."""
    temporary = tmp_path / "a b"
    temporary.mkdir()

    def start_demo(*flags, patch="", **environment):
        """`patch` is Python that runs before the program."""
        (tmp_path / "sitecustomize.py").write_text(patch)
        places = {"TMPDIR": str(temporary), "PYTHONPATH": str(tmp_path)}
        return Command(launch, tmp_path, "demo", *flags, **{**places, **environment})

    start_demo.folders = lambda: list(temporary.iterdir())
    return start_demo


def test_demo_delivers_to_itself_and_ends_with_0(demo):
    shown = demo()
    line = json.loads(shown.says(r"200 recorded\nits line in .*\n\n(\{.*\})\n\n1\. ")[1])
    assert line["data"]["currentStage"]["value"] == "SchedulingTime"
    (folder,) = demo.folders()
    names = ("", ".env", "events.jsonl", "key.pem")
    assert [(folder / name).stat().st_mode & 0o077 for name in names] == [0] * 4
    code, out, err = shown.ended(signal.SIGINT)
    assert (code, re.search(REMOVED, out)[1], demo.folders()) == (0, str(folder), [])
    assert "1 recorded" in err


def test_demo_says_first_where_its_page_is_and_its_password(demo):
    shown = demo()
    password, port = shown.says(PAGE_ADDRESS).groups()
    shown.port = int(port)
    assert get(shown, "/")[0] == 401
    assert get(shown, "/", basic(password))[0] == 200
    code, _, err = shown.ended(signal.SIGINT)
    assert code == 0 and password not in err and "warning" not in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("moment", ["while its certificate is made", "while it serves"])
def test_demo_removes_its_folder_whatever_signal_ends_it(demo, name, moment):
    shown = demo()
    if moment == "while it serves":
        shown.says("README.md")
    assert until(demo.folders)
    code, out, _ = shown.ended(getattr(signal, name))
    assert code == 0 and re.search(REMOVED, out) and demo.folders() == []


def test_demo_on_a_port_that_is_taken_removes_its_folder(demo, shared):
    code, out, err = demo("--port", str(shared.port)).ended()
    assert (code, demo.folders()) == (2, [])
    assert re.fullmatch(REMOVED, f"\n{out}") and "in use" in err


NO_CONNECTION = """
import socket
def refuse(*_, **__):
    raise ConnectionRefusedError(111, "Connection refused")
socket.create_connection = refuse
"""


# Each row: what runs before the demo, its PATH, its exit code, what it says.
@pytest.mark.parametrize(("patch", "path", "code", "said"), [
    ("", "/missing", 2, "install openssl"),
    (NO_CONNECTION, os.environ["PATH"], 1, "error: demo: Connection refused\n"),
], ids=["openssl", "connection"])
def test_a_demo_that_fails_says_why_and_removes_its_folder(demo, patch, path, code, said):
    ended, out, err = demo(patch=patch, PATH=path).ended()
    assert (ended, demo.folders()) == (code, [])
    assert re.search(REMOVED, f"\n{out}") and said in err


NO_LOCALHOST = """
import socket
real = socket.getaddrinfo
def resolve(host, *rest, **options):
    if host == "localhost":
        raise socket.gaierror(-2, "Name or service not known")
    return real(host, *rest, **options)
socket.getaddrinfo = resolve
"""


def test_demo_works_where_localhost_does_not_resolve(demo):
    shown = demo(patch=NO_LOCALHOST)
    shown.says("200 recorded")
    assert shown.ended(signal.SIGINT)[0] == 0


def test_what_demo_prints_can_be_pasted_into_a_shell(demo):
    shown = demo()
    send = shown.says(r"1\. deliver another:  (.*)\n")[1]
    tail = shown.says(r"2\. watch the log:    (.*)\n")[1]
    for words, pattern in ((send, r"recorded .*\n"), (tail.replace("-F", "-n 2"), r".*\n.*\n")):
        said = subprocess.run(["bash", "-c", words], capture_output=True, check=True, env=CLEAN)
        assert re.fullmatch(pattern, said.stdout.decode())
    assert shown.ended(signal.SIGINT)[0] == 0


def test_demo_shows_in_a_browser_what_is_sent(demo, tmp_path):
    with contextlib.closing(Browser(tmp_path / "browser")) as browser:
        shown = demo()
        send = shown.says(r"1\. deliver another:  (.*)\n")[1]
        browser.call("Page.navigate", url=shown.says(r"browser:  (\S+)")[1])
        browser.wait_for("document.querySelectorAll('#rows tr').length == 1")
        assert browser.run("document.body.innerText.includes('SchedulingTime')")
        browser.run("window.notReloaded = true")
        subprocess.run(["bash", "-c", send], check=True, env=CLEAN, stdout=subprocess.DEVNULL)
        browser.wait_for("document.querySelectorAll('#rows tr').length == 2")
        assert browser.run("window.notReloaded") is True
        assert shown.ended(signal.SIGINT)[0] == 0


# --- Fetch ---


def asks_for_data(authorization):
    """Return whether this is a new token for interview data, as the service's pages have it."""
    scheme, _, jwt = authorization.partition(" ")
    header, payload, _ = (base64.urlsafe_b64decode(part + "==") for part in jwt.split("."))
    claims = json.loads(payload)
    return (scheme == "Bearer" and json.loads(header)["alg"] == "HS256"
            and jws(header, payload) == jwt
            and sorted(claims) == ["exp", "iat", "iss", "jti"] and claims["iss"] == KEY
            and str(uuid.UUID(claims["jti"])) == claims["jti"]
            and claims["exp"] == claims["iat"] + 10 and abs(claims["iat"] - time.time()) < 5)


def reply(status, content=b"", **fields):
    """Return an answer of `Service`; the name of each field has _ for -."""
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content_Length": len(content), **fields}.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def drip(content):
    """Return an answer of `Service` that begins with `content` and then has a byte now and then."""
    def answer(handler):
        handler.wfile.write(content)
        for _ in range(200):  # for ten seconds
            if not handler.server.over.wait(0.05):
                handler.wfile.write(b" ")

    return answer


def flood(head):
    """Return an answer of `Service` that is longer than any interview; `head` is in its head."""
    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        for _ in range(70):
            handler.wfile.write(b" " * 10**6)

    return answer


def echo(handler):
    """Answer as `Service` does where the token is wrong, with the token wherever it can be."""
    token = handler.headers["Authorization"]
    handler.wfile.write(f"HTTP/1.1 401 {token}\r\nX: {token}\r\n\r\n{token}".encode())


class Service(http.server.ThreadingHTTPServer):
    """A stub of the service: `answers` by target, but 401 where the token is not right."""

    daemon_threads = True

    def __init__(self, certificate):
        self.answers = {}
        self.asked = []
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), self.Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://localhost:{self.server_port}/api/interviews"
        gather(1, functools.partial(self.serve_forever, 0.01))  # seconds until it sees its end

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            answer = self.server.answers.get(self.path, reply(404))
            if not asks_for_data(self.headers["Authorization"]):
                answer = reply(401)
            with contextlib.suppress(*CUT_OFF):
                answer(self)

        def log_message(self, *_):
            pass

    def handle_error(self, *_):  # of handshakes and peers that have gone
        pass

    def has(self, code, answer):
        """Set what is answered for a code."""
        self.answers[f"/api/interviews/{code}"] = answer


@pytest.fixture
def service(certificate):
    with Service(certificate) as stub:
        yield stub
        stub.over.set()
        stub.shutdown()


@pytest.fixture
def fetch(service, certificate, tmp_path):
    """Return a function that runs `fetch` on the stub."""
    def run_fetch(*words, **environment):
        flags = ("--url", service.url, "--ca", certificate[0])
        return run("fetch", *words, *flags, cwd=tmp_path, **{**OURS, **environment})

    return run_fetch


# Each row: an answer of several lines or odd JSON, and the line that is printed.
@pytest.mark.parametrize(("answer", "line"), [
    (b'{\r\n  "notes": "\xc3\xa0\\nvu \\ud83d"}\n', '{    "notes": "\u00e0\\nvu \\ud83d"}'),
    (b'{"n": [1.0, 1e400],\r\n\t"n": 1\r}', '{"n": [1.0, 1e400],  \t"n": 1 }'),
    (b"\xef\xbb\xbf{}\r\n", "{}"),
    (b"[]", "[]"),
])
def test_an_answer_of_any_json_becomes_one_line(service, fetch, answer, line):
    service.has("x", reply(200, answer))
    environment = {"https_proxy": "http://127.0.0.1:9/", "LC_ALL": "C"}
    assert fetch("x", **environment) == (0, f"{line}\n", "")
    assert service.asked == ["/api/interviews/x"]


NOT_JSON = "200, but its content is not JSON"


# Each row: what is answered for one of three codes, and what is said of it.
@pytest.mark.parametrize(("answer", "said"), [
    (reply(302, Location="a"), "302 Found (a redirect, which is not followed; is --url right?)"),
    (reply(300), "300 Multiple Choices (a redirect, which is not followed; is --url right?)"),
    (reply(400), "400 Bad Request"),
    (echo, "401 Unauthorized (are key and secret right, and this machine's clock?)"),
    (reply(404), "404 Not Found (is the code right? New data can be 30 s late)"),
    (reply(429, Retry_After=7), "429 Too Many Requests, Retry-After: 7"),
    (reply(503, Retry_After="eyJ"), "503 Service Unavailable"),
    (reply(503, Retry_After="Fri, 27 Nov 2026 08:00:00 GMT"),
     "503 Service Unavailable, Retry-After: Fri, 27 Nov 2026 08:00:00 GMT"),
    (reply(500, b"{}"), "500 Internal Server Error"),
    (reply(299, b"{}"), "299"),
    (reply(200), "200, but its content is empty"),
    (reply(200, b"no"), f"{NOT_JSON} (Expecting value: line 1 column 1 (char 0))"),
    (reply(200, b'{"n": NaN}'), "200, but its content holds NaN, which is not JSON"),
    (reply(200, b'"\n"'), f"{NOT_JSON} (Invalid control character at: line 1 column 2 (char 1))"),
    (reply(200, b"[" * 9999), "200, but its content is nested deeper than 64 containers"),
    (reply(200, b"{}{}"), "200, but its content goes on after its JSON value"),
    (reply(200, b"{}", Content_Length=3), "no whole HTTP answer (IncompleteRead)"),
    (lambda handler: None, "no whole HTTP answer (RemoteDisconnected)"),
    (lambda handler: handler.wfile.write(b"\x1b[2J\r\n"), "no whole HTTP answer (BadStatusLine)"),
    (flood(b""), "its answer is longer than 67108864 bytes"),
    (flood(b"Content-Length: 70000000\r\n"), "its answer is longer than 67108864 bytes"),
])
def test_what_fails_is_said_and_the_others_are_fetched(service, fetch, answer, said):
    service.has("a", reply(200, b"[1]"))
    service.has("b", answer)
    service.has("c", reply(200, b"[2]"))
    assert fetch("a", "b", "c") == (1, "[1]\n[2]\n", f"error: b: {said}\n")
    assert len(service.asked) == 3


def test_a_chunk_of_a_negative_size_is_not_read_for_ever(service, fetch):
    sent = []

    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        for _ in range(400):
            sent.append(handler.wfile.write(bytes(10**6)))

    service.has("a", answer)
    service.has("b", reply(200, b"{}"))
    code, out, err = fetch("a", "b")
    assert (code, out, err.count("\n")) == (1, "{}\n", 1)
    assert len(sent) < 200  # the limit is 64 MiB, and as much again of framing


def test_an_answer_that_memory_does_not_hold_leaves_the_others(in_process, monkeypatch):
    monkeypatch.setattr(sw, "fetch_interview", unittest.mock.Mock(side_effect=[MemoryError, b"{}"]))
    assert in_process("fetch", "a", "b") == (1, "{}\n", "error: a: MemoryError\n")


@pytest.mark.parametrize("answer", [
    lambda handler: handler.server.over.wait(10),
    drip(b""),
    drip(b"HTTP/1.1 200 OK\r\n"),
    drip(b"HTTP/1.1 200 OK\r\n\r\n{}"),
    drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n1"),
])
def test_an_answer_that_does_not_end_in_time_is_given_up(
        service, certificate, in_process, monkeypatch, answer):
    service.has("slow", answer)
    service.has("good", reply(200, b"{}"))
    monkeypatch.setattr(sw, "FETCH_SECONDS", 1.0)
    words = ("fetch", "slow", "good", "--url", service.url, "--ca", certificate[0])
    begun = time.monotonic()
    assert in_process(*words) == (1, "{}\n", "error: slow: no whole answer within 1 s\n")
    assert 1 <= time.monotonic() - begun < 5


@pytest.mark.parametrize(("url", "port"), [
    ("https://x/", 443),
    ("http://x/", 80),
    ("http://x:8080/", 8080),
])
def test_a_url_without_a_port_has_that_of_its_scheme(monkeypatch, url, port):
    asked = unittest.mock.Mock(side_effect=OSError)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pytest.raises(OSError):
        sw.connect_by(time.monotonic() + 1, sw.split_url(url), None)
    assert asked.call_args[0] == ("x", port)


def test_a_deadline_that_is_over_leaves_no_time():
    assert sw.time_left(time.monotonic() + 9) > 8
    with pytest.raises(TimeoutError, match="timed out"):
        sw.time_left(time.monotonic())


def test_a_handshake_that_does_not_end_in_time_is_given_up(monkeypatch):
    monkeypatch.setattr(sw, "FETCH_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        base = sw.split_url(f"https://localhost:{mute.getsockname()[1]}/")
        end = threading.Timer(10, mute.shutdown, [socket.SHUT_RDWR])
        end.start()
        with pytest.raises(OSError, match="timed out"):
            sw.fetch_interview("x", base, CREDENTIAL, sw.client_context(None, True))
        end.cancel()


def test_a_silent_address_leaves_the_others_their_time(service, monkeypatch):
    found = [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.2", "127.0.0.1")]
    real = socket.getaddrinfo

    def resolve(host, *rest, **options):
        return found if host == "localhost" else real(host, *rest, **options)

    service.has("x", reply(200, b"{}"))
    monkeypatch.setattr(sw, "FETCH_SECONDS", 2.0)
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.2", service.server_port)))
        silent.listen(0)
        for _ in range(4):  # its queue is full then
            peer = stack.enter_context(socket.socket())
            peer.setblocking(False)
            peer.connect_ex(silent.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        base = sw.split_url(service.url)
        context = sw.client_context(None, True)
        assert sw.fetch_interview("x", base, CREDENTIAL, context) == b"{}"


def test_a_certificate_that_is_not_trusted_gets_no_token(service, tmp_path):
    service.has("x", reply(200, b"{}"))
    words = ("fetch", "x", "--url", service.url)
    code, out, err = run(*words, cwd=tmp_path, **OURS)
    assert (code, out, service.asked) == (1, "", [])
    assert "not trusted here" in err and "--ca" in err
    assert run(*words, "--insecure", cwd=tmp_path, **OURS) == (0, "{}\n", "")


@pytest.mark.parametrize(("code", "target"), [
    ("../admin", "..%2Fadmin"),
    ("a/b?c#d%2e", "a%2Fb%3Fc%23d%252e"),
    ("\u00e4 \u202e", "%C3%A4%20%E2%80%AE"),
    ("x\r\nHost: y", "x%0D%0AHost%3A%20y"),
    ("...", "..."),
    ("~-_", "~-_"),
])
def test_a_code_of_any_characters_is_one_path_segment(service, fetch, code, target):
    service.has(target, reply(200, b"{}"))
    assert fetch(code) == (0, "{}\n", "")
    assert service.asked == [f"/api/interviews/{target}"]


def test_what_is_no_code_is_refused_and_the_others_are_fetched(service, fetch):
    service.has("x", reply(200, b"{}"))
    code, out, err = fetch(".", "..", "", "x")
    assert (code, out, service.asked) == (1, "{}\n", ["/api/interviews/x"])
    assert err == "".join(f"error: {each}: that is no interview code\n" for each in (".", "..", ""))


@pytest.fixture
def fetching(service, certificate, launch, tmp_path):
    """`fetch -`, which waits for codes."""
    words = ("fetch", "-", "--url", service.url, "--ca", certificate[0])
    # With PYTHONUNBUFFERED, each print would be written at once.
    environment = {**OURS, "PYTHONDEVMODE": "1", "PYTHONUNBUFFERED": ""}
    return Command(launch, tmp_path, *words, **environment)


def test_codes_on_stdin_are_fetched_as_they_come(service, fetching):
    for code, line in (("a", b"a\n"), ("b", b"b\r\n"), ("%C3%A4", b"\xc3\xa4\n")):
        service.has(code, reply(200, b'{"is": "%b"}' % code.encode()))
        fetching.is_told(line)
        fetching.says(f'{{"is": "{code}"}}\n$')
    assert fetching.ended()[::2] == (0, "")


def test_the_last_code_on_stdin_needs_no_newline(service, fetching):
    service.has("b", reply(200, b"{}"))
    fetching.is_told(b"\n\x1b\xff\nb")
    code, out, err = fetching.ended()
    assert (code, out) == (1, "{}\n")
    assert err.startswith("error: : that is no interview code\nerror: \\x1b\\udcff: 404 ")
    assert service.asked == ["/api/interviews/%1B%FF", "/api/interviews/b"]


@pytest.mark.parametrize(("codes", "status"), [(b"a\n", 0), (b".\na\n", 1)])
def test_ctrl_c_ends_the_wait_for_codes(service, fetching, codes, status):
    service.has("a", reply(200, b"{}"))
    fetching.is_told(codes)
    fetching.says("{}\n")
    assert fetching.ended(signal.SIGINT)[:2] == (status, "{}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_is_on_its_way_ends_with_1(service, fetching, number):
    service.has("a", lambda handler: handler.server.over.wait())
    fetching.is_told(b"a\n")
    assert until(lambda: service.asked)
    assert fetching.ended(number) == (1, "", "error: a: interrupted\n")


def test_no_client_leaves_a_socket_or_file_open(demo, fetching, service):
    service.has("x", reply(200, b"{}"))
    shown = demo(PYTHONDEVMODE="1")
    send = shown.says(r"1\. deliver another:  (.*)\n")[1] + " --count 9 --concurrency 3"
    sent = subprocess.run(["bash", "-c", send], capture_output=True, text=True, check=True,
                          env={**CLEAN, "PYTHONDEVMODE": "1"})
    fetching.is_told(b"x\n")
    assert fetching.ended() == (0, "{}\n", "")
    assert "ResourceWarning" not in sent.stderr + shown.ended(signal.SIGINT)[2]


def test_a_reader_that_has_gone_ends_fetch_with_1(service, certificate, tmp_path):
    service.has("a", reply(200, b"{}"))
    there, back = os.pipe()
    os.close(there)
    words = [*PROGRAM, "fetch", "a", "a", "--url", service.url, "--ca", certificate[0]]
    done = subprocess.run(words, cwd=tmp_path, env={**CLEAN, **OURS}, stdout=back,
                          stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    os.close(back)
    assert (done.returncode, done.stderr) == (1, "error: fetch: Broken pipe\n")
    assert len(service.asked) == 1


def test_a_closed_stdin_has_no_codes(service, certificate, launch):
    words = [*PROGRAM, "fetch", "-", "--url", service.url, "--ca", certificate[0]]
    closed = launch("bash", "-c", 'exec "$@" <&-', "bash", *words, env={**CLEAN, **OURS})
    assert closed.wait(30) == 0


@pytest.mark.parametrize(("url", "said"), [
    ("ftp://x/", "is not a URL"),
    ("https://x/?a=b", "has to end with its path"),
    ("https://x/#a", "has to end with its path"),
])
def test_a_base_that_codes_cannot_follow_is_refused(tmp_path, url, said):
    code, out, err = run("fetch", "x", "--url", url, cwd=tmp_path, **OURS)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


# --- The timeline ---


def stage_lines(code, *changes):
    """Return log lines of one interview: (previous, stage, its second of the day, its arrival)."""
    lines = []
    for previous, stage, second, arrival in changes:
        clock = time.strftime("%H:%M:%S", time.gmtime(second))
        body = new_event(interviewCode=code, previousStage=previous and {"value": previous},
                         currentStage={"value": stage}, timestamp=f"2026-11-24T{clock}.0000001Z")
        lines.append(line_of(body, 1_800_000_000 + arrival))
    return lines


@pytest.fixture
def timeline(tmp_path):
    """Return a function that runs `timeline` on a log of these lines."""
    def run_timeline(lines, *flags):
        (tmp_path / "log").write_bytes(b"".join(lines))
        return run("timeline", "log", *flags, cwd=tmp_path)

    return run_timeline


COURSE = (
    ("InterviewCreated", "SchedulingTime", 36000, 0),
    ("SchedulingCompleted", "InterviewStarted", 36130, 1),
    ("SchedulingTime", "SchedulingCompleted", 36060, 2),
    ("InterviewCompleted", "FeedbackCollecting", 39590, 3),
)
LINES = stage_lines("code", *COURSE)
STEPS = """
  2026-11-24 10:00:00  SchedulingTime       for 1 min
  2026-11-24 10:01:00  SchedulingCompleted  for 1 min 10 s  late: arrived after a later one
  2026-11-24 10:02:10  InterviewStarted     for 57 min 40 s
  2026-11-24 10:59:50  FeedbackCollecting   now  gap: came from InterviewCompleted

"""


def test_a_timeline_is_in_the_events_order_with_gaps(timeline):
    assert timeline(LINES) == (0, "code" + STEPS, "")


def test_a_timeline_of_several_logs_has_each_event_once(tmp_path):
    (tmp_path / "one").write_bytes(b"".join(LINES[:3]))
    (tmp_path / "two").write_bytes(b"".join(LINES[2:]).rstrip(b"\n"))  # its last line is not ended
    assert run("timeline", "one", "two", "two", cwd=tmp_path) == (0, "code" + STEPS, "")


def test_a_timeline_in_json_has_instants_and_what_is_odd(timeline):
    shown = json.loads(timeline(LINES, "--json")[1])
    assert (shown["interview"], shown["stage"]) == ("code", "FeedbackCollecting")
    assert shown["events"][0] == {"time": "2026-11-24T10:00:00.0000001Z", "stage": "SchedulingTime",
                                  "previous": "InterviewCreated", "seconds": 60.0}
    assert [step.get("gap") for step in shown["events"]] == [None, None, None, True]
    assert [step.get("late") for step in shown["events"]] == [None, True, None, None]


# Each row: which event comes next, and the gap before it.
@pytest.mark.parametrize(("following", "gaps"), [
    (2, []),
    (1, ["gap: came from SchedulingCompleted"]),
])
def test_an_event_without_a_stage_makes_and_hides_no_gap(timeline, following, gaps):
    stageless = new_event(interviewCode="code", currentStage=None, timestamp="2026-11-24T10:00:30Z")
    shown = timeline([LINES[0], line_of(stageless), LINES[following]])[1]
    assert re.findall("gap: .*", shown) == gaps


def test_events_of_one_instant_are_0_seconds_apart(timeline):
    lines = stage_lines("code", ("A", "B", 0, 0), ("B", "C", 0, 1))
    shown = json.loads(timeline(lines, "--json")[1])
    assert [step.get("seconds") for step in shown["events"]] == [0.0, None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_timeline_cut_short_ends_with_1_and_one_line(launch, tmp_path, number):
    reading = Command(launch, tmp_path, "timeline", "-")
    reading.is_told(LINES[0] * 1000)  # more than a pipe takes: it returns once most is read
    assert reading.ended(number) == (1, "", "error: timeline: interrupted\n")


def test_a_stage_that_comes_twice_is_shown_twice(timeline):
    lines = stage_lines("code", ("A", "B", 0, 0), ("B", "A", 1, 1), ("A", "B", 2, 2))
    shown = json.loads(timeline(lines, "--json")[1])
    assert [step["stage"] for step in shown["events"]] == ["B", "A", "B"]


def test_the_deepest_event_is_in_the_timeline(timeline):
    deepest = b'{"interviewCode":"deep","x":' + b"[" * 63 + b"]" * 63 + b"}"
    code, out, err = timeline([line_of(deepest)])
    assert (code, out.splitlines()[0], err) == (0, "deep", "")


@pytest.mark.parametrize(("code", "shown"), [("code\u202e", "code\\u202e" + STEPS), ("none", "")])
def test_a_timeline_of_one_interview_has_that_one(timeline, code, shown):
    lines = [*stage_lines("code\u202e", *COURSE), *stage_lines("other", *COURSE)]
    assert timeline(lines, "--interview", code) == (0, shown, "")


def test_the_interview_that_changed_last_is_at_the_end(timeline):
    lines = [*stage_lines("plain", (None, "First", 0, 0), ("\x1b[2J", "Second\u202e", 1, 1)),
             line_of(new_event(interviewCode="by arrival", timestamp=None), 1_800_000_000),
             line_of(b"{}", 0)]
    assert timeline(lines)[1:] == ("""-
  1970-01-01 00:00:00  -                    now

plain
  2026-11-24 00:00:00  First                for 1 s
  2026-11-24 00:00:01  Second\\u202e         now  gap: came from \\x1b[2J

by arrival
  2027-01-15 08:00:00  SchedulingTime       now

""", "")


@pytest.mark.parametrize("data", [
    '"data_base64":"77u/e30="',  # a byte order mark, then an object
    '"data_base64":"eyJjdXJyZW50U3RhZ2UiOnsidmFsdWUiOiJBIn19"',  # an object with a stage
    '"data_base64":"/w=="',
    '"data":[]',
    '"data":{"currentStage":{"value":7},"previousStage":"A"}',
    '"extension":1',
])
def test_an_event_that_names_no_stage_is_shown_without_one(timeline, data):
    body = new_event(interviewCode="odd", timestamp="2026-11-24T10:00:00Z")
    line = line_of(body).partition(b'"data":')[0] + data.encode() + b"}\n"
    shown = "odd\n  2026-11-24 10:00:00  -                    now\n\n"
    assert timeline([line]) == (0, shown, "")
    assert json.loads(timeline([line], "--json")[1]) == {
        "interview": "odd", "stage": None, "events": [{"time": "2026-11-24T10:00:00.0000000Z"}]}


@pytest.mark.parametrize(("odd", "blank", "foreign"), [
    (b"   ", 2, 1),
    (b"foreign", 1, 2),
    (b"{}", 1, 2),
    (b"[]", 1, 2),
    (b"1", 1, 2),
    (b"\xff", 1, 2),
    (b"[" * 2000, 1, 2),
    (b"\0" * 99, 1, 2),
])
def test_a_timeline_skips_and_counts_what_is_no_event(timeline, odd, blank, foreign):
    code, out, err = timeline([odd, b"\n", LINES[0], b"\n", LINES[0][:-2], b"\n"], "--json")
    assert (code, err) == (0, f"skipped {blank} blank and {foreign} foreign lines\n")
    assert len(json.loads(out)["events"]) == 1


@pytest.mark.parametrize("change", [
    {"id": ["x"]}, {"id": 5}, {"id": None},
    {"subject": 7}, {"subject": ["x"]}, {"subject": None},
    {"time": 5}, {"time": None}, {"time": "now"},
    {"recordedtime": None}, {"recordedtime": "now"}], ids=str)
def test_a_line_whose_members_are_of_other_types_is_foreign(timeline, change):
    line = json.dumps({**json.loads(LINES[0]), **change}).encode() + b"\n"
    assert timeline([line]) == (0, "", "skipped 0 blank and 1 foreign lines\n")


@pytest.mark.parametrize(("sent", "instant"), [
    ("1970-01-01T00:00:01Z", "1970-01-01T00:00:01.0000000Z"),
    ("1970-01-01t01:00:00+01:00", "1970-01-01T00:00:00.0000000Z"),
    ("1970-01-01T00:00:00-00:30", "1970-01-01T00:30:00.0000000Z"),
    ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00.0000000Z"),
    ("1970-01-01T00:00:00.00000019Z", "1970-01-01T00:00:00.0000001Z"),
    ("1969-12-31T23:59:59Z", "1969-12-31T23:59:59.0000000Z"),
    ("2000-03-01T00:30:00+01:00", "2000-02-29T23:30:00.0000000Z"),
    ("0001-01-01T00:00:00+01:00", None),  # which leads out of the calendar
    ("9999-12-31T23:59:59.5-00:01", None),
])
def test_a_time_is_an_instant(timeline, sent, instant):
    line = line_of(new_event(timestamp=sent))
    code, out, _ = timeline([line], "--json")
    assert code == 0 and json.loads(out)["events"][0].get("time") == instant
    code, out, _ = timeline([line])
    assert code == 0 and "SchedulingTime" in out


def test_a_timeline_reads_compressed_logs_and_stdin(tmp_path):
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(b"".join(LINES[:2])))
    (tmp_path / "log").write_bytes(b"".join(LINES[1:3]))
    done = subprocess.run([*PROGRAM, "timeline", "log", "-", "log.1.gz"], cwd=tmp_path,
                          env={**CLEAN, "TZ": "UTC"}, input=b"".join(LINES[2:]),
                          capture_output=True, check=True)
    assert (done.stdout.decode(), done.stderr) == ("code" + STEPS, b"")


def test_a_packed_log_that_is_followed_is_read_once(tmp_path):
    (tmp_path / "log.1").write_bytes(gzip.compress(b"".join(LINES)))
    words = [*PROGRAM, "timeline", "--follow", "log.1"]
    shown = subprocess.check_output(words, cwd=tmp_path, env={**CLEAN, "TZ": "UTC"}, timeout=30)
    assert shown.decode() == "code" + STEPS


@pytest.mark.parametrize("name", ["log.1", "-"])
def test_a_packed_log_is_read_whatever_its_name_is(tmp_path, name):
    (tmp_path / "log.1").write_bytes(gzip.compress(b"".join(LINES)))
    with open(tmp_path / "log.1", "rb") as packed:
        shown = subprocess.check_output([*PROGRAM, "timeline", name], cwd=tmp_path, stdin=packed,
                                        env={**CLEAN, "TZ": "UTC"}, stderr=subprocess.STDOUT)
    assert shown.decode() == "code" + STEPS


@pytest.mark.parametrize(("content", "said"), [
    (gzip.compress(b"".join(LINES))[:-60], "ended before"),
    (b"no gzip\n", "Not a gzipped file"),
    (gzip.compress(b"")[:10] + b"\xff" * 99, "decompressing"),
], ids=["cut", "plain", "broken"])
def test_a_damaged_gz_is_named_and_the_others_are_shown(timeline, tmp_path, content, said):
    (tmp_path / "old.gz").write_bytes(content)
    code, out, err = timeline(stage_lines("other", COURSE[0]), "old.gz")
    assert code == 1 and "other" in out
    assert err.startswith("error: old.gz: ") and said in err


@pytest.mark.parametrize(("make", "said"), [
    (os.mkdir, "is a folder; name a log"),
    (os.mkfifo, "is a named pipe; name a log"),
    (lambda path: os.symlink("/dev/zero", path), "is a device; name a log"),
    (lambda path: None, "there is no such file; name a log"),
])
def test_what_is_no_log_is_named_with_what_is_wanted(tmp_path, make, said):
    make(tmp_path / "it")
    code, out, err = run("timeline", "it", cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


@pytest.mark.parametrize("flags", [[], ["--follow"]])
def test_a_log_that_may_not_be_read_is_no_missing_one(in_process, tmp_path, flags):
    (tmp_path / "log").touch(0)
    tmp_path.chmod(0o755)
    with as_nobody():
        code, _, err = in_process("timeline", *flags, "log")
    assert code == 2 and "error: log: Permission denied; run this as" in err


@pytest.fixture
def follow(launch, tmp_path):
    """Return a function that follows logs; it returns the process and a count of shown steps."""
    def start_following(*names):
        with open(tmp_path / "shown", "wb") as shown:
            process = launch(*PROGRAM, "timeline", "--json", "--follow", *names, stdout=shown,
                             cwd=tmp_path, env=CLEAN)
        return process, steps

    def steps():
        """Return the number of steps in each timeline that has been shown so far."""
        lines = (tmp_path / "shown").read_bytes().splitlines()
        return [len(json.loads(line)["events"]) for line in lines]

    return start_following


def test_a_timeline_follows_the_log_over_its_rotation(follow, tmp_path):
    log = tmp_path / "events.jsonl"
    log.write_bytes(LINES[0])
    process, steps = follow(log)
    assert until(lambda: steps() == [1])
    with open(log, "ab", 0) as file:
        file.write(LINES[1])
        assert until(lambda: steps() == [1, 2])
        file.write(LINES[2])
        log.rename(tmp_path / "events.jsonl.1")  # with a line that it has not seen yet
        log.write_bytes(LINES[3])
    assert until(lambda: steps()[-1] == 4)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_a_log_that_is_still_to_come_can_be_followed(follow, tmp_path):
    (tmp_path / "here").write_bytes(LINES[0])
    _, steps = follow("here", "to come")
    assert until(lambda: steps() == [1])
    (tmp_path / "to come").write_bytes(LINES[1])
    assert until(lambda: steps() == [1, 2])


def test_a_timeline_prints_the_interviews_that_change_alone(follow, tmp_path):
    new = stage_lines("new", *COURSE)
    (tmp_path / "old.gz").write_bytes(gzip.compress(b"".join(LINES)))
    (tmp_path / "log").write_bytes(new[0])
    _, steps = follow("old.gz", "log")
    assert until(lambda: steps() == [1, 4])
    with open(tmp_path / "log", "ab", 0) as file:
        file.write(new[1])
    assert until(lambda: steps() == [1, 4, 2])


def test_following_what_cannot_grow_ends_at_its_end(follow, tmp_path):
    (tmp_path / "old.gz").write_bytes(gzip.compress(LINES[0]))
    process, steps = follow("old.gz")
    assert process.wait(30) == 0 and steps() == [1]


def test_a_timeline_that_follows_ends_with_0_at_sigterm(follow, tmp_path):
    (tmp_path / "log").write_bytes(LINES[0])
    process, steps = follow("log")
    assert until(lambda: steps() == [1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_a_timeline_that_nobody_reads_on_ends_with_0(launch, tmp_path):
    lines = [stage_lines(f"code {number}", COURSE[0])[0] for number in range(2000)]
    (tmp_path / "log").write_bytes(b"".join(lines))
    process = launch(*PROGRAM, "timeline", tmp_path / "log", env=CLEAN,
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 0


MEASURE = """
import json, pathlib, re, skype_webhook, sys, time
begun = time.process_time()
with open(sys.argv[1], "rb") as lines:
    for line in lines:
        json.loads(line)
alone = time.process_time() - begun
assert skype_webhook.main(["timeline", "--json", sys.argv[1]]) == 0
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
print(alone, time.process_time() - begun - alone, int(peak) * 1024, file=sys.stderr)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' /proc")
def test_a_timeline_takes_8_times_json_s_time_and_400_bytes(tmp_path):
    def usage(count):
        """Return what so many events take: json's and the timeline's seconds, and its bytes."""
        (tmp_path / "log").write_bytes(b"".join(line_of(new_event()) for _ in range(count)))
        words = [sys.executable, "-c", MEASURE, tmp_path / "log"]
        plain = {**CLEAN, "PYTHONDEVMODE": ""}  # it would be measured, too
        done = subprocess.run(words, cwd=HERE, env=plain, capture_output=True, check=True)
        return tuple(map(float, done.stderr.split()))

    few = usage(10_000)
    turns = [usage(40_000) for _ in range(3)]  # other work of the machine disturbs one now and then
    assert min(seconds / alone for alone, seconds, _ in turns) < 8
    assert turns[0][2] - few[2] < 30_000 * 400


@pytest.mark.parametrize(("changes", "begin", "end"), [
    ({}, "\x1b[36m", "\x1b[0m"),
    ({"NO_COLOR": "1"}, "", ""),
    ({"TERM": "dumb"}, "", ""),
], ids=str)
def test_a_timeline_on_a_terminal_is_as_wide_and_coloured(launch, tmp_path, changes, begin, end):
    (tmp_path / "log").write_bytes(LINES[0])
    ours, its = os.openpty()
    environment = {**CLEAN, "TZ": "UTC", "TERM": "xterm", "COLUMNS": "40", **changes}
    process = launch(*PROGRAM, "timeline", tmp_path / "log", stdout=its, env=environment)
    assert process.wait(30) == 0
    shown = os.read(ours, 10_000).decode().splitlines()[1]
    os.close(ours)
    os.close(its)
    assert shown == f"{begin}  2026-11-24 10:00:00  SchedulingTime   {end}"


# --- Settings and the command line ---


# Each row: what differs from a good start (flags, variables), and what the one line has to say.
WRONG_STARTS = [
    (["--cert="], {}, "--cert is missing"),
    (["--key="], {}, "--key is missing"),
    (["--cert", "missing.pem"], {}, "missing.pem"),
    (["--cert", "key.pem"], {}, "no PEM certificate"),
    (["--key", "cert.pem"], {}, "no PEM private key"),
    (["--key", "key.pem"], {}, "do not belong together"),
    (["--key", "locked"], {}, "encrypted"),
    (["--cert", "cut"], {}, "cut short"),
    (["--cert", "empty"], {}, "no PEM certificate"),
    (["--cert", "fifo"], {}, "--cert fifo: it is a named pipe, not a regular file"),
    (["--key", "fifo"], {}, "--key fifo: it is a named pipe, not a regular file"),
    (["--port", "65536"], {}, "--port: '65536' is not a whole number from 0 to 65535"),
    (["--port", "8_0"], {}, "--port"),
    (["--port", "\u0663"], {}, "--port"),
    (["--leeway", "-1"], {}, "--leeway: '-1' is not a number from 0 to 3600"),
    (["--max-body", "0"], {}, "--max-body"),
    (["--max-body", "16777217"], {}, "from 1 to 16777216"),
    (["--max-connections", "x"], {}, "--max-connections"),
    (["--request-timeout", "0"], {}, "--request-timeout"),
    (["--path", "hook"], {}, "--path"),
    (["--path", "/healthz"], {}, "--path"),
    (["--host", "192.0.2.1"], {}, "--host"),
    (["--host", "no.such.host.invalid"], {}, "no.such.host"),
    (["--log", "/dev/null"], {}, "it is a device"),
    (["--log", "cut"], {}, "no log of this program"),
    (["--log", "no/folder/log"], {}, "No such file"),
    (["--env-file", "missing.env"], {}, "missing.env"),
    (["--env-file", "bad.env"], {}, "line 2"),
    (["--env-file", "nul.env"], {}, "NUL"),
    (["--env-file", "utf16.env"], {}, "UTF-8"),
    (["--env-file", "fifo"], {}, "--env-file fifo: it is a named pipe, not a regular file"),
    (["--env-file", "."], {}, "--env-file .: it is a folder, not a regular file"),
    (["--behind-proxy"], {}, "--cert"),
    (["--frobnicate"], {}, "there is no flag --frobnicate;"),
    (["--api-secret", SECRET.decode()], {}, "there is no flag --api-secret;"),
    ([f"--api-secret={SECRET.decode()}"], {}, "there is no flag --api-secret;"),
    ([f"-S{SECRET.decode()}"], {}, "there is no flag -S;"),
    ([SECRET.decode(), "--api-secret"], {}, "there is no flag --api-secret;"),
    (["--por", "1"], {}, "there is no flag --por;"),
    (["extra"], {}, "extra"),
    (["--\x1b[2J\u202e"], {}, "--\\x1b[2J\\u202e"),
    ([], {"SKYPE_API_KEY": ""}, "SKYPE_API_KEY is not set"),
    ([], {"SKYPE_API_SECRET": ""}, "SKYPE_API_SECRET is not set"),
    ([], {"SKYPE_API_SECRET": "\ufeff"}, "SKYPE_API_SECRET is not set"),
    ([], {"SKYPE_API_KEY": "paste-your-api-key-here"}, "placeholder"),
    ([], {"SKYPE_API_SECRET": "paste-your-api-secret-here"}, "placeholder"),
    ([], {"SKYPE_API_SECRET": "paste-your-api-secret-here\u200b"}, "placeholder"),
    ([], {"SKYPE_API_SECRET_FILE": "cut"}, "both"),
    ([], {"SKYPE_API_SECRET": "", "SKYPE_API_SECRET_FILE": "missing"}, "SECRET_FILE: No such file"),
    ([], {"SKYPE_API_SECRET": "", "SKYPE_API_SECRET_FILE": SECRET.decode()}, "FILE: No such file"),
    ([], {"SKYPE_API_SECRET": "", "SKYPE_API_SECRET_FILE": "empty"}, "FILE: the file is empty"),
    ([], {"SKYPE_API_SECRET": "", "SKYPE_API_SECRET_FILE": "utf16.env"}, "the file is not UTF-8"),
    ([], {"SKYPE_API_SECRET": "", "SKYPE_API_SECRET_FILE": "fifo"}, "FILE: it is a named pipe"),
    ([], {"SKYPE_API_KEY_PREVIOUS": "x"}, "PREVIOUS"),
    ([], {"SKYPE_BEHIND_PROXY": "maybe"}, "--behind-proxy"),
    ([], {"SKYPE_LEEWAY": "1e3"}, "--leeway"),
]


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder with the files that WRONG_STARTS names."""
    folder = tmp_path_factory.mktemp("wrong")
    cert, key = make_certificate(folder)
    locked = ["-aes128", "-passout", "pass:x", "-out", str(folder / "locked")]
    subprocess.run(["openssl", "pkey", "-in", key, *locked], check=True)
    (folder / "bad.env").write_text("A=b\nnonsense\n")
    (folder / "nul.env").write_text("SKYPE_LOG=a\0b\n")
    (folder / "utf16.env").write_text("SKYPE_LOG=a\n", "utf-16")
    for path in folder.glob("*.env"):
        path.chmod(0o600)
    (folder / "empty").write_text("\n")
    (folder / "cut").write_bytes(pathlib.Path(cert).read_bytes()[:300])
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize(("flags", "environment", "said"), WRONG_STARTS, ids=ascii)
def test_a_wrong_start_ends_with_one_line(certificate, wrong_files, flags, environment, said):
    good = ("--cert", certificate[0], "--key", certificate[1], "--port", 0)
    code, out, err = run(*good, *flags, cwd=wrong_files, **{**OURS, **environment})
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert said in err and SECRET.decode() not in err


def test_main_returns_its_exit_code(capsys):
    assert [sw.main(["--version"]), sw.main(["--frobnicate"]), sw.main(["send"])] == [0, 2, 2]
    assert capsys.readouterr().out == f"{sw.__version__}\n"


def test_a_second_receiver_on_the_same_log_is_refused(serve, in_process):
    serve()
    code, _, err = in_process("--behind-proxy", "--port", "0")
    assert code == 2 and "another process" in err


def test_a_port_that_is_taken_is_named_and_refused(serve, in_process):
    port = str(serve().port)
    code, _, err = in_process("--behind-proxy", "--log", "other.jsonl", "--port", port)
    assert code == 2 and f":{port}: Address already in use; stop what listens there" in err


# Each row: the env file, the environment and a flag, and the path that is served.
@pytest.mark.parametrize(("file", "environment", "flag", "path"), [
    ("# a comment\n\n SKYPE_PATH= /file \n", {}, [], "/file"),
    ('SKYPE_PATH="/quoted"', {}, [], "/quoted"),
    ("SKYPE_PATH='/quoted'", {}, [], "/quoted"),
    ("export SKYPE_PATH=/exported\r\n", {}, [], "/exported"),
    ("SKYPE_PATH = /spaced", {}, [], "/spaced"),
    ("\texport  SKYPE_PATH\t= '/both'", {}, [], "/both"),
    ("SKYPE_PATH=/first\nSKYPE_PATH=/last", {}, [], "/last"),
    ("SKYPE_PATH=/file", {"SKYPE_PATH": ""}, [], "/file"),
    ("SKYPE_PATH=/file", {"SKYPE_PATH": "/environment"}, [], "/environment"),
    ("SKYPE_PATH=/file", {"SKYPE_PATH": "/environment"}, ["--path", "/flag"], "/flag"),
    ("", {}, [], "/"),
])
def test_a_flag_wins_over_environment_and_that_over_env_file(
        serve, tmp_path, file, environment, flag, path):
    (tmp_path / ".env").write_text(file)
    server = serve(*flag, **environment)
    server.wait_for(f"listening on https://127.0.0.1:\\d+{path}, ")


# Each row: how the secret before is given, and the key that it goes with.
@pytest.mark.parametrize(("previous", "key"), [
    ({"SKYPE_API_SECRET_PREVIOUS": "old"}, KEY),
    ({"SKYPE_API_SECRET_PREVIOUS_FILE": "old", "SKYPE_API_KEY_PREVIOUS": "another"}, "another"),
], ids=str)
def test_a_secret_and_the_one_before_can_be_in_files(serve, tmp_path, previous, key):
    for name in ("new", "old"):
        (tmp_path / name).write_text(f"{name}\r\n")
    server = serve(SKYPE_API_SECRET="", SKYPE_API_SECRET_FILE="new", **previous)
    assert status_of(server, new_event(), secret=b"new") == 200
    assert status_of(server, new_event(), secret=b"old", iss=key) == 200


def test_what_is_unseen_around_the_view_s_password_is_dropped(serve):
    server = serve(SKYPE_VIEW_PASSWORD=f"\ufeff{PASSWORD}\n")
    assert view_status(server) == 200


@pytest.mark.parametrize("source", ["environment", "env file", "quoted in env file", "secret file"])
def test_what_cannot_be_seen_around_key_and_secret_is_dropped(serve, tmp_path, source):
    unseen = "\ufeff\u200b \t{}\u2060\u200d\xa0\r\n"
    ours = {name: unseen.format(value) for name, value in OURS.items()}
    if "env file" in source:
        quote = '"' if source.startswith("quoted") else ""
        text = "".join(f"{name}={quote}{value.strip()}{quote}\n" for name, value in ours.items())
        (tmp_path / ".env").write_text(text, "utf-8-sig")
        ours = dict.fromkeys(OURS, "")
    if source == "secret file":
        (tmp_path / "secret").write_text(ours["SKYPE_API_SECRET"], "utf-8")
        ours.update(SKYPE_API_SECRET="", SKYPE_API_SECRET_FILE="secret")
    server = serve(**ours)
    assert server.deliver(new_event())[0] == 200
    assert "SKYPE_API" not in server.stderr()


# Each row: an odd value of a key, a secret, or of a file with one, and what the warning says.
@pytest.mark.parametrize(("value", "said"), [
    ('"hush"', "a quote"),
    ("'hush'", "a quote"),
    ("hush'", "a quote"),
    ("\u201chush", "a quote"),
    ("hush # rotated", "comment"),
    ("hush\t#", "comment"),
    ("hu\u200bsh", "cannot be seen"),
    ("hu\x07sh", "cannot be seen"),
    ("hu\xa0sh", "cannot be seen"),
], ids=ascii)
@pytest.mark.parametrize("name", [
    "SKYPE_API_KEY", "SKYPE_API_SECRET_FILE", "SKYPE_API_KEY_PREVIOUS", "SKYPE_VIEW_PASSWORD"])
def test_an_odd_secret_is_warned_of_without_its_value(in_process, tmp_path, name, value, said):
    changes = {"SKYPE_API_SECRET_PREVIOUS": "x", name: value}
    if name.endswith("_FILE"):
        (tmp_path / "file").write_text(value)
        changes = {"SKYPE_API_SECRET": "", name: "file"}
    code, _, err = in_process("--behind-proxy", "--log", "no/folder/log", **changes)
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert code == 2
    assert said in warning and f" {name.replace('_FILE', '')} " in warning
    assert not re.search("hu|sh|rotated", warning)


def test_a_comment_behind_a_secret_in_an_env_file_is_warned_of(in_process, tmp_path):
    (tmp_path / ".env").write_text("SKYPE_API_SECRET=hush # rotated\n")
    told = in_process("--behind-proxy", "--log", "no/folder/log", SKYPE_API_SECRET="")[2]
    assert "warning: SKYPE_API_SECRET holds a space and a #" in told
    assert "hush" not in told


@pytest.mark.parametrize(("make", "said"), [
    (os.mkfifo, "it is a named pipe, not a regular file"),
    (os.mkdir, "it is a folder, not a regular file"),
    (lambda path: path.write_text("SKYPE_LOG=a", "utf-16"), "it is not text in UTF-8; .*"),
], ids=["pipe", "folder", "UTF-16"])
def test_a_dot_env_that_cannot_be_read_is_warned_of(serve, tmp_path, make, said):
    make(tmp_path / ".env")
    server = serve()
    server.wait_for(rf"warning: \.env: {said}; none of its settings is used")
    assert server.deliver(new_event())[0] == 200


@pytest.mark.parametrize("name", ["chosen.env", "secret"])
def test_a_fifo_in_a_settings_file_s_place_holds_up_no_sighup(serve, tmp_path, name):
    (tmp_path / "chosen.env").write_text("SKYPE_API_SECRET_FILE=secret\n")
    (tmp_path / "secret").write_bytes(SECRET)
    server = serve("--env-file", "chosen.env", SKYPE_API_SECRET="")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    server.hang_up("it is a named pipe, not a regular file")
    assert server.deliver(new_event())[0] == 200


@pytest.mark.parametrize("host", ["", "*", "::", "[::]", "0:0::0"])
def test_all_addresses_of_both_families_are_listened_on(serve, host):
    server = serve("--host", host)
    server.wait_for(r"listening on https://\[::\]:\d+/, https://0\.0\.0\.0:\d+/, log ")
    with socket.create_connection(("::1", server.port), 30):
        assert server.deliver(new_event())[0] == 200
    server.wait_for(r" 127\.0\.0\.1:\d+ recorded ")


@pytest.mark.parametrize(("taken", "left"), [("::", "0.0.0.0"), ("0.0.0.0", "[::]")])
def test_a_family_that_is_taken_is_warned_of(serve, taken, left):
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, free_port()), family=family) as other:
        port = other.getsockname()[1]
        server = serve("--host", "", "--port", str(port))
    named = f"[{taken}]" if ":" in taken else taken
    assert f"warning: cannot listen on {named}:{port}: Address already in use; " in server.stderr()
    assert f" listening on https://{left}:{port}/, log " in server.stderr()


# Each row: a host, and what is said of it.
@pytest.mark.parametrize(("host", "said"), [
    ("127.0.0.1:8443", "a port is for --port"),
    ("fe80::1", "needs its zone"),
])
def test_a_host_that_cannot_be_listened_on_says_what_is_wanted(host, said):
    with pytest.raises(sw.SettingsError, match=said):
        sw.open_listeners(host, 0)


def test_the_brackets_of_an_address_in_a_url_are_taken_off():
    (listener,) = sw.open_listeners("[::1]", 0)
    with listener:
        assert listener.getsockname()[0] == "::1"


# Each row: the addresses of a name, and those that are listened on; the others are warned of.
@pytest.mark.parametrize(("found", "listened"), [
    (["127.0.0.2", "127.0.0.3"], ["127.0.0.2", "127.0.0.3"]),
    (["127.0.0.2", "127.0.0.2"], ["127.0.0.2"]),
    (["192.0.2.1", "127.0.0.2"], ["127.0.0.2"]),
    (["127.0.0.2", "192.0.2.1"], ["127.0.0.2"]),
])
def test_of_a_name_s_addresses_those_that_work_are_listened_on(monkeypatch, capfd, found, listened):
    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    names = []
    for listener in sw.open_listeners("localhost", 0):
        names.append(listener.getsockname())
        listener.close()
    assert [name for name, _ in names] == listened
    assert len({port for _, port in names}) == 1
    sw.REPORTER.flush()
    warned = "warning: cannot listen on 192.0.2.1:" in capfd.readouterr().err
    assert warned == ("192.0.2.1" in found)


def test_a_port_that_needs_a_privilege_says_what_helps(monkeypatch):
    refusal = unittest.mock.Mock(side_effect=OSError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(socket, "create_server", refusal)
    with pytest.raises(sw.SettingsError) as caught:
        sw.open_listeners("", 443)
    for word in ("0.0.0.0:443: Permission", "socket unit", "CAP_NET_BIND_SERVICE", "--port"):
        assert word in str(caught.value)


def test_behind_a_proxy_loopback_alone_is_listened_on(serve):
    serve("--behind-proxy", "--host", "").wait_for("listening on http://127.0.0.1:")


def test_a_fault_is_told_by_its_kind_and_place_only(in_process, monkeypatch, capfd):
    def fault(*_):
        raise RuntimeError("hush")

    monkeypatch.setattr(sw, "Journal", fault)
    code, _, of_main = in_process("--behind-proxy", "--port", "0")
    for thread in gather(1, fault):
        thread.join()
    sw.REPORTER.flush()
    place = r".* fault RuntimeError in fault, test_skype_webhook\.py line \d+: please report it\n"
    for told in (of_main, capfd.readouterr().err):
        assert re.fullmatch(place, told) and "hush" not in told
    assert code == 1


def test_a_sync_that_fails_before_there_is_a_server_ends_it(in_process, tmp_path, monkeypatch):
    log = tmp_path / "events.jsonl"
    log.write_bytes(b'{"spec')
    ends = []
    write = os.write

    def write_no_end_at_first(descriptor, data):
        if data == b"\n":
            ends.append(data)
        return 0 if len(ends) == 1 and data == b"\n" else write(descriptor, data)

    def sync(_):
        if log.read_bytes().endswith(b"\n"):
            raise OSError(errno.EIO, "I/O error")

    # The torn line cannot be ended; and when it can be, that cannot be synced.
    monkeypatch.setattr(os, "write", write_no_end_at_first)
    monkeypatch.setattr(os, "fdatasync", sync)
    code, _, err = in_process("--behind-proxy", "--port", "0")
    assert code == 1 and "start again" in err


# Of our own, nobody else has anything to read; of another's (root's), we read it by our group.
@pytest.mark.parametrize(("mode", "ours", "warned"), [
    (0o600, True, False),
    (0o640, True, True),
    (0o604, True, True),
    (0o640, False, False),
    (0o644, False, True),
])
def test_an_env_file_that_others_can_read_is_warned_of(serve, tmp_path, mode, ours, warned):
    (tmp_path / "open.env").write_text("SKYPE_PROT=1\n")
    (tmp_path / "open.env").chmod(mode)
    if not ours:
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(tmp_path / "open.env", 65534, 65534)
    told = serve("--env-file", "open.env").stderr()
    assert ("chmod 600 open.env" in told) == warned
    assert "warning: open.env line 1: there is no setting SKYPE_PROT" in told


def test_every_setting_and_flag_is_documented(tmp_path):
    code, shown, _ = run("--help", cwd=tmp_path)
    settings = set(re.findall(r"SKYPE_[A-Z_]+[A-Z]", shown))
    flags = set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE))
    example = (HERE / "example.env").read_text("utf-8")
    assert code == 0 and len(settings) > 15
    assert settings == set(re.findall(r"^#?(SKYPE_\w+)=", example, re.MULTILINE))
    assert settings <= set(re.findall(r"SKYPE_[A-Z_]+[A-Z]", README))
    assert flags - set(re.findall(r"--[a-z-]+", README)) == {"--version"}


def test_the_placeholders_of_example_env_are_refused(tmp_path):
    words = ("--env-file", HERE / "example.env", "--behind-proxy", "--port", 0)
    code, _, err = run(*words, cwd=tmp_path)
    assert code == 2 and "placeholder" in err


# --- Operations: the README's configurations, run ---


@pytest.fixture
def shell(service, certificate, launch, tmp_path):
    """Return a function that runs a recipe as it stands; its `python3` fetches from the stub."""
    for name in ("jq", "tail"):
        program(name)
    flags = f"--url {service.url} --ca {certificate[0]}"
    scripts = {"python3": f'[ "$2" = fetch ] && set -- "$@" {flags}\nexec {sys.executable} "$@"',
               "sleep": f"exec {program('sleep')} 0.1"}
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o700)
    shutil.copy(HERE / "skype_webhook.py", tmp_path)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return lambda recipe: launch("bash", "-c", recipe, cwd=tmp_path, start_new_session=True,
                                 env={**CLEAN, **OURS, "PATH": path})


def test_feedback_is_fetched_as_soon_as_it_is_complete(serve, service, shell, tmp_path):
    service.has("a", reply(200, b'{"notes":\r\n"x"}'))
    server = serve()
    fetched = tmp_path / "interviews.jsonl"

    def is_fetched():
        """Deliver until the pipeline, which begins at the end of the log, is there to see it."""
        for code, stage in (("b", "FeedbackCollecting"), ("a", "FeedbackCompleted")):
            body = new_event(interviewCode=code, currentStage={"value": stage}, n=time.time())
            assert server.deliver(body)[0] == 200
        return fetched.exists() and fetched.read_text()

    pipeline = shell(readme("## Fetch interview data"))
    try:
        assert until(is_fetched)
    finally:
        os.killpg(pipeline.pid, signal.SIGKILL)
    assert set(fetched.read_text().splitlines()) == {'{"notes":  "x"}'}
    assert set(service.asked) == {"/api/interviews/a"}


def test_all_interviews_of_a_log_can_be_fetched(service, shell, tmp_path):
    stages = (("a", "FeedbackCompleted"), ("b", "InterviewStarted"), ("c", "FeedbackCompleted"))
    events = [new_event(interviewCode=code, currentStage={"value": stage})
              for code, stage in stages]
    write_log(tmp_path / "events.jsonl", *events[1:])
    (tmp_path / "events.jsonl-20260101.gz").write_bytes(gzip.compress(line_of(events[0])))
    service.has("c", reply(200, b"{}"))
    recipe = readme("## Fetch interview data", 1)
    assert shell(recipe).wait(30) == 1  # of "a" the service has nothing
    assert (tmp_path / "all-interviews.jsonl").read_text() == "{}\n"
    assert sorted(service.asked) == ["/api/interviews/a", "/api/interviews/c"]


def test_the_systemd_units_are_sound_and_as_hard_as_said(tmp_path):
    units = [tmp_path / "skype-webhook.socket", tmp_path / "skype-webhook.service"]
    for number, unit in enumerate(units):
        unit.write_text(readme("skype-webhook.service", number))

    def analyze(*words):
        return subprocess.run([program("systemd-analyze"), *words], capture_output=True, text=True,
                              check=False)

    told = analyze("verify", "--man=no", *units).stderr
    assert not [line for line in told.splitlines() if "skype-webhook" in line]
    done = analyze("security", "--offline=true", units[1])
    if "--offline" in done.stderr:
        pytest.skip("this systemd-analyze cannot work offline")
    said = float(re.search(r"says ([\d.]+) SAFE", README)[1])
    level = float(re.search(r"exposure level for .*: ([\d.]+)", done.stdout)[1])
    assert level <= said + 0.3  # other releases weigh differently


def passes_health_check(server):
    """Return whether the README's HEALTHCHECK is content with a receiver."""
    dockerfile = readme("<b>Container</b>").replace("\\\n", "")
    check = re.search(r"^HEALTHCHECK .* CMD (.*)$", dockerfile, re.MULTILINE)[1]
    words = ["sh", "-c", check.replace("8443", str(server.port))]
    proxied = {**CLEAN, "https_proxy": "http://127.0.0.1:9/"}  # as Docker sets it with a proxy
    return subprocess.run(words, env=proxied, timeout=30, check=False).returncode == 0


def test_a_log_folder_that_goes_is_503_until_it_is_back(serve, tmp_path):
    (tmp_path / "logs").mkdir()
    server = serve("--log", str(tmp_path / "logs" / "events.jsonl"))
    before = new_event()
    after = new_event()
    assert passes_health_check(server) and server.deliver(before)[0] == 200
    (tmp_path / "logs").rename(tmp_path / "gone")
    assert server.deliver(after)[0] == 503 and not passes_health_check(server)
    (tmp_path / "logs").mkdir()
    assert passes_health_check(server) and server.deliver(after)[0] == 200
    logs = [tmp_path / folder / "events.jsonl" for folder in ("gone", "logs")]
    assert [ids_in(log) for log in logs] == [[sha256(before)], [sha256(after)]]
    assert server.stop() == 0 and not passes_health_check(server)


def test_a_changed_secret_refuses_no_event(serve, tmp_path):
    env = tmp_path / "skype.env"
    current = [b"first"]
    write_env(env, SKYPE_API_SECRET="first")
    server = serve("--env-file", str(env), SKYPE_API_SECRET="")
    with delivering(server.port, secret=lambda: current[0]) as (acknowledged, refused):
        for new, previous in (("second", "first"), ("second", ""), ("third", "second")):
            write_env(env, SKYPE_API_SECRET=new, SKYPE_API_SECRET_PREVIOUS=previous)
            server.hang_up("were read again")
            current[0] = new.encode()
            grows(acknowledged, 30)
    assert refused == [] and sorted(server.ids()) == sorted(acknowledged)
    assert status_of(server, new_event(), secret=b"first") == 401


@pytest.fixture
def rotate(tmp_path):
    """Return a function that rotates the log `events.jsonl` by the README's rules."""
    rules = replaced(readme("logrotate.d"), {
        "/var/lib/skype-webhook": tmp_path,
        "weekly": "hourly",
        "dateext": "nodateext",  # so that two can be made in a second
    })
    (tmp_path / "rules").write_text(rules)
    words = [program("logrotate"), "-f", "-s", tmp_path / "state", tmp_path / "rules"]
    return lambda: subprocess.run(words, check=True)


def is_seen(seen, ids):
    """Return whether `tail -F` has shown a log but for, at most, some lines at its end.

    What is written between a rename and its look at it, it can miss.
    """
    shown = [each for each in seen if each in ids]
    return shown == ids[:len(shown)] and len(shown) > len(ids) - 10


def test_logrotate_under_load_loses_no_line(serve, rotate, launch, tmp_path):
    server = serve()
    shown = tmp_path / "shown"
    with open(shown, "wb") as file:
        launch("tail", "-n", "+1", "-F", server.log, stdout=file, stderr=subprocess.DEVNULL)
    with delivering(server.port) as (acknowledged, refused):
        for _ in range(4):
            grows(acknowledged, 30)
            last = acknowledged[-1].encode()
            # A tail that is passed by two rotations misses lines.
            assert until(lambda last=last: last in shown.read_bytes())
            rotate()
        grows(acknowledged, 30)
    for packed in tmp_path.glob("events.jsonl.*.gz"):
        subprocess.run(["gunzip", packed], check=True)
    files = sorted(tmp_path.glob("events.jsonl*"))
    assert len(files) == 5 and {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert refused == [] and sorted(ids_in(*files)) == sorted(acknowledged)
    assert until(lambda: ids_in(shown)[-1:] == ids_in(server.log)[-1:])
    assert all(is_seen(ids_in(shown), ids_in(path)) for path in files)


def start_nginx(launch, folder, certificate, port, receiver):
    text = replaced(readme("<b>nginx</b>"), {
        "127.0.0.1:8443": f"127.0.0.1:{receiver}",
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/letsencrypt/live/your.host/fullchain.pem": certificate[0],
        "/etc/letsencrypt/live/your.host/privkey.pem": certificate[1],
    })
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; error_log stderr; daemon off; master_process off; events {{}}\n"
        f"http {{ access_log off; {folders}\n{text}}}\n")
    launch("nginx", "-c", folder / "nginx.conf")
    assert until(lambda: listens(port))


def test_a_proxy_that_ends_tls_is_believed_about_the_address(serve, launch, certificate, tmp_path):
    server = serve("--behind-proxy")
    port = free_port()
    body = new_event()
    start_nginx(launch, tmp_path, certificate, port, server.port)
    with Peer(port) as peer:
        for _ in range(2):
            assert peer.ask(post(new_event(), "X-Forwarded-For: 203.0.113.9")) == 200
        assert peer.ask(chunked(body) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)) == 200
        refused = "Bearer " + token_of(body, secret=b"wrong")
        assert peer.ask(post(body, authorization=refused)) == 401
    server.wait_for(r" 127\.0\.0\.1 refused 401")
    assert "203.0.113.9" not in server.stderr()
    assert server.stderr().count(" 127.0.0.1 recorded ") == 3


def speaks_tls(port):
    """Return whether a port of ours speaks TLS."""
    with contextlib.suppress(OSError), Peer(port):
        return True
    return False


def test_caddy_hands_deliveries_on_by_one_line(serve, launch, tmp_path):
    program("caddy")
    server = serve("--behind-proxy")
    port = free_port()
    said = tmp_path / "said"
    words = replaced(re.search(r"`(caddy [^`]*)`", README)[1], {
        "your.host": f"https://localhost:{port}",
        "127.0.0.1:8443": f"127.0.0.1:{server.port}",
    })
    # Without programs to have itself trusted by.
    environment = {**CLEAN, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "PATH": ""}
    with open(said, "wb") as lines:
        launch(*words.split(), "--internal-certs", stdout=lines, stderr=lines, env=environment)
    # It does so some time after it has obtained its certificate.
    assert until(lambda: speaks_tls(port) or "listening on :80" in said.read_text())
    if "listening on :80" in said.read_text():
        pytest.skip("port 80, which Caddy needs too, is taken")
    assert stores_at(port)
    server.wait_for(r" 127\.0\.0\.1 recorded ")


def lines_of(*paths):
    return {line for path in paths for line in path.read_bytes().splitlines()}


def start_haproxy(launch, folder, servers):
    """Start the README's HAProxy before two receivers; return its port."""
    port = free_port()
    (folder / "haproxy.cfg").write_text(replaced(readme("<b>HAProxy</b>", 1), {
        "bind :443": f"bind 127.0.0.1:{port}",
        "192.0.2.1:8443": f"127.0.0.1:{servers[0].port}",
        "192.0.2.2:8443": f"127.0.0.1:{servers[1].port}",
    }))
    launch("haproxy", "-f", folder / "haproxy.cfg")
    assert until(lambda: listens(port))
    return port


def start_rsyslog(launch, folder, servers):
    """Start the README's collector and a shipper for each receiver; return the logs' folder."""
    if not list(pathlib.Path("/usr/lib").glob("**/rsyslog/omrelp.so")):
        pytest.skip("rsyslog-relp is not installed")
    collected = folder / "collected"
    port = free_port()
    collected.mkdir()
    texts = [replaced(readme("<b>rsyslog</b>", 1), {"/srv/skype": collected})]
    for server in servers:
        texts.append(replaced(readme("<b>rsyslog</b>", 0), {
            "/var/lib/skype-webhook/events.jsonl": server.log,
            'target="collector"': 'target="127.0.0.1"',
            "/var/spool/rsyslog": server.log.parent,
            "maxMessageSize": f'localHostname="{server.log.parent.name}" maxMessageSize',
        }))
    for number, text in enumerate(texts):
        path = folder / f"rsyslog.{number}"
        path.write_text(replaced(text, {'port="2514"': f'port="{port}"'}))
        launch("rsyslogd", "-n", "-f", path, "-i", f"{path}.pid")
        # The collector: a shipper that finds none tries again much later.
        assert until(lambda: listens(port))
    return collected


def test_of_two_receivers_one_is_killed_and_one_log_is_made(serve, launch, tmp_path):
    servers = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        servers.append(serve(folder=folder))
    collected = start_rsyslog(launch, tmp_path, servers)
    balanced = start_haproxy(launch, tmp_path, servers)
    stage = {"value": "\x7f\u00e4 \t #011 %msg%"}
    odd = new_event(currentStage=stage, big="x" * 100_000)
    assert servers[0].deliver(odd)[0] == servers[1].deliver(odd)[0] == 200
    with delivering(balanced, tries=100) as (acknowledged, refused):
        grows(acknowledged, 100)
        servers[1].process.kill()
        grows(acknowledged, 100)
    stored = {*acknowledged, sha256(odd)}
    lines = lines_of(*[server.log for server in servers])
    assert until(lambda: lines_of(*collected.iterdir()) == lines, 60)
    assert refused == [] and set(ids_in(*collected.iterdir())) == stored
    assert all(len(set(server.ids()) & stored) > 20 for server in servers)


# --- The README: its other lines, run; its words, compared ---


def commands(text):
    """Yield the words of the program's own commands in a text, also of those within a pipeline."""
    for line in re.findall(r"python3 (?:[\w/]*/)?skype_webhook\.py([^`|>#\n]*)", text):
        yield shlex.split(line.replace("[", "").replace("]", ""))


def run_bash(recipe, folder, **environment):
    done = subprocess.run(["bash", "-c", recipe], cwd=folder, env={**CLEAN, **environment},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_log(path, *events):
    path.write_bytes(b"".join(line_of(each) for each in events))


def test_the_readme_is_short_enough_to_be_finished():
    assert len(README.splitlines()) <= 350


def test_every_command_of_the_readme_is_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", PROGRAM)
    found = list(commands(README))
    for words in found:
        name = "serve"
        rest = words
        if words and words[0] in sw.COMMANDS:
            name, *rest = words
        assert sw.make_parser(name).parse_args(rest)
    assert len(found) > 10


def test_the_demo_prints_what_the_readme_shows(launch, tmp_path):
    shown = readme("The demo makes").splitlines()
    with open(tmp_path / "said", "wb") as said:
        demo = launch(*PROGRAM, "demo", cwd=tmp_path, stdout=said, stderr=said)
    assert until(lambda: "3. end with" in (tmp_path / "said").read_text())
    demo.send_signal(signal.SIGINT)
    assert demo.wait(30) == 0
    temporary = tempfile.gettempdir()

    def shape(line):
        """Return a line without what each run, and each machine, has anew."""
        line = line.replace(temporary, "/tmp")
        line = re.sub(r"demo[.:][\w-]+|python3 \S+|127.0.0.1:\d+|\b[0-9a-f]{64}\b", "*", line)
        return re.sub(r"[\d:.T-]+(Z| ms)", "*", line)

    said = {shape(line.rstrip()) for line in (tmp_path / "said").read_text().splitlines()}
    assert [line for line in map(shape, shown) if line not in said] == []


def test_the_readme_s_own_authority_is_trusted_by_send(launch, tmp_path):
    run_bash(readme("These lines make a certificate authority"), tmp_path)
    shutil.copy(HERE / "example.env", tmp_path)
    run_bash(re.search(r"`(cp example.env [^`]*)`", README)[1], tmp_path)
    text = (tmp_path / ".env").read_text()
    for name, value in OURS.items():
        text = re.sub(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(text)
    port = free_port()
    environment = {**CLEAN, "SKYPE_HOST": "127.0.0.1"}
    serving = next(words for words in commands(README) if "--cert" in words)
    sending = next(words for words in commands(README) if "ca.pem" in words)
    launch(*PROGRAM, *serving, "--port", str(port), cwd=tmp_path, env=environment)
    assert until(lambda: listens(port))
    words = [word.replace("8443", str(port)) for word in sending]
    code, out, err = run(*words, cwd=tmp_path)
    assert (code, out[:9], err) == (0, "recorded ", "")


def test_the_unit_s_command_serves_by_its_env_file(launch, certificate, tmp_path):
    unit = readme("skype-webhook.service", 1)
    words = re.search(r"^ExecStart=/usr/bin/python3 -I \S+ (.*)$", unit, re.MULTILINE)[1]
    words = replaced(words, {"%d": tmp_path})
    port = free_port()
    write_env(tmp_path / "env", **OURS, SKYPE_PORT=port,
              SKYPE_TLS_CERT=certificate[0], SKYPE_TLS_KEY=certificate[1])
    launch(sys.executable, "-I", *PROGRAM[1:], *words.split(), cwd=tmp_path, env=CLEAN)
    assert until(lambda: listens(port))
    assert stores_at(port)
    assert len(ids_in(tmp_path / "events.jsonl")) == 1


def test_the_container_s_command_serves_from_its_folders(launch, certificate, tmp_path):
    dockerfile = readme("<b>Container</b>")
    words = json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[1])
    for name, source in zip(("cert.pem", "key.pem"), certificate):
        shutil.copy(source, tmp_path / name)
    port = free_port()
    write_env(tmp_path / "env", **OURS, SKYPE_PORT=port)
    words = [word.replace("/secrets", str(tmp_path)) for word in words[3:]]
    launch(sys.executable, "-I", *PROGRAM[1:], *words, cwd=tmp_path, env=CLEAN)
    assert until(lambda: listens(port))
    assert stores_at(port)


def test_the_files_that_systemd_needs_are_installed(tmp_path):
    for name in ("skype_webhook.py", "example.env"):
        shutil.copy(HERE / name, tmp_path)
    first = re.search(r"`(cp example.env [^`]*)`", README)[1]
    lines = readme("Put the two files into place").splitlines()
    install = "\n".join([first, *[line for line in lines if line.startswith("install")]])
    paths = {"/usr/local": tmp_path / "usr", "/etc": tmp_path / "etc"}
    run_bash(replaced(install, paths), tmp_path)
    env = tmp_path / "etc" / "skype-webhook" / "env"
    assert env.read_bytes() == (HERE / "example.env").read_bytes()
    assert env.stat().st_mode & 0o777 == (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "usr" / "lib" / "skype_webhook.py").is_file()


def test_the_certificate_s_group_is_set_as_the_readme_says(tmp_path):
    recipe = re.search(r"`(chgrp [^`]*)`", README)[1]
    for name in ("live", "archive"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "archive" / "privkey.pem").touch(0o600)
    run_bash(replaced(recipe, {"/etc/letsencrypt": tmp_path, "ssl-cert": os.getgid()}), tmp_path)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("live", "archive/privkey.pem")]
    assert modes == [0o750, 0o640]


def test_a_certificate_of_one_s_own_is_put_where_it_is_read(certificate, tmp_path):
    recipe = re.search(r"`(install -g ssl-cert [^`]*)`", README)[1]
    (tmp_path / "private").mkdir()
    for name, source in zip(("cert.pem", "key.pem"), certificate):
        shutil.copy(source, tmp_path / name)
    run_bash(replaced(recipe, {"ssl-cert": os.getgid(), "/etc/ssl": tmp_path}), tmp_path)
    assert (tmp_path / "private" / "key.pem").stat().st_mode & 0o777 == 0o640


def test_the_jq_lines_of_the_readme_read_a_log(tmp_path):
    program("jq")
    code = re.search(r"select\(\.subject == \"(.*)\"", README)[1]
    events = [new_event(interviewCode=each) for each in (code, "b")]
    write_log(tmp_path / "events.jsonl", *events)
    lines = [line for line in readme("## The log").splitlines() if line.startswith("jq")]
    sent = json.loads(events[0])["timestamp"]
    rows = [f"{sent}\t{each}\tSchedulingTime\n" for each in (code, "b")]
    assert run_bash(lines[0], tmp_path) == "".join(rows)
    assert run_bash(lines[1], tmp_path) == f"{sent}\n"


def test_the_duckdb_lines_of_the_readme_read_logs(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    one = new_event(interviewCode="a")
    other = new_event(interviewCode="b")
    write_log(tmp_path / "events.jsonl", one, other)
    write_log(tmp_path / "copy.jsonl", other)
    query = re.search(r'^duckdb -c "(.*)"$', README, re.MULTILINE)[1]
    query = replaced(query, {"events.jsonl": tmp_path / "events.jsonl"})
    assert {row[0] for row in duckdb.sql(query).fetchall()} == {"a", "b"}
    query = replaced(readme("<b>rsyslog</b>", 2), {"/srv/skype/": f"{tmp_path}/"})
    assert {row[0] for row in duckdb.sql(query).fetchall()} == {sha256(one), sha256(other)}
    assert len(duckdb.sql(query).fetchall()) == 2


def test_the_timeline_of_the_readme_is_what_timeline_prints(tmp_path):
    command, code, *rows = readme("## Live view and timeline").splitlines()
    previous = "InterviewCreated"
    day = "2026-11-24T"
    log = b""
    for row in rows:
        when, stage = row.split()[1:3]
        previous = "InterviewCompleted" if "gap" in row else previous
        body = new_event(interviewCode=code, timestamp=f"{day}{when}Z",
                     previousStage={"value": previous}, currentStage={"value": stage})
        log += line_of(body, 2 if "late" in row else 1)
        previous = stage
    (tmp_path / "events.jsonl").write_bytes(log)
    command = command.replace("$ python3 skype_webhook.py", shlex.join(PROGRAM))
    said = run_bash(command, tmp_path, TZ="UTC", **OURS)
    assert [line.rstrip() for line in said.splitlines() if line] == [code, *rows]


@pytest.fixture
def erase(tmp_path):
    """Return a function that erases an interview by the README's recipe, in the folder `logs`."""
    logrotate = program("logrotate")
    folder = tmp_path / "logs"
    folder.mkdir()
    rules = readme("logrotate.d").replace("/var/lib/skype-webhook", str(folder))
    (tmp_path / "rules").write_text(rules)
    recipe = replaced(readme("**To erase"), {
        "/var/lib/skype-webhook": folder, "sleep 30": "sleep 0.5",
        "logrotate -f /etc/logrotate.d/skype-webhook": f"{logrotate} -f -s ../state ../rules"})
    return lambda code: run_bash(re.sub("^code=.*", f"code={code}", recipe), tmp_path)


def read_log(path):
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def test_one_interview_is_erased_from_all_logs_meanwhile(serve, erase, tmp_path):
    folder = tmp_path / "logs"
    erased = [new_event(interviewCode="a-code", n=n) for n in range(3)]
    others = [new_event() for _ in range(4)]
    packed = line_of(erased[0]) + line_of(others[0])
    (folder / "events.jsonl-20260101-000000.gz").write_bytes(gzip.compress(packed))
    write_log(folder / "events.jsonl-20260108-000000", others[1], erased[1])
    server = serve(folder=folder)
    for body in (erased[2], others[2]):
        assert server.deliver(body)[0] == 200

    assert erase("A-Code") == "0\n"  # lines are left
    assert server.deliver(others[3])[0] == 200
    text = b"".join(read_log(path) for path in folder.glob("events.jsonl*"))
    ids = re.findall(rb'"id":"(\w+)"', text)
    assert sorted(ids) == sorted(sha256(body).encode() for body in others)
    assert b"a-code" not in text and not (folder / "erased").exists()


def test_what_is_erased_leaves_its_log_as_old_and_private(erase, tmp_path):
    log = tmp_path / "logs" / "events.jsonl-20260108-000000.gz"
    log.write_bytes(gzip.compress(line_of(new_event())))
    log.chmod(0o600)
    then = int(time.time()) - 86_400
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    os.chown(log, owner, -1)
    os.utime(log, (then, then))
    erase("a-code")
    status = log.stat()
    assert (status.st_mtime, status.st_uid, status.st_mode & 0o777) == (then, owner, 0o600)


def test_logs_are_deleted_after_half_a_year(erase, tmp_path):
    folder = tmp_path / "logs"
    logs = {days: folder / f"events.jsonl-20200101-000{days}.gz" for days in (170, 200)}
    for days, log in logs.items():
        log.write_bytes(gzip.compress(line_of(new_event())))
        then = time.time() - days * 86_400
        os.utime(log, (then, then))
    write_log(folder / "events.jsonl", new_event())
    erase("a-code")  # by which all logs are rotated
    assert logs[170].exists() and not logs[200].exists()


def test_a_backup_under_load_has_every_line_up_to_its_moment(serve, tmp_path):
    program("rsync")
    recipe = re.search(r"`(rsync [^`]*)`", README)[1]
    (tmp_path / "logs").mkdir()
    (tmp_path / "backup").mkdir()
    server = serve(folder=tmp_path / "logs")
    paths = {"/var/lib/skype-webhook": tmp_path / "logs", "/srv/backup": tmp_path / "backup"}
    recipe = replaced(recipe, paths)
    with delivering(server.port) as (acknowledged, refused):
        for _ in range(3):
            grows(acknowledged, 30)
            before = set(acknowledged)
            run_bash(recipe, tmp_path)
            copy = tmp_path / "backup" / "skype-webhook" / "events.jsonl"
            copied = {line[27:91].decode() for line in copy.read_bytes().splitlines()}
            assert before <= copied and refused == []


TREE = ast.parse((HERE / "skype_webhook.py").read_text("utf-8"))


def texts_in(tree):
    """Yield the texts of a piece of the program, with a NUL for what it fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            yield "".join(parts)


def test_the_lines_under_trouble_are_the_program_s_word_for_word():
    said = "\n".join(texts_in(TREE))
    section = README.partition("\n## Trouble\n")[2].partition("\n## ")[0]
    rows = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    quoted = [line for row in rows for line in re.findall(r"`(.+?)`", row)]
    quoted += re.findall(r"`(error: .+?)`", section)
    pieces = {piece.strip(" (;)") for line in quoted for piece in line.split("…")}
    outcome = re.compile(r"^(recorded|duplicate|refused( \d{3})?|warning:|error:) ?")
    missing = [piece for piece in pieces if outcome.sub("", piece) not in said]
    assert len(quoted) > 30 and missing == []


def test_what_the_program_tells_by_itself_stands_under_trouble():
    section = README.partition("\n## Trouble\n")[2]
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and node.args]
    told = [next(texts_in(call.args[0]), "") for call in calls
            if ast.unparse(call.func) in ("tell", "self.warn")]
    assert len(told) > 20
    for text in told:
        longest = max(text.split("\0"), key=len).strip(" :;")
        assert longest in section or len(longest) < 12 or "demo" in text, text
