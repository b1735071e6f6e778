"""Whole sessions on the smoke recipe, through the real command, with real kernels and real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from peft import PeftModel
from transformers import AutoModelForCausalLM

from elson_nb.corpus.records import make_record, write_jsonl
from elson_nb.recipes import load_recipe
from elson_nb.session.chain import explain
from elson_nb.session.ledger import STEPS, Ledger
from elson_nb.store import file_sha256
from elson_nb.training.adapter import ADAPTER_FILES
from elson_nb.training.base import fetch_base, load_tokenizer

ELSON = [sys.executable, "-c", "from elson_nb.cli.main import main; main()"]


def elson(*words: object, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run([*ELSON, *map(str, words)], capture_output=True, text=True, timeout=timeout)


def ok(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def wait_for(run_dir: Path, phase: str, process: subprocess.Popen, seconds: float = 120) -> dict:
    "The first progress row of a step that has a step count, or a message with *scoring*."
    since = time.time()  # a row of an earlier attempt does not count
    while time.time() < since + seconds and process.poll() is None:
        try:
            row = json.loads((run_dir / "progress.json").read_text())
            busy = "step" in row or "scoring" in row.get("message", "")
            if row["phase"] == phase and row["at"] >= since and busy:
                return row
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"phase {phase} was not seen; exit code {process.poll()}")


def adapter_sums(run: Path) -> dict[str, str]:
    return {p: file_sha256(run / "adapters" / p / "adapter_model.safetensors") for p in "ABC"}


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> Path:
    "One whole session; the other tests look at it."
    runs = tmp_path_factory.mktemp("runs")
    result = json.loads(ok(elson("run", "--recipe", "smoke", "--runs-dir", runs, "--json", "-q")).stdout)
    assert result["complete"] and result["verdict"] == "PASS"
    return Path(result["run"])


def test_a_session_leaves_what_it_promises(smoke_run):
    for name in (
        "recipe.yaml",
        "session.json",
        "inference_test_results.json",
        *(f"{s}_metrics.json" for s in STEPS),
    ):
        assert (smoke_run / name).is_file(), name
    assert sorted(p.name for p in (smoke_run / "adapter").iterdir()) == sorted(ADAPTER_FILES)
    ledger = Ledger.open(smoke_run)
    assert all(ledger.step(s)["status"] == "done" and ledger.step(s)["attempts"] == 1 for s in STEPS)
    assert smoke_run.name in (smoke_run.parent / "TRAINING_LOG.md").read_text()


def test_executed_notebooks_are_reports(smoke_run):
    for name in STEPS.values():
        path = smoke_run / f"{name}.ipynb"
        assert path.stat().st_size < 1_000_000, f"{name} is {path.stat().st_size:,} bytes"
        cells = nbformat.read(path, as_version=4).cells
        outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
        first = next(o for o in outputs if o.output_type == "display_data")
        assert "has not finished" not in first.data["text/html"], (
            f"{name}: the verdict on top was not filled in"
        )
        streams = [o.text for o in outputs if o.output_type == "stream"]
        assert not streams, f"{name} prints to a stream: {streams[:1]}"
        assert any("image/png" in o.get("data", {}) for o in outputs), f"{name} has no figure"


def test_a_finished_session_is_not_run_again(smoke_run):
    before = adapter_sums(smoke_run)
    started = Ledger.open(smoke_run).data["steps"]
    ok(elson("run", "--resume", smoke_run, "-q"))
    assert Ledger.open(smoke_run).data["steps"] == started and adapter_sums(smoke_run) == before


def test_a_changed_output_runs_its_step_again(smoke_run, tmp_path):
    ledger = Ledger.open(smoke_run)
    inputs = ledger.step("C")["inputs"]
    metrics = smoke_run / "C_metrics.json"
    kept = metrics.read_bytes()
    try:
        metrics.write_bytes(kept + b" ")
        assert ledger.why_run("C", inputs) == "C_metrics.json is missing or was changed"
    finally:
        metrics.write_bytes(kept)
    assert ledger.why_run("C", inputs) == ""


def test_order_of_training_is_the_manifests(smoke_run):
    entry = Ledger.open(smoke_run).metrics("0")["phases"]["A"]
    rows = [json.loads(line) for line in (smoke_run / entry["manifest"]).read_text().splitlines()]
    domains = [r["domain"] for r in rows]
    blocks = [d for n, d in enumerate(domains) if n == 0 or domains[n - 1] != d]
    assert len(blocks) == len(set(blocks)), "phase A comes in domain blocks"
    assert [r["position"] for r in rows] == list(range(len(rows)))


def test_adapter_loads_with_stock_peft_and_the_merge_equals_it(smoke_run, tmp_path):
    ok(elson("release", "merge", smoke_run, "--out", tmp_path / "merged"))
    base = fetch_base(load_recipe("smoke").model)
    tokenizer = load_tokenizer(base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), smoke_run / "adapter"
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    inputs = tokenizer("### Instruction:\nWhat is par?\n\n### Response:\n", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, merged(**inputs).logits, atol=1e-4)
    again = elson("release", "merge", smoke_run, "--out", tmp_path / "merged")
    assert again.returncode == 1 and "exists" in again.stderr


def test_a_plain_lora_is_refused_by_name(smoke_run, tmp_path):
    config = smoke_run / "adapter" / "adapter_config.json"
    kept = config.read_text()
    try:
        config.write_text(kept.replace('"use_dora": true', '"use_dora": false'))
        refused = elson("release", "merge", smoke_run, "--out", tmp_path / "merged")
    finally:
        config.write_text(kept)
    assert refused.returncode == 1 and "plain LoRA" in refused.stderr and not (tmp_path / "merged").exists()


def test_a_dead_kernel_and_a_ctrl_c_lose_nothing(smoke_run, tmp_path):
    "Kill the kernel in A, interrupt B, resume: the adapters equal those of the session nobody disturbed."
    process = subprocess.Popen(
        [*ELSON, "run", "--recipe", "smoke", "--runs-dir", str(tmp_path), "-q"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (found := list(tmp_path.glob("*_smoke"))):
        time.sleep(0.1)
    run = found[0]
    os.kill(wait_for(run, "A", process)["pid"], signal.SIGKILL)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1 and "kernel died" in complaint and "--resume" in complaint

    process = subprocess.Popen([*ELSON, "run", "--resume", str(run), "-q"], stderr=subprocess.PIPE, text=True)
    wait_for(run, "A", process)
    second = elson("run", "--resume", run, "-q")
    assert second.returncode == 1 and "another session" in second.stderr
    kernel = wait_for(run, "B", process)["pid"]
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in complaint and "Traceback" not in complaint
    assert Ledger.open(run).step("B")["status"] == "interrupted"
    time.sleep(0.5)
    assert not Path(f"/proc/{kernel}").exists() or "Z" in Path(f"/proc/{kernel}/stat").read_text().split()[2]

    ok(elson("run", "--resume", run, "-q"))
    assert adapter_sums(run) == adapter_sums(smoke_run)
    ledger = Ledger.open(run)
    assert (ledger.step("A")["attempts"], ledger.step("B")["attempts"], ledger.step("C")["attempts"]) == (
        2,
        2,
        1,
    )
    assert (tmp_path / "TRAINING_LOG.md").read_text().count(f"## {run.name}") == 1


def test_what_a_corpus_holds_stays_text(tmp_path):
    "Hostile records through a phase and its report: no markup survives."
    hostile = [
        '<script>alert("x")</script>',
        "<img src=x onerror=alert(1)>",
        "</pre></table><h1>owned</h1>",
        "[click](javascript:alert(1))",
        "costs $5 and $6 \\(x\\)",
    ]
    write_jsonl(
        tmp_path / "hostile.jsonl",
        (
            make_record(
                f"{hostile[n % 5]} question {n}",
                f"{hostile[(n + 1) % 5]} answer {n}",
                category=("insurance", "accounting", "compliance")[n % 3],
                difficulty=("easy", "medium", "hard", "extremely_complex")[n % 4],
            )
            for n in range(120)
        ),
    )
    ok(
        elson(
            "run",
            "--recipe",
            "smoke",
            "--corpus",
            tmp_path / "hostile.jsonl",
            "--phase",
            "A",
            "-q",
            "--runs-dir",
            tmp_path / "runs",
            "--set",
            "curriculum.target_records=30",
        )
    )
    run = next((tmp_path / "runs").glob("*_smoke"))
    for page in (run / "report").glob("*.html"):
        text = page.read_text()
        assert "Content-Security-Policy" in text and "<img src=x" not in text and "<h1>owned" not in text
        assert '<script>alert("x")' not in text
    assert "&lt;script&gt;alert" in (run / "report" / "A_domain_blocks.html").read_text()


def test_dry_run_works_for_every_recipe_and_trains_nothing(tmp_path):
    for recipe in ("smoke", "laptop", "h100", "h100-qdora"):
        plan = json.loads(
            ok(
                elson("run", "--recipe", recipe, "--dry-run", "--json", "--runs-dir", tmp_path / "runs")
            ).stdout
        )
        assert plan["total"]["records"] == load_recipe(recipe).curriculum.target_records
        assert (
            recipe.startswith("h100") == any(m.startswith("GPU") for m in plan["missing"])
            or torch.cuda.is_available()
        )
    assert not (tmp_path / "runs").exists()


def test_bad_input_ends_with_one_sentence(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(
        "{not json\n" + '{"instruction": "a", "output": ""}\n' + '{"instruction": "\\ud800", "output": "b"}\n'
    )
    (tmp_path / "buckets").mkdir()
    cases = {
        ("corpus", "import", "none.csv", "--out", tmp_path / "o.jsonl"): "no such file",
        ("corpus", "import", tmp_path / "bad.jsonl", "--out", tmp_path / "o.jsonl"): "bad.jsonl",
        (
            "corpus",
            "import",
            tmp_path / "bad.jsonl",
            "--out",
            tmp_path / "o.jsonl",
            "--map",
            "instruction",
        ): "field=path",
        ("buckets", "build", tmp_path / "empty.jsonl", "--out", tmp_path / "b"): "empty.jsonl",
        ("buckets", "build", tmp_path / "bad.jsonl", "--out", tmp_path / "b"): "bad.jsonl",
        ("sample", "--buckets", tmp_path / "buckets", "--out", tmp_path): "index.parquet",
        ("run", "--recipe", "smoke", "--set", "adapter.rnak=4"): "did you mean 'rank'",
        (
            "run",
            "--recipe",
            "smoke",
            "--phase",
            "C",
            "--runs-dir",
            tmp_path / "r",
        ): "continues the adapter of phase B",
        ("run", "--resume", tmp_path): "no run folder",
    }
    for words, expected in cases.items():
        result = elson(*words)
        assert result.returncode == 2, (words, result.stdout, result.stderr)
        assert expected in result.stderr and "Traceback" not in result.stderr, (words, result.stderr)


def test_what_stops_a_step_is_explained(tmp_path):
    ledger = Ledger.create(tmp_path, load_recipe("smoke"), [])
    raised = lambda name, value: PapermillExecutionError(3, 3, "cell", name, value, [])
    cases = [
        (raised("OSError", "[Errno 28] No space left on device: 'x'"), "disk is full", 1),
        (OSError(28, "No space left on device"), "disk is full", 1),
        (DeadKernelError("gone"), "kernel died", 1),
        (raised("SampleError", "none of 9 records is within 20 tokens"), "within 20 tokens", 2),
    ]
    for error, expected, code in cases:
        failure = explain(error, ledger, "A")
        assert expected in str(failure) and "--resume" in str(failure) and failure.exit_code == code
