"""How a batcher ends: closed or dropped under an event loop, with the interpreter, in a fork."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proteus_fast import Batcher, Router


class Watching(asyncio.SelectorEventLoop):
    """A loop that knows which descriptors it watches."""

    def __init__(self) -> None:
        self.watched: set[Any] = set()
        super().__init__()

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        self.watched.add(fd)
        super().add_reader(fd, callback, *args)

    def remove_reader(self, fd: Any) -> bool:
        self.watched.discard(fd)
        return super().remove_reader(fd)


def test_no_loop_watches_for_a_batcher_that_is_gone() -> None:
    router = Router.load()
    loop = Watching()
    own = set(loop.watched)

    async def ask(batcher: Batcher) -> None:
        await batcher.route_async("word1", 0.5)
        assert len(loop.watched - own) == 1

    async def ask_in_vain(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match=r"^batcher: closed"):
            await batcher.route_async("word1", 0.5)

    async def use_and_drop() -> None:
        await ask(Batcher(router))
        gc.collect()

    try:
        batcher = Batcher(router)
        loop.run_until_complete(ask(batcher))
        batcher.close()
        # the loop has not seen that yet, then it has
        for _ in range(2):
            loop.run_until_complete(ask_in_vain(batcher))
            loop.run_until_complete(asyncio.sleep(0))
            assert loop.watched == own
        for _ in range(3):
            loop.run_until_complete(use_and_drop())
            loop.run_until_complete(asyncio.sleep(0))
            assert loop.watched == own
    finally:
        loop.close()
    # a batcher outlives a loop
    batcher = Batcher(router)
    asyncio.run(batcher.route_async("word1", 0.5))
    batcher.close()


@pytest.fixture
def program(tmp_path: Path) -> Any:
    def run(body: str) -> str:
        code = (
            "import os, signal, sys, threading, time\nimport numpy as np\nfrom proteus_fast import Router, _core\n"
            + body
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stderr == ""
        return done.stdout

    return run


def test_the_interpreter_ends_while_backends_run(program: Any) -> None:
    """Daemon threads wait in calls, an encoder is at work: neither a crash nor a hang."""
    body = """
router = Router.load()
begun = threading.Event()
def encode(texts):
    begun.set()
    time.sleep(0.05)
    return np.zeros((len(texts), router.input_dim), np.float32)
batcher = _core.Batcher(router.snapshot, encode=encode, lanes=2)
def ask():
    while True:
        try:
            batcher.route(["text"], None, 0.5)
        except RuntimeError:
            pass
for _ in range(4):
    threading.Thread(target=ask, daemon=True).start()
begun.wait()
print("end")
"""
    assert program(body) == "end\n"


def test_a_fork_is_told_so(program: Any) -> None:
    """Also where a thread waits in a call, for which the child's exit must not wait."""
    body = """
batcher = _core.Batcher(Router.load().snapshot, window_us=50_000_000)
waiting = threading.Thread(target=batcher.route, args=(["text"], None, 0.5))
waiting.start()
while batcher.stats()["queued_rows"] == 0:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    try:
        batcher.route(["text"], None, 0.5)
    except RuntimeError as error:
        os.write(1, str(error).encode())
    batcher.close()
    del batcher
    sys.exit(7)
end = time.monotonic() + 30
while not (ended := os.waitpid(child, os.WNOHANG))[0]:
    if time.monotonic() > end:
        os.kill(child, signal.SIGKILL)
    time.sleep(0.01)
assert os.waitstatus_to_exitcode(ended[1]) == 7
batcher.close()
waiting.join()
assert batcher.stats()["completed"] == 1
"""
    assert program(body) == "batcher: expected the process that made it, got a fork of it"
