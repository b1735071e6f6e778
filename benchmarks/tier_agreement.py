"""Fits the weights of `elson_nb.corpus.tiers` and measures who agrees with the generator.

    python benchmarks/tier_agreement.py                   # about two minutes
    python benchmarks/tier_agreement.py --model laptop    # and losses of its base model, four more

The corpus is the generated one. Four fifths of its groups are fitted on, the rest is held out; a group is all
records tied by template family, card, masked skeleton or parent. When the rounded fit is not the table in
nbs/1_corpus/02a_tiers.ipynb, the table to put there is printed and no figures are written.

All goes to benchmarks/results/tier_agreement.json; without --model, the model's part of the last run is kept.
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import cohen_kappa_score, confusion_matrix
from statsmodels.miscmodels.ordinal_model import OrderedModel

from elson_nb.corpus.records import TIERS
from elson_nb.corpus.skeletons import skeleton, skeleton_id
from elson_nb.corpus.synthesis import build_records
from elson_nb.corpus.tiers import FEATURES, THRESHOLDS, assign_tier, tier_features
from elson_nb.recipes import load_recipe
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.base import load_base
from elson_nb.training.batches import encode
from elson_nb.training.difficulty import answer_losses, tiers_by_loss

RESULTS = Path(__file__).parent / "results" / "tier_agreement.json"
DRAWS = 500  # of groups, for an interval


# groups


def ties(record: dict) -> list[tuple]:
    "What binds a record to others: its family (of a card: the card), its skeleton, itself or its parent."
    family = record["meta"]["family"].split("/")
    family = family[:3] if family[1] == "card" else family
    kin = {record["id"], record["meta"].get("parent", record["id"])}
    return [("family", *family), ("skeleton", skeleton_id(skeleton(record))), *(("id", i) for i in kin)]


def group(records: list[dict]) -> np.ndarray:
    "Number of the group of each record: what is connected by ties."
    known: dict[tuple, int] = {}
    edges = [(at, known.setdefault(tie, len(known))) for at, r in enumerate(records) for tie in ties(r)]
    rows, columns = np.array(edges).T
    size = len(records) + len(known)
    graph = coo_array((np.ones(len(edges)), (rows, columns + len(records))), (size, size))
    return connected_components(graph, directed=False)[1][: len(records)]


def folds(groups: np.ndarray, count: int = 5, seed: int = 42) -> np.ndarray:
    "A fold for each record; a group is in one fold."
    names = np.unique(groups)
    of = dict(zip(np.random.default_rng(seed).permutation(names).tolist(), np.arange(len(names)) % count))
    return np.array([of[g] for g in groups.tolist()])


def leaks(records: list[dict], held: np.ndarray) -> int:
    "Ties that have records on both sides of a split."
    sides: dict[tuple, set] = {}
    for record, side in zip(records, held.tolist()):
        for tie in ties(record):
            sides.setdefault(tie, set()).add(side)
    return sum(len(found) == 2 for found in sides.values())


# fit


def features_of(records: list[dict]) -> np.ndarray:
    return np.array([list(tier_features(r).values()) for r in records])


def fit(features: np.ndarray, tiers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Weights and thresholds of a proportional-odds model, in points: one doubles the odds of a higher tier."
    model = OrderedModel(tiers, features, distr="logit")
    found = model.fit(method="bfgs", maxiter=500, disp=False, skip_hessian=True)
    if not found.mle_retvals["converged"]:
        raise RuntimeError("the fit did not converge")
    thresholds = model.transform_threshold_params(found.params)[1:-1]
    return found.params[: features.shape[1]] / np.log(2), thresholds / np.log(2)


def probabilities(weights: np.ndarray, thresholds: np.ndarray, features: np.ndarray) -> np.ndarray:
    points = features @ weights
    above = 1 / (1 + 2 ** np.clip(thresholds - points[:, None], -500, 500))
    return -np.diff(above, axis=1, prepend=1, append=0)


def best(weights: np.ndarray, thresholds: np.ndarray, features: np.ndarray) -> np.ndarray:
    return (features @ weights >= thresholds[:, None]).sum(axis=0)


def log_loss(model: tuple, features: np.ndarray, tiers: np.ndarray) -> float:
    "Mean negative log probability of the true tier (nats), each at least 1e-3."
    own = probabilities(*model, features)[np.arange(len(tiers)), tiers]
    return float(-np.log(np.maximum(own, 1e-3)).mean())


# agreement


def figures(tiers: np.ndarray, given: np.ndarray) -> dict[str, float]:
    "Accuracy, quadratic weighted kappa, share within one tier."
    same = np.array_equal(tiers, given) and len(np.unique(tiers)) == 1  # kappa is 0/0 there
    return {
        "accuracy": float((tiers == given).mean()),
        "kappa": 1.0
        if same
        else float(cohen_kappa_score(tiers, given, weights="quadratic", labels=range(4))),
        "within_one": float((abs(tiers - given) <= 1).mean()),
    }


def intervals(tiers: np.ndarray, given: np.ndarray, groups: np.ndarray, seed: int = 42) -> dict[str, list]:
    "95% intervals of the figures by drawing whole groups; records of a group are not independent."
    rng, names = np.random.default_rng(seed), np.unique(groups)
    members = {name: np.flatnonzero(groups == name) for name in names}
    drawn = []
    for _ in range(DRAWS):
        at = np.concatenate([members[name] for name in rng.choice(names, len(names))])
        drawn.append(list(figures(tiers[at], given[at]).values()))
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    return {name: [lo, hi] for name, lo, hi in zip(figures(tiers, given), low, high)}


def gain(tiers: np.ndarray, given: np.ndarray, other: np.ndarray, groups: np.ndarray, seed: int = 42) -> dict:
    "Accuracy of one rule less that of another on the same records, with a 95% interval over groups."
    names, place = np.unique(groups, return_inverse=True)
    better = np.bincount(place, (tiers == given).astype(float) - (tiers == other))
    size = np.bincount(place)
    picks = np.random.default_rng(seed).integers(0, len(names), (2000, len(names)))
    low, high = np.percentile(better[picks].sum(axis=1) / size[picks].sum(axis=1), [2.5, 97.5])
    return {"accuracy": float(better.sum() / size.sum()), "interval": [low, high]}


def agreement(tiers: np.ndarray, given: np.ndarray, groups: np.ndarray) -> dict:
    table = confusion_matrix(tiers, given, labels=range(4)).tolist()
    return {
        "n": len(tiers),
        **figures(tiers, given),
        "intervals": intervals(tiers, given, groups),
        "confusion": table,
    }


def calibration(tiers: np.ndarray, given: np.ndarray, confidence: np.ndarray) -> list[dict]:
    "Mean confidence and share of right tiers in bands of confidence."
    rows = []
    for low, high in ((0, 0.6), (0.6, 0.8), (0.8, 0.95), (0.95, 1.01)):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            rows.append(
                {
                    "from": low,
                    "n": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "right": float((tiers == given)[inside].mean()),
                }
            )
    return rows


# what the rule is compared with


OLD = (  # the rule before the fit: pattern or None for words, field, unit, points a unit, most points
    (None, "output", 40, 1.0, 4.0),
    (r"\d[\d,.]*%?", "output", 3, 0.7, 2.5),
    (
        r"\b(unless|however|except|although|provided|subject to|only if|depends|whereas)\b",
        "output",
        1,
        0.6,
        2.0,
    ),
    (
        r"\b(trade-?offs?|conflict\w*|competing|recommend\w*|weigh\w*|on the other hand|instead of)\b",
        "output",
        1,
        0.8,
        2.0,
    ),
    (None, "question", 40, 0.8, 2.0),
)


def old_rule(record: dict) -> int:
    "The tier by the weights that were set by hand."
    texts = {"output": record["output"], "question": f"{record['instruction']} {record['input']}"}
    count = lambda pattern, text: len(re.findall(pattern, text, re.I) if pattern else text.split())
    points = sum(min(most, count(p, texts[f]) / unit * each) for p, f, unit, each, most in OLD)
    return sum(points >= limit for limit in (1.6, 3.4, 6.0))


QUALIFIERS = re.compile(
    r"\b(unless|however|except|although|though|provided|depend(?:s|ing)?|whereas|but|otherwise|without|only)\b"
)
TRIED = {  # features that the rule does without
    "qualifiers": lambda r: len(set(QUALIFIERS.findall(r["output"].lower()))),
    "words of the question and its input (doublings)": lambda r: np.log2(
        1 + len(f"{r['instruction']} {r['input']}".split())
    ),
    "figures of the question and its input (doublings)": lambda r: np.log2(
        1 + len(re.findall(r"\d[\d,.]*", f"{r['instruction']} {r['input']}"))
    ),
    "lines of the answer": lambda r: r["output"].count("\n"),
}


def kind(record: dict) -> str:
    "Four kinds of text that were made in different ways."
    if record["domain"] == "tool_use":
        return "tool calls"
    kinds = {"elson_glossary": "cards", "elson_rules": "cards", "elson_strategic_qa": "written questions"}
    return kinds.get(record["source"], "computed problems and cases")


def across_kinds(features: np.ndarray, tiers: np.ndarray, kinds: np.ndarray) -> dict[str, dict]:
    "Each kind judged by a fit that has seen none of it."
    rows = {}
    for name in np.unique(kinds):
        model = fit(features[kinds != name], tiers[kinds != name])
        inside = kinds == name
        rows[str(name)] = {
            "n": int(inside.sum()),
            **figures(tiers[inside], best(*model, features[inside])),
            "log_loss": log_loss(model, features[inside], tiers[inside]),
        }
    return rows


def feature_trials(records: list[dict], features: np.ndarray, tiers: np.ndarray, kinds: np.ndarray) -> dict:
    "Mean log loss over unseen kinds: of the rule's features, without each, and with each that was tried."
    mean = lambda x: float(np.mean([row["log_loss"] for row in across_kinds(x, tiers, kinds).values()]))
    rows = {"the rule's features": mean(features)}
    for at, name in enumerate(FEATURES):
        rows[f"without {name}"] = mean(np.delete(features, at, axis=1))
    for name, of in TRIED.items():
        rows[f"with {name}"] = mean(np.column_stack([features, [of(r) for r in records]]))
    return rows


# the two parts of the report


def microseconds(records: list[dict], runs: int = 20) -> float:
    "Best mean time of many runs, as others on the machine only add to it, of `assign_tier`."
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        for record in records:
            assign_tier(record)
        times.append(time.perf_counter() - started)
    return 1e6 * min(times) / len(records)


def speed(records: list[dict]) -> dict:
    labelled = random.Random(42).sample(records, 1000)
    bare = [r | {"difficulty": ""} for r in labelled]
    long = [r | {"output": " ".join(b["output"] for b in bare[at : at + 5])} for at, r in enumerate(bare)]
    return {
        "unlabelled": microseconds(bare),
        "unlabelled, answer length": float(np.mean([len(r["output"]) for r in bare])),
        "unlabelled, five answers joined": microseconds(long),
        "labelled": microseconds(labelled),
    }


def table_is_the_fit(weights: np.ndarray, thresholds: np.ndarray) -> bool:
    "Whether the notebook's table is the fit, rounded; prints the right one otherwise."
    rounded = [round(float(w), 1) for w in weights], [round(float(t), 1) for t in thresholds]
    same = rounded == ([w for w, _ in FEATURES.values()], list(THRESHOLDS.values()))
    if not same:
        print("the table in nbs/1_corpus/02a_tiers.ipynb is not the fit; put there:")
        print(dict(zip(FEATURES, rounded[0])), dict(zip(THRESHOLDS, rounded[1])))
    return same


def measure(records: list[dict]) -> dict | None:
    "Fit, held-out agreement and baselines; None where the notebook's table is not the fit."
    tiers = np.array([TIERS.index(r["difficulty"]) for r in records])
    groups, kinds = group(records), np.array([kind(r) for r in records])
    fold, features = folds(groups), features_of(records)
    held = fold == 0
    assert not leaks(records, held)
    fitted = fit(features[~held], tiers[~held])
    if not table_is_the_fit(*fitted):
        return None
    bare = [r | {"difficulty": ""} for r, out in zip(records, held) if out]
    assigned = [assign_tier(r) for r in bare]
    rule = np.array([TIERS.index(a.value) for a in assigned])
    length, truth = features[:, :1], tiers[held]
    common = np.full(len(truth), np.bincount(tiers[~held]).argmax())
    compared = {
        "rule": rule,
        "length alone, fitted": best(*fit(length[~held], tiers[~held]), length[held]),
        "hand-set rule before": np.array([old_rule(r) for r in bare]),
        "most frequent tier": common,
    }
    splits = [fit(features[fold != n], tiers[fold != n]) for n in range(5)]
    across = [figures(tiers[fold == n], best(*splits[n], features[fold == n])) for n in range(5)]
    return {
        "records": len(records),
        "groups": len(np.unique(groups)),
        "fitted_on": int((~held).sum()),
        "weights": dict(zip(FEATURES, fitted[0].tolist())),
        "thresholds": dict(zip(THRESHOLDS, fitted[1].tolist())),
        "weights_over_five_splits": {
            name: [min(s[0][at] for s in splits), max(s[0][at] for s in splits)]
            for at, name in enumerate(FEATURES)
        },
        "accuracy_over_five_splits": [row["accuracy"] for row in across],
        "held_out": {name: agreement(truth, given, groups[held]) for name, given in compared.items()},
        "rule_less_length_alone": gain(truth, rule, compared["length alone, fitted"], groups[held]),
        "held_out_by_kind": {
            str(name): {"n": int(at.sum()), **figures(truth[at], rule[at])}
            for name in np.unique(kinds)
            for at in [kinds[held] == name]
        },
        "calibration": calibration(truth, rule, np.array([a.confidence for a in assigned])),
        "unseen_kinds": across_kinds(features, tiers, kinds),
        "feature_trials_log_loss": feature_trials(records, features, tiers, kinds),
        "microseconds_a_record": speed(records),
        "provenance": provenance(),
    }


def correlation(one: np.ndarray, other: np.ndarray, seed: int = 42, draws: int = 2000) -> dict:
    "Spearman's rank correlation with a percentile bootstrap 95% interval over records."
    rng = np.random.default_rng(seed)
    picks = (rng.integers(0, len(one), len(one)) for _ in range(draws))
    drawn = [spearmanr(one[at], other[at]).statistic for at in picks]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"rho": float(spearmanr(one, other).statistic), "interval": [low, high], "n": len(one)}


def at_equal_length(one: np.ndarray, other: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Ranks of two measures with the part that the rank of the length explains taken away."
    ranks = rankdata(length)
    rest = lambda x: x - np.polyval(np.polyfit(ranks, x, 1), ranks)
    return rest(rankdata(one)), rest(rankdata(other))


def by_length(loss: np.ndarray, length: np.ndarray, parts: int = 5) -> list[dict]:
    "Mean loss in equal parts of the records, from the shortest answers to the longest."
    return [
        {
            "tokens": [int(length[at].min()), int(length[at].max())],
            "n": len(at),
            "loss": float(loss[at].mean()),
        }
        for at in np.array_split(np.argsort(length, kind="stable"), parts)
    ]


def measure_model(records: list[dict], recipe_name: str, count: int = 200) -> dict:
    "Loss of the base model on some records, beside the generator's tier and the rule."
    recipe = load_recipe(recipe_name)
    template, longest = recipe.training.prompt_template, recipe.training.max_length
    model, tokenizer = load_base(recipe)
    examples = {}
    for record in random.Random(42).sample(records, len(records)):
        example = encode(record, tokenizer, template)
        if len(example) <= longest:
            examples[record["id"]] = record, example
        if len(examples) == count:
            break
    sample = [record for record, _ in examples.values()]
    started = time.perf_counter()
    losses = answer_losses(sample, model, tokenizer, template)
    seconds = time.perf_counter() - started
    tokens = sum(len(example) for _, example in examples.values())
    loss = np.array([losses[r["id"]] for r in sample])
    truth = np.array([TIERS.index(r["difficulty"]) for r in sample])
    assigned = [assign_tier(r | {"difficulty": ""}).value for r in sample]
    rule = np.array([TIERS.index(t) for t in assigned])
    length = np.array([sum(example.completion_mask) for _, example in examples.values()])
    shares = {tier: int((truth == at).sum()) for at, tier in enumerate(TIERS)}
    cut = tiers_by_loss(losses, shares)
    by_loss = np.array([TIERS.index(cut[r["id"]]) for r in sample])
    return {
        "recipe": recipe_name,
        "base": recipe.model.name,
        "n": len(sample),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "threads": torch.get_num_threads(),
        "mean_loss_by_tier": {t: float(loss[truth == at].mean()) for at, t in enumerate(TIERS)},
        "shares": shares,
        "loss_by_answer_tokens": by_length(loss, length),
        "spearman": {
            "loss and generator's tier": correlation(loss, truth),
            "loss and rule's tier": correlation(loss, rule),
            "loss and answer tokens": correlation(loss, length),
            "loss and generator's tier, answer length removed": correlation(
                *at_equal_length(loss, truth, length)
            ),
        },
        "tiers_by_loss_against_generator": agreement(truth, by_loss, np.arange(len(truth))),
        "provenance": provenance(),
    }


# printing


def print_confusion(table: list[list[int]]) -> None:
    print(f"  {'generator / given':20}" + "".join(f"{t[:9]:>10}" for t in TIERS))
    for name, row in zip(TIERS, table):
        print(f"  {name:20}" + "".join(f"{n:10,}" for n in row))


def print_report(report: dict) -> None:
    print(f"{report['records']:,} records in {report['groups']:,} groups; fitted on {report['fitted_on']:,}")
    for name, weight in report["weights"].items():
        low, high = report["weights_over_five_splits"][name]
        print(f"  {name:40} {weight:7.2f} points a unit, {low:.2f} to {high:.2f} over five splits")
    print("  thresholds", {k: round(v, 2) for k, v in report["thresholds"].items()})
    for name, row in report["held_out"].items():
        said = (f"{k} {row[k]:.3f} [{low:.3f}, {high:.3f}]" for k, (low, high) in row["intervals"].items())
        print(f"{name:24} n {row['n']:,}: {', '.join(said)}")
    more = report["rule_less_length_alone"]
    print("rule less length alone: {:+.3f} [{:+.3f}, {:+.3f}]".format(more["accuracy"], *more["interval"]))
    print_confusion(report["held_out"]["rule"]["confusion"])
    print("accuracy over five splits", [round(a, 3) for a in report["accuracy_over_five_splits"]])
    for title in ("held_out_by_kind", "unseen_kinds"):
        print(title.replace("_", " "))
        for name, row in report[title].items():
            print(f"  {name:30} " + ", ".join(f"{k} {round(v, 3):,}" for k, v in row.items()))
    print("calibration", *report["calibration"], sep="\n  ")
    print("log loss over unseen kinds")
    for name, value in report["feature_trials_log_loss"].items():
        print(f"  {name:60} {value:.3f}")
    print("microseconds a record", {k: round(v, 1) for k, v in report["microseconds_a_record"].items()})


def print_model(model: dict) -> None:
    print(
        f"{model['base']}: {model['n']} records, {model['tokens']:,} tokens in {model['seconds']:.0f} s, "
        f"{model['tokens_per_second']:.0f} tokens/s on {model['threads']} threads"
    )
    print("  mean loss", {t: round(v, 3) for t, v in model["mean_loss_by_tier"].items()})
    for row in model["loss_by_answer_tokens"]:
        print("  {} to {} answer tokens: n {}, loss {:.3f}".format(*row["tokens"], row["n"], row["loss"]))
    for name, row in model["spearman"].items():
        print("  {}: rho {:.3f} [{:.3f}, {:.3f}], n={}".format(name, row["rho"], *row["interval"], row["n"]))
    cut = model["tiers_by_loss_against_generator"]
    print(f"  tiers by loss: accuracy {cut['accuracy']:.3f}, kappa {cut['kappa']:.3f}")
    print_confusion(cut["confusion"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="RECIPE", help="also score records with this recipe's base model")
    given = parser.parse_args()
    records = build_records(seed=42, scale=1.0)
    report = measure(records)
    if report is None:
        return 1
    print_report(report)
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    model = measure_model(records, given.model) if given.model else before.get("model")
    if model:
        print_model(model)
    write_json(RESULTS, report | ({"model": model} if model else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
