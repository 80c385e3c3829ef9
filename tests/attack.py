"""Attacks a server on this machine while good clients use it: `make attack`.

    python -m tests.attack --seconds 60 [overrides of the served configuration]

Starts `stage=serve` and asks for answers one after another. Then 64 and 256 streams ask for them at once, of which 30%
are broken off, and 32 streams ask for them again and again while half-open connections, slow writers, clients that
never read, large bodies, large headers, pipelined requests, broken JSON and broken-off requests arrive. Every answer
must be the one that it was before, no page may be lost, and every attack must get a 4xx or be closed. Prints a table;
exits with 1 otherwise.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

NUM_GOOD, NUM_TOKENS = 32, 48
NUM_STREAMS, SHARE_BROKEN_OFF, LENGTHS = (64, 256), 0.3, (12, 24, NUM_TOKENS)
NUM_HALF_OPEN = 500
START_SECONDS = 600
BODY_BYTES, HEADER_BYTES = 60_000_000, 1_000_000
WORDS = ("alpha", "beta", "17", "+", "naïve", "東京", "sum", "the", "of", "?", "\n", "<|end|>")


class Server:
    """`stage=serve` in a process of its own."""

    def __init__(self, overrides):
        wanted = ["stage=serve", "serve.port=0", "serve.client_seconds=5", *overrides]
        self.process = subprocess.Popen([sys.executable, "-m", "pipeline", *wanted], stdout=subprocess.PIPE, text=True)
        self.port, deadline = None, time.monotonic() + START_SECONDS
        while self.port is None:
            line = self.process.stdout.readline()
            if not line or time.monotonic() > deadline:
                raise SystemExit("the server did not start; run stage=all first")
            found = re.search(r"serving (\S+) .*http://127.0.0.1:(\d+)", line)
            if found:
                self.model, self.port = found[1], int(found[2])

    @property
    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


class Attack:
    """Good clients and bad ones; `outcomes` counts what the bad ones got."""

    def __init__(self, model, port):
        self.model, self.port, self.draw = model, port, random.Random(0)
        self.outcomes = collections.defaultdict(collections.Counter)
        self.gaps, self.waits, self.num_wrong, self.num_answers = [], [], 0, 0

    def body(self, index, num_tokens=NUM_TOKENS):
        prompt = f"What is {index} + {index + 7}?"
        messages = [{"role": "user", "content": prompt}]
        return {
            "model": self.model, "messages": messages, "temperature": 0, "max_tokens": num_tokens, "stream": True
        }  # fmt: skip

    async def answer(self, client, index, num_tokens=NUM_TOKENS, lines_read=None):
        """Returns a stream's text, and notes the time between its chunks once it has begun to write.

        None is the text of a stream that is broken off after `lines_read` lines.
        """
        text, last, num_lines = "", None, 0
        async with client.stream("POST", "/v1/chat/completions", json=self.body(index, num_tokens)) as reply:
            async for line in reply.aiter_lines():
                num_lines += 1
                if num_lines == lines_read:
                    return None
                if line.startswith("data: {"):
                    now = time.monotonic()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return chunk["error"]["message"]
                    delta = chunk["choices"][0]["delta"]
                    text += delta.get("content") or delta.get("reasoning") or ""
                    if not text:
                        last = None  # it waits for a slot
        return text

    async def good(self, wanted, until):
        """Keeps 32 streams open; counts answers that are not the wanted ones."""

        async def one(client, index):
            while time.monotonic() < until:
                found = await self.answer(client, index)
                self.num_answers += 1
                self.num_wrong += found != wanted[index]

        async with self.client() as client:
            await asyncio.gather(*(one(client, index) for index in range(NUM_GOOD)))

    async def many(self, wanted, count, until):
        """Keeps `count` streams of mixed lengths open, 30% of them broken off; returns how they ended."""
        ends = collections.Counter(right=0, wrong=0, broken_off=0)

        async def one(client):
            while time.monotonic() < until:
                index, num_tokens = self.draw.randrange(NUM_GOOD), self.draw.choice(LENGTHS)
                leaves = self.draw.random() < SHARE_BROKEN_OFF
                lines_read = self.draw.randrange(1, num_tokens // 2) if leaves else None
                found = await self.answer(client, index, num_tokens, lines_read)
                right = "right" if found == wanted[index, num_tokens] else "wrong"
                ends["broken_off" if found is None else right] += 1

        async with self.client(count) as client:
            await asyncio.gather(*(one(client) for _ in range(count)))
        return ends

    async def when_idle(self):
        """Returns how many pages are free once no request runs or waits; a request that stays is an error."""
        async with self.client() as client:
            for _ in range(100):
                text = (await client.get("/metrics")).text
                free, running, waiting = (
                    float(re.search(rf"^serve_{name} (\S+)", text, re.MULTILINE)[1])
                    for name in ("pages_free", "requests_running", "requests_waiting")
                )
                if not running and not waiting:
                    return free
                await asyncio.sleep(0.1)
        raise SystemExit(f"{running:g} requests still run and {waiting:g} wait, though their clients have left")

    def client(self, connections=NUM_GOOD):
        limits = httpx.Limits(max_connections=connections)
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=300, limits=limits)

    async def raw(self, name, sent, *, reads=True, pieces=1, pause=0.0):
        """Sends bytes over a connection of its own, in pieces, and counts what comes back."""
        status = "closed"
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            size = max(len(sent) // pieces, 1)
            for start in range(0, len(sent), size):
                writer.write(sent[start : start + size])
                await writer.drain()
                await asyncio.sleep(pause)
            if reads:
                line = await asyncio.wait_for(reader.readline(), 60)
                status = line.split()[1].decode() if line else "closed"
            else:
                await asyncio.sleep(12)
            writer.close()
        self.outcomes[name][status] += 1

    async def pipelined(self):
        """Sends three requests at once over one connection, and counts the answers, which come in turn."""
        short = json.dumps(self.body(4) | {"stream": False, "max_tokens": 2}).encode()
        ask = b"GET /%s HTTP/1.1\r\nHost: x\r\n%s\r\n"
        sent = ask % (b"health", b"") + self.request(short) + ask % (b"nothing", b"Connection: close\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        found = re.findall(rb"HTTP/1.1 (\d+)", await asyncio.wait_for(reader.read(), 60))
        writer.close()
        self.outcomes["pipelined"][", ".join(code.decode() for code in found)] += 1

    def request(self, content, **headers):
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *lines, "", ""]
        return "\r\n".join(head).encode() + content

    def fuzzed(self):
        """Returns a body that is wrong somewhere, most of the time."""
        value = self.body(0) | {"stream": False, "max_tokens": 1}
        for _ in range(self.draw.randrange(1, 4)):
            key = self.draw.choice(
                [*value, "n", "tools", "stop", "logit_bias", "top_p", "seed", "x", "response_format"]
            )
            odd = (None, -1, 2**70, 1e400, "x", [], {}, [[]], {"a": {"b": [1]}}, True, "\ud800", [{"role": 5}])
            value[key] = self.draw.choice(odd)
        content = json.dumps(value).encode()
        if self.draw.random() < 0.3:
            content = content[: self.draw.randrange(len(content))]
        return content

    async def health(self, until):
        """Asks how the server is, again and again, and notes how long it takes to say so."""
        async with self.client() as client:
            while time.monotonic() < until:
                started = time.monotonic()
                (await client.get("/health")).raise_for_status()
                self.waits.append(time.monotonic() - started)
                await asyncio.sleep(0.05)

    async def attacks(self, until):
        """Runs every kind again and again."""
        large = json.dumps(self.body(0) | {"messages": [{"role": "user", "content": "x" * BODY_BYTES}]}).encode()
        long_text = " ".join(self.draw.choices(WORDS, k=400_000))
        long_prompt = json.dumps(self.body(0) | {"messages": [{"role": "user", "content": long_text}]}).encode()
        unread = json.dumps(self.body(1) | {"ignore_eos": True, "logprobs": True, "top_logprobs": 20}).encode()
        kinds = {
            "half-open": lambda: self.raw("half-open", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: "),
            "slow writer": lambda: self.raw("slow writer", self.request(b"{" * 5000), pieces=5000, pause=0.01),
            "never reads": lambda: self.raw("never reads", self.request(unread), reads=False),
            "60 MB body": lambda: self.raw("60 MB body", self.request(large), pieces=1000),
            "3 MB prompt": lambda: self.raw("3 MB prompt", self.request(long_prompt)),
            "1 MB headers": lambda: self.raw("1 MB headers", self.request(b"{}", X="x" * HEADER_BYTES), pieces=100),
            "fuzzed": lambda: self.raw("fuzzed", self.request(self.fuzzed())),
            "broken off": lambda: self.broken_off(),
            "pipelined": lambda: self.pipelined(),
        }
        counts = {"half-open": NUM_HALF_OPEN, "slow writer": 20, "never reads": 8, "fuzzed": 8, "broken off": 4}

        async def repeat(name):
            while time.monotonic() < until:
                await kinds[name]()
                await asyncio.sleep(0.01)

        await asyncio.gather(*(repeat(name) for name in kinds for _ in range(counts.get(name, 1))))

    async def broken_off(self):
        async with self.client() as client:
            async with client.stream("POST", "/v1/chat/completions", json=self.body(3)) as reply:
                async for _ in reply.aiter_lines():
                    break
            self.outcomes["broken off"][str(reply.status_code)] += 1


async def run(server, seconds) -> bool:
    """The good clients; the bad ones have a process of their own, so as not to slow these down themselves."""
    good = Attack(server.model, server.port)
    async with good.client(1) as client:
        asked = [(index, num_tokens) for index in range(NUM_GOOD) for num_tokens in LENGTHS]
        alone = {one: await good.answer(client, *one) for one in asked}
    wanted = [alone[index, NUM_TOKENS] for index in range(NUM_GOOD)]
    pages, holds = await good.when_idle(), True
    for count in NUM_STREAMS:
        ends = await good.many(alone, count, time.monotonic() + seconds / 8)
        lost = pages - await good.when_idle()
        print(f"{count:<3} streams       {dict(ends)}; {lost:g} pages lost")
        holds = holds and ends["right"] > 0 and ends["wrong"] == 0 and lost == 0
    good.gaps = []
    until = time.monotonic() + seconds / 4
    await asyncio.gather(good.good(wanted, until), good.health(until))
    calm, memory = (good.gaps, good.waits), server.memory_mib
    good.gaps, good.waits, before = [], [], good.num_answers
    command = [sys.executable, "-m", "tests.attack", "--seconds", str(seconds), "--on", f"{server.model}:{server.port}"]
    attackers = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    await attackers.stdout.readline()
    until = time.monotonic() + seconds
    peak, done = memory, asyncio.gather(good.good(wanted, until), good.health(until))
    while not done.done():
        await asyncio.wait({done}, timeout=0.5)
        peak = max(peak, server.memory_mib)
    done.result()
    outcomes = json.loads((await attackers.communicate())[0])
    await asyncio.sleep(6)  # the last slow clients are closed
    print(f"good answers      {good.num_answers - before} under attack, {before} before; {good.num_wrong} wrong")
    for name, (gaps, waits) in (("before", calm), ("under attack", (good.gaps, good.waits))):
        print(f"{name:<18}between chunks {_percentiles(gaps)}; /health {_percentiles(waits)}")
    print(f"memory            {memory:.0f} MiB before, {peak:.0f} at most, {server.memory_mib:.0f} after")
    odd = 0
    for name, found in outcomes.items():
        print(f"{name:<18}{', '.join(f'{count} x {status}' for status, count in found.items())}")
        odd += sum(count for status, count in found.items() if re.search(r"\b5\d\d", status))
    lost = pages - await good.when_idle()
    print(f"pages             {pages:g} free before, {lost:g} lost")
    return holds and good.num_wrong == 0 and odd == 0 and lost == 0


def attack_alone(on: str, seconds: float) -> None:
    """Attacks the server of MODEL:PORT and prints what came of it, as JSON."""
    model, port = on.rsplit(":", 1)
    bad = Attack(model, int(port))
    print("begun", flush=True)
    asyncio.run(bad.attacks(time.monotonic() + seconds))
    print(json.dumps({name: dict(found.most_common()) for name, found in bad.outcomes.items()}))


def _percentiles(seconds):
    cut = statistics.quantiles(seconds, n=100)
    return f"{1000 * cut[49]:.0f} ms (p99 {1000 * cut[98]:.0f} ms)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--on", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.on:
        attack_alone(arguments.on, arguments.seconds)
        return
    server = Server(overrides)
    try:
        holds = asyncio.run(run(server, arguments.seconds))
    finally:
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
    print(f"the server ended with {code}")
    raise SystemExit(0 if holds and code == 0 else 1)


if __name__ == "__main__":
    main()
