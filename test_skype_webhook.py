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
import shutil
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


PASSWORD = "p\u00e4ssw\u00f6rt"


def basic(password=PASSWORD):
    return "Authorization: Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


def get(server, path="/", *fields):
    with Peer(server.port) as peer:
        peer.send("\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode())
        return peer.answer()


class Stream(Peer):
    """A viewer of raw server-sent events."""

    def __init__(self, port, path="/events", *fields):
        super().__init__(port)
        self.send("\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", basic(), *fields, "", ""]).encode())
        self.status = self.answer()[0]

    def next(self):
        """Return (id, name, data) of the next event; comments are passed over."""
        found = {}
        while (line := self.file.readline().decode()) != "\n" or not found:
            assert line, "the stream has ended"
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                found[name] = value
        return int(found["id"]), found.get("event", "message"), json.loads(found["data"])


def test_without_a_password_there_is_no_live_view(serve):
    server = serve("--path", "/hook")
    assert [get(server, path)[0] for path in ("/", "/events")] == [404, 404]
    assert get(server, "/hook")[:2][1]["allow"] == "POST"


def test_the_page_needs_the_password_and_has_a_strict_policy(serve):
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD)
    for path in ("/", "/events"):
        status, fields, _ = get(server, path)
        assert (status, fields["www-authenticate"]) == (401, 'Basic realm="skype_webhook", charset="UTF-8"')
    status, fields, page = get(server, "/", basic())
    assert status == 200 and page.startswith(b"<!doctype html>")
    policy = fields["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    script = page.partition(b"<script>")[2].partition(b"</script>")[0]
    assert base64.b64encode(hashlib.sha256(script).digest()).decode() in policy
    assert (fields["cache-control"], fields["referrer-policy"], fields["x-content-type-options"]) == ("no-store", "no-referrer", "nosniff")
    for _ in range(10):
        assert get(server, "/", basic("w\u2603rong"))[0] == 401
    status, fields, _ = get(server, "/", basic())
    assert status == 429 and 0 < int(fields["retry-after"]) <= 60
    assert server.deliver(event())[0] == 200


def test_the_stream_misses_and_repeats_nothing_over_reconnection_and_rotation(serve):
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD)
    bodies = [event() for _ in range(6)]
    ids = [hashlib.sha256(body).hexdigest() for body in bodies]
    with Stream(server.port) as stream:
        assert stream.next()[:2] == (0, "log")
        server.deliver(bodies[0])
        first = stream.next()
        assert (first[0], first[2]["id"]) == (server.log.stat().st_size, ids[0])
        server.deliver(bodies[1])
        assert stream.next()[2]["id"] == ids[1]
        old = server.log.stat().st_ino
        server.log.rename(server.log.with_name("events.jsonl.1"))
        server.deliver(bodies[2])
        assert stream.next()[:2] == (0, "rotated")
        assert stream.next()[2]["id"] == ids[2]
        os.truncate(server.log, 0)
        assert stream.next()[:2] == (0, "rotated")
        server.deliver(bodies[3])
        assert stream.next()[2]["id"] == ids[3]
        server.log.unlink()
        server.deliver(bodies[4])
        assert stream.next()[:2] == (0, "rotated")
        assert stream.next()[2]["id"] == ids[4]
    with Stream(server.port, f"/events?log={old}&after={first[0]}") as stream:  # asleep while the log was rotated
        assert [stream.next()[1] for _ in range(3)] == ["log", "message", "rotated"]
        assert stream.next()[2]["id"] == ids[4]
    server.deliver(bodies[5])
    end = server.log.stat().st_size
    for last, expected in ((end // 2, ids[5]), (0, ids[4]), (end + 1, ids[4]), ("-1", ids[4]), ("\u00b2", ids[4])):
        with Stream(server.port, "/events", f"Last-Event-ID: {last}") as stream:
            stream.next()
            assert stream.next()[2]["id"] == expected, last


def test_a_large_log_starts_at_its_end_and_earlier_events_can_be_had(serve, tmp_path):
    bodies = [event(interviewCode=f"code {n}") for n in range(2000)]
    lines = [sw.format_line(sw.parse_event(body), body, time.time()) for body in bodies]
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines) + b"foreign\n" + b" " * 99 + b"\n")
    server = serve(SKYPE_VIEW_PASSWORD=PASSWORD)
    with Stream(server.port) as stream:
        start, _, _ = stream.next()
        data = stream.next()[2]["subject"]
    status, fields, earlier = get(server, f"/events?before={start}", basic())
    assert status == 200 and int(fields["log-offset"]) == start - len(earlier)
    assert json.loads(earlier.splitlines()[-1])["subject"] == f"code {int(data.split()[1]) - 1}"


def test_sixteen_viewers_take_no_sender_s_place_and_do_not_delay_the_end(serve):
    server = serve("--max-connections", "2", SKYPE_VIEW_PASSWORD=PASSWORD)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.port)) for _ in range(16)]
        assert [stream.status for stream in streams] == [200] * 16
        assert Stream(server.port).status == 503
        assert server.deliver(event())[0] == 200
        streams.pop().close()
        end = time.monotonic() + 10
        while Stream(server.port).status == 503:
            assert time.monotonic() < end
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 3


class Browser:
    """Headless Chromium, driven over a pipe (the DevTools protocol: JSON, each message ended by NUL)."""

    def __init__(self, program, folder):
        there, self.to = os.pipe()
        self.back, back = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--ignore-certificate-errors", "--no-first-run",
                 "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", program, *flags],
                                        pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **({"sessionId": self.session} if self.session else {})}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                received = os.read(self.back, 65536)
                assert received, "the browser has ended"
                self.buffer += received
            answer, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script, seconds=20):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    opened = Browser(program, tmp_path / "browser")
    yield opened
    opened.close()


def test_a_delivery_shows_up_in_the_browser_and_hostile_text_stays_text(serve, browser):
    server = serve(SKYPE_VIEW_PASSWORD="pass")
    browser.call("Page.navigate", url=f"https://viewer:pass@localhost:{server.port}/")
    browser.wait_for("document.querySelector('#state.live') && !document.querySelector('#empty').hidden")
    hostile = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202etxet'
    for n, text in enumerate((hostile, "x" * 10_000)):
        stage = {"value": hostile if n == 0 else "InterviewStarted", "metadata": text}
        assert server.deliver(event(interviewCode=f"{n} {hostile}", currentStage=stage))[0] == 200
    browser.wait_for("document.querySelectorAll('#rows tr').length == 2")
    shown = browser.run("document.body.textContent")
    assert "<script>alert(1)</script>\"><img src=x onerror=alert(2)>\\u202etxet" in shown and "\u202e" not in shown
    assert browser.run("document.querySelectorAll('img, #rows script').length") == 0
    for width in (390, 1280):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        assert browser.run("document.documentElement.scrollWidth") <= width
    server.log.rename(server.log.with_name("events.jsonl.1"))
    browser.run("document.querySelector('#rows a').focus()")
    held = browser.run("document.activeElement.textContent")
    server.deliver(event(interviewCode="after the rotation"))
    browser.wait_for("document.querySelector('#rows').textContent.includes('after the rotation')")
    assert browser.run("document.activeElement.textContent") == held
    assert browser.run("document.querySelectorAll('#rows tr').length") == 3
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.split("@")[-1].removeprefix("https://").startswith((f"localhost:{server.port}/", "data:")) for url in urls), urls
    noise = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [e for e in browser.events if e["method"] in noise and "401" not in json.dumps(e)] == []
    assert server.stop() == 0
    browser.wait_for("document.querySelector('#state').textContent == 'reconnecting'")


# --- Sender and timeline ---


def stage_lines(code, *changes):
    """Return log lines of one interview: (previous, stage, second of its time, second of its arrival)."""
    lines = []
    for previous, stage, second, arrival in changes:
        body = event(interviewCode=code, previousStage={"value": previous}, currentStage={"value": stage},
                     timestamp=f"2026-11-24T10:{second // 60:02d}:{second % 60:02d}.0000001Z")
        lines.append(sw.format_line(sw.parse_event(body), body, 1_800_000_000 + arrival))
    return lines


def run_timeline(*arguments, **environment):
    done = subprocess.run([sys.executable, str(HERE / "skype_webhook.py"), "timeline", *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "TZ": "UTC", **environment}, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


COURSE = (("InterviewCreated", "SchedulingTime", 0, 0), ("SchedulingCompleted", "InterviewStarted", 130, 1),
          ("SchedulingTime", "SchedulingCompleted", 60, 2), ("InterviewCompleted", "FeedbackCollecting", 3700, 3))


def test_a_timeline_is_in_the_events_order_with_gaps_and_late_arrivals(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    lines = stage_lines("code\u202e", *COURSE)
    one.write_bytes(b"".join(lines[:3]) + b"   \nforeign\n{}\n")
    two.write_bytes(b"".join(lines[2:]))
    done = run_timeline(one, two)
    assert done.returncode == 0 and "skipped 1 blank and 2 foreign lines" in done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[1:] if line] == [
        "SchedulingTime", "SchedulingCompleted", "InterviewStarted", "FeedbackCollecting"]
    assert "code\\u202e" in done.stdout and "\x1b" not in done.stdout
    text = [line for line in done.stdout.splitlines() if "gap" in line or "late" in line]
    assert "late" in text[0] and "gap" in text[1] and "InterviewCompleted" in text[1] and len(text) == 2
    assert "2026-11-24 10:00:00" in done.stdout and "for 1 min" in done.stdout and "for 59 min 30 s" in done.stdout
    (line,) = run_timeline("--json", "--interview", "code\u202e", one, two).stdout.splitlines()
    interview = json.loads(line)
    assert interview["stage"] == "FeedbackCollecting" and [e.get("gap", False) for e in interview["events"]] == [False, False, False, True]
    assert run_timeline("--json", "--interview", "other", one).stdout == ""
    assert run_timeline(tmp_path / "none").returncode == 2


def test_a_timeline_follows_the_log_over_its_rotation(tmp_path):
    log = tmp_path / "events.jsonl"
    lines = stage_lines("one", *COURSE)
    log.write_bytes(lines[0])
    process = subprocess.Popen([sys.executable, str(HERE / "skype_webhook.py"), "timeline", "--json", "--follow", str(log)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        counts = [len(json.loads(process.stdout.readline())["events"])]
        with open(log, "ab") as file:
            file.write(lines[1])
        counts.append(len(json.loads(process.stdout.readline())["events"]))
        log.rename(tmp_path / "events.jsonl.1")
        log.write_bytes(lines[2])
        counts.append(len(json.loads(process.stdout.readline())["events"]))
        assert counts == [1, 2, 3]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and process.stderr.read() == b""
    finally:
        process.kill()


# --- Settings and the command line ---
