"""PPO with a dual: where it starts, what it is served as, that it repeats, resumes and learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from proteus_fast.certificate import Path as PolicyPath
from proteus_fast.certificate import cost_scale
from proteus_fast.evaluation.metrics import SELECTION_TARGETS, plug_in_curve, relative_targets
from proteus_fast.evaluation.outcomes import FOLDS, fold_of
from proteus_fast.router import Router
from proteus_fast.training.calibrate import PolicyPart, cost_unit_and_scale, plug_in_checkpoint
from proteus_fast.training.fit_policy import Problem, build_trainer, curve_of, positions_of, to_rows
from proteus_fast.training.ppo import Dual, PolicyConfig, Trainer, draw_batch, follow, rewards_of
from proteus_fast.training.start import Start, dual_start
from proteus_kernels.reference import interpolate_ref, scores_ref
from tests.evaluation import synthetic

SMALL = PolicyConfig(
    hidden=16, sessions=4, batch=16, epochs=1, minibatch=32, session_batches=4, knots=8, learning_rate=3e-3
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def make_problem(n: int, seed: int) -> Problem:
    """Rows on which p is nearly the truth, and z shows it, how dear a row is for all candidates, and noise."""
    table = synthetic.outcome_table(n, seed)
    random = np.random.default_rng(seed)
    dear = random.standard_normal(n)
    table = replace(table, cost_usd=table.cost_usd * np.exp(dear)[:, None])
    skill = synthetic.SKILL[[synthetic.TOPICS.index(task) for task in table.tasks]]
    p = (skill + random.normal(0.0, 0.05, skill.shape)).clip(0.0, 1.0).astype(np.float32)
    z = np.concatenate([p, dear[:, None], random.standard_normal((n, 2))], axis=1).astype(np.float32)
    price = table.cost_usd.mean(axis=0)
    unit, kappa = cost_unit_and_scale(p.astype(np.float64), price)
    nested_z, nested_p = (np.broadcast_to(values, (FOLDS, *values.shape)) for values in (z, p.astype(np.float64)))
    return Problem(
        table, fold_of(table.prompts), price, unit, kappa, z, p.astype(np.float64), nested_z, nested_p
    )  # fmt: skip


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(1500, seed=1)


def parameters(trainer: Trainer) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy().copy() for name, tensor in trainer.network.state_dict().items()}


def same(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> bool:
    assert first.keys() == second.keys()
    return all(first[name].tobytes() == second[name].tobytes() for name in first)


# where training starts


def start_of(problem: Problem, knots: int = 16) -> Start:
    price = problem.price_usd / problem.unit_usd
    return dual_start(problem.p, problem.table.score, price, problem.kappa, knots)


@pytest.mark.parametrize("knots", [2, 3, 5, 16])
def test_the_start_rises_from_the_cheapest_policy_to_the_best(problem: Problem, knots: int) -> None:
    start = start_of(problem, knots)
    assert len(start.tau) == len(start.mu) == len(start.weight) == knots
    assert (start.tau.diff() > 0).all()
    assert (start.mu.diff() > 0).all()
    assert (start.weight.diff() < 0).all()
    assert ((start.mu > 0) & (start.mu < 1)).all()
    assert 2.0 < start.gamma < 8.0
    torch.testing.assert_close(start.weight, problem.kappa * (1.0 - start.mu) ** start.gamma)
    # its ends: what the cheapest candidate reaches, but for the hundredth of the rows, and at least the best's
    mean = problem.table.score.mean(axis=0)
    assert abs(float(start.tau[0]) - mean[problem.price_usd.argmin()]) < 0.02
    assert float(start.tau[-1]) >= mean.max() - 1e-6


def test_the_start_reaches_what_it_says(problem: Problem) -> None:
    """At the weight of a knot the plug-in rule has the knot's accuracy, but for the smoothing over jumps by topic."""
    start = start_of(problem)
    rows, price = np.arange(len(problem.table)), problem.price_usd / problem.unit_usd
    for tau, weight in zip(start.tau.tolist(), start.weight.tolist(), strict=True):
        choice = np.argmax(problem.p - weight * price, axis=1)
        assert abs(problem.table.score[rows, choice].mean() - tau) < 0.05


@pytest.mark.parametrize("knots", [2, 4, 16])
@pytest.mark.parametrize("case", ["one candidate", "equal prices", "free", "nothing predicted", "all right"])
def test_the_start_without_a_choice_to_make(problem: Problem, case: str, knots: int) -> None:
    p, score, price = problem.p, problem.table.score, problem.price_usd / problem.unit_usd
    if case == "one candidate":
        p, score, price = p[:, :1], score[:, :1], price[:1]
    elif case == "equal prices":
        price = np.ones_like(price)
    elif case == "free":
        price = np.zeros_like(price)
    elif case == "nothing predicted":
        p = np.full_like(p, 0.5)
    else:
        score = np.ones_like(score)
    start = dual_start(p, score, price, cost_scale(p, price), knots)
    assert (start.tau.diff() > 0).all()
    assert (start.mu.diff() >= 0).all()
    assert (start.weight.diff() <= 0).all()
    assert all(bool(torch.isfinite(part).all()) for part in start[:3])
    assert ((start.mu > 0) & (start.mu < 1)).all()
    assert (start.weight > 0).all()
    assert 2.0 < start.gamma < 8.0


def test_the_residual_head_starts_at_the_dual_table(problem: Problem) -> None:
    trainer = build_trainer(problem, SMALL, seed=0)
    start = start_of(problem, SMALL.knots)
    tau = positions_of(trainer)
    _, mu = follow(trainer.served, trainer.rows, tau, trainer.kappa)
    expected = interpolate_ref(tau, start.tau, start.mu)
    torch.testing.assert_close(mu, expected[:, None].expand_as(mu), rtol=0, atol=1e-6)
    assert trainer.network.gamma.item() == pytest.approx(start.gamma, abs=1e-5)
    assert not trainer.network.prior.any()


# the policy in the engine


def certified(problem: Problem, trainer: Trainer, calibration: Problem) -> Router:
    candidates = len(problem.table.candidates)
    weight = np.zeros((problem.z.shape[1], candidates), np.float32)
    weight[:candidates] = np.eye(candidates)
    parameter = positions_of(trainer).numpy()
    path = PolicyPath(parameter, np.linspace(2e-3, 1e-3, len(parameter)))
    network = trainer.served
    part = PolicyPart(network.tensors(), network.head, network.gamma.item(), path, "policy")
    tensors = {"predictor.weight": weight, "predictor.bias": np.zeros(candidates, np.float32)}
    return Router(
        plug_in_checkpoint(
            problem.table, problem.p, calibration.table, calibration.z, tensors, delta=0.1, seed=0, policy=part
        )
    )


@pytest.mark.parametrize(
    ("head", "dual", "steps"),
    [("residual", "indexed", 0), ("residual", "indexed", 6), ("free", "indexed", 6), ("free", "scalar", 6)],
)
def test_the_engine_chooses_what_the_trainer_follows(problem: Problem, head: str, dual: str, steps: int) -> None:
    config = replace(SMALL, head=head, dual=dual, learning_rate=0.02)
    trainer = build_trainer(problem, config, seed=0)
    trainer.train(steps)
    other = make_problem(600, seed=2)
    rows = to_rows(problem, other.z, other.p, other.table)
    router = certified(problem, trainer, other)
    assert router.mode == "policy"
    taus = positions_of(trainer)
    choice, mu = follow(trainer.served, rows, taus, trainer.kappa)
    served = torch.from_numpy(router.snapshot.choose_path(other.z, "policy")).long()
    # the two add up in another order: only where two scores are equal but for that may they differ
    network = trainer.served
    for ours, theirs, one in zip(choice, served, mu, strict=True):
        with torch.no_grad():
            scores = scores_ref(rows.p, one, network.prior, rows.price, trainer.kappa, network.gamma)
        gap = scores.gather(1, ours[:, None]) - scores.gather(1, theirs[:, None])
        assert gap.abs().max() < 2e-5 * max(1.0, trainer.kappa)
    assert (choice == served).float().mean() > 0.999
    assert steps == 0 or (mu.std(dim=1) > 1e-3).any()


def test_with_the_scalar_dual_the_served_input_is_one(problem: Problem) -> None:
    trainer = build_trainer(problem, replace(SMALL, dual="scalar"), seed=0)
    trainer.train(6)
    served = trainer.served
    assert torch.equal(served.knots_dual, torch.full((SMALL.knots,), math.log(2.0)))
    torch.testing.assert_close(trainer.network.knots_dual, torch.log1p(trainer.dual.value))
    assert not torch.equal(trainer.network.knots_dual, served.knots_dual)
    for name, tensor in trainer.network.named_parameters():
        assert torch.equal(tensor, served.get_parameter(name))
    indexed = build_trainer(problem, SMALL, seed=0)
    indexed.train(6)
    torch.testing.assert_close(indexed.served.knots_dual, torch.log1p(indexed.dual.value))


# the dual variable


def make_dual(**changes: Any) -> Dual:
    """Knots at .6, .7, .8, .9; lambda 1, 10, 100 and, capped, 1000."""
    config = PolicyConfig(knots=4, smallest_gain=1e-3, **changes)
    weight = torch.tensor([1.0, 0.1, 0.01, 1e-5])
    return Dual(config, Start(torch.tensor([0.6, 0.7, 0.8, 0.9]), torch.linspace(0.1, 0.9, 4), weight, 4.0), 1.0)


EVERY = torch.ones(4, dtype=torch.bool)


def test_lambda_starts_as_the_inverse_weight_and_is_interpolated_in_its_logarithm() -> None:
    dual = make_dual()
    torch.testing.assert_close(dual.value, torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    torch.testing.assert_close(dual.at(dual.knots), dual.value, rtol=1e-5, atol=0)
    between = dual.at(torch.tensor([0.65, 0.75]))
    torch.testing.assert_close(between, torch.tensor([22.0, 1111.0]).sqrt() - 1.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(dual.at(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 1000.0]), rtol=1e-5, atol=0)


def test_a_target_belongs_to_the_knots_beside_it() -> None:
    dual = make_dual()
    shares = dual.shares(torch.tensor([0.0, 0.6, 0.625, 0.75, 0.9, 1.0]))
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0.75, 0.25, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_an_indexed_dual_follows_the_violations_of_its_own_knot() -> None:
    dual = make_dual(dual_step=2.0)
    violation = torch.tensor([0.1, -0.1, 0.3, 0.5])
    seen = torch.tensor([True, True, False, True])
    dual.update(violation, seen)
    # log lambda moves by step times violation; an unseen knot stays; none passes the cap
    expected = torch.tensor([math.exp(0.2), 10.0 * math.exp(-0.2), 100.0, 1000.0])
    torch.testing.assert_close(dual.value, expected)
    for _ in range(100):
        dual.update(-EVERY.float(), EVERY)
    assert (dual.value > 0).all()
    assert (dual.value < 1e-3).all()
    for _ in range(100):
        dual.update(EVERY.float(), EVERY)
    torch.testing.assert_close(dual.value, torch.full((4,), 1000.0))


def test_a_scalar_dual_is_one_additive_number_with_a_floor() -> None:
    dual = make_dual(dual="scalar", scalar_step=0.4)
    assert torch.equal(dual.value, torch.ones(4))
    seen = torch.tensor([True, True, False, False])
    dual.update(torch.tensor([0.1, 0.3, 9.0, 9.0]), seen)
    torch.testing.assert_close(dual.value, torch.full((4,), 1.08))
    torch.testing.assert_close(dual.at(torch.tensor([0.1, 0.66, 0.95])), torch.full((3,), 1.08))
    for _ in range(10):
        dual.update(-EVERY.float(), EVERY)
    assert torch.equal(dual.value, torch.zeros(4))
    assert torch.equal(dual.at(torch.tensor([0.7])), torch.zeros(1))
    dual.update(0.5 * EVERY.float(), EVERY)
    torch.testing.assert_close(dual.value, torch.full((4,), 0.2))
    dual.update(1e4 * EVERY.float(), EVERY)
    torch.testing.assert_close(dual.value, torch.full((4,), 1000.0))


def test_the_alarm_needs_the_cap_and_a_lasting_shortfall() -> None:
    dual = make_dual(slack=0.005, alarm=0.25)
    short = torch.tensor([-0.05, 0.001, 0.05, 0.05])
    for step in range(1, 13):
        dual.update(short, EVERY)
        # only the last knot is at the cap; its shortfall adds up by .05 - .005 a step
        assert dual.unsatisfiable.tolist() == [False, False, False, 0.045 * step > 0.25]
    assert dual.cusum[:2].tolist() == [0.0, 0.0]
    assert dual.cusum[2] > 0.25
    # accuracy that comes back ends it
    for _ in range(12):
        dual.update(torch.full((4,), -0.05), EVERY)
    assert not dual.unsatisfiable.any()
    assert dual.cusum[3] == 0.0


# rewards and batches


def test_rewards(problem: Problem) -> None:
    rows = problem.rows().take(torch.arange(50))
    tau, dual = torch.linspace(0.5, 0.9, 50), torch.logspace(-2, 4, 50)
    config = replace(SMALL, label_share=0.25)
    accuracy = 0.25 * rows.y + 0.75 * rows.p
    short = accuracy - tau[:, None]
    expected = (-rows.c + dual[:, None] * short) / (1.0 + dual[:, None])
    torch.testing.assert_close(rewards_of(rows, tau, dual, config), expected)
    expected = accuracy - rows.c + dual[:, None] * short
    torch.testing.assert_close(rewards_of(rows, tau, dual, replace(config, dual="scalar")), expected)


def test_batches_are_sessions_of_one_target(problem: Problem) -> None:
    rows, knots = problem.rows(), torch.linspace(0.6, 0.9, 4)
    draws = [draw_batch(rows, SMALL, knots, 0, step) for step in range(400)]
    size = SMALL.sessions * SMALL.batch
    taus = torch.stack([batch.tau.view(SMALL.sessions, SMALL.batch) for batch in draws])
    assert (taus == taus[:, :, :1]).all()
    of_session = taus[:, :, 0].view(-1, SMALL.session_batches, SMALL.sessions)
    assert (of_session == of_session[:, :1]).all()
    assert len(of_session[:, 0].unique()) == of_session[:, 0].numel()
    # half a knot beyond either end, spread evenly
    assert of_session.min() >= 0.55
    assert of_session.max() <= 0.95
    assert ((of_session[:, 0].sort(dim=1).values - torch.tensor([0.6, 0.7, 0.8, 0.9])).abs() <= 0.0501).all()
    assert all(len(batch.tau) == len(batch.rows.z) == size for batch in draws)
    again = draw_batch(rows, SMALL, knots, 0, 7)
    assert torch.equal(again.rows.z, draws[7].rows.z)
    assert not torch.equal(again.rows.z, draws[8].rows.z)
    assert not torch.equal(again.rows.z, draw_batch(rows, SMALL, knots, 1, 7).rows.z)
    ends = torch.cat([draw_batch(rows, replace(SMALL, taus="extremes"), knots, 0, step).tau for step in range(40)])
    assert ((ends <= 0.59 + 1e-6) | (ends >= 0.91 - 1e-6)).all()
    assert (ends < 0.6).any()
    assert (ends > 0.9).any()


# the loop

VARIANTS: list[dict[str, Any]] = [
    {},
    {"head": "free", "dual": "scalar", "baseline": "critic", "label_share": 0.0},
    {"baseline": "none", "taus": "extremes", "session_batches": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_run_repeats_and_resumes_to_the_bit(problem: Problem, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(SMALL, **changes)
    whole = build_trainer(problem, config, seed=3)
    whole.train(16)
    assert whole.step == 16
    assert all(bool(torch.isfinite(tensor).all()) for tensor in whole.network.state_dict().values())
    # broken off between two dual steps and within a session
    first = build_trainer(problem, config, seed=3)
    first.train(3)
    other = build_trainer(problem, config, seed=4)
    other.train(3)
    assert not same(parameters(first), parameters(other))
    first.train(7)
    np.savez(tmp_path / "state.npz", **first.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as arrays:
        state = dict(arrays)
    second = build_trainer(problem, config, seed=3)
    second.restore(state)
    assert second.step == 7
    second.train(16)
    assert same(parameters(second), parameters(whole))
    assert second.log == whole.log
    assert torch.equal(second.dual.value, whole.dual.value)
    assert torch.equal(second.dual.cusum, whole.dual.cusum)
    assert second.summary() == whole.summary()


def test_a_state_is_left_as_it_is_by_the_run_that_takes_it_up(problem: Problem) -> None:
    first = build_trainer(problem, SMALL, seed=3)
    first.train(7)
    state = first.state()
    kept = {name: values.copy() for name, values in state.items()}
    first.train(9)
    second = build_trainer(problem, SMALL, seed=3)
    second.restore(state)
    second.train(9)
    assert same(parameters(second), parameters(first))
    assert [name for name, values in state.items() if not np.array_equal(values, kept[name])] == []


def test_the_log_says_what_the_bands_did(problem: Problem) -> None:
    trainer = build_trainer(problem, SMALL, seed=0)
    assert trainer.summary() == "policy at its start"
    trainer.train(11)
    assert [entry["step"] for entry in trainer.log] == [0, 5, 10]
    for entry in trainer.log:
        assert 2.0 <= entry["gamma"] <= 8.0
        taus = [band["tau"] for band in entry["bands"]]
        assert taus == sorted(taus)
        for band in entry["bands"]:
            assert band["violation"] == pytest.approx(band["tau"] - band["accuracy"], abs=1e-6)
            assert band["cost_units"] > 0.0
            assert band["dual"] > 0.0


def test_without_labels_in_the_reward_they_act_through_violations_only(problem: Problem) -> None:
    """Two sets of labels from one start: the same policy while lambda rests, another where labels are rewarded."""

    def trained(problem: Problem, **changes: Any) -> dict[str, NDArray[Any]]:
        config = replace(SMALL, **changes)
        trainer = build_trainer(honest, config, seed=0)
        trainer.rows = problem.rows()
        trainer.train(6)
        return parameters(trainer)

    honest = problem
    other = replace(problem, table=replace(problem.table, score=1.0 - problem.table.score))
    resting = {"dual_every": 1000, "label_share": 0.0}
    assert same(trained(honest, **resting), trained(other, **resting))
    for acting in ({"dual_every": 3, "label_share": 0.0}, {"dual_every": 1000, "label_share": 0.5}):
        assert not same(trained(honest, **acting), trained(other, **acting))


@pytest.mark.parametrize("head", ["residual", "free"])
def test_gamma_and_prior_learn_unless_told_not_to(problem: Problem, head: str) -> None:
    config = replace(SMALL, head=head, learning_rate=0.05)
    at_rest = build_trainer(problem, replace(config, learn_gamma=False, learn_prior=False), seed=0)
    gamma = at_rest.network.gamma.item()
    at_rest.train(5)
    assert at_rest.network.gamma.item() == gamma
    assert not at_rest.network.prior.any()
    moved = build_trainer(problem, config, seed=0)
    moved.train(5)
    assert moved.network.gamma.item() != gamma
    assert moved.network.prior.any()
    assert 2.0 <= moved.network.gamma.item() <= 8.0
    assert all(2.0 <= entry["gamma"] <= 8.0 for entry in moved.log)


def test_the_baselines_differ(problem: Problem) -> None:
    found = []
    for baseline in ("greedy", "critic", "none"):
        trainer = build_trainer(problem, replace(SMALL, baseline=baseline), seed=0)
        start = {name: tensor.clone() for name, tensor in trainer.critic.state_dict().items()}
        trainer.train(2)
        learned = any(not torch.equal(start[name], tensor) for name, tensor in trainer.critic.state_dict().items())
        assert learned == (baseline == "critic")
        found.append(parameters(trainer))
    assert not same(found[0], found[1])
    assert not same(found[0], found[2])
    assert not same(found[1], found[2])


def test_the_policy_learns_which_queries_are_dear(problem: Problem) -> None:
    """The point of stage 2: what shows in z and not in mean prices makes it cheaper than the plug-in rule."""
    fresh = make_problem(4000, seed=5)
    table = fresh.table
    rows = to_rows(problem, fresh.z, fresh.p, table)
    taus = relative_targets(table.score.mean(axis=0), problem.price_usd, SELECTION_TARGETS)
    plug_in = plug_in_curve(fresh.p, problem.price_usd, table).costs(taus, table)
    config = PolicyConfig(hidden=32, sessions=8, batch=64, minibatch=256, learning_rate=1e-3, steps=60)
    trainer = build_trainer(problem, config, seed=0)

    def ratio() -> float:
        choice, _ = follow(trainer.served, rows, positions_of(trainer), trainer.kappa)
        return float(np.exp(np.log(curve_of(table, choice.numpy()).costs(taus, table) / plug_in).mean()))

    assert 0.95 < ratio() < 1.05
    trainer.train(60)
    assert ratio() < 0.85
    # dear rows get less of a preference for quality than cheap ones, at every target inside the range
    _, mu = follow(trainer.served, rows, trainer.dual.knots[2:-2], trainer.kappa)
    dear = torch.from_numpy(fresh.z[:, len(table.candidates)]) > 0
    assert (mu[:, dear].mean(dim=1) < mu[:, ~dear].mean(dim=1)).all()
    # and lower targets less than higher ones
    assert (mu.mean(dim=1).diff() > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "beta"}, "head: expected one of residual, free, got 'beta'"),
        ({"dual": "both"}, "dual: expected one of indexed, scalar, got 'both'"),
        ({"taus": "low"}, "taus: expected"),
        ({"baseline": "mean"}, "baseline: expected"),
        ({"hidden": 0}, "hidden: expected"),
        ({"sessions": 0}, "sessions: expected"),
        ({"batch": 0}, "batch: expected"),
        # of one row there is no deviation
        ({"batch": 1}, "batch: expected at least 2"),
        ({"session_batches": 0}, "session_batches: expected"),
        ({"epochs": 0}, "epochs: expected"),
        ({"minibatch": 0}, "minibatch: expected"),
        ({"dual_every": 0}, "dual_every: expected"),
        ({"steps": -1}, "steps.*: expected at least 0"),
        ({"knots": 1}, ".*knots: expected"),
        ({"label_share": 1.5}, "label_share: expected"),
        ({"label_share": float("nan")}, "label_share: expected"),
        ({"clip": 0.0}, "clip: expected"),
        ({"learning_rate": float("nan")}, "learning_rate: expected"),
        ({"gradient_clip": -1.0}, "gradient_clip: expected"),
        ({"smallest_gain": 0.0}, "smallest_gain: expected"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"stay": float("nan")}, "stay: expected"),
        ({"dual_step": -1.0}, "dual_step: expected"),
        ({"scalar_step": float("inf")}, "scalar_step: expected"),
        ({"slack": float("nan")}, "slack: expected"),
        ({"alarm": -1.0}, "alarm: expected"),
        ({"temperature": (0.1, 0.0)}, "temperature: expected"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        PolicyConfig(**changes)
