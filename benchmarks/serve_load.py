"""How ``snapgen-mlx serve`` stands many clients and bad requests, on this machine alone.

python benchmarks/serve_load.py [--seconds 300] [--clients 50] [--abuse 10000]

Starts servers on 127.0.0.1, draws with the bare pipeline, then with many clients at once, sends
bad requests of every kind while some go on drawing, and prints a table. Exit code 1 for a wrong
status, a dead server, or memory that grew by more than 5 %.
"""

import argparse
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

COMMAND = "from snapgen_mlx.cli.main import main; main()"
DRAW = "/v1/images/generations"
TOKEN = "correcthorse"


def start(gallery: str, *options: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--port", "0", "--gallery", gallery, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    return process, process.stdout.readline().split()[1].partition("?")[0].rstrip("/")


def resident(pid: int) -> float:
    """Megabytes of memory of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def bare(count: int) -> list[float]:
    from snapgen_mlx import Pipeline

    pipe, seconds = Pipeline.load(None), []
    for seed in range(count + 3):
        began = time.perf_counter()
        pipe.generate("a smiling cat", seed=seed)
        seconds.append(time.perf_counter() - began)
    return seconds[3:]


def load(address: str, clients: int, seconds: float) -> tuple[list[float], Counter]:
    latencies, statuses, until = [], Counter(), time.monotonic() + seconds

    def client():
        with httpx.Client(base_url=address, timeout=900) as http:  # above the server's own
            while time.monotonic() < until:
                began = time.perf_counter()
                body = {"prompt": "a smiling cat", "seed": random.randrange(10**6)}
                statuses[http.post(DRAW, json=body).status_code] += 1
                latencies.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, statuses


def raw(address: str, data: bytes, wait: bool = True) -> int:
    """Status that bytes on a connection get; 0 for a connection that was only closed."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as s:
        try:
            s.sendall(data)
            answer = s.recv(64) if wait else b""
        except ConnectionError:
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def abuses(address: str, locked: str) -> dict:
    """By kind: a function that sends one bad request, and the statuses that are right."""
    http, local = httpx.Client(base_url=address, timeout=120), b"Host: 127.0.0.1\r\n"
    asking = httpx.Client(base_url=locked, timeout=120)
    as_json = {"content-type": "application/json"}
    head = f"POST {DRAW} HTTP/1.1\r\n".encode() + local
    bodies = [b"{", b"[]", b"\xff", b"[" * 5000, b'{"prompt": 7}', b'{"prompt": "cat", "n": 1e9}']
    bodies += [b'{"prompt": "cat", "size": "9x9"}', b'{"prompt": "\\ud800"}', b""]
    paths = ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/gallery/..%2f..%2fx", "//etc"]

    def cancelled():
        body = {"prompt": "cat", "stream": True, "progress": True, "keep": False}
        with http.stream("POST", DRAW, json=body) as response:
            return response.status_code

    def post(**headers):
        return http.post(DRAW, json={"prompt": "cat"}, headers=headers).status_code

    def malformed():
        return http.post(DRAW, content=random.choice(bodies), headers=as_json).status_code

    def path():
        line = f"GET {random.choice(paths)} HTTP/1.1\r\n".encode()
        return raw(address, line + local + b"Connection: close\r\n\r\n")

    def token():
        headers = {"authorization": f"Bearer {random.random()}"}
        return asking.post(DRAW, json={"prompt": "cat"}, headers=headers).status_code

    # A client that stops in the middle of its body or headers and goes away.
    half = [head + b"Content-Length: 100\r\n\r\n{", head[:20], b"\x16\x03\x01\x00", b""]
    huge = head + b"Content-Length: 99999999999\r\n\r\n{"
    return {
        "malformed": (malformed, {400}),
        "huge body": (lambda: raw(address, huge), {413}),
        "gone in the middle": (lambda: raw(address, random.choice(half), wait=False), {0}),
        "path tricks": (path, {404}),
        "cancelled stream": (cancelled, {200, 429}),
        "wrong token": (token, {401}),
        "other origin": (lambda: post(origin="https://evil.example"), {403}),
        "other host": (lambda: post(host="evil.example"), {421}),
        "no HTTP": (lambda: raw(address, b"\x00\r\n\r\n"), {400}),
    }


def send_all(kinds: list, count: int) -> dict[str, Counter]:
    """Statuses of so many bad requests by kind, of 20 clients."""
    found: dict[str, Counter] = {name: Counter() for name, _ in kinds}

    def send(i):
        name, (request, _) = kinds[i % len(kinds)]
        return name, request()

    # A refused request may take a second, in which its body may still arrive.
    with ThreadPoolExecutor(20) as pool:
        for name, status in pool.map(send, range(count)):
            found[name][status] += 1
    return found


def slow(address: str, count: int) -> Counter:
    """Connections that send a header line now and then, for ever: closed in the end."""
    host, port = address.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port))) for _ in range(count)]
    closed, until = 0, time.monotonic() + 30
    while connections and time.monotonic() < until:
        time.sleep(1)
        for s in list(connections):
            try:
                s.sendall(b"x")
                s.setblocking(False)
                if s.recv(1) == b"":
                    raise ConnectionError
            except BlockingIOError:
                s.setblocking(True)
            except OSError:
                closed += 1
                connections.remove(s)
                s.close()
    return Counter(closed=closed, open=len(connections))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--abuse", type=int, default=10000)
    args = parser.parse_args()
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        drawn = bare(20)
        server, address = start(f"{folder}/a")
        guarded, locked = start(f"{folder}/b", "--token", TOKEN)
        try:
            kinds = list(abuses(address, locked).items())
            load(address, args.clients, min(20, args.seconds / 5))  # memory settles
            send_all(kinds, args.abuse // 10)
            before = resident(server.pid)
            latencies, statuses = load(address, args.clients, args.seconds)
            after = resident(server.pid)
            print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")
            print(f"bare pipeline: p50 {statistics.median(drawn):.3f} s a picture")
            print(
                f"{args.clients} clients, {args.seconds:.0f} s: {dict(statuses)}, "
                f"{len(latencies) / args.seconds:.1f} pictures/s, "
                f"p50 {quantile(latencies, 0.5):.2f} s, p99 {quantile(latencies, 0.99):.2f} s"
            )
            print(f"memory: {before:.0f} MB before, {after:.0f} MB after")
            if set(statuses) != {200} or after > 1.05 * before:
                bad.append("load")
            found = send_all(kinds, args.abuse)
            for name, (_, right) in kinds:
                print(f"{name}: {dict(found[name])}")
                if not found[name].keys() <= right:
                    bad.append(name)
            print(f"slow headers: {dict(slow(address, 50))}")
            last = resident(server.pid)
            print(f"memory: {last:.0f} MB after {args.abuse} bad requests")
            if last > 1.05 * before:
                bad.append("memory after bad requests")
            if httpx.get(f"{address}/health").json()["status"] != "ok":
                bad.append("health")
            server.send_signal(signal.SIGTERM)
            if server.wait(60) != 0:
                bad.append("stop")
        finally:
            for process in (server, guarded):
                process.kill()
    print("wrong: " + ", ".join(bad) if bad else "all as it should be")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
