"""What a cycle of 15,000 records draws from the full corpus, and from one without its hardest tier.

    python benchmarks/policies.py

It does what `elson corpus build`, `elson buckets build` and, under each policy, `elson sample --phase all
--target-records 15000 --seed 42 --shortfall POLICY` do. Figures go to benchmarks/results/policies.json.
"""

import json
import tempfile
from pathlib import Path

import polars as pl

from elson_nb.corpus.buckets import build_buckets, load_index
from elson_nb.corpus.synthesis import write_corpus
from elson_nb.curriculum.plan import ShortfallError
from elson_nb.curriculum.sampling import SampleError, sample_phases
from elson_nb.recipes import REUSES, SHORTFALLS, TIERS, CurriculumConfig, reference_phases
from elson_nb.session.ledger import provenance

RESULTS = Path(__file__).parent / "results"


def longest_run(domains: list[str]) -> int:
    "Most neighbours of one domain."
    longest = run = 1
    for before, after in zip(domains, domains[1:]):
        run = run + 1 if before == after else 1
        longest = max(longest, run)
    return longest


def drawn(index: pl.DataFrame, shortfall: str = "nearest", reuse: str = "prefer-unseen") -> dict | str:
    "What each phase got, or why there is none."
    config = CurriculumConfig(15000, 42, shortfall, reuse)
    try:
        samples = sample_phases(index, reference_phases(), "all", config)
    except (ShortfallError, SampleError) as error:
        return str(error)
    told, seen = {}, set()
    for name, sample in samples.items():
        plan, ids = sample.plan, sample.rows["id"].to_list()
        told[name] = {
            "records": plan.total,
            "distinct": len(set(ids)),
            "used_before": len(set(ids) & seen),
            "asked": plan.asked,
            "achieved": plan.achieved,
            "domains": len(plan.domains()),
            "largest_domain": plan.largest(),
            "high_risk": dict(zip(("phase", "buckets"), plan.high_risk_share())),
            "longest_run_of_a_domain": longest_run(sample.rows["domain"].to_list()),
            "notes": plan.notes,
        }
        seen |= set(ids)
    return told


def show(title: str, told: dict | str) -> None:
    print(f"\n{title}")
    if isinstance(told, str):
        return print(f"  refused: {told}")
    for name, phase in told.items():
        tiers = " ".join(
            f"{phase['achieved'][t]:>6,} {phase['achieved'][t] / phase['records']:6.1%}" for t in TIERS
        )
        (largest, share), risk = phase["largest_domain"], phase["high_risk"]
        print(
            f"  {name} {phase['records']:6,} records, {phase['distinct']:6,} distinct,"
            f" {phase['used_before']:5,} used before | {tiers} | largest {largest} {share:.1%} |"
            f" high-risk {risk['phase']:.1%}, buckets {risk['buckets']:.1%} |"
            f" longest run {phase['longest_run_of_a_domain']}"
        )
        for note in phase["notes"]:
            print(f"      {note}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus", seed=42, scale=1.0)
        build_buckets([Path(folder) / "corpus"], Path(folder))
        index = load_index(Path(folder))
    softer = index.filter(pl.col("tier") != "extremely_complex")
    report = {"full corpus": drawn(index)}
    report |= {f"full corpus, reuse {reuse}": drawn(index, reuse=reuse) for reuse in REUSES[1:]}
    report |= {f"without extremely_complex, {policy}": drawn(softer, policy) for policy in SHORTFALLS}
    for title, told in report.items():
        show(title, told)
    RESULTS.mkdir(exist_ok=True)
    report = {"target_records": 15000, "seed": 42, "cycles": report, "provenance": provenance()}
    (RESULTS / "policies.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
