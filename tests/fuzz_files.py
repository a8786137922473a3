"""Fuzzes what reads files, by hand: `python tests/fuzz_files.py TARGET FOLDER [libFuzzer's flags]`.

Inputs that reach new code are kept in FOLDER. It needs atheris (`pip install atheris`), which the package does not, and
a plain install of the package, as atheris does not see into an editable one; `test_fuzz_files.py` runs a few mutations
without. Whatever the bytes, a reader succeeds, or raises a built-in exception whose text says what was expected and
what came, within two seconds and a gigabyte.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_SECONDS = 2.0
MOST_BYTES = 1 << 30
_FOLDER = Path(tempfile.mkdtemp(prefix="proteus-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
_CHECKPOINT = ("config.json", "certificate.json", "model.safetensors")


class Finding(AssertionError):
    """What should not have happened."""


class Target(NamedTuple):
    """seeds: makes inputs to begin with. mutate: makes another input of one. run: raises where a promise is broken."""

    seeds: Callable[[], Iterator[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[bytes], bool]


def _refused(call: Callable[[], Any], kinds: Sequence[type[Exception]]) -> Any:
    """The result of a reader, None where it refused its input as it should."""
    begin = time.process_time()
    try:
        return call()
    except tuple(kinds) as error:
        message = str(error)
        if type(error) not in kinds:
            raise Finding(f"a {type(error).__name__} is not documented: {message[:300]!r}") from error
        if not re.search(r"^[^\n]+: expected .+, got:? .+", message, re.DOTALL) and not isinstance(error, OSError):
            raise Finding(f"a message without what was expected: {message[:300]!r}") from error
        message.encode()
        if len(message) > 2000:
            raise Finding(f"a message of {len(message)} characters: {message[:300]!r}") from error
        return None
    finally:
        took = time.process_time() - begin
        if took > MOST_SECONDS:
            raise Finding(f"{took:.1f} s")


def pack(files: Sequence[bytes], signed: bool = True) -> bytes:
    """The three files of a checkpoint as one input; signed: the hashes in config.json are made right first."""
    return bytes([signed]) + b"".join(struct.pack("<I", len(file)) + file for file in files)


def unpack(data: bytes) -> tuple[list[bytes], bool]:
    files, at = [], 1
    for _ in _CHECKPOINT:
        size = int.from_bytes(data[at : at + 4], "little")
        files.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return files, data[:1] != b"\0"


def _checkpoint_seeds() -> Iterator[bytes]:
    from proteus_fast import checkpoint
    from tests.checkpoints import tiny_checkpoint

    for encoder, mode, head, projection in itertools.product(
        ("hash", "none"), ("dual", "policy"), ("residual", "free", None), ("none", "mlp")
    ):
        if mode == "policy" and head is None:
            continue
        made = tiny_checkpoint(encoder=encoder, mode=mode, dim=4)
        config = replace(made.config, head=head, projection=projection, link="sigmoid" if head == "free" else "clip")
        tensors, certificate = dict(made.tensors), made.certificate
        if head is None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("policy.")}
            certificate = replace(
                certificate, paths={"dual": certificate.paths["dual"]}, tables={"dual": certificate.tables["dual"]}
            )
        if projection == "mlp":
            tensors |= {f"projection.{name}": np.eye(4, dtype=np.float32) for name in ("w1", "w2")}
            tensors |= {f"projection.{name}": np.ones(4, np.float32) for name in ("b1", "b2", "ln_weight", "ln_bias")}
        checkpoint.save(replace(made, config=config, tensors=tensors, certificate=certificate), _FOLDER / "seed")
        yield pack([(_FOLDER / "seed" / name).read_bytes() for name in _CHECKPOINT])


def _mutate_checkpoint(data: bytes, rng: random.Random) -> bytes:
    from tests.mutations import mutate_json, mutate_safetensors

    files, signed = unpack(data)
    which = rng.choice((0, 0, 1, 1, 2, 2, 2))
    files[which] = (mutate_safetensors if which == 2 else mutate_json)(files[which], rng)
    return pack(files, signed if rng.random() < 0.99 else not signed)


def _sign(files: list[bytes]) -> None:
    try:
        config = json.loads(files[0])
        hashes = config["sha256"]
        for name, file in zip(_CHECKPOINT[1:], files[1:], strict=True):
            if isinstance(hashes[name], str) and len(hashes[name]) == 64:
                # in place, so that the rest stays the text that it was
                files[0] = files[0].replace(hashes[name].encode(), sha256(file).hexdigest().encode())
    except (ValueError, KeyError, TypeError, RecursionError):
        return


def _run_checkpoint(data: bytes) -> bool:
    from proteus_fast.router import Router

    files, signed = unpack(data)
    if signed:
        _sign(files)
    folder = _FOLDER / "router"
    folder.mkdir(exist_ok=True)
    for name, file in zip(_CHECKPOINT, files, strict=True):
        (folder / name).write_bytes(file)
    router = _refused(lambda: Router.load(folder), (ValueError, FileNotFoundError))
    if router is None:
        return False
    begin = time.process_time()
    _use(router, random.Random(len(data)))
    if time.process_time() - begin > MOST_SECONDS:
        raise Finding("a router that is slow")
    return True


def _use(router: Any, rng: random.Random) -> None:
    """What a loaded router has to be able to do."""
    from proteus_fast import checkpoint

    k, taus = len(router.pool), np.array([0.0, 0.5, 0.9, 1.0])
    rows = np.zeros((4, router.input_dim), np.float32)
    for mode, guarantee in itertools.product(router.certificate.paths, ("certified", "calibrated")):
        for sample in (False, True) if mode == "policy" else (False,):
            found = router.route_batch(rows, taus, mode=mode, guarantee=guarantee, sample=sample, seed=1)
            fits = (found.choice >= 0) & (found.choice < k) & (found.status >= 1) & (found.status <= 3)
            fits &= (found.mu >= 0) & (found.mu <= 1) & np.isfinite(found.score)
            fits &= np.isnan(found.certified_floor) | ((found.certified_floor >= 0) & (found.certified_floor <= 1))
            if not fits.all():
                raise Finding(f"{mode}, {guarantee}, sample={sample}: {found}")
        cost = router.certificate.expected_cost_usd(mode, guarantee)
        if not (np.isfinite(cost).all() and np.all(np.diff(cost) >= 0)):
            raise Finding(f"{mode}, {guarantee}: expected costs that fall")
    if router.checkpoint.config.encoder == "hash":
        texts = ["", "a", "What is 2 + 2? " * rng.randrange(2000)]
        if not np.isfinite(router.encode(texts)).all():
            raise Finding("an embedding that is not finite")
        if router.route(texts[2], 0.5).candidate not in router.pool.names:
            raise Finding("a candidate of no pool")
    # names and versions go into messages of the protocol, which are UTF-8
    "".join((*router.pool.names, *router.versions.values(), router.checkpoint.config.data_set)).encode()
    if rng.randrange(8) == 0:
        router.save(_FOLDER / "again")
        again = checkpoint.load(_FOLDER / "again")
        if checkpoint.certificate_digest(again.certificate) != checkpoint.certificate_digest(router.certificate):
            raise Finding("another certificate after a round trip")


def _config_seeds() -> Iterator[bytes]:
    from proteus_server.config import SETTINGS

    examples = {str: "'localhost:0'", int: "1", float: "0.5", bool: "true"}
    whole = [f"{each.name} = " + (f"'{each.choices[0]}'" if each.choices else examples[each.kind]) for each in SETTINGS]
    yield "\n".join(whole).encode()
    yield b'# a comment\naddress = "unix:/tmp/s"\n\nworkers = 3\ndrain-seconds = 4\n'
    yield b"address = '''\n[::1]:0'''\naccess-log-sample = 1e-3\nmax-queue = 0x10\n"


def _mutate_config(data: bytes, rng: random.Random) -> bytes:
    from tests.mutations import mutate_toml

    return mutate_toml(data, rng)


def _run_config(data: bytes) -> bool:
    from proteus_server import address, config

    file = _FOLDER / "server.toml"
    file.write_bytes(data)
    settings = _refused(lambda: config.read(str(file)), (ValueError,))
    if settings is None:
        return False
    _refused(lambda: config.options_of(settings), (ValueError,))
    for name in ("address", "admin_address", "metrics_address"):
        if name in settings:
            _refused(lambda name=name: address.parse(settings[name], name), (ValueError,))  # type: ignore[misc]
    return True


def _encoder_seeds() -> Iterator[bytes]:
    yield b'{"model_type": "bert", "hidden_size": 32, "max_position_embeddings": 40}'
    yield b'{"model_type": "roberta", "hidden_size": 32, "max_position_embeddings": 514, "layers": [1, 2, null]}'


def _mutate_encoder(data: bytes, rng: random.Random) -> bytes:
    from tests.mutations import mutate_bytes, mutate_json

    return (mutate_bytes if rng.random() < 0.2 else mutate_json)(data, rng)


def _run_encoder(data: bytes) -> bool:
    from proteus_fast.encoder import describe

    folder = _FOLDER / "encoder"
    folder.mkdir(exist_ok=True)
    for name, file in (("config.json", data), ("tokenizer.json", b"{}"), ("model.safetensors", b"")):
        (folder / name).write_bytes(file)
    return _refused(lambda: describe(folder), (ValueError, FileNotFoundError)) is not None


def _table_seeds() -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": ["a", "what is ä?", "a"], "task": ["x", "y", "x"]}
    columns |= {f"{kind}:{name}": [0.0, 0.5, 1.0] for kind in ("score", "cost") for name in ("small", "large")}
    odd = {"prompt": pyarrow.array(["a", "b"]).dictionary_encode(), "score:a": pyarrow.array([True, False])}
    odd |= {"cost:a": pyarrow.array([1, 2]), "other": pyarrow.array([[1], None])}
    for table, compression in itertools.product((columns, odd), ("none", "snappy")):
        pyarrow.parquet.write_table(pyarrow.table(table), _FOLDER / "seed.parquet", compression=compression)
        yield (_FOLDER / "seed.parquet").read_bytes()


def _mutate_table(data: bytes, rng: random.Random) -> bytes:
    from tests.mutations import mutate_bytes

    for _ in range(rng.choice((1, 1, 2, 4))):
        data = mutate_bytes(data, rng)
    return data


def _run_table(data: bytes) -> bool:
    from proteus_fast.evaluation.outcomes import fold_of, read_table
    from proteus_fast.training.distil import read_prompts

    file = _FOLDER / "table.parquet"
    file.write_bytes(data)
    table = _refused(lambda: read_table(file), (ValueError, FileNotFoundError))
    prompts = _refused(lambda: read_prompts(file, ["a"]), (ValueError, FileNotFoundError))
    if table is not None:
        if not (np.isfinite(table.score).all() and np.isfinite(table.cost_usd).all() and len(table.sha256) == 64):
            raise Finding("a table with other numbers")
        fold_of(table.prompts)
    return table is not None or prompts is not None


TARGETS = {
    "checkpoint": Target(_checkpoint_seeds, _mutate_checkpoint, _run_checkpoint),
    "config": Target(_config_seeds, _mutate_config, _run_config),
    "encoder": Target(_encoder_seeds, _mutate_encoder, _run_encoder),
    "table": Target(_table_seeds, _mutate_table, _run_table),
}
MODULES = {
    "checkpoint": ("proteus_fast.router", "safetensors.numpy"),
    "config": ("proteus_server.config", "proteus_server.address"),
    "encoder": ("proteus_fast.encoder",),
    "table": ("proteus_fast.evaluation.outcomes", "proteus_fast.training.distil"),
}


def main(name: str, folder: str, *flags: str) -> None:
    import importlib
    import resource
    import warnings

    import atheris

    # behind the installed package, which a checkout's folder of the same name would hide
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    with atheris.instrument_imports(include=["json", "proteus_fast", "proteus_server", "safetensors", "tomllib"]):
        for module in MODULES[name]:
            importlib.import_module(module)
    target, corpus = TARGETS[name], Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    warnings.simplefilter("error")
    used = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        made = target.mutate(data, random.Random(seed))
        return made if len(made) <= most else data

    atheris.Setup([sys.argv[0], "-max_len=200000", *flags, folder], target.run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
