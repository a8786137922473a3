"""Checkpoints: a folder of config.json, model.safetensors and certificate.json, checked strictly, written atomically.

Tensors (weights are (in, out): y = x W + b; D is the encoder's dimension, d the embedding's, K the pool's size):

- ``encoder.table`` (rows, D) int8, ``encoder.row_scale`` and ``encoder.idf`` (rows,): the hash encoder, if there is
  one;
- ``projection.w1`` (D, d), ``.b1``, ``.w2`` (d, d), ``.b2``, ``.ln_weight``, ``.ln_bias`` (d,): projection ``mlp``;
- ``predictor.weight`` (d, K), ``predictor.bias`` (K,);
- ``policy.w1`` (d + 2, H), ``.b1``, ``.gate_weight``, ``.gate_bias`` (H,), ``.w2`` (H, H), ``.b2`` (H,), ``.w3`` (H,
  2),
  ``.b3`` (2,), ``.prior`` (K,), ``.knots_tau``, ``.knots_dual``, ``.knots_mu`` (N,): the policy network, if there is
  one.

All but the table are float32, of magnitudes up to ``MAX_MAGNITUDE``.

A checkpoint that holds its transformer has a folder ``encoder`` with config.json, tokenizer.json and model.safetensors
as well; any other says where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from proteus_fast import folders, strict_json
from proteus_fast.certificate import (
    MAX_DELTA,
    MAX_SEED,
    MIN_DELTA,
    MIXING_STEPS,
    Certificate,
    Mode,
    Path,
    PathCertificate,
)
from proteus_fast.encoder import FILES, EncoderSource
from proteus_fast.pool import MAX_CANDIDATES, MAX_NAME, MAX_PRICE_USD, Candidate, Pool, is_name

SCHEMA = 1
MAX_TENSOR_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 64
MAX_VERTICES = 4096
MAX_SKETCH = 1024
MAX_DIM = 1 << 16
# of a float in a tensor, so that four layers of MAX_DIM do not overflow
MAX_MAGNITUDE = 1e5
_FILES = ("config.json", "model.safetensors", "certificate.json")
HELD = "encoder"
# of the files of a transformer that a checkpoint holds
MAX_HELD_BYTES = {"config.json": strict_json.MAX_BYTES, "tokenizer.json": 1 << 28, "model.safetensors": 1 << 34}

Array = NDArray[np.float32] | NDArray[np.int8]


@dataclass(frozen=True)
class Config:
    """Everything about a router that is not a tensor and not its certificate.

    Attributes:
        encoder: ``hash``, ``transformer``, or ``none`` where the caller brings embeddings. source: of the transformer,
            None for the others. input_dim: D, what ``route_batch`` takes.
        projection: ``none`` or ``mlp``. link: ``clip`` or ``sigmoid``. head: the policy network's, None without one.
        mode: the mode that is certified and used by default. kappa: cost scale. gamma: cost sensitivity, in [2, 8].
        cost_unit_usd: USD of one cost unit. block_weight: weight of each feature block of the hash encoder, (4,).
        label_definition: what a score of 1 means. data_set, data_sha256, rows: what the router was trained on.
        prompt_sketch: of the prompts of those rows, hashes in ascending order, see ``outcomes.prompt_sketch``; empty
            where it is not known.
    """

    pool: Pool
    encoder: Literal["hash", "transformer", "none"]
    input_dim: int
    projection: Literal["none", "mlp"]
    link: Literal["clip", "sigmoid"]
    head: Literal["residual", "free"] | None
    mode: Mode
    kappa: float
    gamma: float
    cost_unit_usd: float
    block_weight: tuple[float, ...]
    label_definition: str
    data_set: str
    data_sha256: str
    rows: int
    source: EncoderSource | None = None
    prompt_sketch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A router at rest. ``sha256`` identifies its three files together; it is empty where it was not read from them."""

    config: Config
    tensors: Mapping[str, Array]
    certificate: Certificate
    sha256: str = ""


def _expected_shapes(config: Config, tensors: Mapping[str, Array]) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes that the config asks for; None where a size is the tensor's own."""
    candidates, dim = len(config.pool), config.input_dim
    shapes: dict[str, tuple[int | None, ...]] = {}
    if config.encoder == "hash":
        shapes |= {"encoder.table": (None, dim), "encoder.row_scale": (None,), "encoder.idf": (None,)}
    if config.projection == "mlp":
        width = tensors["projection.b1"].size if "projection.b1" in tensors else None
        vectors = dict.fromkeys(("b1", "b2", "ln_weight", "ln_bias"), (width,))
        for name, shape in {"w1": (dim, width), "w2": (width, width), **vectors}.items():
            shapes[f"projection.{name}"] = shape
        dim = width if width is not None else dim
    shapes |= {"predictor.weight": (dim, candidates), "predictor.bias": (candidates,)}
    if config.head is not None:
        hidden = tensors["policy.b1"].size if "policy.b1" in tensors else None
        knots = tensors["policy.knots_tau"].size if "policy.knots_tau" in tensors else None
        policy: dict[str, tuple[int | None, ...]] = {
            "w1": (dim + 2, hidden), "w2": (hidden, hidden), "w3": (hidden, 2), "b3": (2,), "prior": (candidates,),
        }  # fmt: skip
        policy |= dict.fromkeys(("b1", "b2", "gate_weight", "gate_bias"), (hidden,))
        policy |= dict.fromkeys(("knots_tau", "knots_dual", "knots_mu"), (knots,))
        shapes |= {f"policy.{name}": shape for name, shape in policy.items()}
    return shapes


def check_tensors(config: Config, tensors: Mapping[str, Array], place: str) -> None:
    """Raise ValueError unless names, dtypes, shapes and values are those that the config asks for."""
    shapes = _expected_shapes(config, tensors)
    for name in sorted(shapes.keys() ^ tensors.keys()):
        wrong = "a missing tensor" if name in shapes else "an unknown tensor"
        raise ValueError(f"{place}: expected the tensors {', '.join(sorted(shapes))}, got {wrong} {name[:80]!r}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        dtype = np.dtype(np.int8 if name == "encoder.table" else np.float32)
        if tensor.dtype != dtype:
            raise ValueError(f"{place}: {name}: expected dtype {dtype}, got {tensor.dtype}")
        fits = len(shape) == tensor.ndim and all(
            have == want or want is None for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits or tensor.size == 0:
            wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
            raise ValueError(f"{place}: {name}: expected shape {wanted}, got {tensor.shape}")
        # NaN is the least and the largest wherever there is one
        if dtype == np.float32 and not (tensor.min() >= -MAX_MAGNITUDE and tensor.max() <= MAX_MAGNITUDE):
            raise ValueError(
                f"{place}: {name}: expected finite values in [{-MAX_MAGNITUDE:g}, {MAX_MAGNITUDE:g}], "
                f"got {tensor.min():g} to {tensor.max():g}"
            )
    if config.encoder == "hash":
        rows = tensors["encoder.table"].shape[0]
        sizes = (tensors["encoder.row_scale"].size, tensors["encoder.idf"].size)
        if rows & (rows - 1) or rows < 2 or sizes != (rows, rows):
            raise ValueError(
                f"{place}: encoder.table: expected a power of two of rows, as many as row_scale and idf have, "
                f"got {rows} and {sizes}"
            )
    if config.head is not None and np.any(np.diff(tensors["policy.knots_tau"]) <= 0):
        raise ValueError(f"{place}: policy.knots_tau: expected increasing values, got others")
    if config.head is not None and tensors["policy.knots_tau"].size < 2:
        raise ValueError(f"{place}: policy.knots_tau: expected at least 2 knots, got 1")


def _encoder_json(config: Config) -> dict[str, object]:
    entry: dict[str, object] = {"kind": config.encoder, "dim": config.input_dim}
    if config.source is None:
        return entry | {"block_weight": list(config.block_weight)}
    source = config.source
    directory = HELD if source.held else source.directory
    return entry | {"directory": directory, "sha256": source.sha256, "max_tokens": source.max_tokens}


def _config_json(config: Config, sha256: Mapping[str, str]) -> dict[str, object]:
    return {
        "format": "proteus-fast",
        "schema": SCHEMA,
        "pool": [{"name": c.name, "price_usd": c.price_usd, "mean_score": c.mean_score} for c in config.pool],
        "cost_unit_usd": config.cost_unit_usd,
        "encoder": _encoder_json(config),
        "projection": config.projection,
        "link": config.link,
        "head": config.head,
        "mode": config.mode,
        "kappa": config.kappa,
        "gamma": config.gamma,
        "labels": {
            "definition": config.label_definition,
            "data_set": config.data_set,
            "data_sha256": config.data_sha256,
            "rows": config.rows,
            "prompt_sketch": "".join(f"{value:016x}" for value in config.prompt_sketch),
        },
        "sha256": dict(sha256),
    }


_EncoderFields = tuple[Literal["hash", "transformer", "none"], int, tuple[float, ...], EncoderSource | None]


def _read_encoder(root: strict_json.Node) -> _EncoderFields:
    """Kind, D, block weights, and where the transformer is."""
    kinds = [node.one_of("hash", "transformer", "none") for name, node in root.items() if name == "kind"]
    if kinds == ["transformer"]:
        _, dim, directory, sha256, max_tokens = root.fields("kind", "dim", "directory", "sha256", "max_tokens")
        where = directory.text()
        held = where == HELD
        # what is relative would be looked for where the process happens to be
        if not held and not FilePath(where).is_absolute():
            directory.fail(f"an absolute path or {HELD!r}")
        source = EncoderSource(where, sha256.hexadecimal(64), max_tokens.integer(2, 1 << 16), held)
        return "transformer", dim.integer(1, MAX_DIM), (), source
    kind, dim, block_weight = root.fields("kind", "dim", "block_weight")
    name: Literal["hash", "none"] = kind.one_of("hash", "none")
    blocks = 4 if name == "hash" else 0
    weights = tuple(float(w) for w in block_weight.numbers(blocks, blocks, 0.0, 1e3))
    return name, dim.integer(1, MAX_DIM), weights, None


def _read_config(root: strict_json.Node) -> tuple[Config, dict[str, str]]:
    form, schema, pool, unit, encoder, projection, link, head, mode, kappa, gamma, labels, sha256 = root.fields(
        "format", "schema", "pool", "cost_unit_usd", "encoder", "projection", "link", "head", "mode", "kappa", "gamma",
        "labels", "sha256",
    )  # fmt: skip
    form.one_of("proteus-fast")
    schema.integer(SCHEMA, SCHEMA)
    candidates: list[Candidate] = []
    for entry in pool.elements(1, MAX_CANDIDATES):
        name, price, mean_score = entry.fields("name", "price_usd", "mean_score")
        candidate = Candidate(name.text(most=MAX_NAME), price.number(0.0, MAX_PRICE_USD), mean_score.number(0.0, 1.0))
        if not is_name(candidate.name) or candidate.name in {other.name for other in candidates}:
            name.fail("printable characters, other ones for each candidate")
        candidates.append(candidate)
    encoder_kind, input_dim, block_weight, source = _read_encoder(encoder)
    definition, data_set, data_sha256, rows, sketch = labels.fields(
        "definition", "data_set", "data_sha256", "rows", "prompt_sketch"
    )
    model_hash, certificate_hash = sha256.fields("model.safetensors", "certificate.json")
    heads: tuple[Literal["residual", "free"], ...] = ("residual", "free")
    head_name = None if head.is_null else head.one_of(*heads)
    if mode.one_of("dual", "policy") == "policy" and head_name is None:
        mode.fail("'dual' where there is no policy network")
    config = Config(
        pool=Pool(candidates),
        encoder=encoder_kind,
        input_dim=input_dim,
        projection=projection.one_of("none", "mlp"),
        link=link.one_of("clip", "sigmoid"),
        head=head_name,
        mode=mode.one_of("dual", "policy"),
        kappa=kappa.number(1e-9, 1e9),
        gamma=gamma.number(2.0, 8.0),
        cost_unit_usd=unit.number(1e-15, 1e6),
        block_weight=block_weight,
        label_definition=definition.text(),
        data_set=data_set.text(most=256),
        data_sha256=data_sha256.hexadecimal(64),
        rows=rows.integer(1, 1 << 40),
        source=source,
        prompt_sketch=_read_sketch(sketch),
    )
    return config, {
        "model.safetensors": model_hash.hexadecimal(64),
        "certificate.json": certificate_hash.hexadecimal(64),
    }


def _read_sketch(node: strict_json.Node) -> tuple[int, ...]:
    digits = node.text(most=16 * MAX_SKETCH)
    values = [digits[i : i + 16] for i in range(0, len(digits), 16)]
    # ascending as texts is ascending as numbers, all of them being of one length
    if len(digits) % 16 or set(digits) - set("0123456789abcdef") or values != sorted(set(values)):
        node.fail("ascending numbers of 16 lower-case hexadecimal digits each")
    return tuple(int(value, 16) for value in values)


def _certificate_json(certificate: Certificate) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "delta": certificate.delta,
        "n": certificate.n,
        "data_sha256": certificate.data_sha256,
        "date": certificate.date,
        "rounding_seed": certificate.rounding_seed,
        "key": f"{certificate.key:016x}",
        "paths": {
            mode: {
                "parameter": [float(value) for value in entry.path.parameter],
                "expected_cost_usd": [float(value) for value in entry.path.expected_cost_usd],
                "successes": [int(value) for value in entry.successes],
            }
            for mode, entry in certificate.paths.items()
        },
    }


def _read_certificate(root: strict_json.Node, config: Config) -> Certificate:
    schema, delta, n, data_sha256, date, seed, key, paths = root.fields(
        "schema", "delta", "n", "data_sha256", "date", "rounding_seed", "key", "paths"
    )
    schema.integer(SCHEMA, SCHEMA)
    rows = n.integer(1, 1 << 24)
    found: dict[Mode, PathCertificate] = {}
    for name, entry in paths.items():
        if name not in ("dual", "policy") or (name == "policy" and config.head is None):
            paths.fail("the modes that the router has")
        parameter, cost, successes = entry.fields("parameter", "expected_cost_usd", "successes")
        values = parameter.numbers(1, MAX_VERTICES, 0.0, 1.0).astype(np.float32)
        costs = cost.numbers(len(values), len(values), 0.0, 1e6)
        if np.any(np.diff(costs) > 0):
            cost.fail("costs that do not increase along the path")
        steps = (len(values) - 1) * MIXING_STEPS + 1
        counts = np.array([node.integer(0, rows) for node in successes.elements(steps, steps)], np.int64)
        found["dual" if name == "dual" else "policy"] = PathCertificate(Path(values, costs), counts)
    if "dual" not in found or config.mode not in found:
        paths.fail(f"a path for dual and for the default mode {config.mode}")
    return Certificate.build(
        found,
        delta=delta.number(MIN_DELTA, MAX_DELTA),
        n=rows,
        data_sha256=data_sha256.hexadecimal(64),
        date=date.text(most=40),
        rounding_seed=seed.integer(0, MAX_SEED),
        key=int(key.hexadecimal(16), 16),
    )


def _read_tensors(data: bytes, place: str) -> dict[str, Array]:
    """Parse safetensors bytes after checking what its reader does not: header size, tensor count, exact length."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    header = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if not 0 <= header <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"{place}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {header}")
    count = sum(1 for name, _ in strict_json.parse(data[8 : 8 + header], place).items() if name != "__metadata__")
    if count > MAX_TENSORS:
        raise ValueError(f"{place}: expected at most {MAX_TENSORS} tensors, got {count}")
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: expected a valid safetensors file, got {str(error)[:200]}") from None


def default_place() -> str | None:
    """``$PROTEUS_CHECKPOINT``; None where it is unset or empty, for the embedded router."""
    return os.environ.get("PROTEUS_CHECKPOINT") or None


def _named(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    # an empty variable in a script is no wish for the working directory
    if not os.fspath(path):
        raise ValueError("checkpoint: expected a folder, got an empty name")
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and check a checkpoint folder.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        ValueError: anything in it is not as it should be; the message has the file and the field.
    """
    folder = FilePath(_named(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a checkpoint folder, got nothing there")
    config_bytes = strict_json.read_bytes(folder / "config.json", strict_json.MAX_BYTES)
    config, sha256 = _read_config(strict_json.parse(config_bytes, str(folder / "config.json")))
    contents = {}
    for name, most in (("model.safetensors", MAX_TENSOR_BYTES), ("certificate.json", strict_json.MAX_BYTES)):
        contents[name] = strict_json.read_bytes(folder / name, most)
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != sha256[name]:
            raise ValueError(f"{folder / name}: expected sha256 {sha256[name]}, got {found}")
    place = str(folder / "model.safetensors")
    tensors = _read_tensors(contents["model.safetensors"], place)
    check_tensors(config, tensors, place)
    root = strict_json.parse(contents["certificate.json"], str(folder / "certificate.json"))
    certificate = _read_certificate(root, config)
    if config.source is not None and config.source.held:
        held = _check_held(folder)
        config = replace(config, source=replace(config.source, directory=str(held)))
    return Checkpoint(config, tensors, certificate, hashlib.sha256(config_bytes).hexdigest())


def _check_held(folder: FilePath) -> FilePath:
    """The folder of the transformer that a checkpoint holds; its files' hash is checked by whoever reads them."""
    held = folder.absolute() / HELD
    if held.is_symlink() or not held.is_dir():
        raise ValueError(f"{held}: expected a folder with the encoder, got a link or nothing")
    for name, most in MAX_HELD_BYTES.items():
        if (held / name).is_symlink():
            raise ValueError(f"{held / name}: expected a regular file, got a link")
        strict_json.check_size(held / name, most)
    return held


def _hold(source: EncoderSource, folder: FilePath) -> None:
    """Copy the three files of a transformer into a checkpoint's folder; raises unless they are those that it names."""
    (folder / HELD).mkdir()
    digest = hashlib.sha256()
    for name in FILES:
        place = FilePath(source.directory) / name
        strict_json.check_size(place, MAX_HELD_BYTES[name])
        with place.open("rb") as original, (folder / HELD / name).open("wb") as file:
            while block := original.read(1 << 20):
                digest.update(block)
                file.write(block)
    if digest.hexdigest() != source.sha256:
        raise ValueError(f"encoder: expected sha256 {source.sha256} in {source.directory}, got {digest.hexdigest()}")


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> str:
    """Write a checkpoint folder; a reader never sees a part of one.

    It takes the place of one that was there before as :func:`proteus_fast.folders.replaced` says; a reader that mixes
    old and new files is told so by their hashes. Where ``path`` is a symbolic link, the folder that it leads to is
    replaced.

    Returns:
        The checkpoint's sha256.

    Raises:
        ValueError: see :func:`check_target`; or :func:`load` would refuse it.
    """
    from safetensors.numpy import save as save_tensors

    folder = check_target(path, checkpoint.config.source)
    check_tensors(checkpoint.config, checkpoint.tensors, str(folder / "model.safetensors"))
    contents = {
        "model.safetensors": save_tensors({k: np.ascontiguousarray(v) for k, v in checkpoint.tensors.items()}),
        "certificate.json": _to_bytes(_certificate_json(checkpoint.certificate)),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents["config.json"] = _to_bytes(_config_json(checkpoint.config, hashes))
    # what load would refuse is refused here, before anything is replaced
    config, _ = _read_config(strict_json.parse(contents["config.json"], str(folder / "config.json")))
    _read_certificate(strict_json.parse(contents["certificate.json"], str(folder / "certificate.json")), config)
    with folders.replaced(folder) as staging:
        for name, data in contents.items():
            (staging / name).write_bytes(data)
        if checkpoint.config.source is not None and checkpoint.config.source.held:
            _hold(checkpoint.config.source, staging)
    return hashlib.sha256(contents["config.json"]).hexdigest()


def check_target(path: str | os.PathLike[str], source: EncoderSource | None = None) -> FilePath:
    """Raise ValueError unless a checkpoint may be written there: nothing, an empty folder or a checkpoint.

    Args:
        source: the transformer that it will refer to: what it replaces must not be, or hold, that directory.

    Returns:
        The folder to write, absolute and without symbolic links.
    """
    folder = FilePath(os.path.realpath(_named(path)))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to write, got a file")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    # whatever else is there would be lost
    others = names - {*_FILES, HELD}
    if (folder / HELD).is_dir():
        others |= {f"{HELD}/{entry.name}" for entry in (folder / HELD).iterdir() if entry.name not in FILES}
    if others or (names and not names.issuperset(_FILES)):
        found = f"also {min(others)}" if others else f"only {', '.join(sorted(names))}"
        raise ValueError(f"{folder}: expected a checkpoint or an empty folder to replace, got {found}")
    if source is not None and not source.held:
        directory = FilePath(source.directory).resolve()
        if folder in (directory, *directory.parents):
            raise ValueError(
                f"{folder}: expected a folder without the encoder that it refers to, got {directory} in it"
            )
    return folder


def certificate_digest(certificate: Certificate) -> str:
    """sha256 of everything that a certificate says, as hexadecimal digits."""
    return hashlib.sha256(_to_bytes(_certificate_json(certificate))).hexdigest()


def _to_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
