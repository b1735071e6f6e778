"`elson buckets build` and `elson sample` as an operator uses them: a process, its exit code, its files."

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from elson_nb.corpus.buckets import load_index
from elson_nb.corpus.records import make_record, write_jsonl
from elson_nb.recipes import TIERS

DOMAINS = ("insurance", "accounting", "compliance", "gift_tax", "trusts", "fintech", "budgeting", "pensions")
MANIFEST_KEYS = ["id", "position", "phase", "domain", "tier", "source", "tokens", "reason"]


def elson(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).parent / "elson", *map(str, words)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def buckets(tmp_path_factory) -> Path:
    "Eight domains with forty records of every tier but the hardest, of which each has four."
    folder = tmp_path_factory.mktemp("sample")
    counts = dict(zip(TIERS, (40, 40, 40, 4)))
    rows = [
        make_record(f"{d} {t} {n}?", f"Answer {n}.", category=d, difficulty=t, source="toy")
        for d in DOMAINS
        for t in TIERS
        for n in range(counts[t])
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    made = elson("buckets", "build", folder / "corpus.jsonl", "--out", folder / "buckets", "--json")
    assert made.returncode == 0 and json.loads(made.stdout)["records"] == len(rows)
    return folder / "buckets"


def manifest(out: Path, phase: str) -> list[dict]:
    (path,) = (out / "curriculum_runs").glob(f"manifest_phase{phase}_*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(buckets: Path, out: Path, *words: object) -> dict:
    done = elson("sample", "--buckets", buckets, "--out", out, "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_banner_says_what_was_drawn_and_every_shortfall(buckets, tmp_path):
    done = elson("sample", "--buckets", buckets, "--out", tmp_path, "--target-records", "1000", "--seed", "7")
    assert done.returncode == 0, done.stderr
    for words in (
        "Curriculum sample",
        str(buckets),
        "seed    7",
        "shortfall nearest",
        "Phase A: 330 records",
    ):
        assert words in done.stdout
    assert "note: extremely_complex: asked 72, 40 short (stock 32); 40 taken from hard" in done.stdout
    for phase, target in {"A": 330, "B": 430, "C": 240}.items():
        lines = manifest(tmp_path, phase)
        assert [list(line) for line in lines] == [MANIFEST_KEYS] * target
        assert [line["position"] for line in lines] == list(range(target))


@pytest.mark.parametrize(
    "policy, records, hardest",
    [("nearest", 100, 30), ("undershoot", 100, 30), ("repeat", 100, 30)],
)
def test_a_phase_that_can_be_met_is_the_same_under_every_policy(buckets, tmp_path, policy, records, hardest):
    info = sampled(buckets, tmp_path, "--phase", "C", "--target-records", records, "--shortfall", policy)
    assert info["C"]["tiers"]["extremely_complex"] == hardest and not info["C"]["notes"]


def test_what_each_policy_does_stands_in_the_manifest(buckets, tmp_path):
    drawn = {}
    for policy in ("nearest", "undershoot", "repeat"):
        out = tmp_path / policy
        drawn[policy] = sampled(buckets, out, "--phase", "C", "--target-records", 200, "--shortfall", policy)[
            "C"
        ]
        drawn[policy]["reasons"] = Counter(line["reason"] for line in manifest(out, "C"))
    assert [d["records"] for d in drawn.values()] == [200, 172, 200]  # 60 asked of the hardest, 32 in stock
    assert drawn["nearest"]["reasons"]["fills a shortfall of extremely_complex"] == 28
    assert drawn["repeat"]["reasons"]["extremely_complex share of the mix, repeated"] == 28
    assert "28 records smaller" in drawn["undershoot"]["notes"][0]
    refused = elson(
        "sample", "--buckets", buckets, "--out", tmp_path, "--phase", "C", "--target-records", 200,
        "--shortfall", "strict",
    )  # fmt: skip
    assert refused.returncode == 2 and "asked 60, 28 short (stock 32" in refused.stderr
    assert not (tmp_path / "curriculum_runs").exists()


def test_reuse_decides_whether_a_cycle_takes_a_record_twice(buckets, tmp_path):
    twice = {}
    for policy in ("prefer-unseen", "allow", "forbid"):
        sampled(
            buckets,
            tmp_path / policy,
            "--target-records",
            900,
            "--reuse",
            policy,
            "--shortfall",
            "undershoot",
        )
        ids = Counter(line["id"] for phase in "ABC" for line in manifest(tmp_path / policy, phase))
        twice[policy] = sum(n - 1 for n in ids.values())
    assert twice["forbid"] == 0 < twice["prefer-unseen"] < twice["allow"]


def test_a_mix_decides_and_an_option_overrides_it(buckets, tmp_path):
    mix = tmp_path / "my_mix.yaml"
    mix.write_text(
        "curriculum: {target_records: 80, seed: 3}\nphases: {B: {mix: {easy: 0.75, hard: 0.25}}}\n", "utf-8"
    )
    info = sampled(buckets, tmp_path / "one", "--mix", mix, "--phase", "B")["B"]
    assert info["tiers"] == {"easy": 60, "medium": 0, "hard": 20, "extremely_complex": 0}
    other = sampled(buckets, tmp_path / "two", "--mix", mix, "--phase", "B", "--target-records", 40)["B"]
    assert other["tiers"]["easy"] == 30
    domains = [line["domain"] for line in manifest(tmp_path / "one", "B")]
    assert all(a != b for a, b in zip(domains, domains[1:]))


def test_tiers_by_the_loss_of_the_model_keep_their_numbers(buckets, tmp_path):
    source = buckets.parent / "corpus.jsonl"
    some = tmp_path / "some.jsonl"
    some.write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[::7]), "utf-8")
    summaries, indexes = {}, {}
    for way in ("rule", "model"):
        words = ("--recipe", "smoke", "--difficulty", way, "--json")
        done = elson("buckets", "build", some, "--out", tmp_path / way, *words)
        assert done.returncode == 0, done.stderr
        summaries[way] = json.loads(done.stdout)
        indexes[way] = load_index(tmp_path / way, ["id", "tier", "tier_because"]).sort("id")
    assert summaries["rule"]["tiers"] == summaries["model"]["tiers"]
    assert indexes["rule"]["tier"].to_list() != indexes["model"]["tier"].to_list()
    because = indexes["model"]["tier_because"].cast(pl.String).to_list()
    assert all("nats a token" in b and "by the rule" in b for b in because)
    losses = (tmp_path / "model" / "answer_losses.jsonl").read_bytes()
    again = elson("buckets", "build", some, "--out", tmp_path / "model", *words)
    assert again.returncode == 0 and (tmp_path / "model" / "answer_losses.jsonl").read_bytes() == losses
    wrong = elson("buckets", "build", some, "--out", tmp_path / "x", "--difficulty", "guess")
    assert wrong.returncode == 2 and "use rule or model" in wrong.stderr


def test_a_run_takes_a_mix_too(buckets, tmp_path):
    mix = tmp_path / "my_mix.yaml"
    mix.write_text("phases: {A: {mix: {easy: 1.0}}}\n", "utf-8")
    words = ("run", "--recipe", "smoke", "--corpus", buckets.parent / "corpus.jsonl", "--dry-run", "--json")
    plan = json.loads(elson(*words, "--mix", mix).stdout)
    assert set(plan["phases"]["A"]["tiers"].values()) == {0, plan["phases"]["A"]["records"]}
    assert json.loads(elson(*words).stdout)["phases"]["A"]["tiers"]["medium"] > 0


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--mix", "nowhere.yaml"), "there is no mix file nowhere.yaml"),
        (("--shortfall", "sometimes"), "use one of strict, nearest, undershoot, repeat"),
        (("--reuse", "never"), "use one of prefer-unseen, allow, forbid"),
        (("--phase", "D"), "use all, A, B or C"),
        (("--set", "phases.B.mix={easy: 0.9}"), "sums to 90%; its shares must sum to 100%"),
    ],
)
def test_wrong_use_ends_with_2_and_a_reason(buckets, tmp_path, words, complaint):
    done = elson("sample", "--buckets", buckets, "--out", tmp_path, *words)
    assert done.returncode == 2 and complaint in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
