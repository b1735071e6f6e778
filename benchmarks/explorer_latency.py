"""How long the tier-mix explorer takes from a key on a slider to the changed figure, on the full corpus.

    python benchmarks/explorer_latency.py                                # figures to benchmarks/results
    python benchmarks/explorer_latency.py --screenshot docs/tier_mixes.png

In one process: the parts of the handler of a slider and the handler whole. In a real JupyterLab, opened in a
real Chromium: from the key press to the changed `src` of the image, and until the image is decoded, while the
slider is kept moving and after it has rested. Medians, in milliseconds, of at least thirty moves.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from elson_nb.corpus.buckets import build_buckets
from elson_nb.corpus.synthesis import write_corpus
from elson_nb.recipes import load_recipe
from elson_nb.session.explorer import first_state, open_shelves, plans_of, samples
from elson_nb.session.explorer_view import Explorer
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import lab_page  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "explorer_latency.json"
HANDLE = ".elson-page .tier-extremely_complex .noUi-handle"
WATCH = """() => {
  const image = document.querySelector('.elson-page img.widget-image');
  window.__move = {};
  const pressed = () => { window.__move.key = performance.now(); };
  document.addEventListener('keydown', pressed, {once: true, capture: true});
  new MutationObserver(async (_, observer) => {
    observer.disconnect();
    window.__move.changed = performance.now();
    await image.decode().catch(() => {});
    window.__move.decoded = performance.now();
  }).observe(image, {attributes: true, attributeFilter: ['src']});
}"""


def summary(times: list[float]) -> dict[str, float]:
    "Median and 90th percentile, ms, and how many there were."
    deciles = statistics.quantiles(times, n=10)
    return {"n": len(times), "median": round(statistics.median(times), 1), "p90": round(deciles[-1], 1)}


def timed(action: Callable[[int], object], runs: int) -> dict[str, float]:
    "Wall time of `action`, called with the number of its run, after two runs that do not count."
    times = []
    for n in range(runs + 2):
        begun = time.perf_counter()
        action(n)
        times.append(1000 * (time.perf_counter() - begun))
    return summary(times[2:])


def in_process(buckets: Path, runs: int) -> dict[str, dict]:
    "Each part of the handler of a slider, and the whole of it; then what is put off until the slider rests."
    shelves, base = open_shelves(buckets), load_recipe("h100")
    room = Explorer(shelves, base, first_state(base, shelves))
    room.later = lambda: None
    room.phase.value = "C"

    def move(n: int) -> None:
        room.sliders["extremely_complex"].value = 31 + n % 60

    parts = {"handler": timed(move, runs)}
    plan = room.plans["C"]
    parts["plan"] = timed(lambda n: plans_of(room.recipe, shelves), runs)
    parts["draw"] = timed(lambda n: room.figure.draw(plan), runs)
    parts["encode"] = timed(lambda n: room.figure.png(), runs)
    parts["words and numbers"] = timed(lambda n: room._show_numbers(), runs)
    parts["at rest: twelve records"] = timed(lambda n: samples(shelves, room.recipe, "C"), runs)
    return parts


def show_phase_c(page) -> None:
    "Choose phase C, and wait until its sliders and records are there."
    page.get_by_role("button", name="C Stress Epoch").click()
    page.wait_for_function(f"document.querySelector('{HANDLE}').getAttribute('aria-valuenow') === '30.0'")
    page.wait_for_timeout(2500)


def moves(page, count: int, pause_ms: int) -> dict[str, dict]:
    "From key presses on a slider to the changed and to the decoded image."
    page.locator(HANDLE).focus()
    changed, decoded = [], []
    for n in range(count):
        page.evaluate(WATCH)
        page.keyboard.press("ArrowRight" if n % 60 < 30 else "ArrowLeft")
        page.wait_for_function("window.__move.decoded")
        move = page.evaluate("window.__move")
        changed.append(move["changed"] - move["key"])
        decoded.append(move["decoded"] - move["key"])
        page.wait_for_timeout(pause_ms)
    return {"key to changed image": summary(changed), "key to decoded image": summary(decoded)}


def in_browser(page, address: str, runs: int) -> dict[str, dict]:
    lab_page.open_explorer(page, address)
    show_phase_c(page)
    moving = moves(page, runs, 100)
    page.wait_for_timeout(2500)
    rested = moves(page, runs, 1500)
    return {f"{name}, moving": row for name, row in moving.items()} | {
        f"{name}, after a rest": row for name, row in rested.items()
    }


def in_few_colours(picture: Image.Image) -> Image.Image:
    "The picture in its 256 most frequent colours, the others as the nearest of them: a third of the bytes."
    packed = np.asarray(picture).astype(np.int64) @ np.array([65536, 256, 1])
    colours, where, counts = np.unique(packed.ravel(), return_inverse=True, return_counts=True)
    parts = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
    kept = parts[np.argsort(-counts, kind="stable")[:256]]
    nearest = ((parts[:, None] - kept[None]) ** 2).sum(axis=2).argmin(axis=1)
    few = Image.fromarray(nearest[where].reshape(packed.shape).astype(np.uint8), "P")
    few.putpalette(kept.astype(np.uint8).ravel().tolist())
    return few


def screenshot(page, address: str, path: Path) -> None:
    "The page with a mix that asks more than there is."
    lab_page.open_explorer(page, address)
    show_phase_c(page)
    records = page.locator(".elson-page input[type=number]").first
    records.fill("5000")
    records.press("Enter")
    page.locator(HANDLE).focus()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(60)
    page.wait_for_function("document.querySelector('.elson-page .words.short')")
    page.wait_for_timeout(3000)
    page.evaluate("document.activeElement.blur()")
    box = page.locator(".elson-page").first.bounding_box()
    bottom = page.locator(".elson-page table.dataTable tbody tr").nth(3).bounding_box()
    clip = {
        "x": box["x"] - 4,
        "y": box["y"] - 4,
        "width": box["width"] + 8,
        "height": bottom["y"] - box["y"] + 4,
    }
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    in_few_colours(picture).save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height} pixels, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=40, help="moves of each kind, at least 30")
    parser.add_argument(
        "--buckets", type=Path, help="a bucket folder; without it the full corpus is generated"
    )
    parser.add_argument("--screenshot", type=Path, help="write a picture of the page instead of measuring")
    given = parser.parse_args()
    if why := lab_page.missing():
        sys.exit(f"no browser to measure in: {why}")
    with tempfile.TemporaryDirectory(prefix="elson-") as folder:
        work = Path(folder)
        buckets = given.buckets or work / "buckets"
        if not given.buckets:
            write_corpus(work / "corpus", scale=1.0)
            build_buckets([work / "corpus"], buckets)
        page_size = {"width": 1400, "height": 2300, "scale": 1.15} if given.screenshot else {}
        with (
            lab_page.jupyter_lab(work / "lab", buckets) as address,
            lab_page.browser_page(**page_size) as page,
        ):
            if given.screenshot:
                return screenshot(page, address, given.screenshot)
            times = {"browser": in_browser(page, address, max(30, given.runs))}
        times["process"] = in_process(buckets, max(30, given.runs))
        records = open_shelves(buckets).index.height
    for where, rows in times.items():
        for name, row in rows.items():
            print(f"{where:8} {name:36} median {row['median']:7.1f}   p90 {row['p90']:7.1f}   n {row['n']}")
    write_json(RESULTS, {"records": records, "milliseconds": times, "provenance": provenance()})


if __name__ == "__main__":
    main()
