"""Texts of a router over a transformer: decided as in process, many callers' in one encoder batch."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from proteus_fast import Router
from proteus_server import app
from proteus_server.client import Client
from tests import encoders

CANARY = "canary-51d0-the-prompt-of-a-user"
WORDS = [f"word{i}" for i in range(20)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make("bert", tmp_path_factory.mktemp("bert"), WORDS)


@pytest.fixture(scope="module")
def folder(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.save_router(bert, tmp_path_factory.mktemp("router") / "router")


@pytest.fixture
def served(folder: Path, socket_dir: Path) -> Iterator[tuple[Router, Client]]:
    router = Router.load(folder)
    with app.Server(router, f"unix:{socket_dir}/s").running() as place, Client(place, timeout_s=20.0) as client:
        yield router, client


def test_texts_get_the_router_s_decisions(served: Any) -> None:
    router, client = served
    assert client.info().takes_text
    assert client.healthy()
    for text, tau in zip(WORDS, (0.1, 0.5, 0.8, 0.95, 1.0) * 4, strict=True):
        mine, theirs = client.route(text, tau=tau), router.route(text, tau)
        for name in ("candidate", "mu", "score", "status", "certified_floor", "tau_max", "fallbacks"):
            assert getattr(mine, name) == getattr(theirs, name), name
        assert mine.timings.encode_ns > 0
    batch = client.route_batch(WORDS, tau=0.8)
    assert batch.choice.tolist() == router.route_batch(router.encode(WORDS), 0.8).choice.tolist()
    assert batch.timings.encode_ns > 0
    embedding = router.encode(["word3"])[0]
    assert client.route(embedding=embedding, tau=0.8).choice == router.route("word3", 0.8).choice


def test_callers_share_the_encoder(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    router, client = served
    encode = router._encoder.encode
    gate, calls = threading.Event(), []

    def held(texts: Any) -> Any:
        calls.append(len(texts))
        assert gate.wait(20.0)
        return encode(texts)

    expected = [router.route(word, 0.8).candidate for word in WORDS[:7]]
    monkeypatch.setattr(router._encoder, "encode", held)
    with ThreadPoolExecutor(7) as pool:
        first = pool.submit(client.route, WORDS[0], tau=0.8)
        end = time.monotonic() + 10.0
        while not calls:
            assert time.monotonic() < end
            time.sleep(0.001)
        others = [pool.submit(client.route, word, tau=0.8) for word in WORDS[1:7]]
        time.sleep(0.5)
        gate.set()
        assert [call.result().candidate for call in (first, *others)] == expected
    assert calls[0] == 1
    assert sum(calls) == 7
    assert len(calls) < 7


def test_a_failure_of_the_encoder_leaks_nothing(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router, client = served
    caplog.set_level(logging.DEBUG)

    def fail(texts: Any) -> Any:
        raise ValueError(texts[0])

    with monkeypatch.context() as patch:
        patch.setattr(router._encoder, "encode", fail)
        with pytest.raises(RuntimeError, match=r"^INTERNAL: internal error, reference [0-9a-f]{16}$"):
            client.route(CANARY, tau=0.5)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    line = record.getMessage()
    assert "type=RuntimeError" in line
    assert "from type=ValueError" in line
    assert "test_texts.py" in line
    assert CANARY not in caplog.text
    assert client.route("word1", tau=0.5).choice >= 0


def test_a_transformer_that_moved_is_named(
    folder: Path, bert: Path, tmp_path: Path, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, router = tmp_path / "moved", tmp_path / "router"
    shutil.copytree(bert, moved)
    shutil.copytree(folder, router)
    config = router / "config.json"
    config.write_text(config.read_text().replace(str(bert), str(tmp_path / "gone")))
    arguments = ["--address", f"unix:{socket_dir}/s", "--checkpoint", str(router)]
    assert app.main(arguments) == 1
    assert "proteus serve: encoder: expected a directory" in capsys.readouterr().err
    answers: list[str] = []

    def ask() -> None:
        try:
            with Client(f"unix:{socket_dir}/s", timeout_s=20.0) as client:
                while not client.healthy():
                    time.sleep(0.01)
                answers.append(client.route("word1", tau=0.8).candidate)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    caller = threading.Thread(target=ask)
    caller.start()
    assert app.main([*arguments, "--encoder", str(moved)]) == 0
    caller.join()
    assert answers == [Router.load(folder).route("word1", 0.8).candidate]


def test_a_hash_router_is_served_without_torch(tmp_path: Path, socket_dir: Path) -> None:
    code = (
        "import sys\n"
        "from proteus_fast.router import Router\n"
        "from proteus_server import app\n"
        "from proteus_server.client import Client\n"
        f"with app.Server(Router.load(), 'unix:{socket_dir}/s').running() as place, Client(place) as client:\n"
        "    client.route('a text', tau=0.5, timeout_s=20.0)\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.gpu
def test_texts_that_a_gpu_encodes(folder: Path, socket_dir: Path) -> None:
    router = Router.load(folder, "cuda")
    server = app.Server(router, f"unix:{socket_dir}/s", checkpoint=str(folder), device="cuda")
    with server.running() as place, Client(place, timeout_s=60.0) as client:
        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                theirs = list(pool.map(lambda text: client.route(text, tau=0.8), WORDS))
            for text, decision in zip(WORDS, theirs, strict=True):
                mine = router.route(text, 0.8)
                assert (decision.candidate, decision.status) == (mine.candidate, mine.status)
                assert decision.score == pytest.approx(mine.score, abs=1e-5)
            server.control.reload("")
        assert client.info().versions.generation == 3
