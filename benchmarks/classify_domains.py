"""How well the domain classifier does: on templates that it has not seen, and on real questions.

    python benchmarks/classify_domains.py

Cross-validation over the whole generated corpus: *grouped*, with every template family, skeleton and
augmentation on one side, and *ungrouped* (one fold of five), which shows what a split without groups would
have claimed. Then the default classifier on the 300 labelled questions in tests/data. The keyword rule and
the commonest domain answer in the same run. Shares of real questions have Wilson 95% intervals; the
comparison with the keyword rule is McNemar's exact test. Figures go to
benchmarks/results/classify_domains.json.
"""

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
from sklearn.metrics import cohen_kappa_score, f1_score

import elson_nb.corpus.classifier as classifier_module
from elson_nb.corpus.classifier import (
    LOW_CONFIDENCE,
    READINGS,
    DomainClassifier,
    grouped_folds,
    template_groups,
    train_classifier,
)
from elson_nb.corpus.records import read_jsonl
from elson_nb.corpus.synthesis import build_records
from elson_nb.corpus.taxonomy import classify_text
from elson_nb.evaluation.statistics import compare_answers, wilson
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json

RESULTS = Path(__file__).parent / "results"
QUESTIONS = Path(__file__).parents[1] / "tests" / "data" / "labelled_questions.jsonl"
FOLDS, SEED = 5, 42


@cache
def corpus() -> list[dict]:
    "The generated corpus; each process makes it once."
    return build_records(seed=SEED, scale=1.0)


def ungrouped_folds(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    "Folds that do not look at templates."
    side = np.random.default_rng(SEED).permutation(count) % FOLDS
    for fold in range(FOLDS):
        yield np.flatnonzero(side != fold), np.flatnonzero(side == fold)


def by_keywords(record: dict) -> str:
    "What the keyword rule says to question, page and answer."
    return classify_text(
        " ".join(record.get(name) or "" for name in ("instruction", "input", "output"))
    ).value


def tested(job: tuple[np.ndarray, np.ndarray]) -> list[tuple]:
    "Train and test once: position, three guesses, confidence, best guess with the question read once."
    train, test = job
    records = corpus()
    classifier = train_classifier([records[at] for at in train], SEED)
    held = [records[at] for at in test]
    guesses = classifier.top(held)
    once = np.concatenate(
        [
            classifier.scores(classifier.features(held[at : at + 2000], readings=READINGS - 1)).argmax(axis=1)
            for at in range(0, len(held), 2000)
        ]
    )
    return [
        (int(at), [name for name, _ in guess], guess[0][1], classifier.domains[other])
        for at, guess, other in zip(test, guesses, once, strict=True)
    ]


VARIANTS = {  # what else was tried on the real questions
    "without sections of reports": {"REPORT_SECTIONS": {}},
    "documents weigh 10": {"DOCUMENT_WEIGHT": 10.0, "C": 10.0},
}


def varied(name: str) -> dict:
    "First guesses on the real questions of a classifier trained otherwise."
    questions = list(read_jsonl(QUESTIONS))
    with patch.multiple(classifier_module, **VARIANTS[name]):
        guesses = train_classifier(corpus(), SEED).top(questions)
    return {
        "top1": interval([g[0][0] == q["label"] for g, q in zip(guesses, questions, strict=True)]),
        "top3": interval([q["label"] in dict(g) for g, q in zip(guesses, questions, strict=True)]),
    }


def share(right: list[bool] | np.ndarray, weights: np.ndarray | None = None) -> float:
    return round(float(np.average(right, weights=weights)), 4)


def confusions(labels: list[str], guesses: list[str], most: int = 12) -> list[dict]:
    "The commonest wrong guesses."
    wrong = Counter((a, b) for a, b in zip(labels, guesses, strict=True) if a != b)
    return [{"label": a, "guess": b, "records": n} for (a, b), n in wrong.most_common(most)]


def by_confidence(right: np.ndarray, sure: np.ndarray, weights: np.ndarray) -> list[dict]:
    "Accuracy in bands of confidence, and coverage and accuracy of everything from there upward."
    edges = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01]
    rows = []
    for low, high in zip(edges, edges[1:]):
        band, above = (sure >= low) & (sure < high), sure >= low
        if band.any():
            rows.append(
                {
                    "from": low,
                    "records": int(band.sum()),
                    "right": share(right[band], weights[band]),
                    "coverage_above": share(above, weights),
                    "right_above": share(right[above], weights[above]),
                }
            )
    return rows


def calibration_error(right: np.ndarray, sure: np.ndarray, weights: np.ndarray) -> float:
    "Expected calibration error: mean distance of confidence and accuracy over ten bands."
    band = np.minimum((sure * 10).astype(int), 9)
    total = 0.0
    for at in set(band):
        inside = band == at
        gap = np.average(right[inside], weights=weights[inside])
        gap -= np.average(sure[inside], weights=weights[inside])
        total += abs(gap) * weights[inside].sum()
    return round(float(total / weights.sum()), 4)


def cross_validated(rows: list[tuple]) -> dict:
    "Figures over all folds. A group's records share a weight of 1 where it says so."
    records = corpus()
    labels = [records[row[0]]["domain"] for row in rows]
    guesses = [row[1][0] for row in rows]
    right = np.array([a == b for a, b in zip(labels, guesses, strict=True)])
    three = np.array([label in row[1] for label, row in zip(labels, rows, strict=True)])
    sure = np.array([row[2] for row in rows])
    groups = template_groups(records)
    weights = (1 / np.bincount(groups)[groups])[[row[0] for row in rows]]
    names = np.array(labels)
    recall = {name: share(right[names == name]) for name in sorted(set(labels))}
    kept = sure >= LOW_CONFIDENCE
    return {
        "records": len(rows),
        "groups": len(set(groups[[row[0] for row in rows]])),
        "top1": share(right),
        "top3": share(three),
        "macro_f1": round(float(f1_score(labels, guesses, average="macro")), 4),
        "top1_groups_equal": share(right, weights),
        "top3_groups_equal": share(three, weights),
        "top1_question_once": share([row[3] == label for row, label in zip(rows, labels, strict=True)]),
        "domains_with_recall_above_half": sum(value > 0.5 for value in recall.values()),
        "lowest_recall": dict(sorted(recall.items(), key=lambda item: item[1])[:12]),
        "low_confidence": LOW_CONFIDENCE,
        "coverage": share(kept),
        "top1_of_confident": share(right[kept]),
        "calibration_error_groups_equal": calibration_error(right, sure, weights),
        "by_confidence_groups_equal": by_confidence(right, sure, weights),
        "confusions": confusions(labels, guesses),
        "majority": share(names == Counter(labels).most_common(1)[0][0]),
        "keywords": share([by_keywords(records[row[0]]) == label for row, label in zip(rows, labels)]),
    }


def interval(right: list[bool] | np.ndarray) -> dict:
    found = wilson(int(np.sum(right)), len(right))
    return {
        "value": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "n": found.n,
    }


def real_figures(questions: list[dict], classifier: DomainClassifier) -> dict:
    "Figures on labelled questions."
    labels = [q["label"] for q in questions]
    guesses, filed = classifier.top(questions), classifier.classify(questions)
    best = [guess[0][0] for guess in guesses]
    right = np.array([a == b for a, b in zip(labels, best, strict=True)])
    sure = np.array([guess[0][1] for guess in guesses])
    kept, words = sure >= LOW_CONFIDENCE, [by_keywords(q) == q["label"] for q in questions]
    paired = compare_answers(words, [bool(r) for r in right])
    either = [guess in q["labels"] for guess, q in zip(best, questions, strict=True)]
    accepted = [guess in (q["label"], *q["also"]) for guess, q in zip(best, questions, strict=True)]
    first, second = zip(*(q["labels"] for q in questions), strict=True)
    return {
        "top1": interval(right),
        "top3": interval([label in dict(guess) for label, guess in zip(labels, guesses, strict=True)]),
        "top1_either_reading": interval(either),
        "top1_label_or_also": interval(accepted),
        "top1_as_filed": interval([a.value == label for a, label in zip(filed, labels, strict=True)]),
        "coverage": interval(kept),
        "top1_of_confident": interval(right[kept]),
        "calibration_error": calibration_error(right, sure, np.ones(len(right))),
        "majority": share([label == Counter(labels).most_common(1)[0][0] for label in labels]),
        "macro_f1": round(float(f1_score(labels, best, labels=sorted(set(labels)), average="macro")), 4),
        "mean_recall": share([np.mean(right[np.array(labels) == name]) for name in sorted(set(labels))]),
        "domains": len(set(labels)),
        "keywords": interval(words),
        "against_keywords": {
            "gained": paired.gained,
            "lost": paired.lost,
            "p_value_at_most": max(paired.p_value, 1e-5),
            "verdict": paired.verdict,
        },
        "readings_agree": interval([a == b for a, b in zip(first, second, strict=True)]),
        "kappa": round(float(cohen_kappa_score(first, second)), 4),
        "confusions": confusions(labels, best),
    }


def seconds_of(classifier: DomainClassifier) -> dict:
    "Median of three runs each, after one that does not count."
    timed = {}
    for name, records in (("generated", corpus()[:1000]), ("real", list(read_jsonl(QUESTIONS)))):
        classifier.classify(records)
        took = []
        for _ in range(3):
            started = time.perf_counter()
            classifier.classify(records)
            took.append(time.perf_counter() - started)
        timed[f"{name}_texts_per_second"] = round(len(records) / statistics.median(took))
    return timed


def show(name: str, value: object) -> None:
    "A line of the report; lists are only in the file, but for what is confused most."
    if isinstance(value, list):
        value = [tuple(row.values()) for row in value[:4]]
    text = value
    if isinstance(value, dict) and "low" in value:
        text = f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}], n={value['n']}"
    print(f"  {name:32} {text}")


def main() -> None:
    started = time.perf_counter()
    records = corpus()
    jobs = [*grouped_folds(records, FOLDS, SEED), *islice(ungrouped_folds(len(records)), 1)]
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        done = list(pool.map(tested, jobs))
        variants = dict(zip(VARIANTS, pool.map(varied, VARIANTS), strict=True))
    report = {
        "grouped": cross_validated([row for rows in done[:FOLDS] for row in rows]),
        "ungrouped": cross_validated([row for rows in done[FOLDS:] for row in rows]),
    }
    alone, alone_cpu = time.perf_counter(), time.process_time()
    classifier = train_classifier(records, SEED)
    seconds = {
        "train_seconds": round(time.perf_counter() - alone, 1),
        "train_cpu_seconds": round(time.process_time() - alone_cpu, 1),
        **seconds_of(classifier),
    }
    questions = list(read_jsonl(QUESTIONS))
    parts = {"all": questions} | {
        part: [q for q in questions if q["id"].startswith(f"{part}/")]
        for part in ("finqa", "tatqa", "sec10q")
    }
    report["real"] = {name: real_figures(part, classifier) for name, part in parts.items()}
    report["real_variants"] = variants
    report["classifier"] = {"terms": len(classifier.terms), "temperature": classifier.temperature, **seconds}
    report["classifier"]["digest"] = classifier.digest()
    report["seconds_in_all"] = round(time.perf_counter() - started, 1)
    report["provenance"] = provenance()
    for title in ("grouped", "ungrouped", "classifier"):
        print(title)
        for name, value in report[title].items():
            show(name, value)
    for part, figures in [*report["real"].items(), *variants.items()]:
        print(f"real questions: {part}")
        for name, value in figures.items():
            show(name, value)
    write_json(RESULTS / "classify_domains.json", report)


if __name__ == "__main__":
    main()
