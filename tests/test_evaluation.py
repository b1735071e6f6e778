"Evaluation: the harness alone, a server that fails, resuming, comparing, contamination, the next mix."

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from elson_nb.corpus.records import make_record, write_jsonl
from elson_nb.evaluation import harness
from elson_nb.evaluation.benchmark import KINDS, BenchmarkError, ask, load_quiz, quiz_names
from elson_nb.evaluation.comparison import ComparisonError, compare
from elson_nb.evaluation.contamination import contamination
from elson_nb.evaluation.endpoint import Endpoint, EndpointError, ask_endpoint
from elson_nb.evaluation.evaluate import evaluate, load_result
from elson_nb.evaluation.harness import SharedPromptLM, build_exam, run_benchmark
from elson_nb.evaluation.needs import HIGHEST, LOWEST, domain_needs, suggested_mix
from elson_nb.evaluation.results import further_questions, summarised
from elson_nb.evaluation.statistics import CANNOT_TELL, verdict_above, wilson
from elson_nb.recipes import EvaluationConfig, load_recipe, read_mix
from elson_nb.training.base import load_base, make_random_base

ELSON = [sys.executable, "-c", "from elson_nb.cli.main import main; main()"]
many = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(base):
    return load_base(load_recipe("smoke"), base)


# the harness


def test_the_harness_alone_gives_the_same_score(loaded, tmp_path, monkeypatch):
    "Its own loop over the files of a built exam, against our runner: every question judged alike."
    names, every = ["insurance", "tool_use"], load_quiz
    few = lambda name, limit=None, form=None: [
        q for kind in KINDS for q in [q for q in every(name, form=form) if q.kind == kind][:3]
    ]
    monkeypatch.setattr(harness, "quiz_names", lambda: names)
    monkeypatch.setattr(harness, "load_quiz", few)
    monkeypatch.setattr(harness, "TOOL_TOKENS", 8)
    build_exam(tmp_path / "exam", numeric_tokens=8)
    tasks = TaskManager(include_path=str(tmp_path / "exam" / "tasks"), include_defaults=False)
    lm = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4, add_bos_token=False)
    result = simple_evaluate(
        lm,
        tasks=[f"elson_{n}" for n in names],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
    )
    theirs = {s["doc"]["id"]: bool(s["right"]) for samples in result["samples"].values() for s in samples}
    rows = run_benchmark(*loaded, EvaluationConfig(quizzes=names, numeric_max_new_tokens=8))
    assert len(theirs) == 12 and theirs == {row["id"]: row["right"] for row in rows}
    for name in names:
        kept = [right for key, right in theirs.items() if key.startswith(name)]
        assert result["results"][f"elson_{name}"]["right,none"] == pytest.approx(sum(kept) / len(kept))


def test_the_exam_is_one_group_of_27(tmp_path):
    summary = build_exam(tmp_path, form=3)
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert {f"elson_{name}" for name in quiz_names()} | {"elson"} <= set(tasks.all_groups)
    lines = [line for name in quiz_names() for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == summary["questions"] == 431 and summary["form"] == 3
    again = build_exam(tmp_path / "again", form=3)
    assert again == summary


@pytest.mark.parametrize("batch", [1, 16])
def test_a_shared_prompt_changes_no_likelihood(loaded, batch):
    model, tokenizer = loaded
    requests = []
    for question in [q for q in load_quiz("retirement_planning") if q.kind == "multiple_choice"][:7]:
        for choice in question.choices:
            requests.append(
                (("", choice), tokenizer(ask(question))["input_ids"], tokenizer(choice)["input_ids"])
            )
    made = [kind(pretrained=model, tokenizer=tokenizer, batch_size=batch) for kind in (HFLM, SharedPromptLM)]
    theirs, ours = (lm._loglikelihood_tokens(requests, disable_tqdm=True) for lm in made)
    assert [b for _, b in theirs] == [b for _, b in ours]
    assert max(abs(a - b) for (a, _), (b, _) in zip(theirs, ours)) < 1e-3


def test_neighbours_in_a_batch_change_nothing(loaded):
    one, many = (
        run_benchmark(
            *loaded, EvaluationConfig(quizzes=["derivatives"], batch_size=size, numeric_max_new_tokens=4)
        )
        for size in (1, 16)
    )
    assert one == many


# a server


class Server:
    "A server that speaks the protocol, and fails as its plan says, an entry a request; then it answers."

    def __init__(self, plan=(), answer="A", delay=0.0):
        self.plan, self.answer, self.delay = list(plan), answer, delay
        self.requests, self.at_once, self.most = [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.requests.append((self.path, body, self.headers.get("authorization")))
                    fault = outer.plan.pop(0) if outer.plan else None
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                time.sleep(outer.delay)
                try:
                    self.reply(fault)
                finally:
                    with outer.lock:
                        outer.at_once -= 1

            def reply(self, fault):
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(1.5)
                message = {"choices": [{"message": {"role": "assistant", "content": outer.answer}}]}
                content = {"garbage": b"<html>", "half": json.dumps(message).encode()[:20]}.get(
                    fault, json.dumps(message).encode()
                )
                self.send_response(fault if isinstance(fault, int) else 200)
                if fault == 429:
                    self.send_header("retry-after", "1")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def serve():
    servers = []

    def start(*args, **options) -> Server:
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()


def choices(count: int):
    return [q for q in load_quiz("investment") if q.kind == "multiple_choice"][:count]


@pytest.mark.parametrize("fault", [500, 503, 408, "reset"])
def test_a_passing_fault_costs_a_try_and_no_answer(serve, fault):
    server = serve([fault, fault])
    rows = ask_endpoint(Endpoint(server.url, "m", concurrency=1), choices(3))
    assert [row["given"] for row in rows] == [q.choices[0] for q in choices(3)]
    assert [row["tries"] for row in rows] == [3, 1, 1] and all(row["latency_s"] < 1 for row in rows)


def test_a_server_that_asks_for_a_pause_gets_it(serve):
    server, started = serve([429]), time.monotonic()
    ask_endpoint(Endpoint(server.url, "m", concurrency=1), choices(1))
    assert time.monotonic() - started >= 1


def test_a_slow_answer_is_tried_again(serve):
    server = serve(["slow"])
    rows = ask_endpoint(Endpoint(server.url, "m", concurrency=1, timeout=0.5), choices(1))
    assert rows[0]["tries"] == 2


@pytest.mark.parametrize(
    "fault, said", [(401, "OPENAI_API_KEY"), (404, "status 404"), ("garbage", "not a chat completion")]
)
def test_other_faults_are_errors_at_once(serve, fault, said):
    server = serve([fault] * 9)
    with pytest.raises(EndpointError, match=said):
        ask_endpoint(Endpoint(server.url, "m", concurrency=1), choices(2))
    assert len(server.requests) <= 2


def test_a_server_that_stays_down_is_given_up(serve):
    server = serve([503] * 9)
    with pytest.raises(EndpointError, match="503, 2 times; is the server up"):
        ask_endpoint(Endpoint(server.url, "m", concurrency=1, tries=2), choices(1))


def test_requests_run_side_by_side_and_rows_keep_the_order(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server = serve(delay=0.1)
    rows = ask_endpoint(Endpoint(server.url, "the model", concurrency=5), choices(10))
    assert [row["id"] for row in rows] == [q.id for q in choices(10)] and 2 <= server.most <= 5
    path, body, key = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "the model" and key == "Bearer sesame"
    assert body["temperature"] == 0 and "Answer with the letter" in body["messages"][0]["content"]


def test_an_evaluation_of_a_server_goes_on_where_it_was_cut_off(serve, tmp_path):
    config = EvaluationConfig(quizzes=["insurance", "tool_use"], limit=8)
    down = serve([None] * 7 + [404] * 99)
    with pytest.raises(EndpointError):
        evaluate(
            tmp_path / "r.json", config, endpoint=Endpoint(down.url, "m", concurrency=2), facts={"model": "m"}
        )
    up = serve()
    result = evaluate(tmp_path / "r.json", config, endpoint=Endpoint(up.url, "m"), facts={"model": "m"})
    assert result["questions"] == 16 and 9 <= len(up.requests) <= 10
    assert result["latency"]["n"] == 16 and result["latency"]["p50_ms"] <= result["latency"]["p99_ms"]
    assert load_result(tmp_path / "r.json") == json.loads(json.dumps(result))


# the command


def elson(*words, timeout=240, **options):
    return subprocess.run(
        [*ELSON, *map(str, words)], capture_output=True, text=True, timeout=timeout, **options
    )


def test_the_command_survives_a_kill_and_asks_nothing_twice(serve, tmp_path):
    server, out = serve(delay=0.05), tmp_path / "eval.json"
    words = (
        "evaluate",
        "--api-url",
        server.url,
        "--model",
        "m",
        "--limit",
        2,
        "--concurrency",
        2,
        "--out",
        out,
        "-q",
    )
    process = subprocess.Popen([*ELSON, *map(str, words)])
    while len(server.requests) < 20:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len((tmp_path / "eval.partial.jsonl").read_bytes().splitlines()) - 1
    server.requests.clear()
    done = elson(*words)
    result = load_result(out)
    assert done.returncode == 1 and result["verdict"] == "FAIL", done.stderr  # who always says A fails
    assert len(server.requests) <= 54 - kept + 1 and len({r["id"] for r in result["rows"]}) == 54
    assert not (tmp_path / "eval.partial.jsonl").exists()


def test_wrong_use_ends_with_one_sentence(tmp_path):
    (tmp_path / "no.json").write_text("{}")
    cases = {
        ("evaluate",): "no model",
        ("evaluate", "--model", "nowhere"): "no model folder nowhere",
        ("evaluate", "--model", "smoke", "--quiz", "cooking"): "no quiz 'cooking'",
        ("compare", tmp_path / "no.json", tmp_path / "no.json"): "no result of elson evaluate",
        ("benchmark", "contamination"): "--corpus",
    }
    for words, said in cases.items():
        result = elson(*words, cwd=tmp_path)
        assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr, words


# what the answers show


@many
@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from([0.7, 0.8, 0.95]))
def test_so_many_questions_more_settle_it(right, n, target):
    interval = wilson(min(right, n), n)
    more = further_questions(interval, target)
    if more is not None:
        total = n + more
        assert verdict_above(wilson(round(interval.value * total), total), target) != CANNOT_TELL
        assert (more == 0) == (verdict_above(interval, target) != CANNOT_TELL)


def answers(right, asked="likelihood", tier=lambda n: "easy"):
    rows = [
        {
            "id": f"q{n}",
            "quiz": f"quiz{n % 3}",
            "domain": f"domain{n % 4}",
            "kind": "numeric",
            "tier": tier(n),
            "question": str(n),
            "expected": "1",
            "given": "1",
            "right": bool(r),
        }
        for n, r in enumerate(right)
    ]
    return {"asked": asked, "rows": rows}


@settings(derandomize=True, deadline=None, max_examples=5)  # each with bootstraps
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_a_comparison_adds_up_and_turns_round(pairs):
    one, two = (answers(side) for side in zip(*pairs))
    told, turned = compare(one, two), compare(two, one)
    assert len(told["gained"]) == len(turned["lost"]) and told["p_value"] == turned["p_value"]
    change = (len(told["gained"]) - len(told["lost"])) / len(pairs)
    assert told["change"]["value"] == pytest.approx(change) == -turned["change"]["value"]
    for key in ("by_quiz", "by_tier", "by_domain"):
        assert sum(row["n"] for row in told[key]) == len(pairs)
        assert all(row["p"] <= row["p_adjusted"] <= 1 for row in told[key])


def test_chance_in_many_groups_is_no_finding():
    "Of 20 groups one has six gained and none lost: 0.03 by itself, and nothing beside nineteen others."
    rows = answers([False] * 120), answers([n < 6 for n in range(120)])
    for result in rows:
        for n, row in enumerate(result["rows"]):
            row["domain"] = f"domain{n // 6:02}"
    found = compare(*rows)["by_domain"][0]
    assert found["p"] <= 0.05 < found["p_adjusted"] and found["verdict"] == CANNOT_TELL


def test_other_questions_cannot_be_compared():
    one = answers([True, False])
    other = json.loads(json.dumps(one))
    other["rows"][1]["question"] = "another"
    for second, said in ((other, "another text"), (answers([True], asked="writing"), "--written")):
        with pytest.raises(ComparisonError, match=said):
            compare(one, second)
    with pytest.raises(ComparisonError, match="no question in common"):
        compare(one, {"asked": "likelihood", "rows": [{"id": "z", "question": "z"}]})


def test_a_summary_counts_every_row_once():
    rows = [r | {"failure": ""} for r in answers([n % 3 == 0 for n in range(50)])["rows"]]
    told = summarised(rows)
    for key in ("quizzes", "tiers", "kinds", "domains"):
        assert sum(row["n"] for row in told[key]) == 50


# contamination


def test_copies_are_found_and_others_are_not():
    questions = [q for name in quiz_names() for q in load_quiz(name)]
    copied, renamed = questions[3], questions[60]
    words = renamed.question.split()
    figures = " ".join(str(int(w) + 7) if w.isdigit() else w for w in words)
    records = [
        {"id": "copy", "instruction": copied.question, "input": "", "output": "so"},
        {"id": "renamed", "instruction": figures, "input": "", "output": "so"},
        {"id": "other", "instruction": "What is a bond?", "input": "", "output": "A promise to pay."},
    ]
    found = contamination(questions, records)
    assert {row["id"] for row in found["copied"]} == {copied.id, renamed.id}
    assert Counter(row["quiz"] for row in found["rows"]) == Counter(q.quiz for q in questions)


def test_the_command_finds_a_copy_in_a_corpus(tmp_path):
    "Exit code 1 and the record, where a question stands in the corpus; 0 and all 27 quizzes where none does."
    question = load_quiz("insurance")[0]
    rows = [make_record("What is a bond?", "A promise to pay."), make_record(question.question, "So.")]
    for name, records, code in (("clean", rows[:1], 0), ("copied", rows, 1)):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
        words = ("--corpus", tmp_path / f"{name}.jsonl", "--out", tmp_path / f"{name}.json")
        done = elson("benchmark", "contamination", *words)
        assert done.returncode == code and f"{code} of 431 questions" in done.stdout, done.stderr
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["quizzes"]) == 27
    assert question.id in done.stdout and rows[1]["id"] in done.stdout


# the next cycle


def test_the_suggested_mix_is_taken_by_the_plan(tmp_path):
    rows = [
        {"domain": domain, "tier": "hard", "right": n < right}
        for domain, right in (("insurance", 2), ("accounting", 28), ("investment", 15))
        for n in range(30)
    ]
    weights = suggested_mix(load_recipe("laptop"), rows, tmp_path / "next.yaml")
    assert LOWEST <= weights["accounting"] < 1 < weights["insurance"] <= HIGHEST
    mix = read_mix(tmp_path / "next.yaml")
    assert all(mix["phases"][p]["domain_weights"] == weights for p in "ABC")
    words = ("run", "--recipe", "laptop", "--mix", tmp_path / "next.yaml", "--dry-run", "--json")
    plain, mixed = (
        json.loads(elson(*w, env=os.environ | {"ELSON_RUNS": str(tmp_path)}).stdout)
        for w in (words[:3] + words[5:], words)
    )
    assert mixed["total"]["records"] == plain["total"]["records"]


def test_few_questions_move_a_weight_little():
    rows = [{"domain": "a", "tier": "easy", "right": False}]
    rows += [{"domain": "b", "tier": "easy", "right": n % 2 == 0} for n in range(100)]
    needs = {row["domain"]: row["weight"] for row in domain_needs(rows)}
    assert 1 < needs["a"] < 1.1 and abs(needs["b"] - 1) < 0.05


def test_a_result_of_another_exam_is_not_mixed_in(loaded, tmp_path):
    config = EvaluationConfig(quizzes=["fixed_income"], limit=2)

    def cut(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "r.json", config, loaded, show=cut)
    with pytest.raises(BenchmarkError, match="form differ"):
        evaluate(tmp_path / "r.json", config, loaded, form=5)
