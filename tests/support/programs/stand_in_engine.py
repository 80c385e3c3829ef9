"""Stands in for a serving engine: takes its flags, answers /health and /generate, and fails as it is asked to.

    stand_in_engine.py --port P --behaviour fine|crash|hang|crash-later|deaf [sglang-jax's flags]

`/generate` streams SGLang's events: the prompt's tokens, each one up, a few at a time, past `max_new_tokens` as its
DFLASH does. `crash` ends at once, `hang` never answers /health, `crash-later` ends at the first request, and `deaf`
ignores SIGTERM. A process of its own is started, which must not outlive it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROUND = 4
FLAGS = """--model-path --dtype --grammar-backend --disable-hybrid-swa-memory --max-running-requests --context-length
--page-size --chunked-prefill-size --max-prefill-tokens --host --speculative-algorithm --speculative-draft-model-path
--speculative-num-draft-tokens --speculative-eagle-topk --speculative-num-steps --disable-overlap-schedule
--decode-log-interval""".split()


def events(body):
    sampling = body["sampling_params"]
    most, stops = sampling["max_new_tokens"], sampling["stop_token_ids"]
    script = [token + 1 for token in body["input_ids"]] + list(range(100, 200))
    known = []
    while True:
        coming = script[len(known) : len(known) + ROUND]
        is_last = len(known) + ROUND >= most  # then the length ends it, and stop tokens are not looked for
        for token in coming:
            if token in stops and not is_last:
                yield {"output_ids": known, "meta_info": {"finish_reason": {"type": "stop", "matched": token}}}
                return
            known = [*known, token]
        if len(known) >= most:
            yield {"output_ids": known, "meta_info": {"finish_reason": {"type": "length", "length": most}}}
            return
        yield {"output_ids": known, "meta_info": {"finish_reason": None}}


class Handler(BaseHTTPRequestHandler):
    behaviour = "fine"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.behaviour == "crash-later":
            os._exit(7)
        if body["input_ids"][0] == 9:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": "no nines"}')
            return
        self.send_response(200)
        self.end_headers()
        for event in events(body):
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--behaviour", default="fine")
    for flag in FLAGS:  # sglang-jax 0.1.0rc0 has them
        parser.add_argument(flag, nargs="?")
    arguments = parser.parse_args()
    print("starting", os.environ.get("HF_TOKEN"), flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    if arguments.behaviour == "crash":
        print("cannot find the weights", flush=True)
        os._exit(3)
    if arguments.behaviour == "hang":
        time.sleep(600)
    if arguments.behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Handler.behaviour = arguments.behaviour
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
