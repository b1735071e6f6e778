"""Audit of a large file beside the bare parse of the same file, in one run; and peak memory at two sizes.

    python benchmarks/audit_scale.py --records 1000000 --out benchmarks/results/audit_scale.json

The file holds the generated corpus over and over, each record with a case number that makes it unique; every
fifth gets a sentence of random words, so that its skeleton is new and has to be signed and compared. Each
measurement runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elson_nb.corpus.audit import audit
from elson_nb.corpus.records import json_line, record_id
from elson_nb.corpus.synthesis import build_records
from elson_nb.store import write_json


def write_file(path: Path, count: int) -> None:
    "Unique records, a fifth of them with a skeleton of their own."
    rng, base = random.Random(1), build_records(seed=42, scale=1.0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            record = dict(base[number % len(base)])
            record["instruction"] = f"Case {number}. {record['instruction']}"
            if number % 5 == 0:
                record["output"] += f" {' '.join(rng.choices(words, k=25))}."
            record["id"] = record_id(record["instruction"], record["input"], record["output"])
            file.write(json_line(record))


def measured(what: str, path: Path) -> dict:
    "Seconds, MB/s and peak memory of this process for one pass over the file."
    begun = time.perf_counter()
    result = {}
    if what == "parse":
        with open(path, "rb") as file:
            for line in file:
                json.loads(line)
    elif what == "audit":
        with tempfile.TemporaryDirectory(dir=path.parent) as out:
            found = audit([path], Path(out))
        result = {"kept": found["total"]["kept"], "skeletons": found["skeletons"]["distinct"]}
    seconds, size = time.perf_counter() - begun, path.stat().st_size / 1e6
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1000  # `ru_maxrss` would start with the parent's
    return {"seconds": seconds, "mb_per_s": size / seconds, "peak_mb": peak, "file_mb": size, **result}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=["import", "parse", "audit"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given.measure, given.file)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (given.records // 10, given.records):
            path = Path(folder) / f"{count}.jsonl"
            write_file(path, count)
            for what in ("import", "parse", "audit"):
                command = [sys.executable, __file__, "--measure", what, "--file", str(path)]
                rows[f"{count:,} {what}"] = json.loads(
                    subprocess.run(command, capture_output=True, check=True, text=True).stdout
                )
            audit_row, parse_row = rows[f"{count:,} audit"], rows[f"{count:,} parse"]
            base = rows[f"{count:,} import"]["peak_mb"]
            print(
                f"{count:,} records, {audit_row['file_mb']:.0f} MB: audit {audit_row['mb_per_s']:.1f} MB/s, "
                f"bare parse {parse_row['mb_per_s']:.1f} MB/s, "
                f"ratio {audit_row['seconds'] / parse_row['seconds']:.1f}; "
                f"peak memory {audit_row['peak_mb']:.0f} MB, of it {base:.0f} MB "
                f"before the first record; {audit_row['skeletons']:,} skeletons"
            )
            path.unlink()
    if given.out:
        write_json(given.out, rows)


if __name__ == "__main__":
    main()
