"""The command line: ``proteus demo | train | experiment | evaluate | route | serve | plan | certify``.

Exit status: 0, 1 on a missed check, 2 on wrong usage or bad input.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_fast import __version__
from proteus_fast.certificate import Status

if TYPE_CHECKING:
    from proteus_fast.router import Router

OK, MISSED, USAGE = 0, 1, 2
# what a shell reports of a command that SIGINT or SIGPIPE ended
_INTERRUPTED, _READER_GONE = 130, 141
_DEFAULT = "default: $PROTEUS_CHECKPOINT, else the embedded router"
# those of experiments.registry, which is not imported to parse a command line
_EXPERIMENTS = (
    "correlation", "heads", "cost-range", "extremes", "ablations", "convergence", "alarm", "dynamic", "shocks", "leak",
)  # fmt: skip


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _write_json(value: object) -> None:
    _write(json.dumps(value, indent=1, allow_nan=False))


def _taus(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
    if not all(0.0 <= value <= 1.0 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers in [0, 1], got {text!r}")
    return values


# what comes with proteus-fast[transformers]
_TRANSFORMERS = {"transformers", "tokenizers", "huggingface_hub"}


def _load(path: str | None, encoder: str | None = None) -> Router:
    from proteus_fast.checkpoint import default_place
    from proteus_fast.router import Router

    return Router.load(default_place() if path is None else path, encoder=encoder)


@contextmanager
def _saying(command: str, *, quiet: bool) -> Iterator[None]:
    """Let what takes long say on standard error how far it is, whether that is a terminal or not."""
    # of this package alone: libraries have much to say at this level
    logger = logging.getLogger("proteus_fast")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"proteus {command}: %(message)s"))
    level = logger.level
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _demo(arguments: argparse.Namespace) -> int:
    from proteus_fast.demo import run

    return run(Path(arguments.plot), as_json=arguments.json)


def _train(arguments: argparse.Namespace) -> int:
    from proteus_fast.training.distributed import is_first, process_group
    from proteus_fast.training.finetune import FinetuneConfig
    from proteus_fast.training.ppo import PolicyConfig
    from proteus_fast.training.train import TrainConfig, train

    options = {"head": arguments.head, "dual": arguments.dual, "steps": arguments.policy_steps}
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if arguments.mode == "dual" and settings:
        raise ValueError("mode: expected policy or cheaper with --head, --dual or --policy-steps, got dual")
    names = ("epochs", "batch_size", "accumulate", "learning_rate", "precision")
    tuning = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if tuning and not arguments.finetune:
        raise ValueError(f"finetune: expected --finetune with --{next(iter(tuning)).replace('_', '-')}, got none")
    config = TrainConfig(
        data=arguments.data,
        out=arguments.out,
        encoder=arguments.encoder,
        max_tokens=arguments.max_tokens,
        teacher=arguments.teacher,
        unlabelled=arguments.unlabelled,
        hold_encoder=arguments.hold_encoder,
        finetune=FinetuneConfig(**tuning) if arguments.finetune else None,
        delta=arguments.delta,
        seed=arguments.seed,
        refine=not arguments.no_refine,
        mode=arguments.mode,
        policy=PolicyConfig(**settings),
        device=arguments.device,
        progress=False if arguments.json else None,
    )
    with process_group(arguments.device):
        out = train(config)
        if not is_first():
            return OK
    router = _load(str(out))
    summary = {
        "checkpoint": str(arguments.out),
        "data_set": router.checkpoint.config.data_set,
        "candidates": list(router.pool.names),
        "delta": router.certificate.delta,
        "calibration_rows": router.certificate.n,
        "mode": router.mode,
        "tau_max": router.tau_max,
        "router": router.versions["router"],
    }
    for asked, name in ((arguments.finetune, "finetune"), (arguments.teacher is not None, "distil")):
        if asked:
            summary[f"{name}_kept"] = _was_kept(Path(arguments.out), f"{name} selected")
    if arguments.json:
        _write_json(summary)
    else:
        reach = "no target certified" if router.tau_max is None else f"targets certified up to {router.tau_max:.3f}"
        _write(f"{arguments.out}: {len(router.pool)} candidates, {router.certificate.n} calibration rows, {reach}")
        if "finetune_kept" in summary:
            _write(
                f"encoder: {'the fine-tuned one' if summary['finetune_kept'] else 'the frozen one, which costs less'}"
            )
        if "distil_kept" in summary:
            _write(f"teacher: {'learnt from' if summary['distil_kept'] else 'not kept, labels alone cost less'}")
    return OK


def _was_kept(out: Path, stage: str) -> bool:
    """What the training's log last said of a part that is kept only where it costs less."""
    log = out.with_name(out.name + ".training") / "log.jsonl"
    # an earlier run that was killed may have left half a line
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if f'"{stage}"' in line]
    return bool(json.loads(lines[-1])["kept"])


def _experiment(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from proteus_fast.experiments.registry import experiment
    from proteus_fast.experiments.study import load_study, one_thread

    if arguments.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {arguments.seeds}")
    names = [Path(folder).resolve().name for folder in arguments.data]
    if len(set(names)) < len(names):
        raise ValueError(f"data: expected folders of different names, got {', '.join(names)}")
    cache = None if arguments.cache is None else Path(arguments.cache)
    # None: off where standard error is no terminal
    with tqdm(desc=arguments.name, unit="run", disable=True if arguments.json else None) as bar:
        studies = [
            load_study(Path(folder), cache, lambda stage: bar.set_postfix_str(stage)) for folder in arguments.data
        ]
        with one_thread():
            result = experiment(arguments.name)(studies, arguments.seeds, bar.update)
    result.write(Path(arguments.out))
    if arguments.json:
        _write_json(result.figures[studies[0].name] if len(studies) == 1 else result.figures)
    else:
        _write(result.to_markdown())
    return OK


def _evaluate(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from proteus_fast.evaluation.outcomes import read_division, read_table
    from proteus_fast.evaluation.report import LeakError, evaluate

    folder = Path(arguments.data)
    table = read_table(folder / f"{arguments.split}.parquet")
    has_division = (folder / "train.parquet").is_file() and (folder / "val.parquet").is_file()
    division = read_division(folder) if has_division else None
    router = _load(arguments.checkpoint, arguments.encoder)
    steps = 0 if division is None else 3
    try:
        # None: off where standard error is no terminal
        with tqdm(total=steps, desc="baselines", unit="step", disable=True if arguments.json else None) as bar:
            report = evaluate(
                router, table, arguments.taus, split=arguments.split, division=division, progress=bar.update
            )
    except LeakError as error:
        sys.stderr.write(f"proteus evaluate: {error}\n")
        return MISSED
    if arguments.json:
        _write_json(report.to_json())
    else:
        _write(report.to_markdown())
    if arguments.plot:
        report.plot(Path(arguments.plot))
    if report.alarm is not None:
        sys.stderr.write(f"proteus evaluate: {report.alarm}\n")
        return MISSED
    return OK


def _route(arguments: argparse.Namespace) -> int:
    decision = _load(arguments.checkpoint, arguments.encoder).route(
        arguments.text, arguments.tau, available=arguments.available, guarantee=arguments.guarantee
    )
    if arguments.strict and decision.status is Status.INFEASIBLE:
        sys.stderr.write(f"proteus route: tau: expected at most {decision.tau_max} (tau_max), got {arguments.tau:g}\n")
        return MISSED
    answer: dict[str, Any] = decision._asdict()
    answer["status"] = decision.status.name
    if arguments.json:
        _write_json(answer)
        return OK
    floor = "none" if decision.certified_floor is None else f"{decision.certified_floor:.3f}"
    tau_max = "none" if decision.tau_max is None else f"{decision.tau_max:.3f}"
    _write(f"{decision.candidate}  {decision.status.name}  certified floor {floor}  tau_max {tau_max}")
    _write(f"mu {decision.mu:.3f}  score {decision.score:.3f}  fallbacks: {', '.join(decision.fallbacks)}")
    return OK


def _serve(arguments: argparse.Namespace) -> int:
    from proteus_server.app import serve_from

    return serve_from(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from proteus_fast.certificate import plan

    labels = plan(arguments.tau, arguments.headroom, arguments.delta)
    if arguments.json:
        _write_json({"labels": labels})
    else:
        _write(
            f"{labels:,} labelled queries certify {arguments.tau:g} at delta {arguments.delta:g} with a power of 90 %"
            f" where the most accurate policy reaches {arguments.tau + arguments.headroom:g}"
        )
    return OK


def _certify(arguments: argparse.Namespace) -> int:
    from proteus_fast import checkpoint
    from proteus_fast.evaluation.outcomes import calibration_notes, read_table
    from proteus_fast.training.calibrate import recertify

    table = read_table(arguments.data)
    source = _load(arguments.checkpoint, arguments.encoder).checkpoint
    result = recertify(source, table, delta=arguments.delta, seed=arguments.seed)
    checkpoint.save(result, arguments.out)
    certificate = result.certificate
    tau_max = certificate.tau_max(result.config.mode)
    for note in calibration_notes(table.prompts, source.config.prompt_sketch):
        sys.stderr.write(f"proteus certify: {note}\n")
    if arguments.json:
        distinct = len(set(table.prompts))
        facts = {"n": certificate.n, "distinct": distinct, "delta": certificate.delta, "tau_max": tau_max}
        _write_json({"checkpoint": arguments.out, **facts})
    else:
        reach = "no target is certified" if tau_max is None else f"targets up to {tau_max:.3f} are certified"
        _write(f"{arguments.out}: {reach} on {certificate.n} rows at delta {certificate.delta:g}")
    return MISSED if tau_max is None else OK


def _parser(*, with_server: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="proteus", description="Route each query to the cheapest language model that keeps an accuracy target."
    )
    parser.add_argument("--version", action="version", version=f"proteus-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str, json_of: str | None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        if json_of is not None:
            command.add_argument("--json", action="store_true", help=f"print {json_of} as JSON")
        return command

    def add_encoder(command: argparse.ArgumentParser) -> None:
        command.add_argument("--encoder", metavar="DIR", help="where the checkpoint's transformer is, if it was moved")

    demo = add("demo", _demo, "start a server on the embedded router, route queries, print a table", "the table")
    demo.add_argument("--plot", default="proteus-frontier.png", help="where the frontier goes (default %(default)s)")

    train = add("train", _train, "train a router on DIR/{train,val}.parquet", "a summary")
    train.add_argument("--data", required=True, metavar="DIR")
    train.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to write")
    train.add_argument("--encoder", default="hash", help="hash, a Hugging Face directory, or a name on the hub")
    train.add_argument("--teacher", metavar="DIR", help="a transformer that the hash encoder learns from")
    train.add_argument("--unlabelled", metavar="FILE", help="Parquet file of further prompts to ask the teacher about")
    train.add_argument("--max-tokens", type=int, help="of the transformer; a longer text's first ones count")
    train.add_argument("--hold-encoder", action="store_true", help="copy the transformer into the checkpoint")
    train.add_argument(
        "--finetune", action="store_true",
        help="also train all weights of the transformer; kept, and held, where it costs less on a held-out fold",
    )  # fmt: skip
    train.add_argument("--epochs", type=int, help="of --finetune, at most")
    train.add_argument("--batch-size", type=int, metavar="N", help="of --finetune: rows of a forward pass, at most")
    train.add_argument("--accumulate", type=int, metavar="N", help="of --finetune: batches of a step (default 1)")
    train.add_argument("--learning-rate", type=float, metavar="X", help="of --finetune: the head's; lower layers' less")
    train.add_argument(
        "--precision", choices=["float32", "bfloat16"],
        help="of --finetune's products (default bfloat16 on cuda, else float32)",
    )  # fmt: skip
    train.add_argument("--delta", type=float, default=0.1, help="error probability of the certificate (default .1)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--no-refine", action="store_true", help="keep the closed form without trying gradient steps")
    train.add_argument(
        "--mode", choices=["dual", "policy", "cheaper"], default="dual",
        help="dual: the plug-in rule alone (default); policy: also train the Beta policy, and route by it; cheaper: "
        "also train it, route by what costs less out of fold",
    )  # fmt: skip
    train.add_argument("--dual", choices=["indexed", "scalar"], help="lambda(tau) (default), or the paper's")
    train.add_argument(
        "--head", choices=["residual", "free"], help="of the policy (default residual); free is the paper's"
    )
    train.add_argument("--policy-steps", type=int, metavar="N", help="batches of the policy's training, at most")
    train.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where policy and transformer are trained"
    )

    experiment = add("experiment", _experiment, "repeat an experiment: a table and a plot", "its figures")
    experiment.add_argument("name", metavar="NAME", choices=_EXPERIMENTS, help=", ".join(_EXPERIMENTS))
    experiment.add_argument(
        "--data", required=True, action="append", metavar="DIR",
        help="folder with train, val and test tables (repeatable)",
    )  # fmt: skip
    experiment.add_argument("--seeds", type=int, default=5, help="of the policies (default %(default)s)")
    experiment.add_argument("--out", default="docs/results", metavar="DIR", help="where files go (default %(default)s)")
    experiment.add_argument("--cache", metavar="DIR", help="keeps predictors and policies for the next experiment")

    evaluate = add(
        "evaluate", _evaluate, "accuracy, floors and cost on an outcome table, beside baselines", "the report"
    )
    evaluate.add_argument("checkpoint", nargs="?", metavar="CKPT", help=_DEFAULT)
    add_encoder(evaluate)
    evaluate.add_argument("--data", required=True, metavar="DIR")
    evaluate.add_argument("--split", default="test", help="reads DIR/SPLIT.parquet (default %(default)s)")
    evaluate.add_argument("--taus", type=_taus, metavar="T,T,...", help="default: relative to what the pool reaches")
    evaluate.add_argument("--plot", metavar="PNG", help="also draw accuracy against cost")

    route = add("route", _route, "choose a candidate for one text", "the decision")
    route.add_argument("text")
    route.add_argument("--tau", type=float, required=True, help="accuracy target in [0, 1]")
    route.add_argument("--checkpoint", metavar="CKPT", help=_DEFAULT)
    add_encoder(route)
    route.add_argument("--available", action="append", metavar="NAME", help="only these candidates (repeatable)")
    route.add_argument("--guarantee", choices=["certified", "calibrated"], default="certified")
    route.add_argument("--strict", action="store_true", help="an infeasible target is a missed check: exit status 1")

    serve = add("serve", _serve, "serve a router over gRPC until SIGTERM", None)
    # grpc is imported for this command alone
    if with_server:
        from proteus_server.app import add_arguments

        add_arguments(serve)

    plan = add("plan", _plan, "labels needed to certify a target", "the number")
    plan.add_argument("--tau", type=float, required=True)
    plan.add_argument("--headroom", type=float, required=True, help="accuracy of the most accurate policy minus tau")
    plan.add_argument("--delta", type=float, default=0.1, help="error probability of the certificate (default .1)")

    certify = add("certify", _certify, "certify a router again on labelled queries of one's own", "a summary")
    certify.add_argument("checkpoint", metavar="CKPT")
    add_encoder(certify)
    certify.add_argument("--data", required=True, metavar="FILE", help="outcome table with the router's candidates")
    certify.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to write")
    certify.add_argument("--delta", type=float, default=0.1, help="error probability of the certificate (default .1)")
    certify.add_argument(
        "--seed", type=int, default=0,
        help="of the rounding of graded scores and the mixing key: choose it before you see the rows (default 0)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(with_server=words[:1] == ["serve"]).parse_args(words)
    # a shell's `>&-` leaves none: there is nobody to read, which is no error
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    try:
        # a server logs in its own way
        with nullcontext() if arguments.command == "serve" else _saying(arguments.command, quiet=arguments.json):
            status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has gone: nothing more to say, and nothing for the interpreter to flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except KeyboardInterrupt:
        sys.stderr.write(f"proteus {arguments.command}: interrupted\n")
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0].startswith("proteus"):
            raise
        name = error.name.split(".")[0]
        extra = "transformers" if name in _TRANSFORMERS else "train"
        sys.stderr.write(f"proteus {arguments.command}: expected the package {name}: install proteus-fast[{extra}]\n")
        return USAGE
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"proteus {arguments.command}: {error}\n")
        return USAGE
    return status


if __name__ == "__main__":
    sys.exit(main())
