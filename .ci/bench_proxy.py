#!/usr/bin/env python3
"""Measure the receiver behind nginx and HAProxy, which end TLS, on the work of ../shared/bench/run.

    .ci/bench_proxy.py --rounds 3 --seconds 2       from the project's root

Proxy and receiver share core 0, the load has core 1. All flags are those of ../shared/bench/run.
"""
from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys

BENCH = "../shared/bench/run"

NGINX = """
worker_processes 1; daemon off; master_process off; pid WORK/proxy.pid; error_log WORK/proxy.err;
events { worker_connections 1024; }
http {
    access_log off;
    upstream skype_webhook { server 127.0.0.1:RECEIVER; keepalive 32; }
    server {
        listen 127.0.0.1:PORT ssl;
        ssl_certificate WORK/cert.pem;
        ssl_certificate_key WORK/key.pem;
        keepalive_requests 10000000;
        location / {
            proxy_pass http://skype_webhook;
            proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
        }
    }
}
"""
HAPROXY = """
global
    nbthread 1
defaults
    timeout connect 5s
    timeout client 30s
    timeout server 30s
listen ends_tls
    mode http
    bind 127.0.0.1:PORT ssl crt WORK/both.pem
    option forwardfor
    server a 127.0.0.1:RECEIVER
"""
START = """
trap 'kill $receiver $proxy; wait; exit' TERM
PYTHON skype_webhook.py --behind-proxy --port RECEIVER --log WORK/NAME.jsonl & receiver=$!
until (echo > /dev/tcp/127.0.0.1/RECEIVER) 2>/dev/null; do sleep 0.02; done
PROXY & proxy=$!
wait
"""
PROXIES = {"nginx-front": ("nginx -c WORK/proxy.conf", NGINX),
           "haproxy-front": ("haproxy -db -f WORK/proxy.conf", HAPROXY)}


def filled(text: str, values: dict[str, str]) -> str:
    """Return a text with values in the place of its words in capitals."""
    for word, value in values.items():
        text = text.replace(word, value)
    return text


def main() -> int:
    loader = importlib.machinery.SourceFileLoader("bench", BENCH)
    spec = importlib.util.spec_from_loader("bench", loader)
    assert spec
    bench = importlib.util.module_from_spec(spec)
    loader.exec_module(bench)
    without = bench.command

    def command(name: str, port: int, work: pathlib.Path, python: str) -> list[str]:
        if name not in PROXIES:
            return list(without(name, port, work, python))
        start, configuration = PROXIES[name]
        pair = [(work / file).read_text() for file in ("cert.pem", "key.pem")]
        (work / "both.pem").write_text("".join(pair))
        values = {"PROXY": start, "PYTHON": python, "NAME": name, "WORK": str(work),
                  "RECEIVER": str(port + 20_000), "PORT": str(port)}
        (work / "proxy.conf").write_text(filled(configuration, values))
        (work / "start").write_text(filled(START, values))
        return ["bash", str(work / "start")]

    bench.command = command
    sys.argv += ["--peers", ",".join(PROXIES)]
    return int(bench.main())


if __name__ == "__main__":
    sys.exit(main())
