#!/usr/bin/env python3
"""Deliver through proxies that keep their connections to the receiver idle, just at their limit.

Each proxy has a receiver of its own, and keeps to its defaults. 48 senders deliver at about the
same time, wait as long as the proxy (or, by --seconds, the receiver) keeps an idle connection, give
or take 0.1 s, and deliver again: so the one closes a connection just when the other uses it. What
is not answered 200, or is missing in the log, was lost.

    .ci/idle_proxies.py                         480 deliveries through each proxy, 20 minutes
    .ci/idle_proxies.py --seconds 10 caddy      at another limit, through one of them
"""
from __future__ import annotations

import argparse
import collections
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import test_skype_webhook as kit

CADDY = """
{
    admin off
    auto_https off
}
https://localhost:PORT {
    tls CERT KEY
    reverse_proxy 127.0.0.1:RECEIVER
}
"""
TRAEFIK = CADDY.replace("RECEIVER", """RECEIVER {
        transport http {
            keepalive 90s
        }
    }""")  # Caddy as Traefik: both have Go's transport
NGINX = """
pid FOLDER/pid; error_log stderr; daemon off; master_process off;
events {}
http {
    access_log off; client_body_temp_path FOLDER; proxy_temp_path FOLDER;
    fastcgi_temp_path FOLDER; uwsgi_temp_path FOLDER; scgi_temp_path FOLDER;
    upstream skype_webhook {
        server 127.0.0.1:RECEIVER;
        keepalive 32;
    }
    server {
        listen 127.0.0.1:PORT ssl;
        ssl_certificate CERT;
        ssl_certificate_key KEY;
        location / {
            proxy_pass http://skype_webhook;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }
    }
}
"""
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend ends_tls
    bind 127.0.0.1:PORT ssl crt BOTH
    default_backend behind_proxy
backend behind_proxy
    server a 127.0.0.1:RECEIVER
"""
# Each row: the words that start a proxy, its configuration, and its idle limit in seconds.
PROXIES = {
    "caddy": (("caddy", "run", "--adapter", "caddyfile", "--config"), CADDY, 120.0),
    "traefik": (("caddy", "run", "--adapter", "caddyfile", "--config"), TRAEFIK, 90.0),
    "nginx": (("nginx", "-c"), NGINX, 60.0),
    "haproxy": (("haproxy", "-f"), HAPROXY, 5.0),  # its pool-purge-delay
}
SENDERS = 48


def start_proxy(name: str, folder: pathlib.Path, receiver: int) -> tuple[Any, int]:
    """Start a proxy in front of the receiver at a port; return its process, and its own port."""
    words, text, _ = PROXIES[name]
    cert, key = kit.make_certificate(folder)
    both = folder / "both.pem"
    both.write_bytes(pathlib.Path(cert).read_bytes() + pathlib.Path(key).read_bytes())
    port = kit.free_port()
    for word, value in (("PORT", port), ("RECEIVER", receiver), ("CERT", cert), ("KEY", key),
                        ("BOTH", both), ("FOLDER", folder)):
        text = text.replace(word, str(value))
    (folder / "proxy.conf").write_text(text)

    environment = {**kit.CLEAN, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with open(folder / "said", "wb") as said:
        words = (kit.program(words[0]), *words[1:], str(folder / "proxy.conf"))
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said)
    assert kit.until(lambda: kit.listens(port)), (folder / "said").read_text()
    return process, port


def deliver_at(seconds: float, port: int, rounds: int, acknowledged: list[str],
               answers: collections.Counter[str]) -> None:
    """Deliver `rounds` events, with pauses of about `seconds`; count what was answered."""
    for number in range(rounds):
        if number:
            time.sleep(seconds + random.uniform(-0.1, 0.1))
        body = kit.new_event()
        try:
            with kit.Peer(port) as peer:
                status = peer.ask(kit.post(body))
        except OSError as error:
            status = repr(error)
        answers[str(status)] += 1
        if status == 200:
            acknowledged.append(kit.sha256(body))


def run_campaign(name: str, seconds: float, rounds: int, results: list[str]) -> None:
    """Run one proxy's campaign, and add its result."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"idle_{name}."))
    server = kit.Server(folder, ("", ""), "--behind-proxy")
    process, port = start_proxy(name, folder, server.port)
    acknowledged: list[str] = []
    answers: collections.Counter[str] = collections.Counter()
    work = (seconds, port, rounds, acknowledged, answers)
    threads = [threading.Thread(target=deliver_at, args=work) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.terminate()
    process.wait()
    server.stop()

    lost = set(acknowledged) - set(server.ids())
    results.append(f"{name}: at {seconds:g} s {dict(answers)}, of which {len(lost)} not in the log")
    print(results[-1], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="PROXY", help=", ".join(PROXIES))
    parser.add_argument("--seconds", type=float, help="the pause (default: the proxy's limit)")
    parser.add_argument("--rounds", type=int, default=10, help=f"of {SENDERS} deliveries each")
    options = parser.parse_args()
    results: list[str] = []
    campaigns = []
    for name in options.names or PROXIES:
        work = (name, options.seconds or PROXIES[name][2], options.rounds, results)
        campaigns.append(threading.Thread(target=run_campaign, args=work))
        campaigns[-1].start()
    for campaign in campaigns:
        campaign.join()
    due = f"{{'200': {options.rounds * SENDERS}}}, of which 0 not"
    return 0 if all(due in result for result in results) and len(results) == len(campaigns) else 1


if __name__ == "__main__":
    sys.exit(main())
