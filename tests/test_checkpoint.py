"""Checkpoints: what is written comes back, and everything that is wrong is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_fast import checkpoint, strict_json
from proteus_fast.router import EMBEDDED, Router


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "router"
    shutil.copytree(EMBEDDED, target)
    return target


def test_round_trip_is_exact(tmp_path: Path) -> None:
    first = checkpoint.load(EMBEDDED)
    sha256 = checkpoint.save(first, tmp_path / "a" / "router")
    second = checkpoint.load(tmp_path / "a" / "router")
    assert second.sha256 == sha256 == first.sha256
    assert second.config.pool.names == first.config.pool.names
    assert (
        second.certificate.tables["dual"]["certified"].max_index
        == first.certificate.tables["dual"]["certified"].max_index
    )
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor, second.tensors[name])
        assert tensor.dtype == second.tensors[name].dtype


def test_saving_replaces_a_checkpoint_but_nothing_else(tmp_path: Path, folder: Path) -> None:
    source = checkpoint.load(folder)
    checkpoint.save(source, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router"]
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"expected a checkpoint or an empty folder to replace, got also letter\.txt"):
        checkpoint.save(source, other)
    assert (other / "letter.txt").read_text() == "keep me"
    for place in ("notes.txt", ".git", "encoder/notes.txt"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text("keep me")
        with pytest.raises(ValueError, match=rf"got also {place}"):
            checkpoint.save(source, folder)
        assert (folder / place).read_text() == "keep me"
        (folder / place).unlink()
    for name in ("config.json", "certificate.json"):
        (other / name).write_text("{}")
    (other / "letter.txt").unlink()
    with pytest.raises(ValueError, match=r"got only certificate\.json, config\.json"):
        checkpoint.save(source, other)


def test_a_place_has_a_name() -> None:
    for use in (checkpoint.load, checkpoint.check_target):
        with pytest.raises(ValueError, match=r"^checkpoint: expected a folder, got an empty name"):
            use("")


def test_saving_through_links_and_from_inside(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint.load(folder)
    changed = replace(source, certificate=replace(source.certificate, date="2030-01-01"))
    link, dangling = tmp_path / "current", tmp_path / "next"
    link.symlink_to(folder.name)
    dangling.symlink_to("later")
    assert checkpoint.load(folder).sha256 != checkpoint.save(changed, link) == checkpoint.load(folder).sha256
    assert checkpoint.save(source, dangling) == checkpoint.load(tmp_path / "later").sha256
    assert link.is_symlink()
    assert dangling.is_symlink()
    monkeypatch.chdir(folder)
    assert checkpoint.save(source, ".") == checkpoint.load(folder).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "later", "next", "router"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_interrupt_between_renames_loses_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    source = checkpoint.load(folder)
    changed = replace(source, certificate=replace(source.certificate, date="2030-01-01"))
    rename, left = Path.rename, [renames]

    def interrupted(self: Path, target: Path) -> Path:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt) if renames < 2 else contextlib.nullcontext():
        checkpoint.save(changed, folder)
    assert checkpoint.load(folder).certificate.date == (source if renames < 2 else changed).certificate.date
    assert [path.name for path in tmp_path.iterdir()] == ["router"]


def test_processes_that_save_to_one_place(tmp_path: Path) -> None:
    program = (
        "import sys; from proteus_fast.router import Router; router = Router.load()\n"
        "for _ in range(20): router.save(sys.argv[1])"
    )
    place = tmp_path / "router"
    # away from the checkout: the installed package is meant
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", program, str(place)]
    processes = [subprocess.Popen(command, cwd=tmp_path / "elsewhere") for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert checkpoint.load(place).sha256 == checkpoint.load(EMBEDDED).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "router"]


def test_what_could_not_be_loaded_is_not_saved(folder: Path) -> None:
    source = checkpoint.load(folder)
    for wrong in (
        replace(source, config=replace(source.config, label_definition="x" * 5000)),
        replace(source, config=replace(source.config, kappa=1e10)),
        replace(source, certificate=replace(source.certificate, delta=1e-12)),
    ):
        with pytest.raises(ValueError, match="expected"):
            checkpoint.save(wrong, folder)
    assert checkpoint.load(folder).sha256 == source.sha256
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_certificates_have_identities_of_their_own() -> None:
    certificate = checkpoint.load(EMBEDDED).certificate
    digests = {
        checkpoint.certificate_digest(each)
        for each in (certificate, replace(certificate, delta=0.01), replace(certificate, key=3))
    }
    assert len(digests) == 3


def test_embedded_router_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 16 << 20
    assert (EMBEDDED.parent / "README.md").is_file()
    assert Router.load().tau_max is not None


def resign(folder: Path) -> None:
    """Make the hashes in config.json those of the files, so that a check behind them is reached."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "certificate.json"):
        config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))
        if name != "config.json":
            resign(folder)

    return apply


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit("config.json", change)


def certificate(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit("certificate.json", change)


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")
        resign(folder)

    return apply


def raw(name: str, data: Callable[[bytes], bytes], *, signed: bool = True) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data((folder / name).read_bytes()))
        if signed and name != "config.json":
            resign(folder)

    return apply


def huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 40) + data[8:]


def many_tensors(arrays: dict[str, np.ndarray]) -> None:
    arrays.update({f"x{i}": np.zeros(1, np.float32) for i in range(70)})


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json: expected a file"),
    "no model": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors: expected a file"),
    "a folder as config": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), ValueError, "expected a regular file"),
    "not JSON": (raw("config.json", lambda _: b"{"), ValueError, "config.json: expected JSON"),
    "not UTF-8": (raw("config.json", lambda _: b"\xff\xfe"), ValueError, "expected UTF-8"),
    "an array": (raw("config.json", lambda _: b"[]"), ValueError, "expected an object"),
    "deep nesting": (raw("config.json", lambda _: b"[" * 100_000), ValueError, "config.json: expected"),
    "NaN": (raw("config.json", lambda d: d.replace(b'"kappa": ', b'"kappa": NaN, "k": ')), ValueError, "finite"),
    "a field twice": (raw("config.json", lambda d: d.replace(b"{", b'{"schema": 1,', 1)), ValueError, "distinct"),
    "newer schema": (config(lambda c: c.update(schema=2)), ValueError, r"schema: expected an integer in \[1, 1\]"),
    "unknown field": (config(lambda c: c.update(shell="rm")), ValueError, "unknown field 'shell'"),
    "missing field": (config(lambda c: c.pop("gamma")), ValueError, "no 'gamma'"),
    "wrong format": (config(lambda c: c.update(format="other")), ValueError, "format: expected 'proteus-fast'"),
    "empty pool": (config(lambda c: c.update(pool=[])), ValueError, "pool: expected a list of 1 to 64"),
    "65 candidates": (config(lambda c: c.update(pool=c["pool"] * 5)), ValueError, "pool: expected a list of 1 to 64"),
    "a name twice": (
        config(lambda c: c["pool"].__setitem__(3, c["pool"][1])), ValueError, r"pool\[3\]\.name: expected printable",
    ),
    "a name of lines": (
        config(lambda c: c["pool"][2].update(name="a\nb")), ValueError, r"pool\[2\]\.name: expected printable",
    ),
    "no name": (config(lambda c: c["pool"][2].update(name="")), ValueError, r"pool\[2\]\.name: expected printable"),
    "negative price": (
        config(lambda c: c["pool"][3].update(price_usd=-1)), ValueError, r"pool\[3\]\.price_usd: expected a number"),
    "price as text": (config(lambda c: c["pool"][0].update(price_usd="1")), ValueError, "price_usd: expected"),
    "price true": (config(lambda c: c["pool"][0].update(price_usd=True)), ValueError, r"price_usd: expected a number"),
    "score above 1": (config(lambda c: c["pool"][0].update(mean_score=1.5)), ValueError, r"mean_score: expected"),
    "gamma out of range": (config(lambda c: c.update(gamma=9)), ValueError, r"gamma: expected a number in \[2, 8\]"),
    "kappa zero": (config(lambda c: c.update(kappa=0)), ValueError, "kappa: expected"),
    "cost unit zero": (config(lambda c: c.update(cost_unit_usd=0)), ValueError, "cost_unit_usd: expected"),
    "unknown encoder": (config(lambda c: c["encoder"].update(kind="bert")), ValueError, "encoder.kind: expected"),
    "five blocks": (config(lambda c: c["encoder"].update(block_weight=[1] * 5)), ValueError, "block_weight: expected"),
    "wrong dim": (config(lambda c: c["encoder"].update(dim=77)), ValueError, "encoder.table: expected shape"),
    "endless number": (
        raw("config.json", lambda d: d.replace(b'"rows": ', b'"rows": ' + b"9" * 4301)), ValueError,
        "config.json: expected integers of at most 400 digits, got 43"),
    "a name that is no Unicode": (
        config(lambda c: c["pool"][0].update(name="a\ud800")), ValueError, "name: expected a text without surrogates"),
    "unknown link": (config(lambda c: c.update(link="tanh")), ValueError, "link: expected"),
    "policy mode without policy": (
        config(lambda c: c.update(head=None)), ValueError, "mode: expected 'dual'"),
    "policy tensor missing": (tensors(lambda t: t.pop("policy.w1")), ValueError, "a missing tensor"),
    "policy tensors without head": (
        config(lambda c: c.update(head=None, mode="dual")), ValueError, "an unknown tensor"),
    "policy of another width": (
        tensors(lambda t: t.update({"policy.w2": t["policy.w2"][1:]})), ValueError, "policy.w2: expected shape"),
    "knots that fall": (
        tensors(lambda t: t.update({"policy.knots_tau": t["policy.knots_tau"][::-1].copy()})), ValueError,
        "policy.knots_tau: expected increasing"),
    "policy mode without its path": (
        certificate(lambda c: c["paths"].pop("policy")), ValueError, "a path for dual and for the default mode"),
    "projection without tensors": (config(lambda c: c.update(projection="mlp")), ValueError, "a missing tensor"),
    "sketch out of order": (
        config(lambda c: c["labels"].update(prompt_sketch="1" * 16 + "0" * 16)), ValueError,
        "labels.prompt_sketch: expected ascending numbers",
    ),
    "sketch cut off": (
        config(lambda c: c["labels"].update(prompt_sketch="1" * 15)), ValueError, "prompt_sketch: expected ascending",
    ),
    "sketch of others": (
        config(lambda c: c["labels"].update(prompt_sketch="g" * 16)), ValueError, "prompt_sketch: expected ascending",
    ),
    "sketch too long": (
        config(lambda c: c["labels"].update(prompt_sketch="0" * 16 * 1025)), ValueError, "prompt_sketch: expected",
    ),
    "short hash": (config(lambda c: c["labels"].update(data_sha256="ab")), ValueError, "64 lower-case hexadecimal"),
    "bit flip in the model": (
        raw("model.safetensors", lambda d: d[:-1] + bytes([d[-1] ^ 1]), signed=False), ValueError, "expected sha256"),
    "bit flip in the certificate": (
        raw("certificate.json", lambda d: d + b" ", signed=False), ValueError, "expected sha256"),
    "truncated model": (raw("model.safetensors", lambda d: d[:-5]), ValueError, "valid safetensors"),
    "longer model": (raw("model.safetensors", lambda d: d + b"x"), ValueError, "valid safetensors"),
    "empty model": (raw("model.safetensors", lambda _: b""), ValueError, "expected a header"),
    "huge header": (raw("model.safetensors", huge_header), ValueError, "expected a header"),
    "header not JSON": (raw("model.safetensors", lambda d: d[:8] + b"x" + d[9:]), ValueError, "expected JSON"),
    "too many tensors": (tensors(many_tensors), ValueError, "at most 64 tensors"),
    "extra tensor": (tensors(lambda t: t.update(x=np.zeros(3, np.float32))), ValueError, "an unknown tensor 'x'"),
    "missing tensor": (tensors(lambda t: t.pop("predictor.bias")), ValueError, "missing tensor 'predictor.bias'"),
    "float64 tensor": (
        tensors(lambda t: t.update({"encoder.idf": t["encoder.idf"].astype(np.float64)})), ValueError,
        "encoder.idf: expected dtype float32, got float64"),
    "NaN in a tensor": (
        tensors(lambda t: t["predictor.bias"].__setitem__(0, np.nan)), ValueError, "predictor.bias: expected finite"),
    "a tensor that overflows": (
        tensors(lambda t: t["policy.b1"].__setitem__(0, 3e38)), ValueError,
        r"policy.b1: expected finite values in \[-100000, 100000\], got -?[.\d]+ to 3e\+38"),
    "a header that is no object of objects": (
        raw("model.safetensors", lambda _: struct.pack("<Q", 5013) + b'{"x": "' + b"x" * 5004 + b'"}'), ValueError,
        "expected a valid safetensors file, got"),
    "wrong shape": (
        tensors(lambda t: t.update({"predictor.bias": np.zeros(3, np.float32)})), ValueError,
        "predictor.bias: expected shape"),
    "rows no power of two": (
        tensors(lambda t: t.update({
            "encoder.table": t["encoder.table"][:1000], "encoder.idf": t["encoder.idf"][:1000],
            "encoder.row_scale": t["encoder.row_scale"][:1000]})), ValueError, "a power of two"),
    "delta 0": (certificate(lambda c: c.update(delta=0)), ValueError, "delta: expected"),
    "delta .5": (certificate(lambda c: c.update(delta=0.5)), ValueError, "delta: expected"),
    "no rows": (certificate(lambda c: c.update(n=0)), ValueError, r"certificate.json: n: expected"),
    "no path": (certificate(lambda c: c.update(paths={})), ValueError, "a path for dual"),
    "unknown path": (certificate(lambda c: c["paths"].update(x=c["paths"]["dual"])), ValueError, "the modes"),
    "parameter above 1": (
        certificate(lambda c: c["paths"]["dual"]["parameter"].__setitem__(0, 2)), ValueError, r"parameter\[0\]"),
    "more right than rows": (
        certificate(lambda c: c["paths"]["dual"]["successes"].__setitem__(0, 10**6)), ValueError, r"successes\[0\]"),
    "too few steps": (certificate(lambda c: c["paths"]["dual"]["successes"].pop()), ValueError, "successes: expected"),
    "dearer along the path": (
        certificate(lambda c: c["paths"]["dual"]["expected_cost_usd"].__setitem__(-1, 1)), ValueError, "not increase"),
    "short key": (certificate(lambda c: c.update(key="12")), ValueError, "key: expected 16"),
    "key in capitals": (certificate(lambda c: c.update(key="A" * 16)), ValueError, "key: expected 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_by_name(folder: Path, name: str) -> None:
    spoil, exception, message = BAD[name]
    spoil(folder)
    with pytest.raises(exception, match=message) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value) or "pool: expected distinct" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert Router.load().tau_max is not None


def test_oversized_files_are_refused_without_reading(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        os.truncate(file.fileno(), strict_json.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="expected at most"):
        checkpoint.load(folder)


def test_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        checkpoint.load("/nowhere/at/all")


@settings(max_examples=300)
@given(st.data())
def test_random_damage_never_does_worse_than_an_error(data: st.DataObject) -> None:
    """Bytes of config.json or certificate.json are replaced; loading works or raises ValueError."""
    name = data.draw(st.sampled_from(["config.json", "certificate.json"]))
    original = (EMBEDDED / name).read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    patch = data.draw(st.binary(max_size=8))
    damaged = original[:at] + patch + original[at + data.draw(st.integers(0, 8)) :]
    try:
        root = strict_json.parse(damaged, name)
        if name == "config.json":
            checkpoint._read_config(root)
        else:
            checkpoint._read_certificate(root, checkpoint.load(EMBEDDED).config)
    except ValueError as error:
        if not str(error).startswith((name, "pool: expected")):
            pytest.fail(f"a message without its file: {error}")
