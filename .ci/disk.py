#!/usr/bin/env python3
"""Try the journal of a running receiver on disks, files and kills, under load and at full size.

    .ci/disk.py                      all campaigns, about a quarter of an hour
    .ci/disk.py crashes rotation     some of them

Run it as root (it mounts small disks), with strace, logrotate and mkfs.ext4. A campaign prints its
figures, and ends the script with 1 if an acknowledged event is not in the log exactly once.
"""
from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import test_skype_webhook as kit  # noqa: E402  # it stands beside the module

WORK = pathlib.Path(tempfile.mkdtemp(prefix="disk."))
CERTIFICATE = kit.make_certificate(WORK)
SHOWN = re.compile(rb'^{"specversion":"1.0","id":"(\w+)".*}$', re.MULTILINE)
servers: list[Any] = []  # all of them, to be killed at the end


def serve(folder: pathlib.Path, *flags: str, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    servers.append(kit.Server(folder, CERTIFICATE, *flags, **options))
    return servers[-1]


def kill(server: Any) -> None:
    server.process.kill()
    server.process.wait(40)


class Load:
    """Senders of new events, some on kept connections, the others each time on a new one."""

    def __init__(self, server: Any, senders: int = 8, pad: int = 0, large: int = 0) -> None:
        self.server, self.pad, self.large = server, pad, large
        self.acknowledged: list[str] = []
        self.statuses: Counter[object] = Counter()
        self.over = threading.Event()
        self.threads = kit.gather(senders, self.send)

    def send(self) -> None:
        count = random.choice([1, 20])
        while not self.over.is_set():
            try:
                with kit.Peer(self.server.port, timeout=40) as peer:
                    self.deliver(peer, count)
            except OSError:
                self.statuses["cut"] += 1
                time.sleep(0.01)

    def deliver(self, peer: Any, count: int) -> None:
        """Deliver so many events over one connection; the last of twenty may be a large one."""
        for number in range(count):
            body = kit.new_event(pad="x" * (self.large if number == 19 else self.pad))
            status = peer.ask(kit.post(body))
            self.statuses[status] += 1
            if status == 200:
                self.acknowledged.append(kit.sha256(body))
            if status != 200 or self.over.is_set():
                return

    def waits_for_refusals(self, count: int) -> None:
        wanted = self.statuses[503] + count
        assert kit.until(lambda: self.statuses[503] >= wanted, 60), self.statuses

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def read_ids(path: pathlib.Path) -> Iterator[str]:
    """Yield the ids in a log; what is neither an event nor blank ends the campaign."""
    data = path.read_bytes()
    for line in (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n"):
        if line.strip(b" "):
            yield json.loads(line)["id"]


def check(what: str, acknowledged: list[str], *paths: pathlib.Path, **figures: object) -> None:
    ids = [each for path in paths for each in read_ids(path)]
    lost = len(set(acknowledged) - set(ids))
    doubled = len(ids) - len(set(ids))
    print(f"{what}: {len(acknowledged)} acknowledged, {lost} lost, {doubled} doubled", figures)
    if lost or doubled:
        sys.exit(1)


@contextlib.contextmanager
def tailed(log: pathlib.Path) -> Iterator[pathlib.Path]:
    """Follow a log by `tail -F`; yield the file with what it has shown."""
    shown = log.with_name("shown")
    with open(shown, "wb") as out, open(log.with_name("said"), "wb") as said:
        tail = subprocess.Popen(["tail", "-n", "+1", "-F", log], stdout=out, stderr=said)
    try:
        yield shown
    finally:
        tail.kill()
        tail.wait()


# --- Crashes ---


def crashes() -> None:
    """Kill it a hundred times at random moments, under load."""
    folder = WORK / "crashes"
    folder.mkdir()
    log = folder / "events.jsonl"
    log.touch(0o600)
    acknowledged, ups, sealed = [], [], 0
    server = serve(folder)
    with tailed(log) as shown:
        for _ in range(100):
            load = Load(server, large=200_000)
            time.sleep(random.uniform(0.2, 1.2))
            kill(server)
            load.stop()
            acknowledged += load.acknowledged
            begun = time.monotonic()
            server = serve(folder)
            ups.append(round((time.monotonic() - begun) * 1000))
            sealed += server.stderr().count("sealed")
        last = kit.new_event()
        assert server.deliver(last)[0] == 200 and server.stop() == 0
        assert kit.until(lambda: kit.sha256(last).encode() in shown.read_bytes()[-2000:])
    assert sorted(SHOWN.findall(shown.read_bytes())) == sorted(map(str.encode, read_ids(log)))
    said = (folder / "said").read_text()
    check("crashes", acknowledged, log, sealed=sealed, tail=said or "each once, said nothing",
          up_ms=(statistics.median(ups), max(ups)))


# Each row: the rule (strace), whether a write is cut short before it, whether the log was rotated.
KILLS = (
    *((f"write:signal=SIGKILL:when={n}", False, False) for n in (1, 2, 3)),
    *((f"fdatasync:signal=SIGKILL:when={n}", False, False) for n in (1, 2, 3)),
    *((f"write:signal=SIGKILL:when={n}", True, False) for n in (2, 3, 4, 5, 6)),
    ("fdatasync:signal=SIGKILL:when=1", True, False),
    ("fsync:signal=SIGKILL:when=1", False, True),
    ("fdatasync:signal=SIGKILL:when=1", False, True),
    ("fdatasync:signal=SIGKILL:when=2", False, True),
    ("write:signal=SIGKILL:when=1", False, True),
    ("write:error=EIO:when=2+", True, False),
    ("write:error=EIO:when=3+", True, False),
    ("write:error=ENOSPC:when=5", True, False),
)


def kills() -> None:
    """Kill it at the nth call of one kind, or let its sealing fail; deliver all again."""
    for number, row in enumerate(KILLS):
        kill_at(WORK / f"kill.{number}", *row)
    print("kills:", len(KILLS), "of", len(KILLS))


def kill_at(folder: pathlib.Path, rule: str, short: bool, rotated: bool) -> None:
    server = serve(folder)
    log = folder / "events.jsonl"
    before = [kit.new_event() for _ in range(3)]
    bodies = [kit.new_event(pad="x" * 14_000) for _ in range(3)]
    assert all(server.deliver(body)[0] == 200 for body in before)
    with tailed(log) as shown:
        if rotated:
            log.rename(folder / "events.jsonl.1")
            log.touch(0o600)
        if short:
            server.limit("FSIZE", log.stat().st_size + 9000)
        with kit.faulty(server, rule):
            answers = [kit.outcome_of(server.port, body, kit.SECRET) for body in bodies]
        kill(server)

        server = serve(folder)
        outcomes = [server.becomes(body) for body in bodies]
        for answer, outcome in zip(answers, outcomes):
            assert answer != "recorded" or outcome == "duplicate", (answers, outcomes)
        assert {server.becomes(body) for body in bodies} == {"duplicate"}
        assert server.stop() == 0
        last = kit.sha256(bodies[-1]).encode()
        assert kit.until(lambda: last in shown.read_bytes())
    ids = SHOWN.findall(shown.read_bytes())
    assert len(ids) == len(set(ids))
    check(f"kill at {rule}, short {short}, rotated {rotated}",
          [kit.sha256(body) for body in before + bodies], *folder.glob("events.jsonl*"))


# --- Disks ---


@contextlib.contextmanager
def disk(kind: str, size: str) -> Iterator[pathlib.Path]:
    """Mount a small disk."""
    point = WORK / f"{kind}.{size}"
    point.mkdir()
    if kind == "tmpfs":
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
    else:
        image = WORK / f"{size}.img"
        with open(image, "wb") as file:
            file.truncate(int(size[:-1]) * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        words = ["mount", "-o", "loop", str(image), str(point)]
    subprocess.run(words, check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True)


def full() -> None:
    """Fill the disk; start on the full one; free it."""
    for kind, size in (("tmpfs", "64k"), ("tmpfs", "1m"), ("ext4", "8M")):
        with disk(kind, size) as point:
            (point / "filler").write_bytes(b"x" * 30_000)
            server = serve(WORK, "--log", str(point / "log"))
            load = Load(server, pad=700)
            load.waits_for_refusals(50)
            kill(server)
            load.stop()
            acknowledged = load.acknowledged
            server = serve(WORK, "--log", str(point / "log"))
            load = Load(server, pad=700)
            load.waits_for_refusals(50)
            (point / "filler").unlink()
            kit.grows(load.acknowledged, 5)
            load.stop()
            server.stop()
            check(f"full {kind} of {size}", acknowledged + load.acknowledged, point / "log",
                  last=dict(load.statuses))


def faults() -> None:
    """Let writes fail, and then syncs, which are final."""
    for rule in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG"):
        server = serve(WORK / rule)
        load = Load(server, 4)
        kit.grows(load.acknowledged, 50)
        with kit.faulty(server, f"write:error={rule}"):
            load.waits_for_refusals(20)
            assert kit.get(server, "/healthz")[0] == 503
        kit.grows(load.acknowledged, 50)
        load.stop()
        assert server.stop() == 0
        check(f"write {rule}", load.acknowledged, server.log, statuses=dict(load.statuses))
    for number, rule in enumerate(("fdatasync:error=EIO", "fdatasync:error=ENOSPC",
                                   "fdatasync:error=EDQUOT", "fsync:error=EIO")):
        fail_sync(WORK / f"sync.{number}", rule)


def fail_sync(folder: pathlib.Path, rule: str) -> None:
    """Let a sync fail: of a batch, or of the folder after a rotation (fsync)."""
    server = serve(folder, limits={"STOP_GRACE": 0.1})
    load = Load(server, 4)
    kit.grows(load.acknowledged, 50)
    with kit.faulty(server, f"{rule}:when=1"):
        if rule.startswith("fsync"):
            server.log.rename(folder / "events.jsonl.1")
        assert server.process.wait(40) == 1
    load.stop()
    assert "start again" in server.stderr()
    server = serve(folder)
    assert server.deliver(kit.new_event())[0] == 200 and server.stop() == 0
    check(rule, load.acknowledged, *folder.glob("events.jsonl*"), statuses=dict(load.statuses))


def slow() -> None:
    """Let one sync take 25 s, a disk freeze for 24 s, and SIGTERM come during a sync."""
    server, body = serve(WORK / "slow"), kit.new_event()
    with kit.faulty(server, "fdatasync:delay_enter=25000000:when=1"):
        print("one sync of 25 s:", time_delivery(server, body), "then", server.becomes(body))
    server.stop()
    for seconds in (6, 60):
        stop_during_sync(WORK / f"slow.{seconds}", seconds)
    with disk("ext4", "16M") as point:
        server = serve(WORK, "--log", str(point / "log"))
        assert server.deliver(kit.new_event())[0] == 200
        subprocess.run(["fsfreeze", "-f", point], check=True)
        thaw = threading.Timer(24, subprocess.run, [["fsfreeze", "-u", point]])
        thaw.start()
        answer = time_delivery(server, body)
        thaw.join()
        print("ext4 frozen for 24 s:", answer, "then", server.becomes(body), server.stop())


def time_delivery(server: Any, body: bytes) -> str:
    begun = time.monotonic()
    status = server.deliver(body)[0]
    return f"{status} after {time.monotonic() - begun:.1f} s"


def stop_during_sync(folder: pathlib.Path, seconds: int) -> None:
    server, body, answers = serve(folder), kit.new_event(), []
    state = pathlib.Path(f"/proc/{server.process.pid}/stat")

    def has_ended() -> bool:  # it is a zombie until strace lets its thread go
        return state.read_text().rpartition(")")[2].split()[0] == "Z"

    with kit.faulty(server, f"fdatasync:delay_enter={seconds}000000:when=1"):
        sender = kit.gather(1, lambda: answers.append(server.deliver(body)[0]))[0]
        assert kit.until(server.log.read_bytes)
        begun = time.monotonic()
        server.process.terminate()
        assert kit.until(has_ended, 40)
        took = time.monotonic() - begun
    sender.join()
    code = server.process.wait(60)
    print(f"SIGTERM during a sync of {seconds} s: exit {code} after {took:.1f} s, {answers}")


# --- Other files at the path ---


def replaced() -> None:
    """Put what is no log in the place of the log, in nineteen ways and more, under load."""
    folder = WORK / "replaced"
    old = folder / "old"
    server = serve(folder)
    old.mkdir()
    load = Load(server, 6)
    kit.grows(load.acknowledged, 50)
    ways = make_ways(server.log, old)
    for name, (act, is_log) in ways.items():
        swap(server.log, old, act)
        foreign = None if is_log or not server.log.is_file() else server.log.read_bytes()
        if is_log:
            kit.grows(load.acknowledged, 20)
        else:
            load.waits_for_refusals(20)
            assert kit.get(server, "/healthz")[0] == 503, name
            assert foreign is None or server.log.read_bytes() == foreign, name
            remove(server.log)
        kit.grows(load.acknowledged, 20)
    load.stop()
    assert server.stop() == 0
    found = [path for path in (server.log, *old.iterdir()) if not path.is_symlink()]
    logs = [path for path in found if path.is_file()]
    check(f"replaced in {len(ways)} ways", load.acknowledged, *logs, statuses=dict(load.statuses))


def make_ways(
    log: pathlib.Path, old: pathlib.Path
) -> dict[str, tuple[Callable[[], object], bool]]:
    """Return what is put at the path, by name, and whether it can be a log."""
    def bind() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(log))

    def lock() -> None:
        log.touch(exist_ok=False)
        fcntl.flock(os.open(log, os.O_RDONLY), fcntl.LOCK_EX)  # it stays open

    def write(data: bytes) -> None:
        whole = log.with_name("whole")
        whole.unlink(missing_ok=True)
        whole.write_bytes(data)
        os.link(whole, log)  # at once, and over nothing

    foreign = dict(kit.NOT_OURS, object=b"{}", random=os.urandom(5_000_000))
    return {
        "a pipe": (lambda: os.mkfifo(log), False),
        "a folder": (log.mkdir, False),
        "a socket": (bind, False),
        "/dev/full": (lambda: log.symlink_to("/dev/full"), False),
        "/dev/null": (lambda: log.symlink_to("/dev/null"), False),
        "a link to itself": (lambda: log.symlink_to(log), False),
        "a link to a folder": (lambda: log.symlink_to(WORK), False),
        "a link into no folder": (lambda: log.symlink_to(WORK / "none" / "x"), False),
        "a link to no file": (lambda: log.symlink_to(old / "target"), True),
        "a locked file": (lock, False),
        "nothing": (lambda: None, True),
        "an empty file": (lambda: log.touch(exist_ok=False), True),
        "a file of mode 0": (lambda: log.touch(0, exist_ok=False), True),
        **{name: (lambda data=data: write(data), False) for name, data in foreign.items()},
    }


def swap(log: pathlib.Path, old: pathlib.Path, act: Callable[[], object]) -> None:
    """Put something in the place of the log; the receiver makes a new one at once, meanwhile."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.replace(log, old / str(time.monotonic_ns()))
        with contextlib.suppress(FileExistsError):
            act()
            return


def remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def rotation() -> None:
    """Rename the log for 15 s, then have logrotate rotate it, under load."""
    folder = WORK / "rotation"
    server = serve(folder)
    load = Load(server)
    end, renamed = time.monotonic() + 15, 0
    while time.monotonic() < end:
        time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError):
            server.log.rename(folder / f"renamed.jsonl.{renamed}")
            renamed += 1
    rules = folder / "rules"
    text = kit.readme("logrotate.d").replace("/var/lib/skype-webhook/events.jsonl", str(server.log))
    for old, new in {"weekly": "hourly", "dateext": "nodateext", "rotate 26": "rotate 100"}.items():
        text = text.replace(old, new)
    rules.write_text(text)
    for _ in range(40):
        time.sleep(0.25)
        subprocess.run(["logrotate", "-f", "-s", folder / "state", rules], check=True)
    load.stop()
    assert server.stop() == 0
    check(f"rotation: renamed {renamed} times, 40 times by logrotate", load.acknowledged,
          *folder.glob("*.jsonl*"), statuses=dict(load.statuses))


def long() -> None:
    """Start on an empty log, and on long ones, with the page cache warm and dropped."""
    time_starts("an empty log", WORK / "empty")
    for size in (200 * 2**20, 2**30):
        folder = WORK / str(size)
        folder.mkdir()
        block = b"".join(kit.line_of(kit.new_event()) for _ in range(100_000))
        with open(folder / "events.jsonl", "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            while file.tell() < size:
                file.write(block)
        time_starts(f"{size >> 20} MiB, warm", folder)
        time_starts(f"{size >> 20} MiB, dropped", folder, dropped=True)
        (folder / "events.jsonl").unlink()


def time_starts(what: str, folder: pathlib.Path, dropped: bool = False) -> None:
    times, peaks = [], []
    for _ in range(5):
        os.sync()
        if dropped:
            pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        begun = time.monotonic()
        server = serve(folder)
        times.append((time.monotonic() - begun) * 1000)
        status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+)", status)
        peaks.append(int(peak[1]) / 1024 if peak else 0)
        assert server.stop() == 0
    print(f"start, {what}: {min(times):.0f} to {max(times):.0f} ms, {max(peaks):.0f} MiB at most")


CAMPAIGNS = {each.__name__: each
             for each in (crashes, kills, full, faults, slow, replaced, rotation, long)}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in sys.argv[1:] or CAMPAIGNS:
            CAMPAIGNS[name]()
    finally:
        for server in servers:
            server.process.kill()
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
