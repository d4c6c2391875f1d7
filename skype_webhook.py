#!/usr/bin/env python3
"""Receive Skype Interviews webhooks: HTTPS in, verified events out, one durable JSONL line each.

    python3 skype_webhook.py --cert cert.pem --key key.pem      serve
    python3 skype_webhook.py demo                               try it, with nothing but this file
    python3 skype_webhook.py send URL                           sign and deliver a sample event
    python3 skype_webhook.py timeline                           each interview's stages in order
    python3 skype_webhook.py fetch CODE...                      an interview's data, by its code

The promise: 200 means that the event is on disk, once. The path of one request goes down once and
back once:

    accept            Receiver: TCP only; a place is found or made
      thread          Receiver: the deadline runs; TLS handshake
      head            Handler: strict framing, bounded; then the token (checks 1 to 3)
      body            Handler: read only now; then check 4
      pure            parse_event -> format_line            or Rejected -> 4xx, 5xx
      disk            Journal.append: returns when durable  or JournalError -> 503
      answer          200; nothing answers 2xx before this line

The sections, in the order in which they are met:

    limits            sizes and times, each with its reason
    errors            what can go wrong, and how it is answered
    operator's lines  stderr: in a receiver, it has one owner
    settings          what can be set, in the environment or an env file
    JSON              strict decoding; pure
    verification      the four checks of a token; pure
    events and lines  a verified body in, one line of the log out; pure
    HTTP              heads and chunks; pure
    journal           the log: batches, syncs, torn tails, rotation
    connection        one connection's bytes, its deadline, its requests and answers
    live view         the log as an event stream, its password
    server            sockets, TLS, signals; places, threads, evictions, the stop
    HTTP clients      what sender and fetch share
    sender            what the service does, for trying things out
    fetch             an interview's data, from the service
    timeline          each interview's course, from the log
    command line      the commands and their arguments
    page              the live view's page, one HTML literal
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import json.encoder
import math
import os
import pathlib
import queue
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from functools import cached_property, lru_cache
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, Union

try:
    import fcntl
except ImportError:  # Windows: no lock on the log
    fcntl = None  # type: ignore[assignment]  # the module is looked up, not assumed

__version__ = "1.0"

# --- Limits: each with its unit and its reason ---

# Of a request.
TOKEN_LIMIT = 8 * 1024        # bytes; the documented token has about 400
TARGET_LIMIT = 8 * 1024       # bytes; what RFC 9112 section 3 recommends to support
HEAD_LIMIT = 16 * 1024        # bytes, request line to the last CRLF: twice the longest token
FIELD_LIMIT = 64              # header fields; a request has about ten, a proxy's among them
CHUNK_LINE_LIMIT = 8 * 1024   # bytes; chunk extensions are dropped, so nobody needs more
DEPTH_LIMIT = 64              # JSON containers; the documented event has two
SUBJECT_LIMIT = 1024          # characters; a GUID has 36, and it stands in its line twice
TIME_LIMIT = 64               # characters; the documented time has 28, twice in its line, too
LARGE_BODY = 32 * 1024        # bytes; larger ones are parsed one at a time. An event has about 300

# Of the journal.
RECENT_IDS = 65_536           # ids remembered: 5,400 a second for the 12 s of a token (with leeway)
RECENT_BYTES = 64 * 2**20     # bytes read back at start, whatever the size of the log
READ_BACK = 2**20             # bytes of those read at once
BACKLOG_BYTES = 32 * 2**20    # bytes that wait for a stalled disk; RECENT_BYTES hold them all
STORE_SECONDS = 20.0          # the sender waits 30 s for its answer
ANSWER_SECONDS = 28.0         # from a request's first byte; a slow body leaves the disk less
CHECK_SECONDS = 2.0           # a load balancer gives its check less time than a sender its event

# Of a connection.
READ_SIZE = 4 * 1024          # bytes a read, and a connection's buffer; a delivery has about 1,000
IDLE_SECONDS = 150.0          # of a proven sender; clients and proxies keep connections up to 120
FRUITLESS_ANSWERS = 8         # in a row without an event; a peer that gets more slows all others
KEY_UPDATE_BYTES = 8 * 27     # eight key updates of TLS 1.3, as AES-GCM and ChaCha20 send them
DRAIN_SECONDS = 3.0           # how long a refused peer may go on sending before it is cut off
DRAIN_BYTES = 8 * 2**20       # and how much
DRAIN_READ = 64 * 1024        # bytes a read of that: with 4 KiB, 256 such peers held up good ones

# Of the server.
ACCEPT_QUEUE = 1024           # connections that the kernel keeps while we accept
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # an eviction helps
PEERS_ERRORS = {errno.ECONNABORTED, errno.ECONNRESET, errno.EPROTO, errno.EHOSTUNREACH,
                errno.ENETUNREACH, errno.ENETDOWN, errno.ETIMEDOUT}  # accept(2): it has left again
ACCEPT_PAUSE = 0.1            # seconds after an error of accept against which no eviction helps
LEAVE_SECONDS = 0.1           # that an evicted connection takes to leave, mostly
LOOK_SECONDS = 2.0            # between two looks at the certificate's files
STOP_SECONDS = 10.0           # for answers after SIGTERM; the exit is due within 15 s
STOP_GRACE = 1.0              # the part of it in which senders may finish what they have begun
CLOSE_SECONDS = 2.0           # for the last batch after that
CUT_SECONDS = 0.5             # for its answers after that, and for those that are then cut to leave

# Of stderr.
STDERR_SECONDS = 0.5          # in which somebody has to read some of it, else lines are lost
REPORT_PAUSE = 0.02           # seconds; a line waits this long for others
REPORT_LIMIT = 10_000         # lines that wait for a stderr that does not take them
REFUSALS_TOLD = 100           # lines a second; one peer could fill a disk with them
COMPLAINT_SECONDS = 10.0      # between two lines of the same complaint

# Of the live view.
VIEWERS = 16                  # at once, besides the connections: people, not senders
VIEW_BYTES = 2**20            # of the log that a new viewer gets: some 1,600 events
VIEW_PAUSE = 0.2              # seconds between two looks of a viewer, however many events come
HEARTBEAT_SECONDS = 15.0      # between two on an event stream; proxies close a silent one after 60
WRONG_PASSWORDS = 30          # a minute from one network; more are not even looked at
WRONG_PASSWORDS_IN_ALL = 1_000  # a minute from all; then only known networks may go on
KNOWN_NETWORKS = 1_000        # those that the right one has come from

# Of send and fetch.
SEND_SECONDS = 30.0           # a step of a delivery: the service waits as long
FETCH_SECONDS = 30.0          # for one interview's data, up to its last byte
FETCH_BYTES = 64 * 2**20      # of it; notes, feedback and code snapshots have far less


# --- Errors: Rejected knows its answer, the others why ---


class Rejected(Exception):
    """A request that is answered with an error.

    `status` is HTTP's, `detail` one sentence in ASCII that is safe to show, `fields` go with it.
    """

    def __init__(self, status: int, detail: str, *fields: tuple[str, str]) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.fields = fields


class JournalError(Exception):
    """An event that could not be stored, or not in time; the text says why."""


class SyncFailed(Exception):
    """A sync of the log failed: nobody knows what is on the disk, so the process has to end."""


class SettingsError(Exception):
    """A wrong setting, in one line that says what to do. Ends the start with exit code 2."""


def _reason(error: BaseException) -> str:
    """Return an error's reason: what the operating system says of it, or else its text."""
    return str(getattr(error, "strerror", None) or error)


# --- The operator's lines: stderr only ---


@lru_cache(maxsize=2)  # only the first line of a second pays
def _format_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()[:19]


def printable(text: str) -> str:
    """Return `text` with what could move a cursor or hide text (controls, bidi marks) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_report(when: float, message: str) -> str:
    """Return the operator's line for `message`, in UTC; `when` is in Unix seconds."""
    return f"{_format_second(int(when))}.{int(when * 1000) % 1000:03d}Z {printable(message)}\n"


def describe_fault(error: BaseException) -> str:
    """Return the kind and place of a fault of ours, but not its text, which could hold anything."""
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"fault {kind}: please report it"
    last = frames[-1]
    place = f"{last.name}, {os.path.basename(last.filename)} line {last.lineno}"
    return f"fault {kind} in {place}: please report it"


def write_stderr(lines: Sequence[str]) -> bool:
    """Write lines to stderr by one write; return False if it takes nothing for STDERR_SECONDS.

    A long write may wait even so: in a receiver, only the reporter's thread calls this.
    """
    try:
        if os.name == "posix" and not select.select((), (2,), (), STDERR_SECONDS)[1]:
            return False
        os.write(2, "".join(lines).encode("utf-8", "backslashreplace"))
    except OSError:
        return False
    return True


def say(line: str) -> None:
    """Write one line of a command that is no receiver to stderr, as `write_stderr` does."""
    write_stderr([f"{printable(line)}\n"])


# A line: its time (Unix seconds), kind and message. Or a flush: set once all before it is written.
ReportEntry = Union[tuple[float, str, str], threading.Event]


class Reporter:
    """The owner of stderr: a queue of lines, and one thread that writes them.

    So no peer, no event and no stop waits for a stderr that nobody reads: a line that a peer caused
    is dropped while REPORT_LIMIT others wait. How many lines were lost is written as soon as
    somebody reads again. Of the refusals of one second, REFUSALS_TOLD are written; how many more
    there were is written in one line when that second is over.

    `_lock` guards the start of the thread, and `_lost`; `_second` and `_refusals` are the thread's
    alone.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ReportEntry] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._lost = 0      # lines that nobody took, since that was written last
        self._second = 0    # Unix time, of the last refusal
        self._refusals = 0  # in that second

    def tell(self, message: str, kind: str = "") -> None:
        """Queue one line, with the present time; `kind` is the outcome, if a peer caused it."""
        if kind and self._queue.qsize() >= REPORT_LIMIT:
            self._count_lost(1)
            return
        self._queue.put((time.time(), kind, message))
        if self._thread is None:
            self._start()

    def flush(self) -> None:
        """Wait until all lines so far have been written, but not for long if stderr is not read."""
        if self._thread is not None:
            written = threading.Event()
            self._queue.put(written)
            written.wait(3 * STDERR_SECONDS)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="reporter", daemon=True)
                with contextlib.suppress(RuntimeError):  # none can be started: the next line tries
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        """Write lines as they come: the life of the thread. A fault costs the lines at hand."""
        while True:
            try:
                self._write(self._next_entries())
            except Exception as fault:
                write_stderr([format_report(time.time(), f"reporter {describe_fault(fault)}")])

    def _next_entries(self) -> list[ReportEntry]:
        """Return what is queued; nothing after a second without lines, for the untold refusals."""
        try:
            first = self._queue.get(timeout=1.0 if self._refusals > REFUSALS_TOLD else None)
        except queue.Empty:
            return []
        time.sleep(REPORT_PAUSE)  # written one by one, lines would take a seventh of the rate
        others = [self._queue.get() for _ in range(self._queue.qsize())]  # nobody else takes any
        return [first, *others]

    def _write(self, entries: Sequence[ReportEntry]) -> None:
        lines: list[str] = []
        flushes: list[threading.Event] = []
        for entry in entries:
            if isinstance(entry, threading.Event):
                flushes.append(entry)
            else:
                self._add(lines, *entry)

        if flushes or int(time.time()) != self._second:
            self._end_second(lines)
        if lines:
            self._write_lines(lines)
        for flush in flushes:
            flush.set()

    def _write_lines(self, lines: list[str]) -> None:
        lost = self._lost
        report = lines
        if lost:
            message = f"{lost} lines before this one were lost: nobody read stderr"
            report = [format_report(time.time(), message), *lines]
        if write_stderr(report):
            self._count_lost(-lost)
        else:
            self._count_lost(len(lines))

    def _count_lost(self, lines: int) -> None:
        with self._lock:
            self._lost += lines

    def _add(self, lines: list[str], when: float, kind: str, message: str) -> None:
        if kind == "refused":
            if int(when) != self._second:
                self._end_second(lines)
                self._second = int(when)
            self._refusals += 1
            if self._refusals > REFUSALS_TOLD:
                return
        lines.append(format_report(when, message))

    def _end_second(self, lines: list[str]) -> None:
        untold = self._refusals - REFUSALS_TOLD
        self._refusals = 0
        if untold > 0:
            message = f"{untold} more refused; {REFUSALS_TOLD} lines a second are written"
            lines.append(format_report(time.time(), message))


REPORTER = Reporter()  # one for the process, as is stderr
tell = REPORTER.tell


# --- Settings: what can be set, in the environment or an env file; the command line stands last ---


@dataclasses.dataclass(frozen=True)
class Credential:
    """What the service's API settings page shows: the key (a GUID, the issuer) and its secret."""

    api_key: str
    api_secret: bytes = dataclasses.field(repr=False)


KEY_PLACEHOLDER = "paste-your-api-key-here"  # of example.env
SECRET_PLACEHOLDER = "paste-your-api-secret-here"
NO_SECRETS = (b"", SECRET_PLACEHOLDER.encode())  # everybody knows them


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    # The kinds themselves take 1_0, +5 and other digits.
    form = r"[0-9]{1,12}" if kind is int else r"[0-9]{1,6}(?:\.[0-9]{1,6})?"
    what = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        if not re.fullmatch(form, text) or not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")
        return kind(text)
    return parse


def _boolean(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text.lower() in ("1", "true", "yes", "on")


def _url_path(text: str) -> str:
    if not re.fullmatch(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*", text) or text == "/healthz":
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a path like /hook (and /healthz is taken)")
    return text


@dataclasses.dataclass(frozen=True, repr=False)
class Settings:
    """All settings with their defaults.

    To add one: a field here, a line in OPTIONS, in the README and in example.env; its name in FIXED
    if it needs a restart, in SECRETS if it may be in a file, in PASTED if people copy its value.
    """

    api_key: str = ""
    api_secret: str = ""
    api_key_previous: str = ""
    api_secret_previous: str = ""
    view_password: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    host: str = ""
    port: int = 8443
    path: str = "/"
    log: str = "events.jsonl"
    leeway: float = 1.0                # seconds
    max_body: int = 2**20              # bytes
    max_connections: int = 256
    request_timeout: float = 10.0      # seconds
    behind_proxy: bool = False

    @property
    def listening_host(self) -> str:
        """The host to listen on: with a proxy in front, loopback unless it is set."""
        return self.host or ("127.0.0.1" if self.behind_proxy else "")

    @cached_property
    def credentials(self) -> tuple[Credential, ...]:
        """The credentials that a token may match, the present one first."""
        # surrogateescape: a secret in the environment may be any bytes.
        present = Credential(self.api_key, self.api_secret.encode("utf-8", "surrogateescape"))
        if not self.api_secret_previous:
            return (present,)
        previous = Credential(self.api_key_previous or self.api_key,
                              self.api_secret_previous.encode("utf-8", "surrogateescape"))
        return present, previous


class Option(NamedTuple):
    """How a setting is given: in the environment by its name, and by a flag where it has one.

    A secret can be in a file, too, which ..._FILE names.
    """

    parse: Callable[[str], Any]
    help: str
    flag: str = ""
    metavar: str = ""  # of the flag's value; a flag without one means yes


OPTIONS = {
    "api_key": Option(str, "the API key of your API settings page (required)"),
    "api_secret": Option(str, "its secret (required)"),
    "api_key_previous": Option(str, "the key before, while it is still used"),
    "api_secret_previous": Option(str, "the secret before, while it is still used"),
    "view_password": Option(str, "password of the live view; without one, there is none"),
    "tls_cert": Option(str, "certificate, PEM, the full chain", "--cert", "FILE"),
    "tls_key": Option(str, "its private key, PEM, not encrypted", "--key", "FILE"),
    "host": Option(
        str, "address to listen on; without one, all, IPv4 and IPv6", "--host", "ADDRESS"),
    "port": Option(
        _number(int, 0, 65535), "port to listen on", "--port", "PORT"),
    "path": Option(_url_path, "path of the webhook URL", "--path", "PATH"),
    "log": Option(str, "the log, appended to", "--log", "FILE"),
    "leeway": Option(
        _number(float, 0, 3600), "seconds that two clocks may differ",
        "--leeway", "SECONDS"),
    "max_body": Option(
        _number(int, 1, 2**24), "longest body in bytes, at most 16 MiB",
        "--max-body", "BYTES"),
    "max_connections": Option(
        _number(int, 1, 10_000), "connections at once", "--max-connections", "N"),
    "request_timeout": Option(
        _number(float, 0.1, 3600), "seconds for a request",
        "--request-timeout", "SECONDS"),
    "behind_proxy": Option(
        _boolean, "speak plain HTTP, to a proxy that ends TLS", "--behind-proxy"),
}
SETTINGS = {f"SKYPE_{name.upper()}": name for name in OPTIONS}  # as the environment has them
CREDENTIALS = ("SKYPE_API_KEY", "SKYPE_API_SECRET",
               "SKYPE_API_KEY_PREVIOUS", "SKYPE_API_SECRET_PREVIOUS")
SECRETS = ("SKYPE_API_SECRET", "SKYPE_API_SECRET_PREVIOUS")
PASTED = (*CREDENTIALS, "SKYPE_VIEW_PASSWORD")  # copied, and with them what cannot be seen
FIXED = ("host", "port", "log", "max_connections", "behind_proxy")  # until a restart
VARIABLES = {*SETTINGS, *(f"{name}_FILE" for name in SECRETS)}
_ENV_LINE = re.compile(  # quotes are taken off, as the shell and systemd do
    r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?:\"(.*)\"|'(.*)'|(.*?))\s*")
# White space, byte order marks, and characters without a width: what copying adds, unseen.
_UNSEEN = r"[\s\ufeff\u180e\u200b-\u200f\u2060-\u2064]+"
_QUOTES = tuple("\"'`\u2018\u2019\u201a\u201c\u201d\u201e")
_UNSEEN_ENDS = re.compile(rf"\A{_UNSEEN}|{_UNSEEN}\Z")


def file_kind(mode: int) -> str:
    """Return what kind of file a mode (`os.stat`) is of, in words; "a file" is a regular one."""
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def read_regular_file(path: str) -> bytes:
    """Return what a regular file holds; raise OSError. A FIFO would keep us waiting for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        kind = file_kind(os.fstat(descriptor).st_mode)
        if kind != "a file":
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _warn_if_others_can_read(path: str) -> None:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        # What is root's and what we read by our group (0640) is well kept; of our own, the group
        # has nothing to read.
        others = stat.S_IROTH | (stat.S_IRGRP if status.st_uid == os.geteuid() else 0)
        if status.st_mode & others:
            tell(f"warning: {path} can be read by other users of this machine; chmod 600 {path}")


def read_env_file(path: str | None) -> dict[str, str]:
    """Return the settings in an env file; `None` means `.env`, if there is one.

    Raise SettingsError; a `.env` that nobody named and that cannot be read is only warned about.
    """
    name = path or ".env"
    try:
        text = read_regular_file(name).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = "it is not text in UTF-8; save it as that"
        if isinstance(error, OSError):
            reason = _reason(error)
        if path is not None:
            raise SettingsError(f"--env-file {path}: {reason}") from None
        if not isinstance(error, FileNotFoundError):
            tell(f"warning: .env: {reason}; none of its settings is used")
        return {}
    if os.name == "posix":
        _warn_if_others_can_read(name)

    values = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ENV_LINE.fullmatch(line)
        if not match or "\0" in line:
            raise SettingsError(f"{name} line {number} is not NAME=value"
                                + (", for it holds a NUL" if match else ""))
        values[match[1]] = match[2] or match[3] or match[4] or ""
        if match[1].startswith("SKYPE_") and match[1] not in VARIABLES:
            tell(f"warning: {name} line {number}: there is no setting {match[1]}")
    return values


def _read_secret_file(name: str, path: str) -> str:
    """Return the secret in the file that the setting `name` names; raise SettingsError.

    The path is not told: people paste the secret itself there.
    """
    try:
        text = read_regular_file(path).decode("utf-8")
    except UnicodeError:
        raise SettingsError(f"{name}: what is in the file is not UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{name}: {_reason(error)}; "
                            "it has to name a file that holds the secret") from None
    if not _UNSEEN_ENDS.sub("", text):
        raise SettingsError(f"{name}: the file is empty")
    return text


def _look_up(name: str, source: Mapping[str, str]) -> str:
    """Return a setting's text from environment or env file, "" where it is not set.

    Key, secret and password lose what cannot be seen at their ends. Raise SettingsError.
    """
    text = source.get(name, "")
    path = source.get(f"{name}_FILE", "") if name in SECRETS else ""
    if text and path:
        raise SettingsError(f"{name} and {name}_FILE are both set; keep one")
    if path:
        text = _read_secret_file(f"{name}_FILE", path)
    return _UNSEEN_ENDS.sub("", text) if name in PASTED else text


def _warn_if_odd(name: str, text: str) -> None:
    """Warn of a key or secret that is hardly meant as it stands; `send` would not show it."""
    if text.startswith(_QUOTES) or text.endswith(_QUOTES):
        tell(f"warning: {name} begins or ends with a quote, which counts as part of it; "
             "take quotes off (docker --env-file keeps them)")
    elif re.search(r"\s#", text):
        tell(f"warning: {name} holds a space and a #; if that begins a comment, give the comment "
             "a line of its own, for here it counts as part of the value")
    elif not text.isprintable():
        tell(f"warning: {name} holds characters that cannot be seen; "
             "type it, or copy it anew")


def load_settings(options: argparse.Namespace) -> Settings:
    """Return the settings; raise SettingsError.

    A flag wins over the environment, that over the env file; an empty text is not set.
    """
    env_file = read_env_file(options.env_file)
    values: dict[str, Any] = {}
    for variable, name in SETTINGS.items():
        option = OPTIONS[name]
        value = getattr(options, name, None)
        if value in (None, ""):  # no flag
            text = _look_up(variable, os.environ) or _look_up(variable, env_file)
            if not text:
                continue  # its default
            try:
                value = option.parse(text)
            except argparse.ArgumentTypeError as error:
                raise SettingsError(f"{variable} ({option.flag}): {error}") from None
        values[name] = value

    for variable in PASTED:
        _warn_if_odd(variable, values.get(SETTINGS[variable], ""))
    return Settings(**values)


def check_credentials(settings: Settings) -> None:
    """Raise SettingsError where key or secret are missing, or those of example.env."""
    for variable in CREDENTIALS:
        if getattr(settings, SETTINGS[variable]) in (KEY_PLACEHOLDER, SECRET_PLACEHOLDER):
            raise SettingsError(f"{variable} is still the placeholder of example.env; "
                                "paste yours from the API settings page")
    for variable in CREDENTIALS[:2]:
        if not getattr(settings, SETTINGS[variable]):
            raise SettingsError(f"{variable} is not set; "
                                "put it into .env (see example.env) or into the environment")
    if settings.api_key_previous and not settings.api_secret_previous:
        raise SettingsError("SKYPE_API_KEY_PREVIOUS is set without SKYPE_API_SECRET_PREVIOUS; "
                            "set both, or the secret alone")


def load_credential(options: argparse.Namespace) -> Credential:
    """Return what `send` and `fetch` sign by; raise SettingsError."""
    settings = load_settings(options)
    check_credentials(settings)
    return settings.credentials[0]


def check_serving(settings: Settings) -> None:
    """Raise SettingsError where a receiver lacks something, or gets what it cannot use."""
    if settings.behind_proxy:
        if settings.tls_cert or settings.tls_key:
            raise SettingsError("--behind-proxy speaks plain HTTP; "
                                "leave --cert and --key to the proxy")
    elif not (settings.tls_cert and settings.tls_key):
        missing = "--key" if settings.tls_cert else "--cert"
        raise SettingsError(f"{missing} is missing; "
                            "HTTPS needs --cert and --key (or --behind-proxy; or try: demo)")
    check_credentials(settings)


# --- JSON, strictly: pure ---


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("has a member twice")
    return members


# float() takes every number of JSON; int() raises on 4,300 digits and more, and a double holds all
# that a NumericDate needs.
_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=float)
_UNIQUE_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=float,
                                object_pairs_hook=_unique)
_encode_text = json.encoder.encode_basestring


# As signed bytes: an opening bracket is a step of 1, a closing one of -1. Of all else, quotes stay.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_STEPS = bytes(set(range(256)) - set(b'[{]}"'))


def _is_deep(data: bytes, limit: int) -> bool:
    """Return whether brackets in `data`, JSON or not, are nested deeper than `limit`.

    Those in strings do not count; a string that does not end is taken as one up to the end:

        {"a[": [1, {}], "b": 7}    data
        +"+"++--""-                its steps in and out, and the quotes
        +"+"++---                  without strings that hold no bracket
        +++---                     outside of strings: the levels are 1, 2, 3, 2, 1, 0

    No Python runs for each character: 35 ms for the worst MiB. It takes as much memory as the
    data, or twenty times that where it is all strings with brackets in them.
    """
    unescaped = data.replace(rb"\\", b"").replace(rb'\"', b"")
    steps = unescaped.translate(_STEPS, _NO_STEPS)
    # Strings that hold no bracket; where two strings meet, they become one, which is right, too.
    steps = steps.replace(b'""', b"")
    outside = b"".join(steps.split(b'"')[::2])

    levels = itertools.accumulate(memoryview(outside).cast("b"))
    return max(levels, default=0) > limit


def _decode_json(data: bytes, decoder: json.JSONDecoder, limit: int = DEPTH_LIMIT) -> Any:
    """Return the JSON value in `data` (UTF-8, RFC 8259, at most `limit` containers deep).

    Raise ValueError for all that is not one; its text is a predicate, like "is not UTF-8".
    """
    if b"\0" in data:
        raise ValueError("holds NULs, so it is not JSON in UTF-8 (in UTF-16, perhaps)")
    # Before decoding: the decoder recurses, on 3.13 without regard to the recursion limit, and a
    # small thread stack overflows.
    if data.count(b"{") + data.count(b"[") > limit and _is_deep(data, limit):
        raise ValueError(f"is nested deeper than {limit} containers")

    try:
        text = data.decode("utf-8").strip(" \t\r\n")  # json.loads(bytes) would take UTF-16, too
        value, end = decoder.raw_decode(text)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})" if text else "is empty") from None
    if end != len(text):
        raise ValueError("goes on after its JSON value")
    return value


def _decode_object(data: bytes, decoder: json.JSONDecoder,
                   limit: int = DEPTH_LIMIT) -> dict[str, Any]:
    """Return the JSON object in `data`, as `_decode_json` does; raise ValueError."""
    value = _decode_json(data, decoder, limit)
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    return value


# --- Verification: pure (bytes and a clock reading in, claims or Rejected out) ---


_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


def _invalid_token(detail: str) -> Rejected:
    """Return the refusal of a token (RFC 6750 section 3); `detail` has no quote or backslash."""
    challenge = f'Bearer error="invalid_token", error_description="{detail}"'
    return Rejected(401, detail, ("WWW-Authenticate", challenge))


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _signature(secret: bytes, signed: bytes) -> bytes:
    return _base64url(hmac.digest(secret, signed, "sha256"))


def _decode_segment(segment: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in one segment of a token (RFC 7515); raise Rejected."""
    try:
        data = base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))
        if _base64url(data) != segment:  # b64decode takes spare bits in the tail
            raise ValueError("not canonical base64url")
        return _decode_object(data, _UNIQUE_JSON)
    except ValueError:
        raise _invalid_token(
            f"signature: the token's {name} is not a JSON object in base64url") from None


@lru_cache(maxsize=16)  # every token of a sender has the same header; only signed ones come here
def _check_header(segment: bytes) -> None:
    header = _decode_segment(segment, "header")
    if header.get("alg") != "HS256":
        raise _invalid_token("signature: the token's alg is not HS256")
    if "crit" in header:  # RFC 7515 section 4.1.11: not understood, so refused
        raise _invalid_token("signature: the token has critical header parameters (crit), "
                             "and none is supported")


def _numeric_date(claims: dict[str, Any], name: str) -> float:
    """Return a NumericDate (RFC 7519 section 2) in Unix seconds.

    The vendor's .NET sample writes milliseconds, as text.
    """
    value = claims.get(name)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if not isinstance(value, float):  # as every number of a token is, and no bool
        raise _invalid_token(f"time: the token's {name} is missing or not a number")
    if not math.isfinite(value):
        raise _invalid_token(f"time: the token's {name} is not a finite number")
    return value / 1000 if value >= 1e11 else value  # in seconds, that is the year 5138


def _check_time(claims: dict[str, Any], now: float, leeway: float) -> None:
    """Check 3: iat - leeway < now < exp + leeway, and nbf as iat; the refusal gives the seconds."""
    # By how many seconds now lies outside of each bound; less than 0 is inside.
    outside = {"exp": now - _numeric_date(claims, "exp"), "iat": _numeric_date(claims, "iat") - now}
    if "nbf" in claims:
        outside["nbf"] = _numeric_date(claims, "nbf") - now
    for name, seconds in outside.items():
        if not seconds < leeway:  # "not <": a NaN clock is refused too
            what = f"expired {seconds:.1f} s ago" if name == "exp" else f"begins in {seconds:.1f} s"
            more = seconds - leeway
            raise _invalid_token(
                f"time: the token {what} by its {name}, {more:.1f} s more than the leeway "
                f"of {leeway:g} s allows; are the clocks of sender and receiver right (NTP)?")


def _fold_key(key: object) -> str:
    """Return an API key without what programs write differently: letters' case, and braces."""
    return str(key).strip("{}").casefold()


def _check_issuer(issuer: object, keys: Sequence[str]) -> None:
    """Check 2: the token was issued for one of these API keys."""
    if issuer in keys:
        return
    if _fold_key(issuer) in map(_fold_key, keys):
        raise _invalid_token("issuer: the token's iss differs from the API key, but only in upper "
                             "and lower case or in braces; write the key as the service does")
    raise _invalid_token("issuer: the token's iss is not the API key; "
                         "is it the one of the API settings page?")


def verify_token(authorization: str | None, credentials: Sequence[Credential], now: float,
                 leeway: float) -> dict[str, Any]:
    """Checks 1 to 3, for which no body is needed: return the claims, or raise Rejected(401)."""
    if authorization is None:
        raise Rejected(401, "there is no Authorization field; a signed Bearer token is needed",
                       ("WWW-Authenticate", "Bearer"))
    scheme, _, token = authorization.partition(" ")
    token = token.lstrip(" ")
    if scheme.lower() != "bearer":
        raise _invalid_token("Authorization is not one Bearer token")
    if len(token) > TOKEN_LIMIT:
        raise _invalid_token(f"signature: the token is longer than {TOKEN_LIMIT} bytes")
    if not _JWS.fullmatch(token):
        raise _invalid_token("signature: the token is not three base64url segments")

    # The encoded signatures are compared, as bytes: compare_digest raises on non-ASCII text.
    signed, _, signature = token.encode("ascii").rpartition(b".")
    keys = [credential.api_key for credential in credentials
            if credential.api_secret not in NO_SECRETS
            and hmac.compare_digest(_signature(credential.api_secret, signed), signature)]
    if not keys:
        raise _invalid_token("signature: it does not match; "
                             "is the API secret the one of the API settings page?")

    header, _, payload = signed.partition(b".")
    _check_header(header)
    claims = _decode_segment(payload, "payload")
    _check_issuer(claims.get("iss"), keys)
    _check_time(claims, now, leeway)
    return claims


def verify_body(claims: dict[str, Any], body: bytes) -> str:
    """Check 4: return the event's id, the body's SHA-256 in lower-case hex; raise Rejected(401)."""
    digest = hashlib.sha256(body)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not _SHA256.fullmatch(subject):
        raise _invalid_token("body: the token's sub is not a SHA-256 in hex")
    if not hmac.compare_digest(bytes.fromhex(subject), digest.digest()):
        raise _invalid_token(f"body: the SHA-256 of the {len(body)} bytes received is not the "
                             "token's sub; did something on the way (a proxy?) change the body?")
    return digest.hexdigest()


def verify(authorization: str | None, body: bytes, credentials: Sequence[Credential],
           now: float, leeway: float = 1.0) -> dict[str, Any]:
    """Make the four checks of the service's page; return the claims, or raise Rejected(401).

    `authorization` is the field's value, `now` is in Unix seconds, `leeway` in seconds. This is for
    programs that import it: the receiver makes check 4 later, when it has the body.
    Source: Skype Interviews, Webhooks, "Verify the webhook request"; RFC 7515, 7519, 6750.
    """
    claims = verify_token(authorization, credentials, now, leeway)
    verify_body(claims, body)
    return claims


def sign(body: bytes | None, credential: Credential, now: float) -> str:
    """Return the token of one request, as the service's getting-started page describes it.

    It lives ten seconds. That of a request without a body (None) has no `sub`, as the service's
    page "Retrieve interview data" says.
    """
    claims = {"jti": str(uuid.uuid4()), "iss": credential.api_key,
              "exp": int(now) + 10, "iat": int(now)}
    if body is not None:
        claims["sub"] = hashlib.sha256(body).hexdigest()
    header = b'{"alg":"HS256","typ":"JWT"}'
    signed = _base64url(header) + b"." + _base64url(json.dumps(claims).encode())
    return (signed + b"." + _signature(credential.api_secret, signed)).decode()


# --- Events and lines: pure (a verified body in, one line of the log out) ---


SOURCE = "https://interviews.skype.com"

# A stage's name is a phase and an outcome (Interview, Started). A new outcome wants a sign in the
# page (SIGNS), and a colour in `_COLOURS`; a new phase wants a hue in the page's styles.
STAGES = {
    "InterviewCreated": "a recruiter created the interview",
    "InterviewCanceled": "the recruiter canceled the interview",
    "InterviewArchived": "the recruiter archived the interview",
    "SchedulingTime": "candidate or interviewer is asked to propose or select a time",
    "SchedulingFailed": "an error occurred during scheduling",
    "SchedulingCompleted": "the interview has been scheduled",
    "InterviewStarted": "the interview started, at least two participants joined",
    "InterviewFailed": "an error occurred during the interview",
    "InterviewCompleted": "a participant ended the interview",
    "FeedbackCollecting": "the interview ended and awaits the interviewer's feedback",
    "FeedbackFailed": "an error occurred while the feedback was submitted",
    "FeedbackCompleted": "the interviewer submitted feedback",
}


class Event(NamedTuple):
    """What the envelope and the operator's line need of a body.

    `content_type` is the media type of the body. `as_base64` is set where readers of the log would
    choke on the body itself. `warnings` names what is not as documented.
    """

    type: str
    subject: str | None
    time: str | None
    stage: str | None
    content_type: str
    as_base64: bool
    warnings: tuple[str, ...]


TYPE_PREFIX = "com.skype.interviews."
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; RFC 8259 section 8.1: parsers may refuse it
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# What CloudEvents 1.0 excludes from its String: controls, surrogates, noncharacters.
_LAST_OF_PLANES = "".join(chr(plane + 0xFFFE) + chr(plane + 0xFFFF)
                          for plane in range(0, 0x110000, 0x10000))
_NOT_STRING = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_LAST_OF_PLANES}]")
# In order: a whole surrogate pair; a half without its other (group 1); any other escape.
_ESCAPES = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F])|\\.", re.DOTALL)
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt]([01]\d:[0-5]\d|2[0-3]:[0-5]\d):([0-5]\d|60)"
                      r"(?:\.(\d+))?"
                      r"(?:[Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))", re.ASCII)
_EPOCH = datetime(1970, 1, 1)
TICKS = 10**7  # in a second: the service writes its times with seven digits


@lru_cache(maxsize=4096)  # a log's times are near each other: `timeline` reads a million of them
def _parse_minute(text: str) -> int:
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(minutes=1)


def parse_time(text: str) -> int:
    """Return an RFC 3339 time in ticks since 1970 (UTC); raise ValueError."""
    match = _RFC3339.fullmatch(text)
    if not match:
        raise ValueError("not an RFC 3339 time")
    day, minute, second, fraction, direction, hours, minutes = match.groups()
    offset = int(f"{direction}1") * (int(hours) * 60 + int(minutes)) if direction else 0
    seconds = (_parse_minute(f"{day}T{minute}") - offset) * 60 + int(second)
    return seconds * TICKS + int((fraction or "0").ljust(7, "0")[:7])


def _subject(value: object) -> str | None:
    """Return a CloudEvents String of 1 to SUBJECT_LIMIT characters, None for all else."""
    if not isinstance(value, str) or not 0 < len(value) <= SUBJECT_LIMIT:
        return None
    # isprintable takes a tenth of the search's time.
    return value if value.isprintable() or not _NOT_STRING.search(value) else None


def _time(value: object) -> str | None:
    """Return an RFC 3339 time of at most TIME_LIMIT characters, None for all else."""
    if not isinstance(value, str) or len(value) > TIME_LIMIT:
        return None
    try:
        parse_time(value)
    except ValueError:
        return None
    return value


def _stage_name(data: object, name: str) -> str | None:
    """Return the name of the stage `name` (previousStage, currentStage) of an event's data."""
    stage = data.get(name) if isinstance(data, dict) else None
    value = stage.get("value") if isinstance(stage, dict) else None
    return value if isinstance(value, str) else None


def _doubt_stage(name: str, stage: str | None) -> list[str]:
    """Return what is not as documented about a stage."""
    if stage is None:
        return [f"{name}.value is missing"]
    if stage not in STAGES:
        return [f"{name}.value {stage[:80]!r} is not a documented stage"]
    return []


def _parse_body(body: bytes) -> tuple[str, dict[str, Any] | None, list[str]]:
    """Return a body's media type, its fields, and what readers of the log would choke on.

    The fields are None where it is not an object in strict JSON.
    """
    reasons = []
    if body.startswith(BYTE_ORDER_MARK):
        reasons.append("begins with a byte order mark")
    try:
        value = _decode_json(body.removeprefix(BYTE_ORDER_MARK), _JSON)
    except ValueError as error:
        return "application/octet-stream", None, [*reasons, str(error)]

    # jq and DuckDB stop at such an escape, and read nothing of what follows in the file.
    if b"\\" in body and any(match[1] for match in _ESCAPES.finditer(body)):
        reasons.append("holds an unpaired surrogate escape")
    if not isinstance(value, dict):
        return "application/json", None, [*reasons, "is not an object"]
    return "application/json", value, reasons


def parse_event(body: bytes) -> Event:
    """Return the event in a verified body. Raise nothing: every one of them is recorded."""
    content_type, fields, reasons = _parse_body(body)
    warnings = []
    if reasons:
        warnings.append(f"kept as data_base64, for the body {' and '.join(reasons)}")
    if fields is None:
        return Event(f"{TYPE_PREFIX}unknown", None, None, None, content_type, True, tuple(warnings))

    kind = fields.get("event")
    if not isinstance(kind, str) or not _WORD.fullmatch(kind):
        warnings.append("event is missing or not a plain word")
        kind = "unknown"
    subject = _subject(fields.get("interviewCode"))
    if subject is None:
        warnings.append("interviewCode is missing or not plain text")
    sent = _time(fields.get("timestamp"))
    if sent is None:
        warnings.append("timestamp is missing or not an RFC 3339 time")
    stage = _stage_name(fields, "currentStage")
    warnings += _doubt_stage("previousStage", _stage_name(fields, "previousStage"))
    warnings += _doubt_stage("currentStage", stage)
    return Event(TYPE_PREFIX + kind, subject, sent, stage, content_type, bool(reasons),
                 tuple(warnings))


_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")
# How every line begins, up to its source: `_is_event` knows an event of this log by that.
_LINE_START = b'{"specversion":"1.0","id":"'
_ID = slice(len(_LINE_START), len(_LINE_START) + 64)
_AFTER_ID = f'","source":"{SOURCE}"'.encode()


def format_line(event: Event, body: bytes, recorded: float, event_id: str | None = None) -> bytes:
    """Return the event's line: one CloudEvents 1.0 event in JSON, UTF-8, ended by one newline.

    `recorded` is in Unix seconds; `event_id` is the body's SHA-256 in hex, if it is known. `data`
    is the body byte for byte; raw CR and LF, which JSON has between tokens only, become spaces.
    """
    second = math.floor(recorded)
    micros = round((recorded - second) * 1e6)  # it may round up to a whole second
    moment = f"{_format_second(second + micros // 10**6)}.{micros % 10**6:06d}Z"

    event_id = event_id or hashlib.sha256(body).hexdigest()
    start = _LINE_START + event_id.encode() + _AFTER_ID
    attributes = [f'"type":"{event.type}"']
    if event.subject is not None:
        attributes.append(f'"subject":{_encode_text(event.subject)}')
    if event.time is not None:
        attributes.append(f'"time":"{event.time}"')
    attributes.append(f'"recordedtime":"{moment}","datacontenttype":"{event.content_type}"')

    data = b'"data":' + body.translate(_LINE_BREAKS)
    if event.as_base64:
        data = b'"data_base64":"' + base64.b64encode(body) + b'"'
    return b",".join((start, ",".join(attributes).encode(), data)) + b"}\n"


# --- HTTP, strictly: pure (a head in, as Latin-1, its parts or Rejected out) ---

_TOKEN_CHARS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN_CHARS}) ([!-~]+) HTTP/([0-9])\.([0-9])")
# No space before the colon, no fold, no bare CR, LF or NUL.
_FIELD_LINE = re.compile(_TOKEN_CHARS + r":[\t -~\x80-\xff]*")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+;=-]*)(?::[0-9]*)?")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]+")
_HTTP_ORIGIN = re.compile(r"\Ahttps?://[^/?#]+", re.IGNORECASE)
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rf"[ \t]*;[ \t]*{_TOKEN_CHARS}(?:[ \t]*=[ \t]*(?:{_TOKEN_CHARS}|{_QUOTED}))?"
_CHUNK_LINE = re.compile(f"([0-9A-Fa-f]+)(?:{_EXTENSION})*")
_BARE = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\x00")
CHUNKED = -1


class Head(NamedTuple):
    """A request head: `length` of the body in bytes, CHUNKED, or None where none was announced."""

    method: str
    path: str
    query: str
    minor: int
    fields: dict[str, str]
    length: int | None

    def persistent(self) -> bool:
        """Return whether the sender wants to keep the connection (RFC 9112 section 9.3)."""
        value = self.fields.get("connection", "").lower()
        options = [option.strip() for option in value.split(",")]
        return "close" not in options and (self.minor > 0 or "keep-alive" in options)


def _parse_fields(lines: list[str]) -> dict[str, str]:
    """Return field values by lower-case name; raise Rejected.

    Repeated ones are joined by ", " (RFC 9110 section 5.3): a field that may stand only once
    refuses that in the check of its value.
    """
    if len(lines) > FIELD_LIMIT:
        raise Rejected(431, f"there are more than {FIELD_LIMIT} header fields")
    fields: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not _FIELD_LINE.fullmatch(line):
            raise Rejected(400, f"header line {number} is not a field (RFC 9112 section 5)")
        name, _, value = line.partition(":")
        name = name.lower()
        value = value.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _body_length(fields: dict[str, str], minor: int) -> int | None:
    """Return the length of the body (RFC 9112 section 6.3), as in `Head`.

    Raise Rejected where two readings are possible.
    """
    coding = fields.get("transfer-encoding")
    length = fields.get("content-length")
    if coding is not None:
        if length is not None:
            raise Rejected(400, "Content-Length and Transfer-Encoding stand together")
        if minor == 0:
            raise Rejected(400, "HTTP/1.0 has no Transfer-Encoding")
        if coding.lower() != "chunked":
            raise Rejected(501, "the only transfer coding known here is one chunked")
        return CHUNKED

    if length is None:
        return None
    if not (length.isascii() and length.isdigit()):  # int() would take 1_0 and +5
        raise Rejected(400, "Content-Length is not one decimal number")

    digits = length.lstrip("0") or "0"
    if len(digits) > 15:  # int() raises on very many digits
        return 10**15  # more than any cap
    return int(digits)


@lru_cache(maxsize=16)  # all requests of a sender have the same one
def _parse_request_line(line: str) -> tuple[str, str, str, int]:
    """Return method, path, query and minor version (RFC 9112 section 3)."""
    words = line.split(" ")
    if len(words) > 1 and len(words[1]) > TARGET_LIMIT:
        raise Rejected(414, f"the request target is longer than {TARGET_LIMIT} bytes")

    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Rejected(400, "the request line is not METHOD SP target SP HTTP/1.1 "
                            "(RFC 9112 section 3)")

    method, target, major, minor = match.groups()
    if major != "1":
        raise Rejected(505 if major >= "2" else 400, "only HTTP/1.1 and HTTP/1.0 are spoken here")

    absolute = _ABSOLUTE.match(target)
    if not (absolute or target.startswith("/") or (method, target) == ("OPTIONS", "*")):
        raise Rejected(400, "the request target is neither a path nor an absolute URL "
                            "(RFC 9112 section 3.2)")

    path, _, query = _HTTP_ORIGIN.sub("", target).partition("?")
    return method, path or "/", query, int(minor)


def parse_head(text: str) -> Head:
    """Return the parts of a request head (RFC 9112); raise Rejected.

    `text` has neither the CRLF of the last line nor the empty line.
    """
    lines = text.split("\r\n")
    method, path, query, minor = _parse_request_line(lines[0])
    fields = _parse_fields(lines[1:])
    is_missing = minor > 0 and "host" not in fields
    if is_missing or not _HOST.fullmatch(fields.get("host", "")):
        raise Rejected(400, "exactly one valid Host field is needed (RFC 9112 section 3.2)")
    length = _body_length(fields, minor)
    expected = fields.get("expect")
    if expected is not None and expected.lower() != "100-continue":
        raise Rejected(417, "the only expectation known here is 100-continue")
    return Head(method, path, query, minor, fields, length)


def parse_chunk_size(line: str) -> int:
    """Return the size in a chunk's first line (RFC 9112 section 7.1); raise Rejected.

    `line` has no CRLF.
    """
    match = _CHUNK_LINE.fullmatch(line)
    if not match:
        raise Rejected(400, "a chunk does not begin with its size in hex (RFC 9112 section 7.1)")
    return int(match[1], 16)


# --- The journal: disk only ---

SEAL_BLOCK = 4096  # bytes; a page is written whole or not at all when the process or the power ends
CHECK_LINE = b"\n".rjust(SEAL_BLOCK)  # a whole block: a full disk still takes a shorter line
_BLANK_ID = ""  # of a blank line, which is no event
_SEALED = {
    "event": "sealed {path}: its last event lacked its newline (a crash?)",
    "torn": "sealed {path}: its last {size} bytes were not a whole line (a crash?)",
    "foreign": "warning: {path}: its last {size} bytes are no event; they got a newline, and stay",
}
_PATH_ADVICE = {
    errno.ENOENT: "; make its folder first",
    errno.ENOTDIR: "; name a file, like events.jsonl",
    errno.EISDIR: "; name a file, like events.jsonl",
    errno.EACCES: "; the user that runs this program has to be able to write it and its folder",
}
_GZIP_START = b"\x1f\x8b"  # RFC 1952 section 2.3.1
_BLANKS = b" \0"  # a power cut leaves NULs, a seal that was cut short spaces
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}  # NFS, FUSE, CIFS


def _is_event(line: bytes) -> bool:
    """Return whether a line begins as every event of this log does, up to its source."""
    return line.startswith(_LINE_START) and line.startswith(_AFTER_ID, _ID.stop)


TailKind = Literal["nothing", "event", "torn", "foreign"]


def classify_tail(tail: bytes) -> TailKind:
    """Return what the bytes after the last newline of a log are.

    "event": a whole event, which lacks only its newline. "torn": what a crash left of lines of
    ours, which may be overwritten. "foreign": anything else.
    """
    if not tail:
        return "nothing"
    try:
        _decode_object(tail, _JSON, DEPTH_LIMIT + 1)
    except ValueError:
        begun = tail.rstrip(_BLANKS)
        is_ours = begun.startswith(_LINE_START) or _LINE_START.startswith(begun)
        return "torn" if is_ours else "foreign"
    return "event" if _is_event(tail) else "foreign"


def _check_kind(status: os.stat_result) -> None:
    """Raise JournalError where a file cannot be a log."""
    if not stat.S_ISREG(status.st_mode):
        kind = file_kind(status.st_mode)
        raise JournalError(f"it is {kind}; a log is a regular file, like events.jsonl")
    if status.st_nlink == 0:
        raise JournalError("it has been removed and is only mounted here, so that events would be "
                           "lost with the mount; mount the folder of the log, not the file")


def _sync(descriptor: int) -> None:
    """Make durable what was written to a file; raise SyncFailed."""
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync ends at the drive's cache
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        getattr(os, "fdatasync", os.fsync)(descriptor)
    except OSError as error:
        raise SyncFailed(f"sync: {_reason(error)}") from None


def _sync_folder(folder: str) -> bool:
    """Make the names in a folder durable; return False where the file system cannot.

    Raise SyncFailed, or OSError if the folder cannot be opened.
    """
    if not hasattr(os, "O_DIRECTORY"):  # Windows, of which the start tells
        return True
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise SyncFailed(f"sync of its folder: {_reason(error)}") from None
        return False
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return True


def _lock(descriptor: int) -> bool:
    """Lock a file for this process alone; return False where the file system cannot.

    Raise JournalError if another process has locked it, or OSError.
    """
    if not fcntl:  # Windows, of which the start tells
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError("another process has it open and locked; stop that one, "
                           "or choose another log") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


class ReadBack(NamedTuple):
    """What stands at the end of a log."""

    ids: list[str]  # of its last events, the newest first
    broken: int     # lines that hold NULs
    tail: bytes     # what stands after the last newline
    kind: TailKind  # of the tail
    size: int       # of the file, in bytes


class LogFile:
    """The log as an open file: locked, read back, appended to, sealed, released. For one thread.

    Whose it is: a file that holds an event of this log, or nothing but blanks, NULs and a torn tail
    of ours, is ours. Any other is refused by `read_back`, which comes before any write.

    How a torn tail is sealed: it is overwritten with NULs, its first page last, and then with
    spaces, so that a crash at any point leaves a torn tail of ours again; then a newline ends it.
    It is not truncated, for then `tail -F` would print the whole file again; and without the
    newline, `tail -F` would show it and the next event as one line.

    `known_size` is the size in bytes at which we left the file with all its lines whole; None
    before that, and when a failed batch has left something. Where the file has another size, it is
    sealed before the next event (see `Journal._file_at_path`).
    """

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        """Open and lock the file at `path`; raise JournalError or OSError."""
        self.path = path
        self.warn = warn
        self.known_size: int | None = None
        self._has_event = False  # that is durable, and says whose file this is
        self._remains: tuple[int, bytes] | None = None  # of a failed batch, and their offset
        self._folder = os.path.dirname(os.path.realpath(path))  # of a symbolic link's target
        with contextlib.suppress(FileNotFoundError):
            _check_kind(os.stat(path))  # before it is opened: a pipe would block

        with contextlib.ExitStack() as opened:  # closes them again if the rest fails
            self._appender = opened.enter_context(self._open(os.O_APPEND | os.O_CREAT))
            # To seal by: Linux appends even a pwrite to a file that is open with O_APPEND.
            self._editor = opened.enter_context(self._open(0))
            self._status = os.fstat(self._appender.fileno())
            _check_kind(self._status)  # it may have been replaced meanwhile
            if not os.path.samestat(self._status, os.fstat(self._editor.fileno())):
                raise JournalError("it was replaced while it was being opened")
            self._is_locked = _lock(self._appender.fileno())
            opened.pop_all()

    def _open(self, flags: int) -> io.FileIO:
        flags |= os.O_RDWR | getattr(os, "O_BINARY", 0)
        return io.FileIO(os.open(self.path, flags, 0o600), "r+")

    def size_at_path(self) -> int | None:
        """Return the size in bytes, or None if the path does not lead to this file any more.

        It may have been renamed or removed. Raise JournalError or OSError.
        """
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        if not os.path.samestat(status, self._status):
            return None
        _check_kind(status)
        return status.st_size

    # reading

    def _read(self, start: int, size: int) -> bytes:
        self._editor.seek(start)
        return self._editor.read(size) or b""

    def _lines_backwards(self, size: int) -> Iterator[bytes]:
        """Yield what stands after the last newline, then the whole lines before it, backwards.

        RECENT_BYTES in all; raise JournalError if there is no newline in them.
        """
        limit = max(0, size - RECENT_BYTES)
        parts: list[bytes] = []  # of the line whose beginning is not read yet, the last part first
        newline_seen = False
        start = size

        while start > limit:
            end = start
            start = max(limit, end - READ_BACK)
            first, *others = self._read(start, end - start).split(b"\n")
            if others:
                newline_seen = True
                parts.append(others.pop())
                yield b"".join(reversed(parts))
                yield from reversed(others)
                parts.clear()
            parts.append(first)

        if limit == 0:
            yield b"".join(reversed(parts))
        elif not newline_seen:
            raise JournalError("its last line is longer than any event, so it is no log of this "
                               "program, and stays as it is; move it away, or choose another log")

    def read_back(self, wanted: int) -> ReadBack:
        """Return what stands at the file's end, `wanted` ids at most.

        Raise JournalError if the file is somebody else's, or OSError.
        """
        size = self._editor.seek(0, os.SEEK_END)
        lines = self._lines_backwards(size)
        tail = next(lines)
        kind = classify_tail(tail)
        is_ours = _is_event(tail)
        is_blank = kind in ("nothing", "torn")
        ids: list[str] = []
        broken = 0
        for line in lines:
            if not line.strip(_BLANKS):
                continue
            is_blank = False
            has_nul = b"\0" in line  # a page of it was lost in a crash
            broken += has_nul
            if _is_event(line):
                is_ours = True
                if not has_nul:
                    ids.append(line[_ID].decode("ascii", "replace"))
                if len(ids) == wanted:
                    break

        if is_blank and not is_ours:  # of a longer file, not all has been read
            is_ours = size <= RECENT_BYTES or _is_event(self._read(0, _ID.stop + len(_AFTER_ID)))
        if not is_ours:
            self._refuse()
        return ReadBack(ids, broken, tail, kind, size)

    def _refuse(self) -> NoReturn:
        """Raise JournalError for a file that is somebody else's."""
        is_packed = self._read(0, 2) == _GZIP_START
        reason = "it is compressed (gzip)" if is_packed else "it holds no event"
        raise JournalError(f"{reason}, so it is no log of this program, and stays as it is; "
                           "move it away, or choose another log")

    def take_over(self) -> list[str]:
        """Return the ids in the file, the newest first, as soon as they are durable.

        Raise JournalError if it is not ours, OSError or SyncFailed.
        """
        found = self.read_back(RECENT_IDS)
        _sync(self._appender.fileno())  # whoever wrote it may not have synced it
        is_named = _sync_folder(self._folder)

        if not self._is_locked:
            self.warn(f"warning: {self.path}: this file system cannot lock: "
                      "nothing keeps a second receiver off this log; do not start one")
        if not is_named:
            self.warn(f"warning: {self.path}: this file system cannot sync a folder: "
                      "a power cut can take a log that was just begun with it")
        if found.broken:
            self.warn(f"warning: {self.path}: lines that hold NULs (a crash?): {found.broken}; if "
                      "their events come again, they are recorded again")
        if os.name == "posix" and self._status.st_mode & stat.S_IROTH:
            self.warn(f"warning: {self.path} can be read by other users of this machine, and holds "
                      f"candidates' data; chmod o-r {self.path}")
        return found.ids

    # writing

    def append(self, lines: bytes) -> None:
        """Write one batch and make it durable; OSError or SyncFailed: none of it counts."""
        written = 0
        try:
            for end in self._ends_of_parts(lines):
                written += os.write(self._appender.fileno(), lines[written:end])
                if written < end:
                    raise OSError(errno.ENOSPC,
                                  f"only {written} of {len(lines)} bytes were written")
                _sync(self._appender.fileno())
        except (OSError, SyncFailed):
            if written:
                self._remains = (self._appender.tell() - written, lines[:written])
                self.known_size = None
                with contextlib.suppress(OSError, JournalError):
                    self.seal()  # what cannot be done now is done before the next batch
            raise

        self.known_size = self._appender.tell()
        self._has_event = self._has_event or any(map(_is_event, lines.split(b"\n")))

    def _ends_of_parts(self, lines: bytes) -> list[int]:
        """Return where the parts of a batch end that are made durable one after another.

        That is one part, but for a file's first event: its beginning, which is on one page or on
        two, comes alone. Else a crash could leave later pages without the beginning, which alone
        shows that the file is ours.
        """
        if self._has_event:
            return [len(lines)]
        first = SEAL_BLOCK - self._editor.seek(0, os.SEEK_END) % SEAL_BLOCK
        ends = [first, first + SEAL_BLOCK]
        return [end for end in ends if end < len(lines)] + [len(lines)]

    def seal(self) -> list[str]:
        """Blank what a failed batch left, and end what stands after the last newline.

        Return the ids of events that are durable by that: one if it only lacked its newline. Raise
        JournalError if the file is not ours (any more), OSError or SyncFailed.
        """
        self.known_size = None
        if self._remains:
            self._blank(*self._remains)
            self._remains = None

        found = self.read_back(1)
        tail = found.tail
        kind = found.kind
        self._has_event = bool(found.ids) or kind == "event"
        if kind == "torn" and tail.strip(b" "):
            self._blank(found.size - len(tail), tail)
        if kind != "nothing":
            if os.write(self._appender.fileno(), b"\n") != 1:
                raise OSError(errno.ENOSPC, "a torn line could not be ended")
            _sync(self._appender.fileno())
            self.warn(_SEALED[kind].format(path=self.path, size=len(tail)))
        self.known_size = self._editor.seek(0, os.SEEK_END)
        return [tail[_ID].decode()] if kind == "event" else []

    def _blank(self, start: int, content: bytes) -> None:
        """Overwrite what stands at `start` with spaces, as far as it still is `content`.

        A crash in between leaves some pages as they were. So it becomes NULs first: a line that
        holds some is never taken for an event. The first page comes when the others are durable,
        for it says whose they are.
        """
        first = SEAL_BLOCK - start % SEAL_BLOCK
        steps = (
            (start + first, content[first:], b"\0"),
            (start, content[:first], b"\0"),
            (start, bytes(len(content)), b" "),
        )

        failed: SyncFailed | None = None
        for step in steps:
            try:
                self._overwrite(*step)
            except SyncFailed as error:  # the process has to end; but first the event is blanked
                failed = error
        if failed:
            raise failed

    def _overwrite(self, start: int, content: bytes, filler: bytes) -> None:
        """Overwrite and sync what stands at `start`, as far as it still is `content`."""
        end = start + len(content)
        while end > start:
            begin = max(start, (end - 1) // SEAL_BLOCK * SEAL_BLOCK)
            block = content[begin - start:end - start]
            if self._read(begin, len(block)) == block:
                self._editor.seek(begin)
                if self._editor.write(filler * len(block)) != len(block):
                    raise OSError(errno.EIO, "a torn line could not be blanked")
            end = begin
        if content:
            _sync(self._appender.fileno())

    def close(self) -> None:
        """Close the file. A close that fails changes nothing: what was acknowledged is durable."""
        for file in (self._editor, self._appender):
            with contextlib.suppress(OSError):
                file.close()  # it forgets its descriptor first


class _Entry:
    """One line on its way to the disk.

    `settle` wakes the appends that `wait` for it, and is called once; then `error` says why the
    line is not durable, or is None.
    """

    __slots__ = ("_settled", "error", "event_id", "line")

    def __init__(self, event_id: str, line: bytes) -> None:
        self.event_id = event_id
        self.line = line
        self.error: str | None = None
        self._settled = threading.Lock()  # locked until then; an Event takes three times as long
        self._settled.acquire()

    def settle(self, error: str | None) -> None:
        """Wake the appends that wait, one after another."""
        self.error = error
        self._settled.release()

    def wait(self, seconds: float) -> bool:
        """Return whether the entry was settled within `seconds`."""
        if not self._settled.acquire(timeout=seconds):
            return False
        self._settled.release()  # for one more append of the same id
        return True


class Journal:
    """The log: what `append` returns for is durable.

    How group commit works: `append` puts its line into `_pending` and waits. One thread takes all
    that is pending, writes it by one write, syncs, and settles every entry of that batch; what
    arrives meanwhile is the next batch. A thread of its own, so that a stalled sync cannot keep an
    append from giving up in time.

    A failed write is tried again with the next batch. After a failed sync, or a fault of ours,
    `fatal` says why nothing more can be stored: the thread ends, and calls `on_fatal`.

    `_lock` guards the fields below it; only the thread uses `_file`, once it runs. It is never held
    while the disk works, nor while an entry is settled: an append that wakes goes on to the next
    event, and would stop again at the lock. An id moves from `_unsettled` to `_recent` in one step,
    so that an append finds it in one of the two. Whoever takes an entry out of `_unsettled` settles
    it. `_wake` wakes the thread when something is pending or the journal closes.
    """

    def __init__(self, path: str | os.PathLike[str],
                 warn: Callable[[str], None] = lambda warning: None) -> None:
        self.path = os.fspath(path)
        self.warn = warn  # gets a line on what was sealed, or cannot be promised here
        self.on_fatal: Callable[[], None] = lambda: None  # called when the process has to end
        self._file: LogFile | None = None
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._pending: list[_Entry] = []  # not yet taken by the thread
        self._pending_bytes = 0
        self._unsettled: dict[str, _Entry] = {}  # those, and the batch that is being written
        self._recent: OrderedDict[str, None] = OrderedDict()  # durable, the oldest first
        self._failing: str | None = None  # why the last batch failed, or was late
        self.fatal: str | None = None
        self._closing = False

        try:
            self._start()
        except OSError as error:
            advice = _PATH_ADVICE.get(error.errno or 0, "")
            raise JournalError(f"{_reason(error)}{advice}") from None
        except SyncFailed as error:
            raise JournalError(str(error)) from None

        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, event_id: str, line: bytes, seconds: float = STORE_SECONDS) -> bool:
        """Return True once `line` is durable, False if `event_id` already was.

        Raise JournalError where it cannot be stored, at the latest after `seconds`.
        """
        with self._lock:
            if event_id in self._recent:
                return False
            entry = self._unsettled.get(event_id)
            is_first = entry is None
            if entry is None:
                entry = self._enqueue(event_id, line)

        if not entry.wait(seconds):
            late = f"the disk did not take it within {seconds:.3g} s"
            with self._lock:
                self._failing = late
            raise JournalError(late)

        if entry.error is not None:
            raise JournalError(entry.error)
        return is_first

    def _enqueue(self, event_id: str, line: bytes) -> _Entry:
        """Return the new entry of a line, now pending. The caller holds the lock."""
        if self.fatal or self._closing:
            raise JournalError(self.fatal or "the log is closed")
        if self._pending_bytes > BACKLOG_BYTES:
            raise JournalError("the disk has stalled, and too much waits for it")
        entry = self._unsettled[event_id] = _Entry(event_id, line)
        if not self._pending:  # else the thread has been woken already
            self._wake.notify()
        self._pending.append(entry)
        self._pending_bytes += len(line)
        return entry

    def check(self) -> None:
        """Raise JournalError while the log cannot be written; after a failure, try a blank line."""
        with self._lock:
            fatal = self.fatal
            failing = self._failing
        if fatal:
            raise JournalError(fatal)
        if failing:
            self.append(_BLANK_ID, CHECK_LINE, CHECK_SECONDS)

    def close(self) -> None:
        """Write and sync what is pending, and let the file go.

        A disk that has stalled gets CLOSE_SECONDS; then no append waits any longer, and what lands
        afterwards is a duplicate when it is sent again.
        """
        with self._lock:
            if self._closing:
                return  # a second wait would be too long
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._settle_all("the disk did not take it before the receiver had to stop")

    # the thread

    def _run(self) -> None:
        """Commit what comes, until the journal closes or nothing more can be stored."""
        fatal = self._commit_all()
        if self._file:
            self._file.close()
        if fatal is None:
            return
        with self._lock:
            self.fatal = fatal
        self.on_fatal()  # first: nobody else is accepted while the others get their answers
        self._settle_all(fatal)

    def _commit_all(self) -> str | None:
        """Commit one batch after another; return None at the end, or why nothing can be stored."""
        try:
            while batch := self._next_batch():
                self._settle(batch, self._commit(batch))
        except SyncFailed as error:
            return f"{self.path}: {error}"
        except Exception as fault:  # out of memory, or a fault of ours
            return f"{self.path}: {describe_fault(fault)}"
        return None

    def _next_batch(self) -> list[_Entry]:
        """Wait for something to write, and return all of it; nothing once the journal closes."""
        with self._lock:
            while not self._pending and not self._closing:
                self._wake.wait()
            batch = self._pending
            self._pending = []
            self._pending_bytes = 0
        return batch

    def _commit(self, batch: Sequence[_Entry]) -> str | None:
        """Store one batch; return None, or why none of its lines counts. Raise SyncFailed."""
        try:
            self._file_at_path().append(b"".join([entry.line for entry in batch]))
        except (OSError, JournalError) as error:
            return f"{self.path}: {_reason(error)}"
        return None

    def _settle(self, batch: Sequence[_Entry], error: str | None) -> None:
        """Remember what is durable, and wake the appends of a batch."""
        waiting = []
        with self._lock:
            self._failing = error
            if error is None:
                self._remember([entry.event_id for entry in batch if entry.event_id != _BLANK_ID])
            for entry in batch:
                if self._unsettled.pop(entry.event_id, None):
                    waiting.append(entry)
        for entry in waiting:
            entry.settle(error)

    def _settle_all(self, reason: str) -> None:
        """Let no append wait any longer."""
        with self._lock:
            waiting = list(self._unsettled.values())
            self._unsettled.clear()
        for entry in waiting:
            entry.settle(reason)

    def _remember(self, event_ids: Iterable[str]) -> None:
        """Note the ids of durable events, the oldest first. The caller holds the lock."""
        for event_id in event_ids:
            self._recent[event_id] = None
            if len(self._recent) > RECENT_IDS:
                self._recent.popitem(last=False)

    # the file

    def _file_at_path(self) -> LogFile:
        """Return the file at the path, sealed; raise JournalError, OSError or SyncFailed.

        It is opened anew where it is another one than before: rotated, removed, or refused before.
        """
        file = self._file
        size = file.size_at_path() if file else None
        if file and size is None:
            self._release(file)
            file = None
        if file is None:
            file = self._open()
        if size is None or size != file.known_size:
            self._seal(file)
        return file

    def _open(self) -> LogFile:
        """Open the file at the path, and remember the ids in it."""
        file = LogFile(self.path, self.warn)
        try:
            event_ids = file.take_over()
        except BaseException:
            file.close()
            raise
        with self._lock:
            self._remember(reversed(event_ids))
        self._file = file
        return file

    def _seal(self, file: LogFile) -> None:
        event_ids = file.seal()
        with self._lock:
            self._remember(event_ids)

    def _release(self, file: LogFile) -> None:
        """Let a file go that is no longer at the path; it is the last chance to seal it."""
        self._file = None
        try:
            if file.known_size is None:
                with contextlib.suppress(OSError, JournalError):  # the next file may have space
                    self._seal(file)
        finally:
            file.close()

    def _start(self) -> None:
        """Open the log and seal it; on a full disk, the first batch tries that again."""
        file = self._open()
        try:
            self._seal(file)
        except OSError as error:
            self._failing = f"{self.path}: {_reason(error)}"
        except BaseException:
            file.close()
            raise


# --- One connection: its socket, its answers, and the handler of its requests ---

_PHRASES = http.client.responses


class ConnectionEnded(Exception):
    """Nothing more comes from a connection; the subclass says why."""


class Disconnected(ConnectionEnded):
    """The peer has ended or reset it, does not take what is sent, or broke TLS."""


class DeadlineExceeded(ConnectionEnded):
    """The peer was silent until the deadline."""


class Stopped(ConnectionEnded):
    """The receiver stops, and all that had arrived has been read."""


class Evicted(ConnectionEnded):
    """Another connection needed its place."""


@lru_cache(maxsize=2)
def _http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


def format_head(status: int, length: int | None, media_type: str,
                fields: Sequence[tuple[str, str]]) -> bytes:
    """Return the head of an answer; where `length` is None, the connection ends the content."""
    lines = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        "Server: skype_webhook",
        f"Date: {_http_date(int(time.time()))}",
        f"Content-Type: {media_type}",
        *(f"{name}: {value}" for name, value in fields),
    ]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


PROXY_PROTOCOL = "the PROXY protocol"
NO_PROXY_PROTOCOL = ("the PROXY protocol is not spoken here; turn it off in the proxy "
                     "(send-proxy, proxy_protocol)")
_PROXY_STARTS = (b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n")  # how its versions 1 and 2 begin


def name_protocol(first: bytes) -> str | None:
    """Return what a peer speaks that begins with these bytes, or None if it can be TLS."""
    if first.startswith(_PROXY_STARTS):
        return PROXY_PROTOCOL
    if b"A" <= first[:1] <= b"Z":  # a method; TLS begins with byte 22
        return "plain HTTP"
    return None


# Seconds and microseconds. 66 is SO_RCVTIMEO_NEW: a 32-bit Linux with 64-bit times (Alpine, say).
_TIMEVAL = "qq" if socket.SO_RCVTIMEO == 66 else "ll"


def host_port(address: Sequence[Any]) -> str:
    """Return a socket's address as it stands in a URL."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{host}:{address[1]}"


class Connection:
    """An accepted socket, TLS over it, and its deadline.

    TLS works on two buffers, and the socket stays our own. So one read of the socket does what an
    SSLSocket takes three for, and another thread can shut the socket down (SSLSocket.shutdown would
    clear its TLS state).

    Only the connection's own thread reads and writes. It keeps the deadline itself: the time left
    is the timeout of its next read, so a peer that sends a byte a second gains nothing by it.

    Other threads set `interruption`, and its own sets `storing` (`Receiver.protect`), both under
    `Receiver.changed`: so a connection is never evicted while its event is being stored. Its own
    thread reads `interruption` and clears `storing` without the lock: seen late, neither harms.
    """

    def __init__(self, accepted: socket.socket, address: Any, seconds: float) -> None:
        host = address[0]
        if "." in host:  # IPv4, also on a listener for both families
            host = host.removeprefix("::ffff:")
        self.host: str = host
        self.peer = host_port((host, address[1]))
        self.socket = accepted
        self.tls: ssl.SSLObject | None = None
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        # Of the socket, in seconds; 0: none.
        self.timeouts = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}
        self.tls_allowance = math.inf  # bytes that TLS may say before the peer's next content

        self.proven = False   # it has delivered a verified event
        self.storing = False  # its event is verified, and not answered yet
        self.interruption: type[ConnectionEnded] | None = None  # why another thread has ended it
        self.restart_clock(seconds)

    def restart_clock(self, seconds: float) -> None:
        """Give the peer so many seconds from now, for whatever it is waited for."""
        self.since = time.monotonic()
        self.deadline = self.since + seconds

    def interrupt(self, ending: type[ConnectionEnded]) -> None:
        """Have the connection's thread raise `ending`, from another thread.

        A stop lets it read first what has arrived, and answer it; an eviction ends everything.
        """
        self.interruption = ending
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD if ending is Stopped else socket.SHUT_RDWR)

    def handshake(self, context: ssl.SSLContext) -> str | None:
        """Speak TLS from now on, and return None; or return what the peer speaks instead.

        Raise ConnectionEnded, or ssl.SSLError where the peer's TLS is not ours.
        """
        first = self._read_socket()
        spoken = name_protocol(first)
        if spoken is not None:
            return spoken
        try:
            self.socket.getpeername()  # raises if the peer has reset it: a handshake costs 0.2 ms
        except OSError:
            raise Disconnected from None

        self.incoming.write(first)
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self._advance(self.tls.do_handshake)
        if not self.incoming.pending:
            self.acknowledge()  # without tickets, we send nothing now that would carry the ACK
        self.tls_allowance = KEY_UPDATE_BYTES
        return None

    def receive(self) -> bytes:
        """Return what the peer sends next, at least a byte; raise ConnectionEnded."""
        tls = self.tls
        if tls is None:
            return self._read_socket()

        if not (self.incoming.pending or tls.pending()):
            self.incoming.write(self._read_socket())  # without data, the step would only raise
        try:
            content: bytes = self._advance(tls.read, READ_SIZE)
        except ssl.SSLError:
            raise Disconnected from None
        if not content:  # the peer's closure alert
            raise self.interruption or Disconnected
        self.tls_allowance = KEY_UPDATE_BYTES
        return content

    def _read_socket(self) -> bytes:
        """Return what comes until the deadline; what is there by then can be read after it, too."""
        while True:
            self._set_timeout(socket.SO_RCVTIMEO, self.deadline - time.monotonic())
            try:
                received = self.socket.recv(READ_SIZE)
            except (BlockingIOError, socket.timeout):
                if time.monotonic() >= self.deadline:
                    raise self.interruption or DeadlineExceeded from None
                continue
            except OSError:
                received = b""
            if not received:
                raise self.interruption or Disconnected
            return received

    def _set_timeout(self, option: int, seconds: float) -> None:
        """Have each read (SO_RCVTIMEO) or write (SO_SNDTIMEO) end after so many seconds.

        These are the kernel's timeouts, and set again only when they are off by three per cent. A
        timeout of Python's own takes a poll, and another turn of the interpreter lock, for each
        read and write: a seventh of the CPU of an event.
        """
        if abs(self.timeouts[option] - seconds) <= seconds / 32:
            return
        seconds = max(seconds, 0.001)  # 0 would mean: no timeout
        if os.name == "posix":
            self.timeouts[option] = seconds
            timeval = struct.pack(_TIMEVAL, int(seconds), int(seconds % 1 * 1e6))
            with contextlib.suppress(OSError):  # the peer has gone: the next call says so
                self.socket.setsockopt(socket.SOL_SOCKET, option, timeval)
        else:  # Windows takes another structure
            self.socket.settimeout(seconds)

    def _advance(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a step of TLS returns; feed it while it asks, and send what it has to say."""
        while True:
            try:
                return step(*arguments)
            except ssl.SSLWantReadError:
                pass
            finally:  # after an error, too: TLS has an alert to send
                if self.outgoing.pending:
                    self._speak_tls()
            self.incoming.write(self._read_socket())

    def _speak_tls(self) -> None:
        """Send what TLS has to say; raise Disconnected for a peer that asks for that alone."""
        self.tls_allowance -= self.outgoing.pending
        if self.tls_allowance < 0:
            raise Disconnected
        self._transmit(self.outgoing.read(), self.deadline - time.monotonic())

    def send(self, data: bytes, seconds: float, last: bool = False) -> None:
        """Send all of `data` within so many seconds, and the closure alert of TLS after the `last`.

        Raise Disconnected where the peer does not take it. After the last, `tls` is None.
        """
        if self.tls:
            try:
                if data:  # before 3.10, nothing to write is an error after the peer's end
                    self.tls.write(data)
            except ssl.SSLError:
                raise Disconnected from None
            if last:
                with contextlib.suppress(ssl.SSLError):  # the peer's alert is not waited for
                    self.tls.unwrap()
                self.tls = None
            data = self.outgoing.read()
        self._transmit(data, seconds)

    def _transmit(self, data: bytes, seconds: float) -> None:
        """Send all of `data`; raise Disconnected if that takes longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            self._set_timeout(socket.SO_SNDTIMEO, seconds)
            try:
                sent = self.socket.send(data)
            except OSError:
                raise Disconnected from None
            if sent == len(data):
                return
            data = data[sent:]
            seconds = deadline - time.monotonic()
            if seconds <= 0:  # it takes some, but a timeout is per call
                raise Disconnected

    def acknowledge(self) -> None:
        """Acknowledge what has arrived: until then, Nagle holds back the rest, mostly for 40 ms."""
        if hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):  # the peer has gone: the next read says so
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def more_has_arrived(self) -> bool:
        """Return at once (within a millisecond or so) whether there is something to read."""
        if self.tls and (self.incoming.pending or self.tls.pending()):
            return True
        self._set_timeout(socket.SO_RCVTIMEO, 0)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def end(self, unread: bool) -> None:
        """Say that nothing follows, before the socket is closed.

        With `unread` data, a close alone would reset the connection, and the peer would never see
        its answer: so it may go on sending for a while.
        """
        if self.tls:
            with contextlib.suppress(Disconnected):
                self.send(b"", 0, last=True)
        if unread:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
                self._drain()

    def _drain(self) -> None:
        """Read and drop what comes, within DRAIN_SECONDS and DRAIN_BYTES; raise OSError."""
        deadline = time.monotonic() + DRAIN_SECONDS
        left = DRAIN_BYTES
        dropped = bytearray(DRAIN_READ)
        while left > 0:
            self.socket.settimeout(max(0.0, deadline - time.monotonic()))
            received = self.socket.recv_into(dropped)
            if not received:
                return
            left -= received


# An IPv6 address in brackets or an IPv4 address, with or without a port; or an IPv6 address alone.
# No zone: that could be any text.
_FORWARDED = re.compile(
    r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+)(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+)")


def forwarded_for(fields: dict[str, str]) -> str | None:
    """Return the address that the proxy itself has seen: the last of X-Forwarded-For, or None."""
    last = fields.get("x-forwarded-for", "").rpartition(",")[2]
    match = _FORWARDED.fullmatch(last.strip(" \t"))
    if not match:
        return None
    try:
        address = ipaddress.ip_address(match[1] or match[2] or match[3])
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


def allowed_methods(path: str, settings: Settings) -> list[str]:
    """Return the methods that a path takes: none where there is nothing."""
    viewed = bool(settings.view_password) and path in ("/", "/events")
    methods = ["GET", "HEAD"] if viewed or path == "/healthz" else []
    if path == settings.path:
        methods.append("POST")
    return methods


def idle_seconds(settings: Settings, proven: bool) -> float:
    """Return how long a connection may be silent between two requests."""
    return IDLE_SECONDS if proven or settings.behind_proxy else settings.request_timeout


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests in, answers out, in order, for one connection.

    The base class gives its loop and its names: `handle` calls `handle_one_request` until
    `close_connection`, and a request is answered by `do_GET`, `do_HEAD` or `do_POST`. Its reading
    of heads is not used, since it takes lines without a colon and ignores Transfer-Encoding; nor
    are its answers, which are HTML.
    """

    request: Connection
    server: Receiver

    def setup(self) -> None:
        self.connection: Connection = self.request
        self.buffer = b""    # received, and not read yet
        self.unread = False  # more of the request may be on its way
        self.fruitless = 0   # requests in a row without an event
        # A request's time begins with its first byte. But the first request's has run since accept,
        # unless a proxy keeps the connection ready.
        self.clock_runs = not self.server.settings.behind_proxy

    def finish(self) -> None:
        self.connection.end(self.unread)

    def handle_one_request(self) -> None:
        """Read one request and answer it; raise ConnectionEnded where no answer can be sent."""
        self.close_connection = True
        if not self.await_request():
            return
        self.begin_request()
        try:
            self.read_head()
            self.respond()
        except Rejected as refusal:
            self.refuse(refusal)
        except ConnectionEnded as ending:
            if self.answered or isinstance(ending, Evicted):
                raise
            self.refuse(self.incomplete(ending))
        except Exception as fault:
            if self.answered:
                raise
            self.unread = True  # nobody knows where the next request begins
            answer = Rejected(500, "the receiver has a fault; send it again")
            self.refuse(answer, describe_fault(fault))

        self.connection.storing = False
        self.clock_runs = False
        self.connection.restart_clock(idle_seconds(self.server.settings, self.connection.proven))

    def await_request(self) -> bool:
        """Wait for the first byte of a request; return whether one has come."""
        try:
            while self.buffer in (b"", b"\r", b"\r\n"):
                self.buffer += self.connection.receive()
        except ConnectionEnded:
            return False
        return True

    def begin_request(self) -> None:
        """Forget the request before, and take the settings that this one is judged by."""
        self.settings = self.server.settings
        self.command = ""
        self.unread = True
        self.answered = False
        self.fruitless += 1
        self.name_client(None)
        if not self.clock_runs:
            self.connection.restart_clock(self.settings.request_timeout)

    def name_client(self, forwarded: str | None) -> None:
        self.client_host = forwarded or self.connection.host
        self.client_name = forwarded or self.connection.peer

    def read_head(self) -> None:
        """Read the head of a request; raise Rejected or ConnectionEnded."""
        if self.buffer.startswith(_PROXY_STARTS):
            raise Rejected(400, NO_PROXY_PROTOCOL)
        # Some senders end a body with an empty line (RFC 9112 section 2.2).
        self.buffer = self.buffer.removeprefix(b"\r\n")

        text = self.read_until(b"\r\n\r\n", HEAD_LIMIT - 4)
        if text is None:
            # A target that is too long has an answer of its own.
            _parse_request_line(self.buffer.partition(b"\r\n")[0].decode("latin-1"))
            raise Rejected(431, f"the head is longer than {HEAD_LIMIT} bytes")

        self.head = parse_head(text)
        self.command = self.head.method
        self.path = self.head.path
        self.unread = self.head.length not in (None, 0)
        self.close_connection = not self.head.persistent()
        if self.settings.behind_proxy:
            self.name_client(forwarded_for(self.head.fields))

    def respond(self) -> None:
        """Have the request answered by its method; raise Rejected if its path takes others."""
        allowed = allowed_methods(self.path, self.settings)
        if not allowed:
            raise Rejected(404, "there is nothing at this path")
        if self.command not in allowed:
            methods = ", ".join(allowed)
            raise Rejected(405, f"this path takes {methods} only", ("Allow", methods))
        getattr(self, f"do_{self.command}")()

    def do_POST(self) -> None:
        """Take one delivery: the path of one request, as at the top of this file."""
        self.check_length()
        settings = self.settings
        authorization = self.head.fields.get("authorization")
        claims = verify_token(authorization, settings.credentials, time.time(), settings.leeway)
        body = self.read_body()
        event_id = verify_body(claims, body)
        self.server.protect(self.connection)

        with self.server.turn_of(body):
            event = parse_event(body)
            line = format_line(event, body, time.time(), event_id)
        outcome = "recorded" if self.store(event_id, line) else "duplicate"

        self.fruitless = 0
        self.answer(200, b'{"status":"%b","id":"%b"}' % (outcome.encode(), event_id.encode()))
        warnings = f" ({'; '.join(event.warnings)})" if event.warnings else ""
        what = f"{(event.stage or '-')[:100]} {(event.subject or '-')[:100]}"
        self.report(outcome, what + warnings)

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self.answer_health()
        elif self.path == "/":
            show_page(self)
        else:
            show_events(self)

    do_HEAD = do_GET

    def answer_health(self) -> None:
        """Answer whether the next event can be stored."""
        try:
            self.server.journal.check()
        except JournalError as error:
            raise Rejected(503, "the log cannot be written", ("Retry-After", "10")) from error
        self.answer(200, b'{"status":"ok"}')

    # reading

    def receive_more(self) -> bytes:
        """Return what comes next within a request; raise ConnectionEnded."""
        self.connection.acknowledge()
        return self.connection.receive()

    def read_until(self, delimiter: bytes, limit: int) -> str | None:
        """Return what comes before `delimiter`, as Latin-1; None if it is longer than `limit`.

        Both are taken from the buffer; `limit` is in bytes. While it waits, it raises Rejected for
        a bare CR or LF, or a NUL; whoever parses what it returns does so, too.
        """
        scanned = 0
        length = self.buffer.find(delimiter)
        while length < 0 and len(self.buffer) <= limit + len(delimiter):
            if _BARE.search(self.buffer, scanned):
                raise Rejected(400, "there is a bare CR or LF, or a NUL (RFC 9112 section 2.2)")
            scanned = max(0, len(self.buffer) - len(delimiter) + 1)
            self.buffer += self.receive_more()
            length = self.buffer.find(delimiter, scanned)

        if not 0 <= length <= limit:
            return None
        data = self.buffer[:length]
        self.buffer = self.buffer[length + len(delimiter):]
        return data.decode("latin-1")

    def check_length(self) -> None:
        """Raise Rejected where no body is announced, or one that is too long."""
        length = self.head.length
        if length is None:
            self.unread = True
            raise Rejected(411, "a Content-Length, or a chunked body, is needed")
        if length > self.settings.max_body:
            raise self.too_long()

    def too_long(self) -> Rejected:
        return Rejected(413, f"the body is longer than {self.settings.max_body} bytes")

    def read_body(self) -> bytes:
        """Return the body; raise Rejected or ConnectionEnded.

        A sender that waits for a 100 gets it now, since its head has been found acceptable.
        """
        is_awaited = "expect" in self.head.fields and self.head.minor > 0
        if is_awaited and not self.buffer:  # not by `self.send`: this is no answer
            self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", self.settings.request_timeout)
        length = self.head.length or 0
        body = self.read_chunks() if length == CHUNKED else self.read_exactly(length)
        self.unread = False
        return body

    def read_exactly(self, count: int) -> bytes:
        """Return so many bytes; what has arrived beyond them stays in the buffer."""
        parts = [self.buffer]
        left = count - len(self.buffer)
        while left > 0:
            parts.append(self.receive_more())
            left -= len(parts[-1])
        whole = b"".join(parts)
        self.buffer = whole[count:]
        return whole[:count]

    def read_chunks(self) -> bytes:
        """Return a chunked body (RFC 9112 section 7.1); trailers are checked and dropped.

        The data may be as long as the cap, and the framing as long again.
        """
        parts = []
        data_left = framing_left = self.settings.max_body
        while True:
            line = self.read_until(b"\r\n", CHUNK_LINE_LIMIT)
            if line is None:
                raise Rejected(400, f"a chunk line is longer than {CHUNK_LINE_LIMIT} bytes")
            size = parse_chunk_size(line)
            data_left -= size
            framing_left -= len(line) + 4  # with the CRLF after it, and that after the data
            if data_left < 0:
                raise self.too_long()
            if framing_left < 0:
                raise Rejected(413, "the chunk lines are longer than the longest body")
            if size == 0:
                break
            chunk = self.read_exactly(size + 2)
            if not chunk.endswith(b"\r\n"):
                raise Rejected(400, "a chunk is longer than its size (RFC 9112 section 7.1)")
            parts.append(chunk[:-2])

        self.buffer = b"\r\n" + self.buffer  # so that the trailers, often none, end like a head
        trailers = self.read_until(b"\r\n\r\n", HEAD_LIMIT - 2)
        if trailers is None:
            raise Rejected(431, f"the trailers are longer than {HEAD_LIMIT} bytes")
        _parse_fields(trailers.split("\r\n")[1:])
        return b"".join(parts)

    def incomplete(self, ending: ConnectionEnded) -> Rejected:
        """Return the refusal of a request that was not whole."""
        if isinstance(ending, DeadlineExceeded):
            seconds = self.settings.request_timeout
            return Rejected(408, f"the request was not whole within {seconds:g} s")
        if isinstance(ending, Stopped):
            return Rejected(503, "the receiver is stopping; send it again", ("Retry-After", "1"))
        return Rejected(400, "the request ended before it was whole")

    # storing and answering

    def store(self, event_id: str, line: bytes) -> bool:
        """Return True once the line is durable, False for a duplicate; raise Rejected."""
        spent = time.monotonic() - self.connection.since
        seconds = max(1.0, min(STORE_SECONDS, ANSWER_SECONDS - spent))
        try:
            return self.server.journal.append(event_id, line, seconds)
        except JournalError as error:
            detail = "the event could not be stored; send it again"
            raise Rejected(503, detail, ("Retry-After", "10")) from error

    def answer(self, status: int, content: bytes, media_type: str = "application/json",
               *fields: tuple[str, str]) -> None:
        """Send one answer; head and content go by one write, in one packet."""
        if not self.may_persist():
            self.close_connection = True
        if self.close_connection:
            fields = (*fields, ("Connection", "close"))
        elif self.head.minor == 0:
            fields = (*fields, ("Connection", "keep-alive"))
        data = format_head(status, len(content), media_type, fields)
        if self.command != "HEAD":
            data += content

        try:
            self.send(data, last=self.close_connection)
        except Disconnected:  # what is recorded stays recorded
            self.close_connection = True

    def may_persist(self) -> bool:
        """Return whether the receiver can keep the connection for another request."""
        if self.unread:
            return False
        if self.fruitless >= FRUITLESS_ANSWERS and not self.settings.behind_proxy:
            return False
        if self.server.stopping:  # the last request that has arrived ends the connection
            return bool(self.buffer) or self.connection.more_has_arrived()
        return True

    def send(self, data: bytes, last: bool = False) -> None:
        """Send an answer, or a part of one; raise Disconnected."""
        self.answered = True
        self.connection.send(data, self.settings.request_timeout, last)

    def refuse(self, refusal: Rejected, reason: str = "") -> None:
        """Answer by a problem (RFC 9457), and tell the operator, who alone gets the reason."""
        status = refusal.status
        detail = refusal.detail
        problem = json.dumps({"title": _PHRASES[status], "status": status, "detail": detail})
        self.answer(status, problem.encode(), "application/problem+json", *refusal.fields)

        reason = reason or str(refusal.__cause__ or "")
        self.report("refused", f"{status} {detail}" + (f" ({reason})" if reason else ""))

    def report(self, outcome: str, what: str) -> None:
        """Count an outcome, and tell the operator of it."""
        milliseconds = (time.monotonic() - self.connection.since) * 1000
        self.server.report(outcome, f"{self.client_name} {outcome} {what} {milliseconds:.1f} ms")


# --- The live view: one page, and the log as an event stream for those who know the password ---


def _open_log(path: str) -> io.FileIO | None:
    """Open a log to read, if it is there and a regular file; a pipe would keep us waiting."""
    try:
        return io.FileIO(path) if os.path.isfile(path) else None
    except OSError:
        return None


def _log_mark(file: io.FileIO) -> str:
    """Return what a log is known by, whatever its name; "" before it holds an event.

    It is a hash of the file's inode and of how its first event begins, id included.
    """
    size = _ID.stop
    while True:
        file.seek(0)
        data = file.read(size)
        start = data.lstrip(_BLANKS + b"\n")[:_ID.stop]
        if len(start) == _ID.stop:
            break
        if len(data) < size:
            return ""
        size *= 2  # its first line is blank
    inode = os.fstat(file.fileno()).st_ino
    return hashlib.sha256(b"%d %b" % (inode, start)).hexdigest()[:16]


class Tail:
    """The log as a reader follows it: whole lines, each once, over rotation and truncation.

    `file` is the one that is read, from `offset` on. The journal never writes to a file again once
    it has written to the next. So as soon as another file at the path holds an event, it is opened
    (`next_file`), what is left of `file` is all that there will be of it, and then `next_file`
    takes its place. Until then, a missing or empty file at the path means nothing.

    A file whose `mark` changes was truncated (copytruncate), and is read from its start. A file
    without a mark holds no event, and is not read: its mark is still to come.

    It reads what is written, which may not be durable yet: an event that is then refused, since its
    sync failed, has been seen.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = _open_log(path)
        self.next_file: io.FileIO | None = None
        self.offset = 0
        self.mark = _log_mark(self.file) if self.file else ""

    def close(self) -> None:
        for file in (self.file, self.next_file):
            if file:
                file.close()

    def event_id(self, offset: int) -> str:
        """Return the stream's id of the event whose line ends at `offset`."""
        return f"{self.mark}-{offset}"

    def go_after(self, event_id: str) -> None:
        """Begin after the event of this id; at the file's start, if the id is of another file."""
        mark, _, digits = event_id.partition("-")
        if not self.file or mark != self.mark or not re.fullmatch(r"[0-9]{1,18}", digits):
            return
        if int(digits) <= self.file.seek(0, os.SEEK_END):
            self.offset = int(digits)

    def go_near_end(self) -> None:
        """Begin with the first event of the last VIEW_BYTES bytes, or of more if there is none."""
        size = self.file.seek(0, os.SEEK_END) if self.file else 0
        length = VIEW_BYTES
        while self.file and length < size:
            self.file.seek(size - length)
            newline = self.file.read(length).find(b"\n" + _LINE_START)
            if newline >= 0:
                self.offset = size - length + newline + 1
                return
            length *= 2

    def read_on(self) -> bytes:
        """Return the next whole lines, b"" if there are none yet; raise OSError."""
        self._look()  # before reading: what is read of a complete file then is all of it
        lines = self._read()

        if not lines and self.next_file:
            if self.file:
                self.file.close()
            self.file = self.next_file
            self.next_file = None
            self.offset = 0
            self.mark = _log_mark(self.file)
            lines = self._read()
        return lines

    def _look(self) -> None:
        """Notice a rotation or a truncation."""
        if not self.next_file:
            self.next_file = self._open_next()
        mark = _log_mark(self.file) if self.file else ""
        if mark not in ("", self.mark):
            self.offset = 0
            self.mark = mark

    def _open_next(self) -> io.FileIO | None:
        """Return the file at the path, open, if it is another one and holds an event."""
        try:
            if self.file and os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return None
        except OSError:  # nothing is there
            return None

        file = _open_log(self.path)
        if file and not _log_mark(file):
            file.close()
            return None
        return file

    def _read(self) -> bytes:
        """Return the next whole lines of `file`."""
        if not self.file or not self.mark:
            return b""
        length = VIEW_BYTES
        while True:
            self.file.seek(self.offset)
            data = self.file.read(length)
            end = data.rfind(b"\n") + 1
            if end or len(data) < length:
                break
            length *= 2  # a longer line
        self.offset += end
        return data[:end]


def network_of(host: str) -> str:
    """Return what one guesser can take addresses from: a /64 of IPv6, a single address of IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])  # without the zone of a link-local one
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((int(address), 64), strict=False))


class Guesses:
    """Wrong passwords of the live view in this minute, by network: each has a share.

    All networks together have a share too, so that many of them gain little. It does not lock out
    who has given the right password before. `_lock` guards all fields.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minute = 0                       # of the clock that `now` comes from
        self._wrong: Counter[str] = Counter()  # in that minute, by network
        self._known: set[str] = set()          # networks that the right password came from

    def are_too_many(self, network: str, now: float) -> bool:
        """Return whether no more passwords are looked at; `now` is in seconds, of any clock."""
        with self._lock:
            if int(now // 60) != self._minute:
                self._minute = int(now // 60)
                self._wrong.clear()
            if self._wrong[network] >= WRONG_PASSWORDS:
                return True
            in_all = sum(self._wrong.values())
            return in_all >= WRONG_PASSWORDS_IN_ALL and network not in self._known

    def note(self, network: str, right: bool) -> None:
        """Remember how a password was that came from there."""
        with self._lock:
            if not right:
                self._wrong[network] += 1
            elif len(self._known) < KNOWN_NETWORKS:
                self._known.add(network)


def check_password(handler: Handler) -> None:
    """Let a viewer in by HTTP Basic (RFC 7617), by any user name; raise Rejected."""
    network = network_of(handler.client_host)
    guesses = handler.server.guesses
    if guesses.are_too_many(network, time.monotonic()):
        detail = "there were too many wrong passwords; wait a minute"
        raise Rejected(429, detail, ("Retry-After", "60"))

    challenge = ("WWW-Authenticate", 'Basic realm="skype_webhook", charset="UTF-8"')
    scheme, _, text = handler.head.fields.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        raise Rejected(401, "the live view asks for its password", challenge)

    given = b""
    with contextlib.suppress(ValueError):
        given = base64.b64decode(text.strip(" "), validate=True).partition(b":")[2]
    password = handler.settings.view_password.encode("utf-8", "surrogateescape")
    right = hmac.compare_digest(given, password)
    guesses.note(network, right)
    if not right:
        raise Rejected(401, "that is not the password of the live view", challenge)


HEARTBEAT = b"event: heartbeat\ndata: {}\n\n"  # an event, for scripts see no SSE comments
VIEW_FIELDS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)


def watch_for_silence(sock: socket.socket) -> None:
    """Have the kernel end a connection whose machine does not answer (it fell asleep) for 10 s."""
    times = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 8000}
    with contextlib.suppress(OSError):  # it has gone already: the next read says so
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in times.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def has_gone(viewer: Connection) -> bool:
    """Return at once whether the viewer has gone; what else it sends is dropped."""
    viewer.restart_clock(0)
    try:
        viewer.receive()
    except DeadlineExceeded:
        return False
    except ConnectionEnded:
        return True
    return False


def format_frames(tail: Tail, lines: bytes) -> bytes:
    """Return the events in the `lines` that were just read of `tail` as server-sent events.

    Blank and foreign lines are left out, and so is one with a CR, which would end its line here.
    """
    frames = []
    end = tail.offset - len(lines)
    for line in lines.split(b"\n")[:-1]:
        end += len(line) + 1
        if line.startswith(_LINE_START) and b"\r" not in line:
            frames.append(b"id: %b\ndata: %b\n\n" % (tail.event_id(end).encode(), line))
    return b"".join(frames)


def stream_events(handler: Handler, tail: Tail) -> None:
    """Send events as they come, until the viewer goes, the server stops or the password changes.

    Raise Disconnected if they are not taken, OSError if the log cannot be read.
    """
    server = handler.server
    password = handler.settings.view_password
    beat = time.monotonic()

    while not (server.stopping or has_gone(handler.connection)):
        if server.settings.view_password != password:
            return
        data = format_frames(tail, tail.read_on())
        if time.monotonic() - beat >= HEARTBEAT_SECONDS:
            beat += HEARTBEAT_SECONDS
            data += HEARTBEAT
        handler.send(data)
        time.sleep(VIEW_PAUSE)  # so sixteen viewers leave the senders their share of the processor


def show_events(handler: Handler) -> None:
    """GET /events: the log as server-sent events, each a line of it.

    Who comes back with the id of the last one goes on after it. The header comes first: a browser
    that reconnects by itself sends it along with the query that it began with.
    """
    check_password(handler)
    query = dict(urllib.parse.parse_qsl(handler.head.query))
    last_id = handler.head.fields.get("last-event-id") or query.get("after")
    fields = [*VIEW_FIELDS, ("X-Accel-Buffering", "no"), ("Connection", "close")]

    handler.server.seat_viewer(handler.connection)
    handler.close_connection = True
    watch_for_silence(handler.connection.socket)
    try:
        with contextlib.closing(Tail(handler.settings.log)) as tail:
            if last_id:
                tail.go_after(last_id)
            else:
                tail.go_near_end()
            handler.send(format_head(200, None, "text/event-stream; charset=utf-8", fields))
            if handler.head.method == "GET":
                stream_events(handler, tail)
    except OSError as error:
        if not handler.answered:
            raise Rejected(503, "the log cannot be read", ("Retry-After", "10")) from error
        tell(f"{handler.client_name} live view: the log cannot be read: {_reason(error)}")


def show_page(handler: Handler) -> None:
    """GET /: the page."""
    check_password(handler)
    path = handler.settings.path.replace("&", "&amp;")  # it holds no <: see `_url_path`
    page = PAGE.replace("{PATH}", path).encode()
    policy = ("Content-Security-Policy", PAGE_POLICY)
    handler.answer(200, page, "text/html; charset=utf-8", policy, *VIEW_FIELDS)


# --- The server: sockets, TLS, signals; places, threads, evictions, the stop ---


def _check_pem(flag: str, path: str, content: str) -> None:
    try:
        text = read_regular_file(path).decode("latin-1")
    except PermissionError as error:
        raise SettingsError(f"{flag} {path}: {_reason(error)}; "
                            "the user that runs this program has to be able to read it") from None
    except OSError as error:
        raise SettingsError(f"{flag} {path}: {_reason(error)}") from None
    if not re.search(f"-----BEGIN (?:[A-Z]+ )?{content.upper()}-----", text):
        raise SettingsError(f"{flag} {path}: there is no PEM {content} in it; "
                            "openssl converts other formats (DER, PKCS#12)")


def _refuse_password() -> str:
    """Called by OpenSSL for an encrypted key, in place of its question on the terminal."""
    raise SettingsError("the key is encrypted; decrypt it (openssl pkey -in KEY -out NEW) "
                        "and let nobody but this program's user read it")


# OpenSSL's x509_vfy.h
X509_NOT_YET_VALID = 9
X509_EXPIRED = 10
X509_WRONG_HOST = (62, 64)  # a name, an address


def _warn_if_refused(context: ssl.SSLContext, cert: str) -> None:
    """Warn if even a peer that trusts this very certificate refuses it, mostly for its time."""
    peer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    peer.check_hostname = False  # it names none, which is an error from 3.14 on
    peer.verify_flags |= 0x80000  # X509_V_FLAG_PARTIAL_CHAIN; it has a name in `ssl` from 3.10

    up = ssl.MemoryBIO()
    down = ssl.MemoryBIO()
    ends = (peer.wrap_bio(down, up), context.wrap_bio(up, down, server_side=True))

    try:
        peer.load_verify_locations(cert)
        for _ in range(3):  # turns: enough for a whole handshake
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        advice = "senders refuse it; have another one issued"
        if error.verify_code == X509_EXPIRED:
            advice = "senders refuse it, so renew it"
        elif error.verify_code == X509_NOT_YET_VALID:
            advice = "look at this machine's clock first; if that is right, senders refuse it"
        tell(f"warning: --cert {cert}: {error.verify_message}; {advice}")
    except OSError:
        pass  # it is not the certificate that is refused


_NO_PAIR = ("the first certificate in the file (that has to be your own, the chain follows it) "
            "and the key do not belong together")
_PAIR_ERRORS = {  # by OpenSSL's reason
    "KEY_VALUES_MISMATCH": _NO_PAIR,
    "KEY_TYPE_MISMATCH": _NO_PAIR,
    "NO_CERTIFICATE_ASSIGNED": _NO_PAIR,  # nor of one kind (RSA, EC)
    "EE_KEY_TOO_SMALL": "the key is too small; make one with 2,048 bits (RSA) or P-256 (EC)",
    "CA_MD_TOO_WEAK": "the certificate is signed by an outdated hash (SHA-1?); have it issued anew",
}


def load_context(cert: str, key: str) -> ssl.SSLContext:
    """Return a new server context with this certificate chain and key (PEM files).

    Raise SettingsError where senders could not be served by them.
    """
    _check_pem("--cert", cert, "certificate")
    _check_pem("--key", key, "private key")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The last ones are for .NET on Windows Server 2012 R2.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES:!SHA1")
    # Two tickets cost 25 us, more than the signature that a resumption would save.
    context.num_tickets = 0
    # A peer that half-closes, or whose time is over, still gets its answer.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION

    try:
        context.load_cert_chain(cert, key, _refuse_password)
    except SettingsError as error:
        raise SettingsError(f"--key {key}: {error}") from None
    except ssl.SSLError as error:
        reason = _PAIR_ERRORS.get(error.reason) or (
            f"they cannot be used ({error.reason or 'broken PEM'}); is one of them cut short?")
        raise SettingsError(f"--cert {cert}, --key {key}: {reason}") from None
    except OSError as error:  # removed since it was read
        raise SettingsError(f"--cert {cert}, --key {key}: {_reason(error)}") from None
    _warn_if_refused(context, cert)
    return context


class Certificate:
    """The TLS context of new connections.

    Changed files make a new one: loading a bad pair into a live one breaks it.
    """

    def __init__(self, cert: str, key: str) -> None:
        self.cert = cert
        self.key = key
        self.seen = self.versions()
        self.context = load_context(cert, key)
        self.next_look = 0.0

    def versions(self) -> list[tuple[int, ...]]:
        """Return what differs once a file has changed; rsync and tar keep mtime, but not ctime."""
        versions: list[tuple[int, ...]] = []
        for path in (self.cert, self.key):
            with contextlib.suppress(OSError):
                status = os.stat(path)  # through symlinks, as certbot lays them
                versions.append((status.st_ino, status.st_size,
                                 status.st_ctime_ns, status.st_mtime_ns))
        return versions

    def reload_if_changed(self) -> None:
        """Swap a new context in once the files have changed and load; else keep the old one."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_SECONDS
        versions = self.versions()
        if versions != self.seen:
            self.seen = versions
            try:
                self.context = load_context(self.cert, self.key)
                tell(f"the new certificate {self.cert} is in use")
            except SettingsError as error:
                tell(f"error: {error}; "
                     "the old certificate stays in use until the files change again")


def load_certificate(settings: Settings) -> Certificate | None:
    """Return the certificate, None where a proxy has it; raise SettingsError."""
    return None if settings.behind_proxy else Certificate(settings.tls_cert, settings.tls_key)


class Signals:
    """What the operating system asks for: a stop, or that the settings are read again.

    It is obeyed from before the port opens. A signal can be delivered to another thread while the
    main one sleeps: so each also writes a byte into the wake-up pipe, which the accepting loop
    selects on. The byte only wakes: a storm fills the pipe, and bytes are lost.
    """

    def __init__(self) -> None:
        self.stop_asked = False
        self.hangup = False
        self.reader, self._writer = socket.socketpair()
        for end in (self.reader, self._writer):
            end.setblocking(False)
        self._before: dict[int, Any] = {}  # handlers
        self._wakeup_before = -1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._wakeup_before = signal.set_wakeup_fd(
                self._writer.fileno(), warn_on_full_buffer=False)
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A program ignores them from here on: they would change its exit code. An importer
            # gets its own handlers back.
            after = signal.SIG_IGN if __name__ == "__main__" else handler
            signal.signal(number, after or signal.SIG_DFL)  # None: Python had not set it
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        self.reader.close()
        self._writer.close()

    def _note(self, number: int, _frame: object) -> None:
        """Note a signal; SIGUSR1 and SIGUSR2, which rotation scripts send, change nothing."""
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stop_asked = True
        elif number == getattr(signal, "SIGHUP", None):
            self.hangup = True

    def ask_to_stop(self) -> None:
        """Ask for a stop, from any thread."""
        self.stop_asked = True
        with contextlib.suppress(OSError):  # a full pipe wakes, too
            self._writer.send(b"\0")

    def drain(self) -> None:
        """Empty the wake-up pipe, so that it can wake again."""
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(READ_SIZE)


class Receiver(socketserver.BaseServer):
    """Accepts connections, finds a place for each, and serves them in a bounded pool of threads.

    How a place is found: when all are taken, the connection that has waited longest for its request
    is evicted: the accepting thread cuts it, and its own thread leaves. So slow peers only cost
    slow peers their place. One that has delivered a verified event goes last, one whose event is
    being stored never.

    `changed` guards `connections`, `viewers`, and the choice of whom to evict (see `Connection`).
    It is notified when a connection has left. `_counting` guards changes of `counts`. Only the
    accepting thread has `threads`, `evictions_told` and `next_complaint`, and it alone replaces
    `settings`, `certificate` and `guesses` (`adopt`); a request reads its settings once.
    """

    def __init__(self, settings: Settings, journal: Journal, listeners: Sequence[socket.socket],
                 certificate: Certificate | None, signals: Signals, *,
                 inherited: bool = False) -> None:
        super().__init__(listeners[0].getsockname(), Handler)
        self.settings = settings
        self.certificate = certificate
        self.journal = journal
        self.listeners = listeners
        self.inherited = inherited  # they are systemd's
        self.signals = signals
        self.on_hangup: Callable[[], None] = lambda: None

        self.changed = threading.Condition()
        self.connections: set[Connection] = set()
        self.viewers: set[Connection] = set()
        self.waiting: queue.SimpleQueue[Connection] = queue.SimpleQueue()  # for a thread
        self.threads = 0
        self.large_body_lock = threading.Lock()
        self.guesses = Guesses()

        self._counting = threading.Lock()
        self.counts = dict.fromkeys(("recorded", "duplicate", "refused", "evicted"), 0)
        self.evictions_told = 0
        self.next_complaint: dict[str, float] = {}  # monotonic time

        self.selector = selectors.DefaultSelector()
        for listener in listeners:
            listener.setblocking(False)
            # Inherited by what it accepts. With Nagle, a 100 would hold an answer back for 40 ms.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(listener, selectors.EVENT_READ, listener)
        self.selector.register(signals.reader, selectors.EVENT_READ)
        journal.on_fatal = self.shutdown
        if journal.fatal:  # it failed before there was anybody to tell
            self.shutdown()

    @property
    def stopping(self) -> bool:
        return self.signals.stop_asked

    def adopt(self, settings: Settings, certificate: Certificate | None) -> None:
        """Use these settings for new requests, this certificate for new connections."""
        if settings.view_password != self.settings.view_password:
            self.guesses = Guesses()
        self.settings = settings
        self.certificate = certificate

    def report(self, outcome: str, message: str) -> None:
        """Count an outcome, and tell the operator of it."""
        self.count(outcome)
        REPORTER.tell(message, outcome)

    def count(self, outcome: str) -> None:
        with self._counting:
            self.counts[outcome] += 1

    def shutdown(self) -> None:
        """Ask for a stop, from any thread. Unlike the base class's, it does not wait for it."""
        self.signals.ask_to_stop()

    # the accepting thread

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept until a stop is asked for; see what is due every `poll_interval` seconds."""
        while not self.stopping:
            for key, _ in self.selector.select(poll_interval):
                if key.data:
                    self.accept(key.data)
                else:
                    self.signals.drain()
            self.service_actions()

    def service_actions(self) -> None:
        if self.signals.hangup:
            self.signals.hangup = False
            self.on_hangup()
        if not self.waiting.empty():
            self.add_threads()
        self.tell_evictions()
        if self.certificate:
            self.certificate.reload_if_changed()

    def accept(self, listener: socket.socket) -> bool:
        """Accept one connection, and have it served; return whether there was one.

        Only TCP is accepted here: a listener wrapped by `ssl` would wait for each peer's handshake.
        """
        try:
            accepted, address = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in PEERS_ERRORS:
                return True
            self.accept_failed(error)
            return False

        connection = self.admit(accepted, address)
        if connection:
            self.waiting.put(connection)
            if not self.add_threads():
                self.evict_and_wait(connection)
        return True

    def admit(self, accepted: socket.socket, address: Any) -> Connection | None:
        """Return an accepted connection with a place; or close it, and return None."""
        try:
            accepted.getpeername()  # raises for a peer that has reset it: those take no place
        except OSError:
            accepted.close()
            return None

        accepted.setblocking(True)  # on macOS it came as its listener is
        connection = Connection(accepted, address, idle_seconds(self.settings, proven=False))
        with self.changed:
            while len(self.connections) >= self.settings.max_connections:
                self.evict()
                has_left = self.changed.wait(LEAVE_SECONDS)
                if self.stopping and not has_left:  # all are storing, and the time is over
                    accepted.close()
                    return None
            self.connections.add(connection)
        return connection

    def accept_failed(self, error: OSError) -> None:
        """Tell why no connection can be accepted; evict one where that helps, else wait a while."""
        is_shortage = error.errno in SHORTAGES
        advice = "does a firewall or a security module of this machine forbid it?"
        if is_shortage:
            advice = ("raise the open-file limit (LimitNOFILE=, ulimit -n), "
                      "or lower --max-connections")
        if self.is_due("accept"):
            tell(f"cannot accept: {_reason(error)}; {advice}")
        if is_shortage:
            self.evict_and_wait()
        else:
            time.sleep(ACCEPT_PAUSE)  # the connection stays in the queue, and select would return

    def evict_and_wait(self, newcomer: Connection | None = None) -> None:
        """Evict a connection, but not the newcomer, to free its descriptor and its thread."""
        with self.changed:
            self.evict(newcomer)
            self.changed.wait(LEAVE_SECONDS)

    def evict(self, newcomer: Connection | None = None) -> None:
        """Cut the connection that has waited longest for its request, if there is one.

        Those that have delivered a verified event go last. Never cut are viewers, and one whose
        event is being stored. The caller holds `changed`, and calls this anew after each wait.
        """
        candidates = [each for each in self.connections
                      if each is not newcomer and not each.storing and each.interruption is None]
        if candidates:
            longest = min(candidates, key=lambda each: (each.proven, each.since))
            longest.interrupt(Evicted)
            self.count("evicted")

    def protect(self, connection: Connection) -> None:
        """Keep the place of a connection while its event is stored; raise Evicted if it is lost."""
        with self.changed:
            if connection.interruption is Evicted:
                raise Evicted
            connection.storing = connection.proven = True

    def seat_viewer(self, connection: Connection) -> None:
        """Give a connection a viewer's place instead of a sender's, to its end; raise Rejected."""
        with self.changed:
            if connection.interruption is Evicted:
                raise Evicted
            if len(self.viewers) >= VIEWERS:
                detail = f"there are {VIEWERS} viewers, and no more places"
                raise Rejected(503, detail, ("Retry-After", "10"))
            self.connections.discard(connection)
            self.viewers.add(connection)
            self.changed.notify_all()

    def turn_of(self, body: bytes) -> contextlib.AbstractContextManager[object]:
        """Return the context in which a body is parsed and formatted: of large ones, one at a time.

        Eight at once, of the most expensive kind, delayed all others by 3.5 s; 128 took 757 MiB.
        """
        return self.large_body_lock if len(body) > LARGE_BODY else contextlib.nullcontext()

    def tell_evictions(self) -> None:
        """Tell how many connections were evicted since that was told last."""
        untold = self.counts["evicted"] - self.evictions_told
        if untold and self.is_due("evictions"):
            self.evictions_told += untold
            limit = self.settings.max_connections
            tell(f"evicted {untold} connections, the longest waiting, to make room for others; "
                 f"if your senders need more than {limit} at once, raise --max-connections")

    def is_due(self, complaint: str) -> bool:
        """Return whether this may be told now: each complaint once in COMPLAINT_SECONDS."""
        now = time.monotonic()
        if now < self.next_complaint.get(complaint, 0.0):
            return False
        self.next_complaint[complaint] = now + COMPLAINT_SECONDS
        return True

    def add_threads(self) -> bool:
        """Start threads until each connection and viewer has one; return whether each has."""
        with self.changed:
            wanted = len(self.connections) + len(self.viewers)
        try:
            while self.threads < wanted:
                threading.Thread(target=self.work, name="connection", daemon=True).start()
                self.threads += 1
        except RuntimeError as error:
            if self.is_due("threads"):
                tell(f"cannot start a thread: {error}; raise the limit of threads "
                     "(TasksMax=, ulimit -u), or lower --max-connections")
            return False
        return True

    # a connection's thread

    def work(self) -> None:
        """Serve one connection after another: the life of a thread, which no stop waits for."""
        while True:
            self.serve_connection(self.waiting.get())

    def serve_connection(self, connection: Connection) -> None:
        """Serve one connection to its end."""
        try:
            certificate = self.certificate
            if certificate is None or self.secure(connection, certificate.context):
                # The base class makes the handler; a Connection stands for its socket.
                self.finish_request(connection, connection.peer)  # type: ignore[arg-type]
        except ConnectionEnded:
            pass
        except Exception as fault:
            tell(f"{connection.peer} {describe_fault(fault)}")
        finally:
            with self.changed:
                self.connections.discard(connection)
                self.viewers.discard(connection)
                connection.socket.close()  # in here: `interrupt` could meet its number's next owner
                self.changed.notify_all()

    def secure(self, connection: Connection, context: ssl.SSLContext) -> bool:
        """Return whether TLS is spoken with the peer; tell why not. Raise ConnectionEnded."""
        try:
            spoken = connection.handshake(context)
        except ssl.SSLError as error:
            reason = error.reason or "it is not TLS"
            if re.search("CERT|_CA", reason):
                reason += ("; it does not trust the certificate: "
                           "is it current, and --cert the full chain?")
            self.report("refused", f"{connection.peer} refused TLS handshake failed: {reason}")
            return False
        if spoken is None:
            return True
        self.refuse_plain(connection, spoken)
        return False

    def refuse_plain(self, connection: Connection, spoken: str) -> None:
        """Answer a peer that does not speak TLS in plain text, and tell what it speaks."""
        text = b"This port speaks https: use https:// in the URL.\n"
        head = format_head(400, len(text), "text/plain; charset=utf-8", [("Connection", "close")])
        advice = "the URL has to begin with https://"
        if spoken == PROXY_PROTOCOL:
            advice = NO_PROXY_PROTOCOL
        self.report("refused", f"{connection.peer} refused 400 {spoken} on the TLS port: {advice}")
        connection.send(head + text, self.settings.request_timeout)
        connection.end(unread=True)

    # the end

    def stop(self) -> None:
        """Answer what has been sent whole, then end all connections.

        1. Accept who waits in the queue. 2. Let senders finish for STOP_GRACE; then read what has
        arrived, and answer it, until STOP_SECONDS. 3. Close the journal, which takes CLOSE_SECONDS
        at most; what is not stored by then is answered 503. Cut who is left.
        """
        grace_deadline = time.monotonic() + STOP_GRACE
        deadline = time.monotonic() + STOP_SECONDS
        self.take_backlog(grace_deadline)
        self.wait_for_answers(grace_deadline, deadline)
        self.cut_the_rest()
        self.selector.close()

    def take_backlog(self, deadline: float) -> None:
        """Accept who waits in the queue; what waits with systemd is for our successor."""
        for listener in self.listeners:
            has_more = not self.inherited
            while has_more and time.monotonic() < deadline:
                has_more = self.accept(listener)
            listener.close()

    def wait_for_answers(self, grace_deadline: float, deadline: float) -> None:
        """Let senders finish until `grace_deadline`, and answer what they sent until `deadline`."""
        with self.changed:
            self.changed.wait_for(self.has_none, grace_deadline - time.monotonic())
            for connection in self.connections:
                if connection.interruption is None:
                    connection.interrupt(Stopped)
            for viewer in self.viewers:  # those that are left do not take what was sent
                viewer.interrupt(Evicted)
            self.changed.wait_for(self.has_none, deadline - time.monotonic())

    def cut_the_rest(self) -> None:
        """End the connections that wait for the disk, then those that do not take their answer."""
        self.journal.close()  # no append waits any longer
        with self.changed:
            self.changed.wait_for(self.has_none, CUT_SECONDS)
            for connection in self.connections:
                connection.interrupt(Evicted)
            self.changed.wait_for(self.has_none, CUT_SECONDS)

    def has_none(self) -> bool:
        return not (self.connections or self.viewers)


def _addresses(host: str, port: int) -> dict[tuple[Any, ...], int]:
    """Return the addresses that `host` stands for, each with its family; raise SettingsError.

    An empty one, * and :: (however it is spelt) are all addresses of both families. It may have
    the brackets that it has in a URL.
    """
    both: dict[tuple[Any, ...], int] = {
        ("::", port): socket.AF_INET6,
        ("0.0.0.0", port): socket.AF_INET,
    }

    host = host.removeprefix("[").removesuffix("]")
    if host in ("", "*", "::"):
        return both

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--host {host}: {_reason(error)}; it has to be an address or a name "
                            "of this machine; a port is for --port") from None

    addresses: dict[tuple[Any, ...], int] = {
        address: family for family, _, _, _, address in found
    }
    return both if any(address[0] == "::" for address in addresses) else addresses


def _listen_advice(number: int | None, port: int) -> str:
    """Return what helps against an error number of bind(2) or listen(2)."""
    if number in (errno.EACCES, errno.EPERM):
        return ("ports below 1024 need a privilege: let systemd open it (the socket unit of the "
                "README), add CAP_NET_BIND_SERVICE, or choose another --port")
    if number == errno.EADDRINUSE:
        return f"stop what listens there (ss -ltnp sport = :{port}), or choose another --port"
    if number == errno.EINVAL:
        return ("an address like fe80::1 needs its zone (fe80::1%eth0); "
                "one like ::ffff:192.0.2.1 is written 192.0.2.1")
    return "this machine has no such address; --host names those to listen on"


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets on all addresses of `host`; raise SettingsError where there is none.

    A family, or an address, that cannot be had beside others is warned about.
    """
    listeners: list[socket.socket] = []
    failures: list[str] = []
    for (name, _, *scope), family in _addresses(host, port).items():
        if listeners:  # of port 0 the kernel has chosen one, for all addresses
            port = listeners[0].getsockname()[1]
        address = (name, port, *scope)
        try:
            listener = socket.create_server(address, family=family, backlog=ACCEPT_QUEUE)
            listeners.append(listener)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            failures.append(f"cannot listen on {host_port(address)}: {reason}; "
                            + _listen_advice(error.errno, port))

    if not listeners:
        raise SettingsError(failures[-1])
    for failure in failures:
        tell(f"warning: {failure}")
    return listeners


def take_listeners() -> list[socket.socket]:
    """Return the listening sockets that systemd handed over (sd_listen_fds(3)), if any.

    Raise SettingsError. Sockets that are meant for another process are warned about.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    if not count:
        return []
    if pid != str(os.getpid()):
        tell(f"warning: LISTEN_FDS={count} is for process {pid or '(no LISTEN_PID)'}, and this is "
             f"{os.getpid()}: its sockets are left alone, and senders wait there for nobody; "
             "let a wrapper start this program by exec")
        return []

    listeners = []
    try:
        if not re.fullmatch(r"[1-9][0-9]{0,2}", count):
            raise ValueError("it is not a count of sockets")
        for number in range(3, 3 + int(count)):
            listeners.append(socket.socket(fileno=number))
            is_tcp = listeners[-1].family in (socket.AF_INET, socket.AF_INET6)
            if not is_tcp or not listeners[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ValueError(f"descriptor {number} is not a listening TCP socket")
            os.set_inheritable(number, False)
    except (OSError, ValueError) as error:
        raise SettingsError(f"LISTEN_FDS={count}: {_reason(error)}; "
                            "check the socket unit") from None
    return listeners


def listening_urls(listeners: Sequence[socket.socket], settings: Settings) -> str:
    """Return the URLs that are served, one for each address; 0.0.0.0 for [::] of both families."""
    scheme = "http" if settings.behind_proxy else "https"
    addresses = []
    for listener in listeners:
        address = listener.getsockname()
        addresses.append(address)
        is_all = listener.family == socket.AF_INET6 and address[0] == "::"
        if is_all and not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            addresses.append(("0.0.0.0", address[1]))
    return ", ".join(f"{scheme}://{host_port(address)}{settings.path}" for address in addresses)


def notify(state: str) -> None:
    """Tell systemd how we are (sd_notify(3)), where it asked for that."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
    except OSError as error:
        first = state.partition("\n")[0]
        tell(f"warning: NOTIFY_SOCKET {path}: {_reason(error)}; systemd was not told {first}")


# --- HTTP clients: what the sender and fetch share ---


def split_url(url: str) -> urllib.parse.SplitResult:
    """Return the parts of an http or https URL; raise SettingsError."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_http = parts.scheme in ("https", "http") and re.fullmatch("[!-~]+", url)
        if not is_http or not parts.hostname or parts.port == 0:
            raise ValueError(url)
    except ValueError:  # an odd port or address, too
        raise SettingsError(f"{url} is not a URL like https://host:8443/") from None
    return parts


def client_context(ca: str | None, insecure: bool) -> ssl.SSLContext:
    """Return the TLS context of a client; raise SettingsError.

    It trusts the certificates in the file `ca` (None: the system's), or, `insecure`, any.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:  # an SSLError too
        reason = error.strerror or "there is no PEM certificate in it"
        raise SettingsError(f"--ca {ca}: {reason}") from None

    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def make_connection(
    parts: urllib.parse.SplitResult, context: ssl.SSLContext
) -> http.client.HTTPConnection:
    """Return a connection to the host of a URL, which connects at its first request."""
    host = parts.hostname or ""
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, parts.port, timeout=SEND_SECONDS, context=context)
    return http.client.HTTPConnection(host, parts.port, timeout=SEND_SECONDS)


def describe_distrust(error: ssl.SSLCertVerificationError) -> str:
    """Return why a certificate was refused, and what to do about that."""
    advice = ("does the server send its full chain? "
              "Name an authority of your own by --ca FILE, or use --insecure")
    if error.verify_code in X509_WRONG_HOST:
        advice = "use a name that it was issued for, or --insecure"
    elif error.verify_code in (X509_NOT_YET_VALID, X509_EXPIRED):
        advice = "look at this machine's clock; if that is right, a new certificate is needed"
    return f"its certificate is not trusted here ({error.verify_message}); {advice}"


def describe_no_answer(error: Exception) -> str:
    """Return why there was no answer, in words for an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return describe_distrust(error)
    reason = _reason(error) or type(error).__name__
    if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
        return "what answers there does not speak HTTPS; is it https in the URL, or http?"
    if isinstance(error, socket.gaierror):
        return f"{reason}; is the name in the URL right?"
    if isinstance(error, (TimeoutError, socket.timeout)):
        return f"{reason}; does a firewall keep the port closed?"
    return reason


# --- The sender: what Skype Interviews does, for trying things out ---


def sample_event(stage: str, interview: str, now: float) -> bytes:
    """Return an event like the documented one, of another stage, interview and time.

    `now` is in Unix seconds.
    """
    when = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")
    metadata = STAGES.get(stage, "")
    if stage == "SchedulingTime":
        metadata = "2000 - Pending interviewer time selection"
    event = {
        "previousStage": {"value": "InterviewCreated", "metadata": "1 - Interview was created"},
        "currentStage": {"value": stage, "metadata": metadata},
        "event": "State", "timestamp": f"{when}0Z", "interviewCode": interview}
    return json.dumps(event).encode()


class Sender:
    """Delivers events to one URL over one kept connection."""

    def __init__(self, url: str, credential: Credential, context: ssl.SSLContext) -> None:
        parts = split_url(url)
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.credential = credential
        self.connection = make_connection(parts, context)

    def close(self) -> None:
        self.connection.close()

    def deliver(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the answer's status and JSON object.

        Raise OSError or http.client.HTTPException where there is none.
        """
        self.connection.request("POST", self.target, body, headers={
            "Authorization": f"Bearer {sign(body, self.credential, time.time())}",
            "Content-Type": "application/json; charset=utf-8"})
        answer = self.connection.getresponse()
        content = answer.read()
        try:
            return answer.status, _decode_object(content, _JSON)
        except ValueError:
            return answer.status, {"detail": content.decode("utf-8", "replace")[:200]}


class Tally:
    """What became of many deliveries."""

    def __init__(self) -> None:
        self.taken: list[float] = []  # milliseconds that each took
        self.refused = 0
        self.last: dict[str, Any] = {}  # the answer to the last one that was taken
        self.last_failure = ""  # the reason of the last one that was not taken
        self._lock = threading.Lock()  # guards the count of the refused

    def add(self, status: int, answer: dict[str, Any], milliseconds: float) -> None:
        if status == 200:
            self.taken.append(milliseconds)
            self.last = answer
        else:
            phrase = _PHRASES.get(status, "")
            self.fail(f"refused: {status} {phrase}: {answer.get('detail', '')}".rstrip())

    def fail(self, reason: str) -> None:
        with self._lock:
            self.refused += 1
            self.last_failure = reason

    def describe(self, seconds: float, busy: float) -> str:
        """Return rate and latency, over `seconds` in which this process took `busy` s of CPU time.

        Its threads share the interpreter lock: they are at their limit before one processor is.
        """
        text = f"{len(self.taken)} delivered, {self.refused} refused in {seconds:.2f} s"
        if not self.taken:
            return text
        times = sorted(self.taken)
        p50 = times[len(times) // 2]
        p99 = times[len(times) * 99 // 100]
        text += f": {len(times) / seconds:.0f}/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        if busy > 0.6 * seconds:
            text += "; the sender itself was the limit, the receiver can take more"
        return text


def deliver_turns(
    sender: Sender, turns: Iterator[int], body: Callable[[], bytes], tally: Tally
) -> None:
    """Deliver over one connection until the `turns`, which other threads take too, are used up."""
    with contextlib.closing(sender):
        for _ in turns:
            begun = time.perf_counter()
            try:
                status, answer = sender.deliver(body())
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = describe_no_answer(error)
                if isinstance(error, ConnectionRefusedError):
                    reason += "; is the receiver running there?"
                tally.fail(f"not delivered: {reason}")
                return
            tally.add(status, answer, (time.perf_counter() - begun) * 1000)


def deliver_concurrently(
    senders: Sequence[Sender], count: int, body: Callable[[], bytes]
) -> Tally:
    """Deliver `count` events, each sender in a thread of its own; on a terminal, show progress."""
    tally = Tally()
    turns = iter(range(count))
    threads = []
    for sender in senders:
        work = (sender, turns, body, tally)
        threads.append(threading.Thread(target=deliver_turns, args=work, daemon=True))
        threads[-1].start()

    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)
                if count > 1 and sys.stderr.isatty():
                    sys.stderr.write(f"\r{len(tally.taken)} of {count} delivered \r")
    except KeyboardInterrupt:
        tally.fail("interrupted")
    return tally


# --- Fetch: an interview's data, from the service ---

FETCH_BASE = "https://interviews.skype.com/api/interviews"
# Seconds or an HTTP-date (RFC 9110 section 10.2.3): other text could hold our token.
_RETRY_AFTER = re.compile(r"[0-9]{1,9}|[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9: ]{13} GMT")


def time_left(deadline: float) -> float:
    """Return the seconds until `deadline` (monotonic); raise TimeoutError where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def connect_by(
    deadline: float, parts: urllib.parse.SplitResult, context: ssl.SSLContext
) -> socket.socket:
    """Return a socket that is connected to the host of a URL; raise OSError.

    Each address of the host has its share of the time: a silent one leaves the others theirs.
    """
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(place[0]) for *_, place in found]
    while True:
        seconds = time_left(deadline) / len(addresses)
        try:
            sock = socket.create_connection((addresses.pop(0), port), seconds)
            break
        except OSError:
            if not addresses:
                raise

    if parts.scheme == "http":
        return sock
    with sock:  # the TLS socket is another object
        sock.settimeout(time_left(deadline))
        return context.wrap_socket(sock, server_hostname=parts.hostname)


class TimedReader(io.RawIOBase):
    """What a peer sends until a deadline: the time left is the timeout of each read.

    So a peer that drips bytes is not waited for any longer than one that sends none. More than
    `limit` bytes are not read, whatever they are said to be: `http.client` takes a chunk of size -1
    for all that follows.
    """

    def __init__(self, sock: socket.socket, deadline: float, limit: int) -> None:
        super().__init__()
        self.sock = sock
        self.deadline = deadline
        self.left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(time_left(self.deadline))
        received = self.sock.recv_into(buffer)
        self.left -= received
        if self.left < 0:
            raise ValueError("its answer is longer than it may be")
        return received


class TimedAnswer(http.client.HTTPResponse):
    """The answer to a GET, read until a deadline; its framing may be as long as its content."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__(sock, method="GET")
        self.fp = io.BufferedReader(TimedReader(sock, deadline, 2 * FETCH_BYTES))
        self.begin()

    def read_whole(self) -> bytes:
        """Return the content.

        Raise ValueError if it has more than FETCH_BYTES, IncompleteRead if it was cut off.
        """
        content = bytearray()
        while part := self.read(65_536):
            content += part
            if len(content) > FETCH_BYTES:
                raise ValueError(f"its answer is longer than {FETCH_BYTES} bytes")
        if self.length:  # what is missing of the announced length
            raise http.client.IncompleteRead(b"", self.length)
        return bytes(content)


def describe_refusal(answer: http.client.HTTPResponse) -> str:
    """Return status and reason of an answer that is not 200.

    Nothing of its text, which could hold our token.
    """
    status = answer.status
    text = f"{status} {_PHRASES.get(status, '')}".rstrip()
    retry_after = answer.getheader("Retry-After", "")
    if _RETRY_AFTER.fullmatch(retry_after):
        text += f", Retry-After: {retry_after}"

    if 300 <= status < 400:
        return f"{text} (a redirect, which is not followed; is --url right?)"
    if status == 401:
        return f"{text} (are key and secret right, and this machine's clock?)"
    if status == 404:
        return f"{text} (is the code right? New data can be 30 s late)"
    return text


def fetch_interview(
    code: str, base: urllib.parse.SplitResult, credential: Credential, context: ssl.SSLContext
) -> bytes:
    """Return the service's data of one interview, JSON on one line.

    Nothing is re-serialised: line breaks, which JSON only has between tokens, become spaces.
    Raise ValueError for an answer without data, OSError or http.client.HTTPException for none.
    """
    if code in ("", ".", ".."):
        raise ValueError("that is no interview code")
    quoted = urllib.parse.quote(code.encode("utf-8", "surrogateescape"), safe="")
    deadline = time.monotonic() + FETCH_SECONDS

    with contextlib.closing(make_connection(base, context)) as connection:
        connection.sock = connect_by(deadline, base, context)
        connection.sock.settimeout(time_left(deadline))
        connection.request("GET", f"{base.path.rstrip('/')}/{quoted}", headers={
            "Authorization": f"Bearer {sign(None, credential, time.time())}",
            "Content-Type": "application/json", "Connection": "close"})
        answer = TimedAnswer(connection.sock, deadline)
        if answer.status != 200:
            raise ValueError(describe_refusal(answer))
        content = answer.read_whole()

    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        _decode_json(content, _JSON)
    except ValueError as error:
        raise ValueError(f"200, but its content {error}") from None
    return content.translate(_LINE_BREAKS).strip()


def describe_failure(error: Exception) -> str:
    """Return why an interview's data could not be had; nothing of what the peer sent."""
    if isinstance(error, (TimeoutError, socket.timeout)):
        return f"no whole answer within {FETCH_SECONDS:.0f} s"
    if isinstance(error, http.client.HTTPException):
        return f"no whole HTTP answer ({type(error).__name__})"
    return describe_no_answer(error)


def read_codes(words: Sequence[str]) -> Iterator[str]:
    """Yield interview codes; for the word "-" those on stdin, a line each, as they come."""
    for word in words:
        if word != "-":
            yield word
            continue
        with open(0, "rb", closefd=False) as stdin:
            for line in stdin:
                yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


# --- The timeline: the log in, each interview's course out ---

# Select Graphic Rendition, ECMA-48
_RED = "31"
_GREEN = "32"
_YELLOW = "33"
_CYAN = "36"
_GREY = "90"
# By how a stage's name ends.
_COLOURS = {"Failed": _RED, "Canceled": _GREY, "Archived": _GREY, "Completed": _GREEN}

StagePair = tuple[str, str]  # the names of previousStage and currentStage, "" where there is none


class Row(NamedTuple):
    """An event in a log. Rows sort into courses by themselves; a million take 330 MiB."""

    interview: str
    time: int       # in ticks since 1970
    recorded: int   # when it arrived, likewise
    id_hash: int    # of its id
    stages: StagePair


@dataclasses.dataclass
class Step:
    """One event in an interview's course."""

    time: int                      # in ticks since 1970
    recorded: int                  # when it arrived, likewise
    previous: str                  # its previousStage, "" where it has none
    stage: str                     # its currentStage, likewise
    seconds: float | None = None   # until the next one
    gap: bool = False              # its previousStage is not the stage before it
    late: bool = False             # it arrived after an event of a later time


def is_packed(path: str, file: io.BufferedReader) -> bool:
    """Return whether an open log is compressed by gzip, by its name or by how it begins."""
    return path.endswith(".gz") or file.peek(2).startswith(_GZIP_START)


def check_log(path: str, may_be_missing: bool) -> bool:
    """Return whether the log at `path` may grow; raise SettingsError if it cannot be read."""
    try:
        kind = file_kind(os.stat(path).st_mode)
        if kind != "a file":
            raise SettingsError(f"{path} is {kind}; name a log, a .gz file, or - for stdin")

        with open(path, "rb") as file:
            return not is_packed(path, file)
    except FileNotFoundError:
        if not may_be_missing:
            advice = "there is no such file; name a log, or set SKYPE_LOG"
            raise SettingsError(f"{path}: {advice}") from None
        return True
    except PermissionError as error:
        advice = "run this as the user that the receiver runs as"
        raise SettingsError(f"{path}: {_reason(error)}; {advice}") from None
    except OSError as error:
        raise SettingsError(f"{path}: {_reason(error)}") from None


def check_logs(paths: Sequence[str], follow: bool) -> list[str]:
    """Return the logs that can be followed; raise SettingsError for what is no log."""
    followed = []
    for path in paths:
        if path == "-":
            continue
        grows = check_log(path, may_be_missing=follow and not path.endswith(".gz"))
        if follow and grows:
            followed.append(path)
    return followed


@contextlib.contextmanager
def open_to_read(path: str) -> Iterator[BinaryIO]:
    """Open a log to read it once: `-` is stdin, and gzip is decompressed. Raise OSError."""
    with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
        if is_packed(path, file):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield io.BufferedReader(unpacked)
        else:
            yield file


@lru_cache(maxsize=1024)  # the same few pairs stand in every line: each is kept in memory once
def _stage_pair(previous: str, stage: str) -> StagePair:
    return previous, stage


def parse_row(line: bytes) -> Row:
    """Return the event in one line of a log; raise ValueError if there is none."""
    event = _decode_object(line, _JSON, DEPTH_LIMIT + 1)  # the envelope is a container, too
    code = event.get("subject", "-")
    recorded: Any = event.get("recordedtime")
    sent: Any = event.get("time", recorded)
    for value in (event.get("id"), code, recorded, sent):
        if not isinstance(value, str):
            raise ValueError("id, subject, recordedtime and time are text")

    id_hash = hash(event["id"]) & (2**60 - 1)  # a longer number would take more memory
    data = event.get("data")
    stages = _stage_pair(_stage_name(data, "previousStage") or "",
                         _stage_name(data, "currentStage") or "")
    return Row(code, parse_time(sent), parse_time(recorded), id_hash, stages)


def parse_rows(lines: Iterable[bytes], only: str | None, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the events in lines of a log, those of the interview `only` if one is given.

    Blank and foreign lines are skipped, and counted.
    """
    for line in lines:
        try:
            row = parse_row(line)
        except ValueError:
            skipped["foreign" if line.strip() else "blank"] += 1
            continue
        if only is None or row.interview == only:
            yield row


def make_steps(rows: Iterable[Row]) -> list[Step]:
    """Return an interview's course. Its rows are sorted, and may hold an event more than once."""
    once: dict[int, Row] = {}
    for row in rows:
        once.setdefault(row.id_hash, row)  # of an event in several logs, its first arrival

    steps = []
    before = ""
    for row in once.values():
        previous, stage = row.stages
        has_gap = before != "" and stage != "" and previous != before
        steps.append(Step(row.time, row.recorded, previous, stage, gap=has_gap))
        before = stage or before

    for step, following in zip(steps, steps[1:]):
        step.seconds = (following.time - step.time) / TICKS

    soonest: float = math.inf  # the first arrival among the later events
    for step in reversed(steps):
        step.late = step.recorded > soonest
        soonest = min(soonest, step.recorded)
    return steps


def _clock(ticks: int, zone: timezone | None) -> str | None:
    """Return a time in a zone (None: the reader's), to the second.

    Return None where the platform's calendar does not hold it.
    """
    try:
        return datetime.fromtimestamp(ticks // TICKS, zone).isoformat()[:19]
    except (ValueError, OverflowError, OSError):
        return None


def _duration(seconds: float) -> str:
    """Return a length of time by its largest unit and the next one."""
    for size, unit, part, its_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            rest = int(seconds % size // part)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {its_unit}" if rest else "")
    return f"{int(seconds)} s" if seconds >= 1 else "under 1 s"


def as_json(code: str, steps: Sequence[Step]) -> str:
    """Return an interview as one JSON object: its present stage, and its events in order."""
    events = []
    present = None
    for step in steps:
        event: dict[str, object] = {}
        second = _clock(step.time, timezone.utc)
        if second:
            event["time"] = f"{second}.{step.time % TICKS:07d}Z"

        if step.stage:
            event["stage"] = present = step.stage
        if step.previous:
            event["previous"] = step.previous
        if step.seconds is not None:
            event["seconds"] = step.seconds
        if step.gap:
            event["gap"] = True
        if step.late:
            event["late"] = True

        events.append(event)
    return json.dumps({"interview": code, "stage": present, "events": events})


def as_text(code: str, steps: Sequence[Step], width: int | None, colours: bool) -> str:
    """Return an interview as lines, with a blank one at the end; `width` in columns cuts them."""
    lines = [printable(code)[:width]]
    for step in steps:
        when = (_clock(step.time, None) or "-").replace("T", " ")
        stage = printable(step.stage or "-")
        line = f"  {when:<19}  {stage:<19}  "
        line += "now" if step.seconds is None else f"for {_duration(step.seconds)}"
        if step.gap:
            line += f"  gap: came from {printable(step.previous or 'no stage')}"
        if step.late:
            line += "  late: arrived after a later one"
        lines.append(_coloured(line[:width], step) if colours else line[:width])
    return "\n".join([*lines, ""])


def _coloured(line: str, step: Step) -> str:
    """Return a line in the colour of its stage, or of what is odd about it."""
    colour = _CYAN
    for end, its_colour in _COLOURS.items():
        if step.stage.endswith(end):
            colour = its_colour
    if step.gap or step.late:
        colour = _YELLOW
    return f"\x1b[{colour}m{line}\x1b[0m"


def show_courses(rows: list[Row], as_objects: bool) -> None:
    """Print each interview's course, the one with the latest event at the end. It sorts `rows`."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    rows.sort()
    latest = {row.interview: row.time for row in rows}  # the last row of each one stays
    rows.sort(key=lambda row: latest[row.interview])  # stable: an interview's rows stay together

    for code, its_rows in itertools.groupby(rows, key=lambda row: row.interview):
        steps = make_steps(its_rows)
        print(as_json(code, steps) if as_objects else as_text(code, steps, width, colours))
    sys.stdout.flush()


# --- The command line ---


def open_journal(path: str) -> Journal:
    """Return the journal of this log, and tell if it cannot be written yet; raise SettingsError."""
    try:
        journal = Journal(path, tell)
    except JournalError as error:
        raise SettingsError(f"--log {path}: {error}") from None
    try:
        journal.check()
    except JournalError as error:
        tell(f"error: {error}; deliveries are answered 503 until it can be written")
    return journal


def missing_promises() -> str:
    """Return what cannot be promised on this operating system, "" on a POSIX one."""
    wanted = (
        (fcntl, "no lock keeps a second receiver off this log: do not start one"),
        (os.name == "posix", "the log cannot be renamed while it is open"),
        (hasattr(os, "O_DIRECTORY"), "a power cut can take a log that was just begun with it"),
        (hasattr(signal, "SIGHUP"), "changed secrets are read at a restart only"),
    )
    return "; ".join(consequence for is_there, consequence in wanted if not is_there)


def run(receiver: Receiver) -> int:
    """Serve until a signal says stop; return the exit code."""
    settings = receiver.settings
    journal = receiver.journal
    urls = listening_urls(receiver.listeners, settings)
    tell(f"listening on {urls}, log {os.path.abspath(settings.log)}")
    missing = missing_promises()
    if missing:
        tell(f"warning: on this system {missing}")

    notify("READY=1")
    receiver.serve_forever(LOOK_SECONDS)
    notify("STOPPING=1")
    tell("stopping: answering what has been sent")
    receiver.stop()

    counts = [f"{count} {outcome}" for outcome, count in receiver.counts.items()]
    tell(f"stopped: {', '.join(counts)}")
    if journal.fatal:
        tell(f"error: {journal.fatal}: it cannot be known what is on the disk; start again")
    return 1 if journal.fatal else 0


def reload_settings(receiver: Receiver, options: argparse.Namespace) -> None:
    """Read env file and certificates again (SIGHUP); what is wrong changes nothing."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        new = load_settings(options)
        fixed = {name: getattr(receiver.settings, name) for name in FIXED}
        changed = [name for name, value in fixed.items() if getattr(new, name) != value]
        new = dataclasses.replace(new, **fixed)
        check_serving(new)
        receiver.adopt(new, load_certificate(new))

        message = "settings and certificate were read again"
        if changed:
            message += f"; a restart is needed for: {', '.join(changed)}"
        tell(message)
    except SettingsError as error:
        tell(f"error: {error}; the old settings stay in force")
    notify("READY=1")


def serve(options: argparse.Namespace) -> int:
    """Receive events until a signal says stop."""
    settings = load_settings(options)
    check_serving(settings)
    certificate = load_certificate(settings)
    with Signals() as signals, open_journal(settings.log) as journal:
        inherited = take_listeners()
        listeners = inherited or open_listeners(settings.listening_host, settings.port)
        receiver = Receiver(settings, journal, listeners, certificate, signals,
                            inherited=bool(inherited))
        receiver.on_hangup = lambda: reload_settings(receiver, options)
        return run(receiver)


def make_certificate(folder: str) -> tuple[str, str]:
    """Return the paths of a throw-away certificate for this machine and of its key.

    Raise SettingsError.
    """
    cert = os.path.join(folder, "cert.pem")
    key = os.path.join(folder, "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec",
               "-pkeyopt", "ec_paramgen_curve:prime256v1",
               "-nodes", "-days", "7", "-subj", "/CN=localhost",
               "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert]

    try:
        # In a session of its own: a Ctrl-C is for us, once the certificate is there.
        subprocess.run(command, check=True, capture_output=True, start_new_session=True)
    except FileNotFoundError:
        raise SettingsError("demo needs the openssl command to make a certificate, "
                            "and there is none; install openssl") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()[-200:]
        raise SettingsError(f"openssl could not make a certificate: {reason}") from None
    return cert, key


def show_delivery(url: str, credential: Credential, folder: str) -> None:
    """Deliver the documented event, show the line that it left, and say how to go on.

    Raise OSError, http.client.HTTPException, or ValueError where it was refused.
    """
    cert = os.path.join(folder, "cert.pem")
    log = os.path.join(folder, "events.jsonl")
    body = sample_event("SchedulingTime", "1c519c56-1712-1e89-1c3e-743ecbedd117", time.time())
    with contextlib.closing(Sender(url, credential, client_context(cert, False))) as sender:
        status, answer = sender.deliver(body)
    if status != 200:
        raise ValueError(f"the sample event was refused: {status} {answer.get('detail', '')}")

    line = pathlib.Path(log).read_text("utf-8")
    another = shlex.join(["python3", os.path.abspath(sys.argv[0]), "send", url,
                          "--env-file", os.path.join(folder, ".env"), "--ca", cert])
    print(f"delivered the documented sample event over HTTPS: {status} {answer.get('status')}\n"
          f"its line in {log}:\n\n{line}\n"
          f"1. deliver another:  {another}\n"
          f"2. watch the log:    {shlex.join(['tail', '-F', log])}\n"
          "3. end with Ctrl-C; then put your own key and secret into .env and run with "
          "--cert and --key (README.md)", flush=True)


def serve_demo(folder: str, port: int, signals: Signals) -> int:
    """Serve from a folder, and deliver the documented event to it; return the exit code."""
    cert, key = make_certificate(folder)
    credential = Credential(str(uuid.uuid4()), secrets.token_urlsafe(32).encode())
    settings = Settings(api_key=credential.api_key, api_secret=credential.api_secret.decode(),
                        view_password=secrets.token_urlsafe(16), tls_cert=cert, tls_key=key,
                        host="127.0.0.1", port=port, log=os.path.join(folder, "events.jsonl"))
    env_file = pathlib.Path(folder, ".env")
    env_file.touch(0o600)
    env_file.write_text(f"SKYPE_API_KEY={settings.api_key}\n"
                        f"SKYPE_API_SECRET={settings.api_secret}\n")

    with open_journal(settings.log) as journal:
        listeners = open_listeners(settings.host, settings.port)
        receiver = Receiver(settings, journal, listeners, load_certificate(settings), signals)
        receiver.on_hangup = signals.ask_to_stop  # its terminal was closed
        address = f"127.0.0.1:{listeners[0].getsockname()[1]}"
        failed = threading.Event()

        def deliver() -> None:
            try:
                show_delivery(f"https://{address}/", credential, folder)
            except (OSError, ValueError, http.client.HTTPException) as error:
                if not signals.stop_asked:  # by which it was cut off
                    tell(f"error: demo: {describe_no_answer(error)}")
                    failed.set()
                    signals.ask_to_stop()

        print(f"the live page, in a browser:  https://demo:{settings.view_password}@{address}/\n"
              "(it warns of the certificate, which nobody vouches for)\n", flush=True)
        delivery = threading.Thread(target=deliver)
        delivery.start()
        code = run(receiver)
        delivery.join()
        return 1 if failed.is_set() else code


def demo(options: argparse.Namespace) -> int:
    """Try everything on loopback, with a certificate and credentials that are thrown away."""
    with Signals() as signals:
        folder = tempfile.mkdtemp(prefix="skype_webhook_demo.")
        try:
            return serve_demo(folder, options.port, signals)
        finally:
            shutil.rmtree(folder)
            print(f"removed {folder}")


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does: without a handler, process 1 (a container's) gets none."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@sigterm_as_ctrl_c()
def send(options: argparse.Namespace) -> int:
    """Sign and deliver sample events, or one from a file; return 0 if all were taken."""
    credential = load_credential(options)
    context = client_context(options.ca, options.insecure)
    try:
        stored = pathlib.Path(options.file).read_bytes() if options.file else None
    except OSError as error:
        raise SettingsError(f"--file {options.file}: {_reason(error)}") from None

    def body() -> bytes:
        if stored is not None:
            return stored
        return sample_event(options.stage, str(uuid.uuid4()), time.time())

    senders = [Sender(options.url, credential, context)
               for _ in range(min(options.count, options.concurrency))]
    begun = time.perf_counter()
    busy = time.process_time()
    tally = deliver_concurrently(senders, options.count, body)

    if options.count > 1:
        print(tally.describe(time.perf_counter() - begun, time.process_time() - busy))
    elif tally.taken:
        outcome = f"{tally.last.get('status')} {tally.last.get('id')}"
        print(printable(f"{outcome} in {tally.taken[0]:.1f} ms"))
    if tally.refused:
        say(f"error: {tally.last_failure}")
    return 0 if len(tally.taken) == options.count else 1


@sigterm_as_ctrl_c()
def fetch(options: argparse.Namespace) -> int:
    """Print the data of each interview, a line each; return 0 if all of it could be had."""
    base = split_url(options.url)
    if base.query or base.fragment:
        raise SettingsError(f"--url {options.url}: it has to end with its path; codes follow it")
    credential = load_credential(options)
    context = client_context(options.ca, options.insecure)

    failed = 0
    under_way = None
    try:
        for code in read_codes(options.codes):
            under_way = code
            try:
                line = fetch_interview(code, base, credential, context)
            except (OSError, ValueError, MemoryError, http.client.HTTPException) as error:
                say(f"error: {code}: {describe_failure(error)}")
                failed += 1
            else:
                sys.stdout.buffer.write(line + b"\n")
                sys.stdout.flush()
            under_way = None
    except KeyboardInterrupt:
        if under_way is not None or "-" not in options.codes:  # else it waits for codes
            say(f"error: {under_way or 'fetch'}: interrupted")
            failed += 1
    return 1 if failed else 0


def drop_stdout() -> None:
    """Discard the rest of stdout: else the interpreter complains of it, and ends with 120."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_log(path: str, only: str | None, rows: list[Row], skipped: Counter[str]) -> bool:
    """Add the events in a log to `rows`; return whether it could be read to its end.

    What kept it from being read is said on stderr.
    """
    try:
        with open_to_read(path) as file:
            rows.extend(parse_rows(file, only, skipped))
    except (OSError, EOFError, zlib.error) as error:  # a .gz file that is cut short, or is none
        say(f"error: {path}: {_reason(error)}")
        return False
    return True


def read_tails(tails: Sequence[Tail], only: str | None, skipped: Counter[str]) -> list[Row]:
    """Return the events that are new in logs."""
    rows: list[Row] = []
    for tail in tails:
        while lines := tail.read_on():
            rows.extend(parse_rows(lines.split(b"\n")[:-1], only, skipped))
    return rows


def show_changes(rows: list[Row], new: Sequence[Row], as_objects: bool) -> None:
    """Add new events to `rows`, and print the whole course of each interview that they concern."""
    if new:
        rows += new
        changed = {row.interview for row in new}
        show_courses([row for row in rows if row.interview in changed], as_objects)


@sigterm_as_ctrl_c()
def timeline(options: argparse.Namespace) -> int:
    """Print each interview's course; with --follow, again each one that changes.

    Raise SettingsError.
    """
    paths = options.files or [load_settings(options).log]
    followed = check_logs(paths, options.follow)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")

    only = options.interview
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    are_whole = True
    opened = contextlib.ExitStack()
    try:
        for path in paths:
            if path not in followed:
                are_whole = read_log(path, only, rows, skipped) and are_whole
        tails = [opened.enter_context(contextlib.closing(Tail(path))) for path in followed]
        rows += read_tails(tails, only, skipped)
        show_courses(rows, options.json)

        while tails:
            time.sleep(VIEW_PAUSE)
            show_changes(rows, read_tails(tails, only, skipped), options.json)
    except KeyboardInterrupt:
        if not options.follow:  # Ctrl-C is how --follow ends; without it, something is missing
            raise
    except BrokenPipeError:  # | head
        drop_stdout()
    finally:
        opened.close()
        if skipped:
            counts = f"{skipped['blank']} blank and {skipped['foreign']} foreign lines"
            say(f"skipped {counts}")
    return 0 if are_whole else 1


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message}; see {self.prog} --help")
        sys.exit(2)


def add_env_file(parser: Parser) -> None:
    parser.add_argument("--env-file", metavar="FILE",
                        help="settings by name (default: .env, if there)")


def add_trust(parser: Parser) -> None:
    parser.add_argument("--ca", metavar="FILE", help="trust this certificate (PEM)")
    parser.add_argument("--insecure", action="store_true", help="trust any certificate")


def add_serve_arguments(parser: Parser) -> None:
    parser.add_argument("--version", action="version", version=__version__)
    add_env_file(parser)
    for name, option in OPTIONS.items():
        default = getattr(Settings, name)
        if option.metavar:
            told = f" (default: {default})" if default != "" else ""
            parser.add_argument(option.flag, dest=name, type=option.parse,
                                metavar=option.metavar, help=option.help + told)
        elif option.flag:
            parser.add_argument(option.flag, dest=name, action="store_const", const=True,
                                help=option.help)


def add_demo_arguments(parser: Parser) -> None:
    parser.add_argument("--port", metavar="PORT", type=_number(int, 0, 65535), default=0,
                        help="port to listen on (default: any)")


def add_send_arguments(parser: Parser) -> None:
    add_env_file(parser)
    parser.add_argument("url", metavar="URL", help="for instance https://localhost:8443/")
    parser.add_argument("--stage", metavar="NAME", default="SchedulingTime",
                        help="currentStage, for instance " + ", ".join(STAGES))
    parser.add_argument("--file", metavar="FILE",
                        help="deliver this body instead of a sample event")
    parser.add_argument("--count", metavar="N", type=_number(int, 1, 10**9), default=1,
                        help="deliveries in all")
    parser.add_argument("--concurrency", metavar="C", type=_number(int, 1, 1000), default=1,
                        help="connections at once")
    add_trust(parser)


def add_timeline_arguments(parser: Parser) -> None:
    add_env_file(parser)
    parser.add_argument("files", metavar="LOG", nargs="*",
                        help="logs, merged by event id, also .gz and - for stdin (default: --log)")
    parser.add_argument("--log", metavar="FILE",
                        help="the log, where none is named (default: the setting)")
    parser.add_argument("--interview", metavar="CODE", help="this interview only")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object an interview, a line each")
    parser.add_argument("--follow", action="store_true",
                        help="go on, also over rotations, until Ctrl-C")


def add_fetch_arguments(parser: Parser) -> None:
    add_env_file(parser)
    parser.add_argument("codes", metavar="CODE", nargs="+",
                        help="an interviewCode; - reads them from stdin, one a line")
    parser.add_argument("--url", metavar="BASE", default=FETCH_BASE,
                        help=f"the URL without the code (default: {FETCH_BASE})")
    add_trust(parser)


class Command(NamedTuple):
    """What the first word of the command line stands for."""

    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[Parser], None]
    help: str


COMMANDS = {
    "serve": Command(serve, add_serve_arguments, "receive events (the default command)"),
    "demo": Command(demo, add_demo_arguments,
                    "try it on loopback: deliver a sample event, and see it in the browser"),
    "send": Command(send, add_send_arguments,
                    "sign and deliver a sample event: is my set-up right?"),
    "timeline": Command(timeline, add_timeline_arguments,
                        "print each interview's stages in order, from the log"),
    "fetch": Command(fetch, add_fetch_arguments,
                     "print interviews' data (notes, feedback, times), from the service"),
}


def describe_all() -> str:
    """Return the end of the first help: all commands, and all settings by their variables."""
    lines = ["commands:"]
    lines += [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "settings (flag, else environment, else env file):"]
    for variable, name in SETTINGS.items():
        lines.append(f"  {variable:<26} {OPTIONS[name].flag or OPTIONS[name].help}")
    files = ", ".join(f"{variable}_FILE" for variable in SECRETS)
    lines.append(f"  {files}: files that hold the secrets")
    return "\n".join(lines)


def make_parser(name: str) -> Parser:
    """Return the parser of one command's arguments."""
    program = os.path.basename(sys.argv[0]) or "skype_webhook.py"
    description = COMMANDS[name].help
    epilog = None
    if name == "serve":
        description = (__doc__ or "").partition("\n")[0]
        epilog = describe_all()
    else:
        program += f" {name}"
    parser = Parser(program, description=description, epilog=epilog, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    COMMANDS[name].add_arguments(parser)
    return parser


def _parse_words(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Return the options. The value of an unknown flag is not told: it may be a secret."""
    options, unknown = parser.parse_known_args(words)
    for word in unknown:
        if word.startswith("--"):
            parser.error(f"there is no flag {word.partition('=')[0]}")
        if word.startswith("-"):
            parser.error(f"there is no flag {word[:2]}")
    if unknown:
        parser.error(f"{unknown[0]} has no meaning here; "
                     f"a command ({', '.join(COMMANDS)}) is the first word")
    return options


def run_command(name: str, words: Sequence[str]) -> int:
    """Run one command; return its exit code. What it had to say on stderr is written by its end."""
    try:
        return COMMANDS[name].run(_parse_words(make_parser(name), words))
    except SystemExit as ended:  # argparse: --help, --version, wrong usage
        return int(ended.code or 0)
    finally:
        REPORTER.flush()


def open_standard_streams() -> None:
    """Open a closed stdin, stdout or stderr on /dev/null: the log would get its number."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def tell_thread_fault(fault: threading.ExceptHookArgs) -> None:
    tell(f"thread {describe_fault(fault.exc_value or fault.exc_type())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0: done, 1: failed while running, 2: wrong usage or settings.
    """
    open_standard_streams()
    threading.excepthook = tell_thread_fault
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else "serve"

    try:
        code = run_command(name, words)
        sys.stdout.flush()
        return code
    except SettingsError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"error: {name}: interrupted")
        return 1
    except OSError as error:  # mostly a stdout that is full, or closed at its other end
        say(f"error: {name}: {_reason(error)}")
        drop_stdout()
        return 1
    except Exception as error:
        tell(f"{name} {describe_fault(error)}")
        REPORTER.flush()
        return 1


# --- The page of the live view ---

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Skype Interviews, live</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E
%3Ccircle cx='8' cy='8' r='8'/%3E%3C/svg%3E">
<style>
:root {
  color-scheme: light dark;
  --back: light-dark(#f4f5f7, #0e1116); --card: light-dark(#fff, #161b22);
  --text: light-dark(#1b1f24, #e6e9ed); --dim: light-dark(#59636e, #9aa4af);
  --line: light-dark(#d9dee4, #2d343d); --amber: light-dark(#8a4b00, #f0b35b);
  --violet: light-dark(#6a3fb0, #c3a6ff); --blue: light-dark(#0a5ca8, #74b4ff);
  --green: light-dark(#17702f, #5fd07c); --red: light-dark(#b3261e, #ff8a80);
}
* { box-sizing: border-box }
body {
  margin: auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; max-width: 84rem;
  background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums;
}
header { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center }
h1 { font-size: 1.25rem; margin: 0 auto 0 0 }
input {
  padding: .4rem .7rem; border: 1px solid var(--dim); border-radius: .5rem;
  background: var(--card); color: inherit; font: inherit; max-width: 100%;
}
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px }
#state::before { content: "\25cb\a0"; color: var(--amber) }
#state.live::before { content: "\25cf\a0"; color: var(--green) }
#note { min-height: 1.45em; margin: .6rem 0 }
.small { font-size: .87em; color: var(--dim) }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
[hidden] { display: none !important }

table {
  width: 100%; border-collapse: collapse; table-layout: fixed;
  background: var(--card); border: 1px solid var(--line);
}
th, td {
  padding: .6rem .8rem; border-top: 1px solid var(--line);
  text-align: left; vertical-align: top; overflow-wrap: anywhere;
}
th:nth-child(1) { width: 17% }
th:nth-child(2) { width: 22% }
th:nth-child(4) { width: 10% }
a { color: var(--blue); font: .87em ui-monospace, monospace }
a, .metadata { display: block; max-height: 6em; overflow: auto }  /* however long the text is */
ol {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(11.4rem, 1fr)); gap: .45rem 1rem;
  list-style: none; margin: 0; padding: 0; font-size: .9em;
}
li, .stage { position: relative; padding-left: 2.5em }
.gap { border-left: 3px dashed var(--amber); padding-left: calc(2.5em + .5rem) }
.gap .mark { left: .5rem }
li time, li span { white-space: nowrap }
em { display: block; margin-left: -2.5em; color: var(--amber); font-style: normal }

/* A stage's mark. The colour and the letter are its phase, the sign is what became of it; what is
   complete or at its end is filled. */
.mark {
  position: absolute; left: 0; width: 2.3em; text-align: center; border-radius: .3em;
  font: 700 .8em/1.6 ui-monospace, monospace;
  --hue: var(--dim); color: var(--hue); box-shadow: inset 0 0 0 1.5px var(--hue);
}
.Scheduling { --hue: var(--violet) }
.Interview { --hue: var(--blue) }
.Feedback { --hue: var(--green) }
.Canceled, .Archived { --hue: var(--dim) }
.Failed { --hue: var(--red); border-radius: 1em }
.Completed, .Failed, .Canceled, .Archived { color: var(--card); background: var(--hue) }

@media (max-width: 45rem) {
  input { width: 100% }
  thead { position: absolute; clip-path: inset(50%) }
  table, tbody, td, tbody th { display: block; width: auto !important; border: 0; background: none }
  tr {
    display: grid; grid-template-columns: 1fr auto; margin-bottom: .6rem; padding: .35rem 0;
    background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  }
  td, th { padding: .25rem .8rem }
  td { grid-column: 1 / 3 }
  td:last-child { grid-area: 1 / 2; font-size: .87em; color: var(--dim) }
  ol { grid-template-columns: repeat(auto-fit, minmax(9.6rem, 1fr)) }
}
</style>

<header>
<h1>Skype Interviews</h1><span id="state" role="status">connecting</span>
<input id="filter" type="search" size="30" placeholder="Filter: code, stage, metadata"
  aria-label="Filter: code, stage, metadata">
</header>
<main>
<p id="note" class="small"></p>
<p id="empty" hidden>No events yet.
Send a first one, on the receiver's machine and in its folder:<br>
<code>python3 skype_webhook.py send '<span id="origin"></span>{PATH}' --insecure</code></p>
<table role="table" hidden><caption class="unseen">Interviews, newest change first</caption>
<thead class="small" role="rowgroup"><tr role="row">
<th role="columnheader">Interview</th><th role="columnheader">Stage</th>
<th role="columnheader">Path</th><th role="columnheader">Changed</th></tr></thead>
<tbody id="rows" role="rowgroup"></tbody></table>
<p id="news" class="unseen" aria-live="polite"></p>
</main>
<noscript>This page needs JavaScript. In a terminal: python3 skype_webhook.py timeline</noscript>

<script>
"use strict";
const STAGES = new Map(Object.entries({STAGES}));
const OPENED = Date.now();
const ROWS = 500;   // shown at most: of the interviews,
const STEPS = 40;   // and of the steps of each
const FIRST_WAIT = 2000;  // ms before a lost connection is tried again: at first, and at most
const LAST_WAIT = 30000;
const SILENCE = 40000;    // ms without a heartbeat, which is due each 15 s
const SIGNS = {Created: "+", Time: "?", Started: "\u25b6", Collecting: "\u2026",
  Completed: "\u2713", Failed: "!", Canceled: "\u00d7", Archived: "="};
const TODAY = new Intl.DateTimeFormat([], {timeStyle: "short"});
const THIS_YEAR = new Intl.DateTimeFormat([],
  {month: "short", day: "numeric", hour: "numeric", minute: "2-digit"});
const BEFORE = new Intl.DateTimeFormat([], {dateStyle: "medium", timeStyle: "short"});
const $ = id => document.getElementById(id);

// An interview: {code, steps, now: its last step, text: what the filter looks at,
// row: where it is shown, stale: to be drawn again, fresh: changed since the page was opened}
const interviews = new Map();  // by code
const changed = new Set();     // interviews whose steps are to be put in order
const seen = new Set();        // ids of events
let broken = 0;                // lines that are no event
let due;                       // the next drawing

// --- Events in ---

function moment({time = "", recordedtime: recorded}) {
  let date = new Date(time.toUpperCase());
  if (isNaN(date)) [time, date] = [recorded, new Date(recorded)];
  // A Date has milliseconds; the key, which gives the order, has all digits.
  const ticks = /\.\d{3}(\d*)/.exec(time)?.[1] ?? "";
  return {time, recorded, date, key: `${date.toISOString().slice(0, 23)}${ticks} ${recorded}`};
}

function take(line) {
  const event = JSON.parse(line);
  if (seen.has(event.id)) return;
  const text = (stage, name) => {
    const value = event.data?.[stage]?.[name];
    return typeof value === "string" ? value : "";
  };
  const step = {
    ...moment(event),
    stage: text("currentStage", "value"),
    metadata: text("currentStage", "metadata"),
    previous: text("previousStage", "value"),
    readable: "data" in event,
  };
  seen.add(event.id);

  const code = String(event.subject ?? "-");
  if (!interviews.has(code)) interviews.set(code, {code, steps: []});
  const interview = interviews.get(code);
  interview.steps.push(step);
  interview.fresh ||= Date.parse(event.recordedtime) > OPENED;
  interview.stale = true;
  changed.add(interview);
}

const byKey = (a, b) => (a.key > b.key) - (a.key < b.key);

function settle(interview) {  // in the order of the events' own time, with gaps marked
  const steps = interview.steps.sort(byKey);
  let before = "";
  for (const step of steps) {
    step.gap = Boolean(before && step.stage && step.previous !== before);
    before = step.stage || before;
  }
  interview.now = steps[steps.length - 1];
  const words = steps.flatMap(step => [step.stage, step.metadata]);
  interview.text = [interview.code, ...words].join(" ").toLowerCase();
}

// --- Text and times out. Text is only ever set as text. What cannot be seen in it, or turns it
// around (bidi marks), is spelt out. ---

const spelt = character => "\\u" + character.codePointAt(0).toString(16).padStart(4, "0");
const shown = text => text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, spelt);
const named = stage => shown(stage.slice(0, 100)) || "no stage";
const called = code => code === "-" ? "no interview code" : shown(code);

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function breakable(text) {  // a narrow column breaks InterviewStarted before Started
  return text.split(/(?=[A-Z])/).flatMap(word => [make("wbr", {}), word]);
}

function duration(seconds) {
  const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
  for (const [size, unit, part, its] of units) {
    const count = Math.floor(seconds / size);
    const rest = Math.floor(seconds % size / part);
    if (count) return `${count} ${unit}` + (rest ? ` ${rest} ${its}` : "");
  }
  return seconds >= 1 ? `${Math.floor(seconds)} s` : "under 1 s";
}

function when(date) {
  const now = new Date();
  const minutes = Math.floor((now - date) / 60000);
  if (minutes === 0 || minutes === -1) return "just now";  // -1: its clock is a little ahead
  if (minutes > 0 && minutes < 60) return `${minutes} min ago`;
  if (date.toDateString() === now.toDateString()) return TODAY.format(date);
  return (date.getFullYear() === now.getFullYear() ? THIS_YEAR : BEFORE).format(date);
}

const ageOf = date => Date.now() - date < 86400000 ? "young" : "";  // whose text will change

function clock({date, time, recorded}) {  // the exact time on hover
  const title = time + (time === recorded ? "" : `\nrecorded ${recorded}`);
  return make("time", {className: ageOf(date), dateTime: date.toISOString(), title}, when(date));
}

function keepTime() {
  for (const time of document.querySelectorAll("time.young")) {
    const date = new Date(time.dateTime);
    const text = when(date);
    if (time.textContent !== text) time.textContent = text;
    time.className = ageOf(date);
  }
}

// --- Rows ---

function mark(stage) {  // of InterviewStarted, the phase is Interview and the outcome Started
  const words = STAGES.has(stage) && /^([A-Z][a-z]+)([A-Z][a-z]+)$/.exec(stage);
  const [, phase, outcome] = words || ["", "", ""];
  const sign = phase.slice(0, 1) + (SIGNS[outcome] ?? "\u2013");
  return make("span", {className: `mark ${phase} ${outcome}`, ariaHidden: "true"}, sign);
}

function meaning({stage, readable}) {
  if (stage) return STAGES.get(stage) ?? "not a documented stage";
  return readable ? "the event names no stage" : "its body is no plain JSON object: see the log";
}

function item(step, i, steps) {
  const after = steps[i + 1];
  const times = make("div", {className: "small"}, clock(step));
  const seconds = after && (after.date - step.date) / 1000;
  if (after) times.append(" \u00b7 ", make("span", {}, duration(seconds)));
  const gap = step.gap ? make("em", {}, "gap: came from ", ...breakable(named(step.previous))) : "";
  return make("li", {className: step.gap ? "gap" : "", title: shown(step.metadata)},
    gap, mark(step.stage), ...breakable(named(step.stage)), times);
}

function makeRow(code) {
  const link = make("a", {href: "#" + encodeURIComponent(code)}, called(code));
  const cell = () => make("td", {role: "cell"});
  return make("tr", {role: "row"},
    make("th", {role: "rowheader", scope: "row"}, link), cell(), cell(), cell());
}

function fill(interview) {  // the row and its link stay, so that focus does
  const {code, now, steps} = interview;
  const hidden = Math.max(0, steps.length - STEPS);
  interview.row ??= makeRow(code);
  const [, stage, path, time] = interview.row.cells;
  const metadata = make("div", {className: "small metadata"}, shown(now.metadata));
  if (now.metadata.length > 200) metadata.tabIndex = 0;  // it scrolls
  stage.replaceChildren(make("div", {className: "stage"},
    mark(now.stage), make("strong", {}, ...breakable(named(now.stage))),
    make("div", {className: "small"}, meaning(now)), metadata));
  path.replaceChildren(hidden ? `after ${hidden} earlier steps:` : "",
    make("ol", {}, ...steps.map(item).slice(hidden)));
  time.replaceChildren(clock(now));

  const colours = [{backgroundColor: "color-mix(in srgb, var(--blue) 30%, var(--card))"}, {}];
  if (interview.fresh) interview.row.animate(colours, 2000);
  interview.stale = interview.fresh = false;
}

function arrange(rows) {  // moving as few as can be
  const table = $("rows");
  const held = document.activeElement;
  const row = held.closest("#rows tr");
  rows.forEach((each, i) => {
    if (table.children[i] !== each) table.insertBefore(each, table.children[i] ?? null);
  });
  while (table.children.length > rows.length) table.lastChild.remove();
  if (!row?.isConnected || document.activeElement === held) return;
  (held.isConnected ? held : row.querySelector("a")).focus({preventScroll: true});
}

function announce(news) {
  const sentence = ({code, now}) => `${called(code.slice(0, 100))} is now ${named(now.stage)}`;
  $("news").textContent = news.length > 3 ? `${news.length} interviews have changed`
    : news.map(sentence).join(", ");
}

function render() {
  clearTimeout(due);
  due = undefined;
  changed.forEach(settle);
  const news = [...changed].filter(each => each.fresh);
  changed.clear();

  const wanted = $("filter").value.trim().toLowerCase();
  const found = [...interviews.values()].filter(each => each.text.includes(wanted));
  const part = found.sort((a, b) => byKey(b.now, a.now)).slice(0, ROWS);
  part.filter(each => each.stale).forEach(fill);
  arrange(part.map(each => each.row));
  if (news.length) announce(news);

  const size = interviews.size;
  $("note").textContent = (size ? `${found.length} of ${size} interviews` : "")
    + (found.length > ROWS ? `, the newest ${ROWS} are shown` : "")
    + (broken ? `, ${broken} lines of the log could not be read` : "");
  document.querySelector("table").hidden = !found.length;
  $("empty").hidden = size > 0 || $("state").className !== "live";
}

// --- The connection. With the id of the last event that it got, a new one misses nothing. ---

let source;             // an EventSource
let last = "";          // id of the last event
let heard;              // when the receiver was last heard of
let retry;              // the next try,
let wait = FIRST_WAIT;  // and how long it waits

function listen(message) {
  heard = Date.now();
  due ||= setTimeout(render, 60);
  last = message.lastEventId;
  try {
    take(message.data);
  } catch {
    broken += 1;
  }
}

function say(state) {
  if ($("state").textContent !== state) $("state").textContent = $("state").className = state;
}

function connect() {
  heard = Date.now();
  source = new EventSource(`${location.origin}${location.pathname}events?after=${last}`);
  source.onopen = () => {
    wait = FIRST_WAIT;
    say("live");
    due ||= setTimeout(render, 500);  // an empty log sends nothing
  };
  source.onmessage = listen;
  source.addEventListener("heartbeat", () => { heard = Date.now(); });
  source.onerror = reconnect;
}

function reconnect() {  // by a new source: the browser's own stops at a 503
  source.close();
  heard = Date.now();  // else the watch below would begin a long wait anew before its end
  say("reconnecting");
  clearTimeout(retry);
  retry = setTimeout(connect, wait);
  wait = Math.min(2 * wait, LAST_WAIT);  // or a page with an old password uses up the attempts
}

function filterByHash() {
  let text = location.hash.slice(1);
  try {
    text = decodeURIComponent(text);
  } catch {
    // it was typed by hand
  }
  $("filter").value = text;
  render();
}

$("filter").oninput = render;
$("origin").textContent = location.origin;
onhashchange = filterByHash;
setInterval(keepTime, 10000);
setInterval(() => {
  if (Date.now() - heard > SILENCE) reconnect();  // it slept, or the network has gone
}, 5000);
connect();
filterByHash();
</script>
</html>
""".replace("{STAGES}", json.dumps(STAGES))


def _hash_of(tag: str) -> str:
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_POLICY = (
    f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; "
    "connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


if __name__ == "__main__":
    sys.exit(main())
