#!/usr/bin/env python3
"""Attack a receiver on loopback, and measure how its good senders fare meanwhile.

    .ci/attacks.py                              every attack, 20 s each
    .ci/attacks.py --list                       the names of attacks and campaigns
    .ci/attacks.py --seconds 35 healthz-256     one attack, longer
    .ci/attacks.py --seconds 600 long           a campaign: stop, long, idle
    .ci/attacks.py --program /tmp/older.py      another version of the receiver, to compare

The receiver has core 0 to itself; attackers and good senders share core 1. Good deliveries come 20
times a second on new connections and 20 times a second on a kept one, each signed, and timed from
the moment at which it is due. Every event that was acknowledged has to be in the log exactly once,
and a SIGTERM amid the attack has to end the receiver in time.

An attack is a function that lives the life of one hostile connection. The table near the end of
this file says how many threads run it again and again, and what else the receiver has to cope with.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import ctypes
import functools
import hashlib
import hmac
import json
import multiprocessing
import os
import pathlib
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
KEY, SECRET = "0ed0e01b-4f8f-93ee-45de-9695954a44a9", b"3627875e-7826-8a35-4b38-c54e8a4bb1f1"
PASSWORD = "the password of the live view"
RECEIVER_CORE, OTHERS_CORE = 0, 1
GOOD_RATE = 20.0        # deliveries a second on new connections, and as many on the kept one
GOOD_TIMEOUT = 30.0     # seconds; what the service waits for an answer
STOP_LIMIT = 15.0       # seconds from SIGTERM to the end, also under attack
ATTACK_TIMEOUT = 20.0   # seconds that an attacker waits on its socket
LONG_RATE = 200.0       # deliveries a second of the long run
DELAY = 0.04            # seconds each way, to the distant sender
SCALE = 10              # the idle campaign runs this many times faster than life


def say(text: str) -> None:
    print(text, flush=True)


# --- Deliveries ---


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def sign(body: bytes) -> str:
    """Return a token as the service makes it, as of now."""
    now = int(time.time())
    claims = {"jti": str(uuid.uuid4()), "iss": KEY, "sub": hashlib.sha256(body).hexdigest(),
              "exp": now + 10, "iat": now}
    payload = json.dumps(claims).encode()
    signed = base64url(b'{"alg":"HS256","typ":"JWT"}') + b"." + base64url(payload)
    return (signed + b"." + base64url(hmac.digest(SECRET, signed, "sha256"))).decode()


def new_event() -> bytes:
    """Return the body of an event that no other call returns."""
    return json.dumps({
        "previousStage": {"value": "InterviewCreated", "metadata": "1 - Interview was created"},
        "currentStage": {"value": "SchedulingTime", "metadata": "2000 - Pending interviewer"},
        "event": "State", "timestamp": "2018-02-26T17:50:17.4862382Z",
        "interviewCode": str(uuid.uuid4())}).encode()


def head(first: str, *fields: str) -> bytes:
    return "\r\n".join([first, "Host: localhost", *fields, "", ""]).encode()


def post(body: bytes, token: str = "", length: int | None = None) -> bytes:
    """Return one delivery as it goes over the wire; without `token`, a good one."""
    length = len(body) if length is None else length
    return head("POST / HTTP/1.1", f"Authorization: Bearer {token or sign(body)}",
                f"Content-Length: {length}") + body


def post_chunked(body: bytes) -> bytes:
    """Return the head of a good delivery whose body is to follow in chunks."""
    return head("POST / HTTP/1.1", f"Authorization: Bearer {sign(body)}",
                "Transfer-Encoding: chunked")


def get(target: str, *fields: str) -> bytes:
    return head(f"GET {target} HTTP/1.1", *fields)


def basic(password: str) -> str:
    return "Authorization: Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


# --- Connections ---


class Target(NamedTuple):
    """Where a receiver, or a relay in front of it, listens on loopback."""

    port: int
    tls: bool = True


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


CONTEXT = client_context()


def connect(target: Target, timeout: float = ATTACK_TIMEOUT) -> socket.socket:
    """Return a TCP connection."""
    raw = socket.create_connection(("127.0.0.1", target.port), timeout)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def open_stream(target: Target, timeout: float = ATTACK_TIMEOUT) -> socket.socket:
    """Return a connection that requests can be sent on."""
    raw = connect(target, timeout)
    return CONTEXT.wrap_socket(raw, server_hostname="localhost") if target.tls else raw


class Client:
    """A good sender's connection. `sent` is when its request had been sent whole, 0 before that."""

    def __init__(self, target: Target) -> None:
        self.socket = open_stream(target, GOOD_TIMEOUT)
        self.file = self.socket.makefile("rb")
        self.sent, self.is_last = 0.0, False

    def ask(self, request: bytes) -> int:
        """Return the status of the answer; raise OSError where there is none."""
        self.sent = 0.0
        self.socket.sendall(request)
        self.sent = time.monotonic()
        line, length = self.file.readline(), 0
        if not line:
            raise ConnectionError("closed without an answer")
        status = int(line.split()[1])
        while (line := self.file.readline().strip().lower()):
            name, _, value = line.partition(b": ")
            if name == b"content-length":
                length = int(value)
            self.is_last = self.is_last or (name, value) == (b"connection", b"close")
        self.file.read(length)
        return status

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class RawTls:
    """TLS 1.3 whose records are made one by one, and sent when the attacker wants."""

    def __init__(self, target: Target) -> None:
        self.socket = connect(target)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = CONTEXT.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        while self._wants_more():
            self.flush()
            received = self.socket.recv(65536)
            if not received:
                raise ConnectionError("closed in the handshake")
            self.incoming.write(received)
        self.flush()

    def _wants_more(self) -> bool:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return True
        return False

    def flush(self) -> None:
        self.socket.sendall(self.outgoing.read())

    def drop_received(self) -> None:
        """Drop what has come, unread by TLS, so that the receiver is never kept from sending."""
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(2**20, socket.MSG_DONTWAIT)

    def update_key(self, ours_too: bool) -> None:
        """Make a KeyUpdate, which may ask for one of the receiver's (RFC 8446 section 4.6.3).

        Python has no call for it, but OpenSSL has. The pointer to OpenSSL's structure stands in
        CPython's object behind its header and a reference.
        """
        place = id(self.tls._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
        OPENSSL.SSL_key_update(ctypes.c_void_p.from_address(place), int(ours_too))
        self.tls.do_handshake()


OPENSSL = ctypes.CDLL(ssl._ssl.__file__)  # OpenSSL is found through what is linked to it


# --- Attacks: the life of one hostile connection each ---


def do_nothing(_target: Target) -> None:
    time.sleep(1)


def pipeline(request: bytes, target: Target) -> None:
    """Send requests without waiting for answers, and take the answers in large pieces."""
    batch, ahead = 64, 0
    with open_stream(target) as peer:
        peer.sendall(request * batch)
        while True:
            peer.sendall(request * batch)
            ahead += batch
            while ahead > 0:
                received = peer.recv(65536)
                if not received:
                    return
                ahead -= received.count(b"HTTP/1.1 ")


def ask_in_turn(request: bytes, target: Target) -> None:
    with open_stream(target) as peer:
        while True:
            peer.sendall(request)
            if not peer.recv(65536):
                return


def send_refused_body(target: Target) -> None:
    """Announce a body that is allowed, with a bad token, and send up to 9 MB."""
    with open_stream(target) as peer:
        peer.sendall(post(b"", "a.b.c", 2**20))
        for _ in range(9 * 2**20 // 65536):
            peer.sendall(bytes(65536))


def update_keys(ours_too: bool, target: Target) -> None:
    peer = RawTls(target)
    with peer.socket:
        while True:
            for _ in range(100):
                peer.update_key(ours_too)
            peer.flush()
            peer.drop_received()


def shake_hands(target: Target) -> None:
    RawTls(target).socket.close()


def send_large_events(target: Target) -> None:
    """Deliver verified bodies of the kind that is the most expensive to parse."""
    with contextlib.closing(Client(target)) as client:
        while True:
            start = b'{"n":"%b","a":[' % uuid.uuid4().hex.encode()
            client.ask(post(start + b"[]," * ((2**20 - len(start) - 4) // 3) + b"[]]}"))


def send_and_wait(data: bytes, target: Target) -> None:
    """Send something below TLS, and wait until the receiver closes the connection."""
    with connect(target, 600) as peer:
        peer.sendall(data)
        while peer.recv(65536):
            pass


def ask_and_wait(request: bytes, target: Target) -> None:
    """Send a request, or a part of one, and wait until the receiver closes the connection."""
    with open_stream(target, 600) as peer:
        peer.sendall(request)
        while peer.recv(65536):
            pass


def make_hello() -> bytes:
    """Return a whole ClientHello."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        CONTEXT.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def reset_after(data: bytes, target: Target) -> None:
    """Connect 200 times, send something, and reset all of them."""
    peers = []
    for _ in range(200):
        peers.append(connect(target))
        peers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if data:
            peers[-1].send(data)
    for peer in peers:
        peer.close()


def send_records_of_one_byte(request: bytes, target: Target) -> None:
    """Send a request again and again, each of its bytes in a TLS record; take no answers."""
    peer = RawTls(target)
    with peer.socket:
        while True:
            for number in range(len(request)):
                peer.tls.write(request[number:number + 1])
            peer.flush()
            peer.drop_received()


def take_answers_by_bytes(target: Target) -> None:
    with connect(target) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        with CONTEXT.wrap_socket(raw, server_hostname="localhost") as peer:
            while True:
                peer.sendall(get("/healthz") * 50)
                peer.recv(1)


def half_close(target: Target) -> None:
    """End the sending side in the middle of a request."""
    with open_stream(target) as peer:
        peer.sendall(post(b"", "a.b.c", 100))
        socket.socket.shutdown(peer, socket.SHUT_WR)
        while peer.recv(65536):
            pass


def send_small_chunks(target: Target) -> None:
    """With the secret: a body of one byte a chunk."""
    with open_stream(target) as peer:
        peer.sendall(post_chunked(b""))
        while True:
            peer.sendall(b"1\r\n \r\n" * 10_000)


def drip_trailer(target: Target) -> None:
    """With the secret: a trailer of one byte a packet."""
    with open_stream(target) as peer:
        peer.sendall(post_chunked(b"") + b"0\r\n")
        while True:
            peer.sendall(b"a")


def expect_nothing(target: Target) -> None:
    """With the secret: ask for a 100, and send no body."""
    request = head("POST / HTTP/1.1", f"Authorization: Bearer {sign(b'{}')}", "Content-Length: 2",
                   "Expect: 100-continue")
    ask_and_wait(request, target)


def pipeline_events(target: Target) -> None:
    """With the secret: good events, 100 at once."""
    with open_stream(target) as peer:
        while True:
            peer.sendall(b"".join(post(new_event()) for _ in range(100)))
            if not peer.recv(65536):
                return


def replay_event(target: Target) -> None:
    """Pipeline a good delivery that somebody has seen."""
    pipeline(post(new_event()), target)


def guess_password(address: str, target: Target) -> None:
    """Guess the password of the live view, by a proxy that names another address each time."""
    with open_stream(target) as peer:
        while True:
            place = address.format(random.getrandbits(16), random.getrandbits(16))
            peer.sendall(get("/", basic(place), f"X-Forwarded-For: {place}"))
            if not peer.recv(65536):
                return


def watch_without_reading(target: Target) -> None:
    """With the password: ask for the stream of events, read none of it, and send a lot."""
    with open_stream(target) as peer:
        peer.sendall(get("/events", basic(PASSWORD)))
        while True:
            peer.sendall(bytes(65536))


# --- One receiver ---


class Attack(NamedTuple):
    """What is run against a receiver, and what the receiver has to cope with besides."""

    peer: Callable[[Target], None]
    peers: int = 1                  # at once
    again: bool = True              # a closed one comes back at once
    pace: float = 0.0               # connections a second in all; 0: as fast as it goes
    flags: tuple[str, ...] = ()     # of the receiver
    wrapper: tuple[str, ...] = ()   # the command that runs it, with limits
    stderr_read: bool = True        # else stderr is a full pipe
    viewed: bool = False            # there is a live view, and somebody who looks at its page


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def full_pipe() -> tuple[int, int]:
    """Return the reading and the writing end of a pipe that takes nothing more."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    return reading, writing


def new_certificate(folder: pathlib.Path) -> None:
    """Put a new certificate and its key into the place of those in use."""
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-subj", "/CN=localhost", "-keyout", "new.key", "-out", "new.cert"]
    subprocess.run(words, check=True, capture_output=True, cwd=folder)
    for name in ("key", "cert"):
        (folder / f"new.{name}").replace(folder / f"{name}.pem")


class Receiver:
    """A receiver in a process of its own, with its files in `folder`."""

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path, attack: Attack) -> None:
        self.log, self.errors = folder / "events.jsonl", folder / "stderr"
        self.target = Target(free_port(), "--behind-proxy" not in attack.flags)
        flags = ["--host", "127.0.0.1", "--port", str(self.target.port), *attack.flags]
        if self.target.tls:
            new_certificate(folder)
            flags += ["--cert", "cert.pem", "--key", "key.pem"]
        environment = {"PATH": os.environ["PATH"], "SKYPE_API_KEY": KEY,
                       "SKYPE_API_SECRET": SECRET.decode()}
        if attack.viewed:
            environment["SKYPE_VIEW_PASSWORD"] = PASSWORD
        if attack.stderr_read:
            self.ends: tuple[int, ...] = (os.open(self.errors, os.O_WRONLY | os.O_CREAT),)
        else:
            self.ends = full_pipe()
        words = ["taskset", "-c", str(RECEIVER_CORE), *attack.wrapper, options.python]
        self.process = subprocess.Popen([*words, options.program, *flags],
                                        cwd=folder, env=environment, stderr=self.ends[-1])
        self.wait_until_up()

    def wait_until_up(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                connect(self.target).close()
                return
            time.sleep(0.02)
        raise SystemExit(f"the receiver did not come up: {self.said()}")

    def said(self) -> str:
        return self.errors.read_text("utf-8", "replace") if self.errors.exists() else ""

    def status(self, name: str) -> int:
        """Return a number of /proc/PID/status: Threads, or VmHWM and VmRSS in KiB."""
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def cpu_seconds(self) -> float:
        text = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wrong(self, acknowledged: list[str]) -> int:
        """Return how many of these events are not exactly once in the logs, rotated ones too."""
        found: collections.Counter[str] = collections.Counter()
        for path in self.log.parent.glob("events.jsonl*"):
            with path.open("rb") as lines:
                found.update(line[27:91].decode() for line in lines if line.strip())
        return sum(found[event_id] != 1 for event_id in set(acknowledged))

    def stop(self) -> int:
        """End the receiver; return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            for end in self.ends:
                os.close(end)


# --- Good senders ---


class Good:
    """Deliveries of one kind: what became of them, and how many milliseconds they took."""

    def __init__(self) -> None:
        self.tried = 0
        self.times: list[float] = []
        self.failures: collections.Counter[str] = collections.Counter()
        self.acknowledged: list[str] = []

    def ask(self, client: Client | None, target: Target, request: bytes,
            wanted: int = 200, event_id: str = "") -> Client | None:
        """Send one request and note what became of it; return the connection if it is kept."""
        due = time.monotonic()
        self.tried += 1
        try:
            client = client or Client(target)
            status = client.ask(request)
        except OSError as error:
            self.failures[type(error).__name__] += 1
            return None
        if status == wanted:
            self.times.append((time.monotonic() - due) * 1000)
            self.acknowledged.append(event_id)
        else:
            self.failures[str(status)] += 1
        if client.is_last:
            client.close()
            return None
        return client

    def deliver(self, client: Client | None, target: Target, body: bytes) -> Client | None:
        """As `ask`; the event is signed before the connection is made, as the service does it."""
        event_id = hashlib.sha256(body).hexdigest()
        return self.ask(client, target, post(body), event_id=event_id)

    def row(self) -> str:
        times = sorted(self.times) or [float("nan")]
        p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
        return f"{self.tried:6}/{len(self.times):<6}{p50:6.0f} {p99:6.0f} {times[-1]:6.0f}"


def turns(rate: float, end: float) -> Iterator[None]:
    """Yield so many times a second, until `end`; a turn that takes too long delays the next."""
    while (begun := time.monotonic()) < end:
        yield
        time.sleep(max(0.0, begun + 1 / rate - time.monotonic()))


def in_thread(function: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def deliver_new(good: Good, target: Target) -> None:
    client = good.deliver(None, target, new_event())
    if client:
        client.close()


def deliver_on_new(good: Good, target: Target, end: float) -> None:
    """Deliver at a steady rate, each on a connection of its own, however long the answers take."""
    senders = [in_thread(deliver_new, good, target) for _ in turns(GOOD_RATE, end)]
    for sender in senders:
        sender.join()


def deliver_on_kept(good: Good, target: Target, end: float) -> None:
    """Deliver on one connection; where that is closed, another follows."""
    client = None
    for _ in turns(GOOD_RATE, end):
        client = good.deliver(client, target, new_event())


def look_at_page(good: Good, target: Target, end: float) -> None:
    """Look at the page once a second, with the right password."""
    for _ in turns(1, end):
        good.ask(None, target, get("/", basic(PASSWORD), "Connection: close"))


# --- An attack ---


def live(attack: Attack, target: Target, start: float, number: int, lives: Any) -> None:
    """Be one attacker, until the process is killed."""
    while attack.again or not lives[number]:
        if attack.pace:
            turn = start + (number + lives[number] * attack.peers) / attack.pace
            time.sleep(max(0.0, turn - time.monotonic()))
        lives[number] += 1
        with contextlib.suppress(OSError):
            attack.peer(target)


def attack_until_killed(attack: Attack, target: Target, lives: Any) -> None:
    os.nice(5)  # so that good senders do not wait for the attackers' processor
    threading.stack_size(256 * 1024)
    start = time.monotonic()
    for number in range(attack.peers):
        in_thread(live, attack, target, start, number, lives)
    threading.Event().wait()


@contextlib.contextmanager
def attackers(attack: Attack, target: Target) -> Iterator[Any]:
    """Attack meanwhile; yield how many lives each attacker has begun."""
    lives = multiprocessing.RawArray("q", attack.peers)
    process = multiprocessing.Process(target=attack_until_killed, args=(attack, target, lives))
    process.start()
    try:
        yield lives
    finally:
        process.kill()
        process.join()


HEADING = ("attack                    s    new tried/ok       p50    p99    max   kept tried/ok   "
           "    p50    p99    max ms  lives/s  CPU  threads  MiB  stderr lines    KiB/s  evicted")


def run_attack(name: str, options: argparse.Namespace) -> bool:
    """Run one attack, print its row, and return whether nothing was lost, doubled or unanswered."""
    attack = ATTACKS[name]
    new, kept, page = Good(), Good(), Good()
    with tempfile.TemporaryDirectory(prefix="attack.") as folder:
        receiver = Receiver(options, pathlib.Path(folder), attack)
        end = time.monotonic() + options.seconds
        cpu = -receiver.cpu_seconds()
        with attackers(attack, receiver.target) as lives:
            senders = [in_thread(deliver_on_new, new, receiver.target, end),
                       in_thread(deliver_on_kept, kept, receiver.target, end)]
            if attack.viewed:
                senders.append(in_thread(look_at_page, page, receiver.target, end))
            time.sleep(options.seconds)
            said, cpu = receiver.said(), cpu + receiver.cpu_seconds()
            rate = sum(lives) / options.seconds
            for sender in senders:
                sender.join()
            threads, peak = receiver.status("Threads"), receiver.status("VmHWM") // 1024
            stopped = time.monotonic()
            code = receiver.stop()
            stopped = time.monotonic() - stopped
        wrong = receiver.wrong(new.acknowledged + kept.acknowledged)
        evicted = re.search(r"stopped: .*?(\d+) evicted", receiver.said())
    lines, kib = said.count("\n"), len(said) / 1024 / options.seconds
    say(f"{name:22} {options.seconds:4.0f} {new.row()}  {kept.row()}    {rate:7.0f} "
        f"{cpu / options.seconds:4.0%} {threads:8} {peak:4} {lines:13} {kib:8.1f} "
        f"{evicted[1] if evicted else '-':>8}")
    if attack.viewed:
        say(f"    its page, with the right password: {page.row()} {dict(page.failures)}")
    failures = new.failures + kept.failures
    passed = not (failures or wrong or code or stopped > STOP_LIMIT)
    if not passed:
        say(f"    FAILED: {dict(failures)}, wrong in the log: {wrong}, "
            f"exit code {code} after {stopped:.1f} s")
    return passed


# --- Campaigns that are no attacks ---


def send_until_stopped(kept: bool, good: Good, target: Target, unanswered: list[float]) -> None:
    """Deliver as fast as it goes until the port is closed; note when what failed had been sent."""
    client = None
    while True:
        body = new_event()
        try:
            client = client or Client(target)
            status = client.ask(post(body))
        except ConnectionRefusedError:
            return
        except OSError:
            unanswered.append(client.sent if client else 0.0)
            client = None
            continue
        good.tried += 1
        if status == 200:
            good.acknowledged.append(hashlib.sha256(body).hexdigest())
        if client.is_last or not kept:
            client.close()
            client = None


def stop_under_load(options: argparse.Namespace) -> bool:
    """Stop a receiver again and again, amid deliveries on 8 kept and 8 new connections at once."""
    passed = True
    for _ in range(max(1, int(options.seconds / 4))):
        good, unanswered = Good(), list[float]()
        with tempfile.TemporaryDirectory(prefix="attack.") as folder:
            receiver = Receiver(options, pathlib.Path(folder), Attack(do_nothing))
            senders = [in_thread(send_until_stopped, number % 2, good, receiver.target, unanswered)
                       for number in range(16)]
            time.sleep(2)
            stopped = time.monotonic()
            code = receiver.stop()
            seconds = time.monotonic() - stopped
            for sender in senders:
                sender.join()
            wrong = receiver.wrong(good.acknowledged)
        lost = sum(0 < sent < stopped for sent in unanswered)
        passed = passed and not (code or wrong or lost or seconds > STOP_LIMIT)
        say(f"stop: exit code {code} after {seconds:.1f} s, {good.tried} answered, "
            f"{len(good.acknowledged)} acknowledged, {wrong} of them wrong in the log, "
            f"{lost} sent whole before it without an answer")
    return passed


def deliver_in_the_long_run(kept: bool, good: Good, bad: Good, target: Target, end: float) -> None:
    """Deliver at an eighth of the rate; some events twice, some with a bad token."""
    client = None
    for number, _ in enumerate(turns(LONG_RATE / 8, end)):
        body = new_event()
        if number % 70 == 69:
            client = bad.ask(client, target, post(body, "a.b.c"), 401)
        for _ in range(2 if number % 20 == 19 else 1):
            client = good.deliver(client, target, body)
        if client and not kept:
            client.close()
            client = None


def long_run(options: argparse.Namespace) -> bool:
    """Deliver for a long time, amid rotations, new certificates and SIGHUPs."""
    kept, new, bad = Good(), Good(), Good()
    with tempfile.TemporaryDirectory(prefix="attack.") as name:
        folder = pathlib.Path(name)
        receiver = Receiver(options, folder, Attack(do_nothing))
        end = time.monotonic() + options.seconds
        ways = [(False, new, bad, receiver.target, end), (True, kept, bad, receiver.target, end)]
        senders = [in_thread(deliver_in_the_long_run, *way) for way in ways * 4]
        for second, _ in enumerate(turns(1, end)):
            if second % 20 == 10:
                receiver.log.rename(f"{receiver.log}.{second}")
            if second % 40 == 20:
                new_certificate(folder)
            if second % 33 == 30:
                receiver.process.send_signal(signal.SIGHUP)
            if second % 60 == 30:
                descriptors = len(os.listdir(f"/proc/{receiver.process.pid}/fd"))
                say(f"long: {second} s, {receiver.status('VmRSS') / 1024:.1f} MiB, "
                    f"{receiver.status('Threads')} threads, {descriptors} descriptors")
        for sender in senders:
            sender.join()
        code = receiver.stop()
        acknowledged = kept.acknowledged + new.acknowledged
        wrong, files = receiver.wrong(acknowledged), len(list(folder.glob("events.jsonl*")))
        last = receiver.said().splitlines()[-1]
    failures = kept.failures + new.failures + bad.failures
    say(f"long: {len(acknowledged)} acknowledgements of {len(set(acknowledged))} events in {files} "
        f"files, {wrong} wrong there; {bad.tried} bad; failures {dict(failures)}; "
        f"exit code {code}; {last}\n    new {new.row()}  kept {kept.row()}")
    return not (failures or wrong or code)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Hand on what arrives, and the end, after a delay."""
    with contextlib.suppress(OSError):
        while received := source.recv(65536):
            time.sleep(DELAY)
            sink.sendall(received)
    time.sleep(DELAY)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def relay(listener: socket.socket, target: Target) -> None:
    """Stand between senders and the receiver, so that they are far from each other."""
    while True:
        near, _ = listener.accept()
        far = connect(target, 600)
        in_thread(pump, near, far)
        in_thread(pump, far, near)


def return_at_limit(limit: float, good: Good, target: Target, end: float) -> None:
    """Deliver each time that the connection has been idle for nearly so long."""
    client = None
    time.sleep(random.uniform(0, limit))
    while time.monotonic() < end:
        if client and select.select([client.socket], [], [], 0)[0]:
            client.close()
            client = None
        client = good.deliver(client, target, new_event())
        time.sleep(limit - random.uniform(0, 0.1))


def idle_pools(options: argparse.Namespace) -> bool:
    """Deliver from 40 ms away on connections that are reused at their pools' limits."""
    pools = {limit: Good() for limit in (10, 60, 90, 120)}
    with tempfile.TemporaryDirectory(prefix="attack.") as name:
        folder = pathlib.Path(name)
        text = pathlib.Path(options.program).read_text("utf-8")
        text = re.sub(r"(?m)^IDLE_SECONDS = \S+", f"IDLE_SECONDS = {150 / SCALE}", text)
        (folder / "skype_webhook.py").write_text(text, "utf-8")
        options = argparse.Namespace(**{**vars(options), "program": folder / "skype_webhook.py"})
        flags = ("--request-timeout", str(10 / SCALE), "--max-connections", "1000")
        receiver = Receiver(options, folder, Attack(do_nothing, flags=flags))
        listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        in_thread(relay, listener, receiver.target)
        relayed, end = Target(listener.getsockname()[1]), time.monotonic() + options.seconds
        senders = [in_thread(return_at_limit, limit / SCALE, good, relayed, end)
                   for limit, good in pools.items() for _ in range(75)]
        for sender in senders:
            sender.join()
        receiver.stop()
    for limit, good in pools.items():
        say(f"idle: pool of {limit} s: {good.tried} deliveries, unanswered: {dict(good.failures)}")
    return not any(good.failures for good in pools.values())


# --- The tables ---

HELLO = make_hello()
BROKEN_HELLO = b"\x16\x03\x01\x00\x05hello"
BAD_POST, HEALTH, PAGE = post(b"", "a.b.c"), get("/healthz"), get("/")
LONG_HEAD = b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2700  # and no end
OTHER_USER = ("setpriv", "--reuid=65534", "--clear-groups",  # root's threads have no limit
              "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
PROXIED = ("--behind-proxy",)
P = functools.partial

ATTACKS = {
    "none": Attack(do_nothing),
    "post-64": Attack(P(pipeline, BAD_POST), 64),
    "post-256": Attack(P(pipeline, BAD_POST), 256),
    "healthz-64": Attack(P(pipeline, HEALTH), 64),
    "healthz-256": Attack(P(pipeline, HEALTH), 256),
    "page-64": Attack(P(pipeline, PAGE), 64, viewed=True),
    "page-256": Attack(P(pipeline, PAGE), 256, viewed=True),
    "healthz-in-turn-256": Attack(P(ask_in_turn, HEALTH), 256),
    "bodies-256": Attack(send_refused_body, 256),
    "key-updates-64": Attack(P(update_keys, True), 64),
    "key-updates-unasked-64": Attack(P(update_keys, False), 64),
    "bad-handshakes": Attack(P(send_and_wait, BROKEN_HELLO), 1000, pace=1500, stderr_read=False),
    "refusals-1": Attack(P(pipeline, BAD_POST), 1),
    "large-8": Attack(send_large_events, 8),
    "large-128": Attack(send_large_events, 128),
    "mute": Attack(P(send_and_wait, b""), 1000, again=False),
    "mute-again": Attack(P(send_and_wait, b""), 1000),
    "half-hello-again": Attack(P(send_and_wait, HELLO[:200]), 1000),
    "hello-again": Attack(P(send_and_wait, HELLO), 1000),
    "idle-again": Attack(P(ask_and_wait, HEALTH), 1000),
    "reset": Attack(P(reset_after, b"")),
    "reset-after-hello": Attack(P(reset_after, HELLO)),
    "descriptors": Attack(P(send_and_wait, b""), 100, again=False,
                          wrapper=("prlimit", "--nofile=30")),
    "threads": Attack(P(send_and_wait, b""), 300, again=False,
                      wrapper=(*OTHER_USER, "prlimit", "--nproc=30")),
    "handshakes-64": Attack(shake_hands, 64),
    "bytes-64": Attack(P(send_records_of_one_byte, HEALTH), 64),
    "head-bytes-64": Attack(P(send_records_of_one_byte, LONG_HEAD), 64),
    "answers-by-bytes-64": Attack(take_answers_by_bytes, 64),
    "half-close-256": Attack(half_close, 256),
    "chunks-64": Attack(send_small_chunks, 64),
    "trailers-64": Attack(drip_trailer, 64),
    "expect-256": Attack(expect_nothing, 256),
    "events-8": Attack(pipeline_events, 8),
    "replay-64": Attack(replay_event, 64),
    "guess-one-64": Attack(P(guess_password, "2001:db8::{:x}:{:x}"), 16, flags=PROXIED,
                           viewed=True),
    "guess-many-64s": Attack(P(guess_password, "2001:db8:{:x}:{:x}::1"), 16, flags=PROXIED,
                             viewed=True),
    "watch-64": Attack(watch_without_reading, 64, viewed=True),
    "page-known-64": Attack(P(pipeline, get("/", basic(PASSWORD))), 64, viewed=True),
}
CAMPAIGNS = {"stop": stop_under_load, "long": long_run, "idle": idle_pools}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="attacks or campaigns (default: all attacks)")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--seconds", type=float, default=20, help="how long (default: 20)")
    parser.add_argument("--python", default=sys.executable, help="the receiver's Python")
    parser.add_argument("--program", type=pathlib.Path, default=HERE.parent / "skype_webhook.py",
                        help="the receiver (default: this project's)")
    options = parser.parse_args()
    options.program = options.program.resolve()
    if options.list:
        print(*ATTACKS, *CAMPAIGNS)
        return 0
    os.sched_setaffinity(0, {OTHERS_CORE})
    say(HEADING)
    passed = [CAMPAIGNS[name](options) if name in CAMPAIGNS else run_attack(name, options)
              for name in options.names or ATTACKS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
