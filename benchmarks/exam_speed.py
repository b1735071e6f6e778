"""Seconds a question: the harness as it comes against this runner; same model, same questions, same process.

    python benchmarks/exam_speed.py [--quiz NAME ...] [--rounds 2] [--out FILE.json]

`plain` is lm-evaluation-harness with its own `HFLM` and its default batch of one, over the task files that
`elson benchmark build` writes. `elson` is `run_benchmark` with the laptop recipe's batch: choices behind a
prompt that is computed once, and answers in batches sorted by length. The arms take turns; seconds are
medians over the rounds. Every question must be judged alike by both, or the benchmark fails.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from elson_nb.evaluation.benchmark import load_quiz
from elson_nb.evaluation.harness import build_exam, run_benchmark
from elson_nb.recipes import EvaluationConfig, load_recipe
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.base import fetch_base, load_base

TARGET = 2.0  # seconds of the plain harness over those of this runner


def ask_plain(model, tokenizer, tasks: TaskManager, names: list[str]) -> dict[str, bool]:
    "The harness alone, its defaults; question -> right."
    lm = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False)
    groups = [f"elson_{name}" for name in names]
    found = simple_evaluate(lm, tasks=groups, task_manager=tasks, log_samples=True, bootstrap_iters=0)
    return {s["doc"]["id"]: bool(s["right"]) for samples in found["samples"].values() for s in samples}


def ask_ours(model, tokenizer, config: EvaluationConfig) -> dict[str, bool]:
    return {row["id"]: row["right"] for row in run_benchmark(model, tokenizer, config)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quiz", nargs="+", default=["insurance", "derivatives"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    recipe = load_recipe("laptop")
    torch.set_num_threads(recipe.training.threads)
    model, tokenizer = load_base(recipe, fetch_base(recipe.model))
    config = EvaluationConfig(quizzes=args.quiz, batch_size=recipe.evaluation.batch_size)
    questions = [q for name in args.quiz for q in load_quiz(name)]
    seconds: dict[str, list[float]] = {"plain": [], "elson": []}
    judged: dict[str, dict[str, bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_exam(Path(folder))
        tasks = TaskManager(include_path=str(Path(folder) / "tasks"), include_defaults=False)
        arms = {
            "plain": lambda: ask_plain(model, tokenizer, tasks, args.quiz),
            "elson": lambda: ask_ours(model, tokenizer, config),
        }
        for turn in range(args.rounds):
            for name, arm in arms.items():
                began = time.perf_counter()
                judged[name] = arm()
                seconds[name].append(time.perf_counter() - began)
                print(
                    f"round {turn + 1} of {args.rounds}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr
                )
    if judged["plain"] != judged["elson"]:
        raise SystemExit("the two judged differently")
    each = {name: statistics.median(values) / len(questions) for name, values in seconds.items()}
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["elson"])]
    result = {
        "quizzes": args.quiz,
        "questions": len(questions),
        "right": sum(judged["elson"].values()),
        "seconds_a_question": each,
        "plain_over_elson": statistics.median(ratios),
        "plain_over_elson_range": [min(ratios), max(ratios)],
        "target": TARGET,
        "verdict": "MET" if min(ratios) >= TARGET else "MISSED" if max(ratios) < TARGET else "CANNOT TELL",
        "provenance": provenance(),
    }
    print(
        f"{len(questions)} questions, {result['right']} right in both: plain {each['plain']:.2f} s, elson "
        f"{each['elson']:.2f} s a question, {result['plain_over_elson']:.2f} times "
        f"[{min(ratios):.2f}, {max(ratios):.2f}], target {TARGET}: {result['verdict']}"
    )
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
