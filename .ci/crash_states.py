#!/usr/bin/env python3
"""Start the journal on every state of its log that a crash can leave: does it keep its promises?

    PYTHONPATH=. python3 .ci/crash_states.py [STATES [SEED]]      10,000 states from seed 1 on

A process writes a session of events under strace. The trace has each call that touches the disk,
and what was acknowledged when, however the journal is written: it shares no code with this. The
calls are replayed on a model of a disk, page by page, and the crash comes after any of them. What
it leaves:

  - A sync of a file makes its bytes and its length durable; one of the folder does so for its
    names.
  - Of what was written since, each page of 4 KiB is as it was at the sync, or after any one of the
    writes since. A page that is new since may be zeros; one that is written over is not, for it is
    not allocated anew.
  - The length is that of the sync, or after any one of the writes since. What lies below it and did
    not reach the disk is zeros. Pages and length do not wait for each other.
  - Names change in their order, each change whole, and do not wait for the bytes of their files.
  - Where nothing but the process is gone (a kill), everything that was written is there.

On each state a journal is started twice, and the last events are sent again each time. Some of
these restarts are traced as well: the crash comes again while the first one is being mended.
"""
from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import os
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import skype_webhook
from skype_webhook import Journal, JournalError

PAGE = 4096               # bytes
SESSION_STATES = 700      # of one session; the events of the next one have other lengths
RESTARTS = 40             # of the states of a session, traced in their turn
RESTART_CUTS = 5          # of one restart
RESTART_STATES = 10       # of these
TRIES = 10                # to find a state of a cut that was not seen before
HEAD_START = 0.005        # seconds that one event of several has before the others
SYNC_SECONDS = 0.015      # that a sync of the session takes at least: the others become one batch
LOG = "log.jsonl"
NOTE = b"# a note\n"      # of somebody else, in the log
STRAY = b"a stray note"   # the same, without a newline
CALLS = ("openat,close,lseek,read,write,pwrite64,fsync,fdatasync,rename,"
         "ftruncate,writev,pwritev,unlink,link,sync_file_range")  # the latter are not expected


# --- The traced process: what it does, and says on stdout ---


class Event(NamedTuple):
    """What the journal takes."""

    id: str
    line: bytes


def make_event(number: int, size: int = 0) -> Event:
    """Return an event whose line has `size` bytes more than it needs."""
    data = b'{"event":"State","n":%d,"x":"%b"}' % (number, b"y" * size)
    event_id = hashlib.sha256(data).hexdigest()
    return Event(event_id, (
        b'{"specversion":"1.0","id":"%b","source":"https://interviews.skype.com",'
        b'"type":"com.skype.interviews.State","recordedtime":"2026-11-23T23:10:00.123456Z",'
        b'"datacontenttype":"application/json","data":%b}\n' % (event_id.encode(), data)))


def event_of(line: bytes) -> Event:
    """Return the event of a line."""
    return Event(line[27:91].decode(), line)


def deliver(journal: Journal, events: Iterable[Event]) -> None:
    """Append events one after the other, and say what becomes of each."""
    for event in events:
        os.write(1, b"begin " + event.line)
        try:
            journal.append(*event)
            os.write(1, b"done " + event.line)
        except JournalError:
            os.write(1, b"refused " + event.line)


def deliver_together(journal: Journal, events: Sequence[Event],
                     meanwhile: Callable[[], None] = lambda: None) -> None:
    """Append events of which all but the first are one batch: they come while it is synced."""
    threads = [threading.Thread(target=deliver, args=(journal, [event])) for event in events]
    threads[0].start()
    time.sleep(HEAD_START)
    meanwhile()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()


def limit_files(size: int) -> None:
    """Let no file become longer: a write is cut short there, and the next one fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def write_session(path: str, seed: int) -> None:
    """Write events of many lengths, alone and together, of which some find no room.

    Somebody else writes to the log meanwhile, it is rotated.
    """
    chance = random.Random(seed)
    numbers = itertools.count(100)

    def new(count: int, *sizes: int) -> list[Event]:
        sizes = sizes or (10, 700, 2500, 4000, 9000)
        return [make_event(next(numbers), chance.choice(sizes)) for _ in range(count)]

    def rotate() -> None:
        os.rename(path, path + ".3")
        limit_files(PAGE + chance.randrange(400))

    with Journal(path) as journal:
        deliver(journal, new(4))
        deliver_together(journal, new(8))

        batch = new(8, 700, 2500, 9000)
        limit_files(os.path.getsize(path) + len(batch[0].line) + chance.randrange(2000, 25000))
        deliver_together(journal, batch)
        limit_files(2**40)
        deliver_together(journal, batch[3:])
        deliver(journal, batch[:4])

        last = new(1)
        limit_files(os.path.getsize(path) + len(last[0].line) - len(b"\n"))
        deliver(journal, last)
        limit_files(2**40)
        deliver(journal, last)

        with open(path, "ab") as log:
            log.write(STRAY)
        deliver_together(journal, new(6))

        os.rename(path, path + ".1")
        deliver_together(journal, new(1, 9000) + new(6))

        batch = new(3, 2500, 9000)
        limit_files(os.path.getsize(path) + len(batch[0].line) + chance.randrange(1000, 2000))
        deliver_together(journal, batch)
        deliver(journal, batch[1:])
        os.rename(path, path + ".2")
        limit_files(PAGE - chance.randrange(140))  # the next event begins near a page's end
        deliver(journal, batch[1:])
        limit_files(2**40)
        deliver_together(journal, batch)

        batch = new(9, 500, 700)
        deliver_together(journal, batch, rotate)  # all but the first are a new log's first batch
        limit_files(2**40)
        deliver_together(journal, batch[1:])

    with Journal(path) as journal:
        deliver(journal, batch)
        deliver_together(journal, new(6))


def restart_all(folder: str) -> None:
    """Start a journal on each log below a folder, and append the events that lie beside it."""
    for place in sorted(pathlib.Path(folder).iterdir()):
        lines = (place / "sent").read_bytes().splitlines(keepends=True)
        os.write(1, b"restart")
        with contextlib.suppress(JournalError), Journal(place / "state" / LOG) as journal:
            deliver(journal, map(event_of, lines))


# --- The trace ---


class Call(NamedTuple):
    """A system call that succeeded."""

    name: str
    words: list[str]
    result: int


class CannotTrace(Exception):
    """There is no strace here, or it may not trace a process."""


def trace(*words: str, sync_seconds: float = 0) -> list[Call]:
    """Run this script with these words in another process; return its calls, by their ends.

    Raise CannotTrace.
    """
    if not shutil.which("strace"):
        raise CannotTrace("strace is not installed")
    with tempfile.NamedTemporaryFile("r") as output:
        tracer = ["strace", "-f", "-qq", "-xx", "-s", str(2**24), "-o", output.name,
                  "-e", f"trace={CALLS}",
                  f"--inject=fsync,fdatasync:delay_enter={sync_seconds * 1e6:.0f}"]
        done = subprocess.run(
            [*tracer, sys.executable, __file__, *words],
            check=False, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.path.dirname(skype_webhook.__file__)})
        if "Operation not permitted" in done.stderr:
            raise CannotTrace(done.stderr)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return list(read_trace(output))


def read_trace(output: Iterable[str]) -> Iterator[Call]:
    """Yield the calls in what `strace -f -xx` has put out."""
    begun: dict[str, str] = {}
    for row in output:
        thread, text = row.rstrip().split(maxsplit=1)
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.rpartition(" <")[0]
            continue
        if text.startswith("<..."):
            text = begun.pop(thread) + text.partition(" resumed>")[2]
        match = re.match(r"(\w+)\((.*)\) += (\d+)", text)
        if match:
            yield Call(match[1], match[2].split(", "), int(match[3]))


def bytes_of(word: str) -> bytes:
    """Return the bytes of a string in a trace."""
    return bytes.fromhex(word.strip('"').replace("\\x", ""))


def path_of(word: str) -> pathlib.Path:
    """Return the path that a string in a trace is."""
    return pathlib.Path(os.fsdecode(bytes_of(word)))


# --- The model of the disk ---


class DiskFile:
    """A file: its bytes now, and what a crash can leave of those that were not synced."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.sync()

    def sync(self) -> None:
        """Make all of it durable."""
        self.synced = bytes(self.data)
        self.lengths = [len(self.data)]          # that one, and after each write since
        self.pages: dict[int, list[bytes]] = {}  # by number: as at the sync, and after each write

    def write(self, offset: int, data: bytes) -> None:
        """Write what lies on one page."""
        number = offset // PAGE
        versions = self.pages.setdefault(number, [self.page(number)])
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset:offset + len(data)] = data
        versions.append(self.page(number))
        self.lengths.append(len(self.data))

    def page(self, number: int) -> bytes:
        """Return a page, shorter at the end of the file."""
        return bytes(self.data[number * PAGE:(number + 1) * PAGE])

    def crashed(self, chance: random.Random) -> bytes:
        """Return what a crash leaves, at random."""
        length = chance.choice(self.lengths)
        data = bytearray(self.synced)
        for number, versions in self.pages.items():
            start, end = number * PAGE, (number + 1) * PAGE
            data.extend(bytes(max(0, end - len(data))))
            data[start:end] = chance.choice(versions).ljust(PAGE, b"\0")
        return bytes(data[:length].ljust(length, b"\0"))


Names = dict[str, DiskFile]


def synced(files: dict[str, bytes]) -> list[Names]:
    """Return the one state of the names in a folder that holds these files, all durable."""
    return [{name: DiskFile(data) for name, data in files.items()}]


class DiskFolder:
    """A folder: each state of its names that a crash can leave, the last one last."""

    def __init__(self, path: pathlib.Path, names: list[Names]) -> None:
        self.path = path
        self.names = copy.deepcopy(names)

    def sync(self) -> None:
        """Make the names durable."""
        del self.names[:-1]

    def create(self, name: str) -> None:
        """Add an empty file."""
        self.names.append({**self.names[-1], name: DiskFile()})

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        names = dict(self.names[-1])
        names[new] = names.pop(old)
        self.names.append(names)


# --- The replay of a trace on the model: None is yielded after each change of the disk ---


class Descriptor:
    """An open file of the model, or its folder: a method for each call on it."""

    def __init__(self, target: DiskFile | DiskFolder, flags: str) -> None:
        self.target = target
        self.appends = "O_APPEND" in flags
        self.position = 0

    def lseek(self, words: list[str], result: int) -> Iterator[None]:
        self.position = result
        yield from ()

    def read(self, words: list[str], result: int) -> Iterator[None]:
        self.position += result
        yield from ()

    def write(self, words: list[str], result: int) -> Iterator[None]:
        yield from self.pwrite64([*words, str(self.position)], result)
        self.position += result

    def pwrite64(self, words: list[str], result: int) -> Iterator[None]:
        """Write page by page: a kill can come between two of them."""
        assert isinstance(self.target, DiskFile)
        data = bytes_of(words[1])[:result]
        offset = len(self.target.data) if self.appends else int(words[3])
        while data:
            size = PAGE - offset % PAGE
            self.target.write(offset, data[:size])
            yield
            data = data[size:]
            offset += size

    def fsync(self, words: list[str], result: int) -> Iterator[None]:
        self.target.sync()
        yield

    fdatasync = fsync


class Process:
    """The traced process: its descriptors of the folder and the files in it."""

    def __init__(self, folder: DiskFolder) -> None:
        self.folder = folder
        self.descriptors: dict[int, Descriptor] = {}

    def do(self, call: Call) -> Iterator[None]:
        """Do one call on the folder, if it concerns that."""
        if call.name == "openat":
            yield from self.open(path_of(call.words[1]), call.words[2], call.result)
        elif call.name == "rename":
            self.folder.rename(path_of(call.words[0]).name, path_of(call.words[1]).name)
            yield
        elif call.name == "close":
            self.descriptors.pop(int(call.words[0]), None)
        elif int(call.words[0]) in self.descriptors:
            method = getattr(self.descriptors[int(call.words[0])], call.name)
            yield from method(call.words, call.result)

    def open(self, path: pathlib.Path, flags: str, descriptor: int) -> Iterator[None]:
        """Open the folder, or a file in it, which may be new."""
        if path == self.folder.path:
            self.descriptors[descriptor] = Descriptor(self.folder, flags)
        elif path.parent == self.folder.path:
            if path.name not in self.folder.names[-1]:
                self.folder.create(path.name)
                yield
            self.descriptors[descriptor] = Descriptor(self.folder.names[-1][path.name], flags)


# --- The crash ---


class Known(NamedTuple):
    """What is known of a session so far, by what it said."""

    lines: dict[str, bytes]  # of all events that were begun, by id
    done: set[str]           # ids of those that were acknowledged
    others: set[bytes]       # lines that are no events, and stay


class Cut(NamedTuple):
    """A moment of a session at which the crash comes."""

    names: list[Names]  # the files that it can leave, the last ones last
    known: Known


class State(NamedTuple):
    """What a crash has left: a kill leaves the disk as it is, not all of it synced."""

    names: list[Names]
    known: Known
    is_kill: bool

    def files(self) -> dict[str, bytes]:
        """Return the bytes of the files."""
        return {name: bytes(file.data) for name, file in self.names[-1].items()}


def cuts_of(calls: Sequence[Call], folder: DiskFolder, known: Known) -> Iterator[Cut]:
    """Do calls on the folder; yield a cut after each change of it, and each acknowledgement."""
    process = Process(folder)
    known = copy.deepcopy(known)
    for call in calls:
        what = b""
        if call.name == "write" and call.words[0] == "1":
            what, _, line = bytes_of(call.words[1]).partition(b" ")
            if what == b"begin":
                known.lines.update([event_of(line)])
            if what == b"done":
                known.done.add(event_of(line).id)
                yield copy.deepcopy(Cut(folder.names, known))
        else:
            for _ in process.do(call):
                yield copy.deepcopy(Cut(folder.names, known))
    if State(folder.names, known, is_kill=True).files() != read_folder(folder.path):
        raise RuntimeError("the trace does not explain what is on the disk")


def states_of(cut: Cut, chance: random.Random) -> Iterator[State]:
    """Yield what a crash can leave: first what a kill does, then at random, without an end."""
    yield State(cut.names, cut.known, is_kill=True)
    while True:
        names = chance.choice(cut.names)
        files = {name: file.crashed(chance) for name, file in names.items()}
        yield State(synced(files), cut.known, is_kill=False)


def explore(cuts: Iterable[Cut], count: int, chance: random.Random) -> Iterator[State]:
    """Yield `count` different states, or as many as there are, of all cuts in turn."""
    seen: set[int] = set()
    sources = [states_of(cut, chance) for cut in cuts]
    while sources:
        for source in sources[:]:
            state = next_unseen(source, seen)
            if state:
                yield state
            else:
                sources.remove(source)
            if len(seen) == count:
                return


def next_unseen(source: Iterator[State], seen: set[int]) -> State | None:
    """Return the next state that was not seen, and note it as seen; None where none comes."""
    for state in itertools.islice(source, TRIES):
        files = frozenset(state.files().items())
        key = hash((files, len(state.known.lines), len(state.known.done)))
        if key not in seen:
            seen.add(key)
            return state
    return None


# --- The start afterwards, and the promises ---


def write_folder(path: pathlib.Path, files: dict[str, bytes]) -> None:
    """Make a folder hold these files and no others."""
    path.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        file.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)


def read_folder(path: pathlib.Path) -> dict[str, bytes]:
    """Return the files in a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def events_to_send(known: Known) -> list[Event]:
    """Return the events that were not acknowledged, the last ones all the same, and a new one."""
    events = [Event(*each) for each in known.lines.items()]
    again = [event for event in events if event.id not in known.done or event in events[-8:]]
    return [*again, make_event(9999)]


def restart(path: pathlib.Path, events: Sequence[Event]) -> tuple[bytes, list[bool]]:
    """Start a journal and append the events; return what the log holds then, and the answers."""
    with Journal(path) as journal:
        answers = [journal.append(*event) for event in events]
    return path.read_bytes(), answers


def mended(data: bytes, whole: Iterable[bytes]) -> bytes:
    """Return what has to become of a log's bytes; `whole` are the lines of its events."""
    tail = data[data.rfind(b"\n") + 1:]
    if not tail:
        return data
    start = b'{"specversion":"1.0","id":"'
    begun = tail.rstrip(b" \0")
    is_ours = begun.startswith(start) or start.startswith(begun)
    if is_ours and tail + b"\n" not in whole:
        data = data[:-len(tail)] + b" " * len(tail)
    return data + b"\n"


def broken_promises(state: State, path: pathlib.Path) -> list[str]:
    """Start twice, in the folder `path`, on what a crash has left; return the broken promises."""
    known = state.known
    files = state.files()
    sent = events_to_send(known)
    write_folder(path, files)
    try:
        first, _ = restart(path / LOG, sent)
        second, answers = restart(path / LOG, sent)
    except JournalError as error:
        return [f"it starts and takes events ({error})"]

    after = read_folder(path)
    whole = {*known.lines.values(), sent[-1].line}
    lines = {name: data.splitlines(keepends=True) for name, data in after.items()}
    events = {name: [line for line in each if line in whole] for name, each in lines.items()}
    found = set(itertools.chain.from_iterable(events.values()))
    acknowledged = {known.lines[event_id] for event_id in known.done}
    left = set(itertools.chain.from_iterable(data.splitlines(True) for data in files.values()))
    begun = mended(files.get(LOG, b""), whole)
    wrecks = [line for line in lines[LOG] if line.strip() and line not in whole | known.others]
    rotated = [name for name in files if name != LOG]
    promises = {
        "what was acknowledged is there": acknowledged <= left & found,
        "what was sent again is there": found >= {event.line for event in sent},
        "no log has an event twice": all(len(each) == len(set(each)) for each in events.values()),
        "only a torn tail of ours is blanked, every tail ended": first.startswith(begun),
        "what was rotated stays": all(after[name] == files[name] for name in rotated),
        "a second start changes nothing": second == first and not any(answers),
        "a kill leaves whole and blank lines": not (wrecks and state.is_kill),
        "a crash leaves those, and such with NULs": all(b"\0" in line for line in wrecks),
    }
    return [promise for promise, is_kept in promises.items() if not is_kept]


# --- The campaign ---


def session_cuts(seed: int, path: pathlib.Path) -> Iterator[Cut]:
    """Trace a session in a new folder, on a log of two events, a foreign line and a torn one."""
    events = [make_event(1), make_event(2)]
    files = {LOG: events[0].line + NOTE + events[1].line + make_event(3, 9000).line[:6000]}
    write_folder(path, files)
    calls = trace("session", str(path / LOG), str(seed), sync_seconds=SYNC_SECONDS)
    known = Known(dict(events), {event.id for event in events}, {NOTE, STRAY + b"\n"})
    return cuts_of(calls, DiskFolder(path, synced(files)), known)


def restart_cuts(states: Sequence[State], path: pathlib.Path) -> Iterator[Iterator[Cut]]:
    """Trace restarts on these states, each in a new folder below `path`; yield the cuts of each."""
    places = [path / f"{number:06d}" for number in range(len(states))]
    for place, state in zip(places, states):
        write_folder(place / "state", state.files())
        lines = b"".join(event.line for event in events_to_send(state.known))
        (place / "sent").write_bytes(lines)

    calls = trace("restarts", str(path))
    starts = [number for number, call in enumerate(calls)
              if call.name == "write" and bytes_of(call.words[1]) == b"restart"]
    for place, state, start, end in zip(places, states, starts, [*starts[1:], len(calls)]):
        log = mended(state.files().get(LOG, b""), state.known.lines.values())
        others = state.known.others.union(log.splitlines(keepends=True))
        known = state.known._replace(others=others)
        yield cuts_of(calls[start:end], DiskFolder(place / "state", state.names), known)


def all_states(seed: int, path: pathlib.Path) -> Iterator[State]:
    """Yield the states of one session after the other, and of restarts on some of them."""
    for number in itertools.count(seed):
        chance = random.Random(number)
        cuts = session_cuts(number, path / f"session.{number}")
        states = list(explore(cuts, SESSION_STATES, chance))
        yield from states
        again = chance.sample(states, min(RESTARTS, len(states)))
        for cuts in restart_cuts(again, path / f"restarts.{number}"):
            some = sorted(cuts, key=lambda _: chance.random())[:RESTART_CUTS]
            yield from explore(some, RESTART_STATES, chance)


@contextlib.contextmanager
def new_folder() -> Iterator[pathlib.Path]:
    """Make a folder for the time of the block: in memory, where a sync takes no time."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield pathlib.Path(name)


def campaign(count: int, seed: int) -> int:
    """Try so many states; print a row that sums them up, and return the exit code."""
    began = time.monotonic()
    broken: Counter[str] = Counter()
    failures = 0
    with new_folder() as path:
        for state in itertools.islice(all_states(seed, path), count):
            promises = broken_promises(state, path / "left")
            broken.update(promises)
            if promises:
                failures += 1
                kept = pathlib.Path(tempfile.mkdtemp(prefix="crash-state."))
                write_folder(kept, state.files())
                print(f"{kept}: {'; '.join(promises)}")
    for promise, times in broken.most_common():
        print(f"{times} times not so: {promise}")
    print(f"states {count}, starts {2 * count}, failures {failures}, "
          f"seconds {time.monotonic() - began:.0f}, seed {seed}")
    return 1 if broken else 0


def main(words: Sequence[str]) -> int:
    """Do what the words say: one of the two traced parts, or the campaign."""
    if words[:1] == ["session"]:
        write_session(words[1], int(words[2]))
        return 0
    if words[:1] == ["restarts"]:
        restart_all(words[1])
        return 0
    numbers = [int(word) for word in words]
    return campaign(*numbers, *(10_000, 1)[len(numbers):])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
