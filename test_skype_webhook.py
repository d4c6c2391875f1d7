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

NOW = 1_519_343_720
BODY = b'{"event":"State"}'
HEADER = b'{"alg":"HS256","typ":"JWT"}'
PUBLISHED = ("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJqdGkiOiJkODY2MWExNC00YjdjLTVmZGEtMjIyNy05YjA1NWZjZjViMTAiLCJpc3MiOiIwZWQwZTAxYi"
             "00ZjhmLTkzZWUtNDVkZS05Njk1OTU0YTQ0YTkiLCJzdWIiOiI0NDEzNmZhMzU1YjM2NzhhMTE0NmFkMTZmN2U4NjQ5ZTk0ZmI0ZmMyMWZlNzdlODMxMGMwNj"
             "BmNjFjYWFmZjhhIiwiZXhwIjoxNTE5MzQzNzI0LCJpYXQiOjE1MTkzNDM3MTR9.4KSookeDh2d_Vujy_bUiA2n0yKY39inaIc1laWjDt6Q")
RFC7515_A1 = ("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb2"
              "90Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
RFC7515_A1_KEY = base64.urlsafe_b64decode("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow==")


def check(authorization, body=BODY, now=NOW, credentials=(CREDENTIAL,), leeway=1.0):
    return sw.verify(authorization, body, credentials, now, leeway)


def refusal(authorization, *args, **options):
    with pytest.raises(sw.Rejected) as caught:
        check(authorization, *args, **options)
    assert caught.value.status == 401
    return caught.value.detail


def payload(body=BODY, now=NOW, **claims):
    claims = {"iss": KEY, "sub": hashlib.sha256(body).hexdigest(), "exp": now + 10, "iat": now, **claims}
    return json.dumps(claims).encode()


def change_signature(good):
    return good[:-1] + ("B" if good[-1] != "B" else "C")


def respell(good):
    """Return the token with spare bits set in the last character of its signature: another spelling of the same bytes."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return good[:-1] + alphabet[alphabet.index(good[-1]) ^ 1]


# Each row changes one thing in a valid delivery, as a function of (token, body, now); the word that the refusal has to hold.
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
    "another signature": (lambda t, b, n: "Bearer " + change_signature(t), "signature"),
    "non-canonical signature": (lambda t, b, n: "Bearer " + respell(t), "signature"),
    "junk in it": (lambda t, b, n: "Bearer " + t[:5] + "!" + t[5:], "signature"),
    "not ASCII": (lambda t, b, n: "Bearer " + t + "\xe9", "signature"),
    "over 8 KiB": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, x="y" * 9000)), "longer"),
    "another secret": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n), b"other"), "signature"),
    "empty secret": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n), b""), "signature"),
    "alg none": (lambda t, b, n: "Bearer " + jws(b'{"alg":"none"}', payload(b, n)), "HS256"),
    "alg hs256": (lambda t, b, n: "Bearer " + jws(b'{"alg":"hs256"}', payload(b, n)), "HS256"),
    "alg HS512": (lambda t, b, n: "Bearer " + jws(b'{"alg":"HS512"}', payload(b, n)), "HS256"),
    "no alg": (lambda t, b, n: "Bearer " + jws(b'{"typ":"JWT"}', payload(b, n)), "HS256"),
    "crit": (lambda t, b, n: "Bearer " + jws(b'{"alg":"HS256","crit":["exp"]}', payload(b, n)), "critical"),
    "header a list": (lambda t, b, n: "Bearer " + jws(b'["HS256"]', payload(b, n)), "header"),
    "header UTF-16": (lambda t, b, n: "Bearer " + jws(HEADER.decode().encode("utf-16"), payload(b, n)), "header"),
    "two algs": (lambda t, b, n: "Bearer " + jws(b'{"alg":"none","alg":"HS256"}', payload(b, n)), "header"),
    "payload a list": (lambda t, b, n: "Bearer " + jws(HEADER, b"[]"), "payload"),
    "payload nested deep": (lambda t, b, n: "Bearer " + jws(HEADER, b'{"a":' + b"[" * 2900 + b"]" * 2900 + b"}"), "token's"),
    "a claim twice": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n)[:-1] + b',"iat":1}'), "payload"),
    "NaN": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, x=float("nan"))), "payload"),
    "no iss": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, iss=None)), "issuer"),
    "another iss": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, iss=KEY.upper())), "issuer"),
    "iss a list": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, iss=[KEY])), "issuer"),
    "no iat": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, iat=None)), "iat"),
    "no exp": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, exp=None)), "exp"),
    "iat a bool": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, iat=True)), "iat"),
    "exp huge": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n).replace(b'"exp": ', b'"exp": 1' + b"0" * 400)), "exp"),
    "exp of 5000 digits": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n).replace(b'"exp": ', b'"exp": 1' + b"0" * 5000)), "payload"),
    "exp Arabic digits": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, exp="\u0669" * 10)), "exp"),
    "exp 1_0": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, exp="9_999_999_999")), "exp"),
    "expired": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n - 60)), "expired 50"),
    "not begun": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n + 60)), "begins in 60"),
    "nbf ahead": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, nbf=n + 60)), "nbf"),
    "nbf a list": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, nbf=[])), "nbf"),
    "no sub": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, sub=None)), "sub"),
    "sub of another body": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b + b" ", n)), "sub"),
    "sub cut": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, sub=hashlib.sha256(b).hexdigest()[:-1])), "sub"),
    "sub in base64": (lambda t, b, n: "Bearer " + jws(HEADER, payload(b, n, sub=base64url(hashlib.sha256(b).digest()).decode())), "sub"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_change_is_refused(attack):
    good = token(BODY, NOW)
    assert check("Bearer " + good)["iss"] == KEY
    change, word = ATTACKS[attack]
    assert word in refusal(change(good, BODY, NOW))


def test_one_change_is_refused_over_tls(shared):
    for attack, (change, word) in ATTACKS.items():
        body, now = event(), int(time.time())
        before = shared.log.read_bytes()
        authorization = change(token(body), body, now)
        lines = ["POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        lines += [] if authorization is None else [f"Authorization: {authorization}"]
        with Peer(shared.port) as peer:
            peer.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            status, fields, content = peer.answer()
        assert (status, attack) == (401, attack)
        assert (word[:7] in content.decode()) or "s ago" in content.decode() or "begins" in content.decode(), attack
        assert fields["www-authenticate"].startswith("Bearer error=" if authorization is not None else "Bearer")
        assert shared.log.read_bytes() == before
        assert shared.deliver(body)[0] == 200


@pytest.mark.parametrize("claims", [
    {"iat": NOW * 1000, "exp": (NOW + 10) * 1000}, {"iat": str(NOW * 1000)}, {"iat": str(NOW), "exp": f"{NOW + 10}.5"},
    {"iat": NOW + 0.5}, {"nbf": NOW}, {"sub": hashlib.sha256(BODY).hexdigest().upper()}, {"x": {"y": [1]}}, {"exp": 1e13},
], ids=str)
def test_documented_and_vendor_forms_of_claims_pass(claims):
    check("bEaReR  " + jws(HEADER, payload(**claims)))


def test_leeway_is_exclusive_at_both_ends():
    good = "Bearer " + token(BODY, NOW)
    for now in (NOW - 0.99, NOW + 10.99):
        check(good, now=now)
    for now in (NOW - 1, NOW + 11):
        assert "clock" in refusal(good, now=now)
    assert "clock" not in refusal(good, now=NOW + 1000)
    check(good, now=NOW + 14, leeway=5)


def test_a_previous_credential_needs_its_own_key_and_secret():
    old = sw.Credential("old", b"old secret")
    both = (CREDENTIAL, old)
    check("Bearer " + jws(HEADER, payload(iss="old"), b"old secret"), credentials=both)
    assert "issuer" in refusal("Bearer " + jws(HEADER, payload(iss="old")), credentials=both)
    assert "signature" in refusal("Bearer " + jws(HEADER, payload(), b""), credentials=(sw.Credential(KEY, b""),))


def test_tokens_from_outside():
    assert "signature" in refusal("Bearer " + PUBLISHED, b"{}")
    assert "issuer" in refusal("Bearer " + RFC7515_A1, credentials=(sw.Credential(KEY, RFC7515_A1_KEY),))
    assert "iat" in refusal("Bearer " + RFC7515_A1, credentials=(sw.Credential("joe", RFC7515_A1_KEY),))


def test_a_secret_is_not_in_the_text_of_a_credential():
    assert SECRET.decode() not in repr(CREDENTIAL)


# --- Events and lines ---


@pytest.mark.parametrize("body", [
    b"", b"[]", b"1", b"null", b'"x"', b"{", b"{} x", b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":01}', b"{'a':1}", b'{"a":"\n"}', b'{"a":1,}',
    b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32-le"), b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}',
    b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", b'{"a":' + b"[" * 100_000, b'{"a":"\\x"}',
], ids=lambda body: repr(body[:20]))
def test_what_is_no_event_is_refused(body):
    with pytest.raises(sw.Rejected) as caught:
        sw.parse_event(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [
    b"{}", b' \r\n{"a":1}\n', b'{"a":1,"a":2}', b'{"a":1e400,"b":-0.0,"c":' + b"9" * 5000 + b"}", b'{"a":' + b"[" * 63 + b"]" * 63 + b"}",
    b'{"a":"' + b"[" * 1000 + b'"}', b'{"a":"\\ud83d\\ude00"}', b'{"event":5,"currentStage":"x","interviewCode":{},"timestamp":[]}',
    b'{"event":"a b","currentStage":{"value":"New"},"timestamp":"2018-02-30T00:00:00Z"}',
], ids=lambda body: repr(body[:20]))
def test_an_odd_event_is_recorded_byte_for_byte_with_a_warning(body):
    parsed = sw.parse_event(body)
    line = sw.format_line(parsed, body, 0)
    assert parsed.warnings
    assert line.endswith(b',"data":' + body.replace(b"\r", b" ").replace(b"\n", b" ") + b"}\n") and line.count(b"\n") == 1
    assert line.startswith(b'{"specversion":"1.0","id":"' + hashlib.sha256(body).hexdigest().encode() + b'","source":')


def test_the_documented_event_becomes_this_line():
    body = event(interviewCode="1c519c56")
    envelope = json.loads(line := sw.format_line(sw.parse_event(body), body, 1_519_343_720.25))
    assert list(envelope) == ["specversion", "id", "source", "type", "subject", "time", "recordedtime", "datacontenttype", "data"]
    assert not sw.parse_event(body).warnings
    assert line == (b'{"specversion":"1.0","id":"%b","source":"https://interviews.skype.com","type":"com.skype.interviews.State",'
                    b'"subject":"1c519c56","time":"2018-02-26T17:50:17.4862382Z","recordedtime":"2018-02-22T23:55:20.250000Z",'
                    b'"datacontenttype":"application/json","data":%b}\n') % (hashlib.sha256(body).hexdigest().encode(), body)


@pytest.mark.parametrize("escape", [b"\\ud800", b"\\udc00", b"\\ud800\\ud800", b"\\udc00\\ud800", b"\\ud800x", b"\\\\\\uDBFF"])
def test_an_unpaired_surrogate_is_recorded_as_base64(escape):
    body = b'{"interviewCode":"' + escape + b'"}'
    envelope = json.loads(sw.format_line(sw.parse_event(body), body, 0))
    assert base64.b64decode(envelope["data_base64"]) == body and not {"data", "subject"} & set(envelope)


@pytest.mark.parametrize(("field", "value"), [
    ("interviewCode", ""), ("interviewCode", "a\nb"), ("interviewCode", "\x7f"), ("interviewCode", 5),
    ("timestamp", "2018-02-26 17:50:17Z"), ("timestamp", "2018-02-26T17:50:17"), ("timestamp", "2018-02-26T25:50:17Z"), ("timestamp", 0),
    ("timestamp", "\u0662018-02-26T17:50:17Z"), ("event", "x" * 65), ("event", "a\"b"), ("event", None)])
def test_what_fits_no_attribute_is_left_out(field, value):
    body = event(**{field: value})
    envelope = json.loads(sw.format_line(sw.parse_event(body), body, 0))
    if field == "event":
        assert envelope["type"] == "com.skype.interviews.unknown"
    else:
        assert {"interviewCode": "subject", "timestamp": "time"}[field] not in envelope


@pytest.mark.parametrize(("text", "seconds"), [("1970-01-01T00:00:01Z", 1), ("1970-01-01t01:00:00+01:00", 0), ("1970-01-01T00:00:00-00:30", 1800),
                                               ("2016-12-31T23:59:60Z", 1483228800), ("1970-01-01T00:00:00.0000001Z", 1e-7)])
def test_times_are_instants(text, seconds):
    assert sw.parse_time(text) == round(seconds * 10**9)


# --- The journal ---


def line(number, size=0):
    body = b'{"n":%d,"x":"%b"}' % (number, b"y" * size)
    return hashlib.sha256(body).hexdigest(), sw.format_line(sw.parse_event(body), body, 0)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


def test_one_event_by_64_threads_is_written_once(log):
    start, results = threading.Barrier(64), []

    def append():
        start.wait()
        for number in range(20):
            results.append(journal.append(*line(number)))

    with sw.Journal(log) as journal:
        threads = [threading.Thread(target=append) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results.count(True) == 20 and len(log.read_bytes().splitlines()) == 20


def test_ids_are_remembered_over_a_restart(log):
    with sw.Journal(log) as journal:
        assert all(journal.append(*line(number, 5000)) for number in range(500))
    with sw.Journal(log) as journal:
        assert not any(journal.append(*line(number, 5000)) for number in range(500))
        assert journal.append(*line(500))


def test_a_torn_tail_of_every_length_is_sealed(log):
    whole, torn = line(0)[1], line(1)[1]
    for length in range(1, len(torn)):
        log.write_bytes(whole + torn[:length])
        with sw.Journal(log) as journal:
            assert journal.append(*line(1)) == (length < len(torn) - 1)
        first, blank, *rest = log.read_bytes().split(b"\n")
        assert first + b"\n" == whole
        if length < len(torn) - 1:
            assert blank == b" " * length and b"\n".join(rest) == torn
        else:
            assert blank + b"\n" == torn and rest == [b""]


def test_a_log_with_only_a_torn_line_longer_than_a_page_is_sealed(log):
    log.write_bytes(b"x" * 100_000)
    with sw.Journal(log) as journal:
        assert journal.sealed == 100_000
    assert log.read_bytes() == b" " * 100_000 + b"\n"


def test_a_new_log_is_private_and_locked(log):
    with sw.Journal(log):
        assert log.stat().st_mode & 0o777 == 0o600
        with pytest.raises(sw.JournalError, match="another process"):
            sw.Journal(log)
    sw.Journal(log).close()


@pytest.mark.parametrize("kind", ["folder", "fifo", "no folder"])
def test_a_path_that_is_no_regular_file_is_refused(log, kind):
    if kind == "folder":
        log.mkdir()
    elif kind == "fifo":
        os.mkfifo(log)
    with pytest.raises(sw.JournalError):
        sw.Journal(log / "x" if kind == "no folder" else log)


def test_rotation_by_rename_and_by_copytruncate_is_followed(log):
    with sw.Journal(log) as journal:
        journal.append(*line(0))
        log.rename(old := log.with_suffix(".1"))
        journal.append(*line(1))
        assert not journal.append(*line(0))
        assert (old.read_bytes(), log.read_bytes()) == (line(0)[1], line(1)[1])
        os.truncate(log, 0)
        journal.append(*line(2))
        assert log.read_bytes() == line(2)[1]
        log.unlink()
        journal.append(*line(3))
        assert log.read_bytes() == line(3)[1]


def test_a_failed_write_is_blanked_and_the_next_one_goes_through(log, monkeypatch):
    real = os.write
    with sw.Journal(log) as journal:
        journal.append(*line(0))
        monkeypatch.setattr(sw.os, "write", lambda fd, data: real(fd, data[:10]) if len(data) > 10 else real(fd, data))
        with pytest.raises(sw.JournalError, match="10 of"):
            journal.append(*line(1))
        monkeypatch.undo()
        assert journal.append(*line(1))
        journal.check()
    assert log.read_bytes() == line(0)[1] + b" " * 10 + b"\n" + line(1)[1]


def test_a_failed_sync_is_final(log, monkeypatch):
    ended = threading.Event()
    with sw.Journal(log) as journal:
        journal.on_final = ended.set
        monkeypatch.setattr(sw, "_sync", lambda fd: os.fsync(10**6))
        for _ in range(2):
            with pytest.raises(sw.JournalError):
                journal.append(*line(1))
        assert ended.wait(5)
        with pytest.raises(sw.JournalError):
            journal.check()
    assert not log.read_bytes().strip()


def test_an_append_waits_no_longer_than_its_time(log, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(sw, "STORE_SECONDS", 0.2)
    with sw.Journal(log) as journal:
        monkeypatch.setattr(sw, "_sync", lambda fd: go_on.wait(10))
        with pytest.raises(sw.JournalError, match="within"):
            journal.append(*line(1))
        go_on.set()
        monkeypatch.setattr(sw, "STORE_SECONDS", 10)
        assert not journal.append(*line(1))


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
