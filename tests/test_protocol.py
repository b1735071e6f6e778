"The eight steps after a training, the log, what a person adds to it, and all runs in a real browser."

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import lab_page
import pytest

from elson_nb.session.ledger import Ledger
from elson_nb.session.log import LOG, entry_in, log_session, write_entry
from elson_nb.session.protocol import PROTOCOL, commit_session, protocol
from elson_nb.session.site import all_runs, site_page, write_site
from elson_nb.store import read_json, write_json

ROOT = Path(__file__).parents[1]
KEPT = sorted(p.parent for p in (ROOT / "runs").glob("*_laptop/session.json"))[-1]
ELSON = [sys.executable, "-c", "from elson_nb.cli.main import main; main()"]
HOSTILE = '</script><img src=x onerror="document.title=1"><b>bold</b>'


def elson(*words, cwd=None):
    return subprocess.run([*ELSON, *map(str, words)], capture_output=True, text=True, timeout=120, cwd=cwd)


def git(folder, *words) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    "A copy of a session that is kept here, in a repository of its own; what git does not keep left out."
    for name, value in (("GIT_AUTHOR_NAME", "A"), ("GIT_AUTHOR_EMAIL", "a@b.c")):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.replace("AUTHOR", "COMMITTER"), value)
    git(tmp_path, "init", "-q")
    folder = tmp_path / "runs" / KEPT.name
    shutil.copytree(KEPT, folder)
    ledger = Ledger(folder)
    for entry in ledger.data["steps"].values():
        entry["outputs"] = {p: s for p, s in entry["outputs"].items() if (folder / p).is_file()}
    ledger.data.pop("protocol", None)
    ledger.data.pop("by_hand", None)
    write_json(ledger.path, ledger.data)
    return folder


def owed(run: Path) -> list[int]:
    return [row["step"] for row in protocol(Ledger.open(run)) if not row["done"]]


def test_what_is_owed_shrinks_with_the_evidence(run):
    assert owed(run) == [4, 5, 6, 7, 8]
    log_session(Ledger.open(run))
    assert owed(run) == [7, 8]
    commit_session(Ledger.open(run))
    assert owed(run) == []
    rows = Ledger.open(run).data["protocol"]
    assert [row["what"] for row in rows] == list(PROTOCOL.values()) and all(row["since"] for row in rows)


@pytest.mark.parametrize(
    "harm, expected",
    [
        (lambda run: (run / "C_metrics.json").write_text("{}"), {1, 3}),
        (lambda run: (run / "inference_test_results.json").unlink(), {1, 2}),
        (lambda run: (run.parent / LOG).unlink(), {4, 5, 6, 7}),
        (lambda run: (run / "B_mixed_curriculum.ipynb").write_text("x"), {7}),
    ],
)
def test_evidence_that_goes_is_owed_again(run, harm, expected):
    log_session(Ledger.open(run))
    commit_session(Ledger.open(run))
    harm(run)
    try:
        found = set(owed(run))
    except Exception as error:  # noqa: BLE001 - the message is what is tested
        pytest.fail(f"{type(error).__name__}: {error}")
    assert expected | {8} <= found


def test_warnings_and_retries_stand_in_the_log(run):
    "What a notebook printed as a warning, once; what the trainer had to do; text, never markup."
    book = read_json(run / "A_domain_blocks.ipynb")
    said = "/tmp/x.py:7: UserWarning: a <b>bold</b> one\n"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for cell in code[:2]:
        cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": said})
    write_json(run / "A_domain_blocks.ipynb", book)
    metrics = read_json(run / "B_metrics.json")
    metrics["totals"]["notes"] = ["step 3: memory ended, 1024 tokens a micro-batch now"]
    write_json(run / "B_metrics.json", metrics)
    log_session(Ledger.open(run))
    entry = entry_in(run.parent / LOG, run.name)
    assert entry.count("A_domain_blocks: UserWarning: a &lt;b&gt;bold&lt;/b&gt; one") == 1
    assert "phase B: step 3: memory ended" in entry and "none recorded" not in entry


def test_a_commit_takes_the_session_and_nothing_else(run):
    root = run.parents[1]
    (root / "mine.txt").write_text("not yet")
    git(root, "add", "mine.txt")
    log_session(Ledger.open(run))
    commit_session(Ledger.open(run))
    files = git(root, "show", "--name-only", "--format=", "HEAD").split()
    assert f"runs/{LOG}" in files and "mine.txt" not in files
    assert git(root, "diff", "--cached", "--name-only").split() == ["mine.txt"]


def test_the_command_keeps_what_a_person_adds(run):
    said = elson(
        "log", run, "--quality", "investment=4", "--note", "Learning rate <b>high</b> in C.", "--commit"
    )
    assert said.returncode == 0, said.stderr
    entry = entry_in(run.parent / LOG, run.name)
    assert "| investment |" in entry and " 4 |" in entry
    assert "rate &lt;b&gt;high&lt;/b&gt; in C." in entry and "<b>" not in entry
    assert elson("log", run, "--note", "Learning rate <b>high</b> in C.").returncode == 0
    again = entry_in(run.parent / LOG, run.name)
    assert again.count("in C.") == 1 and " 4 |" in again
    assert elson("protocol", run).returncode == 0


def test_wrong_marks_are_named(run):
    for words, said in (
        (["--quality", "cooking=4"], "cooking"),
        (["--quality", "investment=9"], "1 to 5"),
        (["--quality", "x"], "=4"),
    ):
        result = elson("log", run, *words)
        assert result.returncode == 2 and said in result.stderr
    result = elson("protocol", run)
    assert result.returncode == 1 and "OWED" in result.stdout


def write_many(log: str, who: int) -> None:
    for n in range(20):
        name = f"r{who}-{n % 5}"
        write_entry(Path(log), name, f"<!-- run {name} -->\n## {name}\n{n}\n<!-- end {name} -->\n")


def test_writers_in_several_processes_lose_and_double_nothing(tmp_path):
    log = tmp_path / LOG
    processes = [multiprocessing.Process(target=write_many, args=(str(log), who)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    text = log.read_text()
    assert sorted(line for line in text.splitlines() if line.startswith("## ")) == sorted(
        f"## r{who}-{n}" for who in range(4) for n in range(5)
    )


def test_a_writer_that_is_killed_leaves_a_whole_log(tmp_path):
    log = tmp_path / LOG
    write_many(str(log), 0)
    for _ in range(8):
        process = multiprocessing.Process(target=write_many, args=(str(log), 1))
        process.start()
        process.join(0.02)
        process.kill()
        process.join()
        text = log.read_text()
        assert text.count("<!-- run ") == text.count("<!-- end ") and text.count("## r0-") == 5


# the page of all runs


def hostile_runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for name in (KEPT.name, "20990101-000000_other"):
        shutil.copytree(KEPT, runs / name)
    other = runs / "20990101-000000_other"
    metrics = read_json(other / "A_metrics.json")
    for row in metrics["steps"]:
        row["loss"] += 0.5
    write_json(other / "A_metrics.json", metrics)
    session = read_json(other / "session.json")
    session["provenance"]["machine"] = HOSTILE
    write_json(other / "session.json", session)
    broken = runs / "20250101-000000_broken"
    broken.mkdir()
    (broken / "session.json").write_text('{"run": ')
    return runs


def test_a_run_that_cannot_be_read_is_listed_with_the_reason(tmp_path):
    rows = all_runs(hostile_runs(tmp_path))
    assert [bool(row["cannot_read"]) for row in rows] == [False, False, True]
    assert "<script>document" not in site_page(rows) and HOSTILE not in site_page(rows)


@pytest.fixture
def page(tmp_path):
    if why := lab_page.missing():
        pytest.skip(why)
    runs = hostile_runs(tmp_path)
    with lab_page.browser_page() as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(write_site(runs).as_uri())
        yield page
        assert not errors


def test_in_a_browser_it_sorts_draws_and_compares(page):
    names = lambda: [
        r.split("\n")[0] for r in page.locator("#table tbody tr td:nth-child(2)").all_inner_texts()
    ]
    assert page.locator("svg polyline").count() == 2 and page.title() == "Runs"
    before = names()
    page.get_by_role("button", name="run", exact=True).click()
    assert names() == sorted(before)
    page.get_by_role("button", name="run", exact=True).click()
    assert names() == sorted(before, reverse=True)
    assert page.locator("#compare tr.on").count() >= 1
    assert HOSTILE in page.locator("#compare").inner_text()
    assert page.locator("#compare b, #compare img").count() == 0
    page.locator("#table input").first.uncheck()
    assert (
        page.locator("svg polyline").count() == 1 and "exactly two" in page.locator("#compare").inner_text()
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    link = page.locator(f'a[href="{KEPT.name}/report/index.html"]')
    link.click()
    assert KEPT.name in page.title()
