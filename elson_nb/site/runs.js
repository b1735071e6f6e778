const runs = JSON.parse(document.getElementById("runs").textContent);
const colours = ["#0969da", "#d1570a", "#1a7f37", "#8250df", "#bf3989", "#6e7781", "#9a6700", "#0a7ea4"];
const body = document.querySelector("#table tbody"), chart = document.getElementById("chart");
const made = (tag, text) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; return e; };
const shape = (tag, set) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const k in set) e.setAttribute(k, set[k]); return e; };
const chosen = () => [...body.querySelectorAll("input:checked")].map(box => runs[+box.value]);
const smooth = points => { let kept = 0, weight = 0; return points.map(([x, y]) => {
  kept = 0.8 * kept + 0.2 * y; weight = 0.8 * weight + 0.2; return [x, kept / weight]; }); };

function draw() {
  const picked = chosen().filter(run => run.curve.length), box = chart.querySelector("svg"), keys = chart.querySelector(".keys");
  box.replaceChildren(); keys.replaceChildren();
  for (const row of body.rows) row.classList.toggle("on", !!row.querySelector("input:checked"));
  if (!picked.length) { keys.append(made("p", "Choose runs in the table to see their losses here.")); compare([]); return; }
  const lines = picked.map(run => smooth(run.curve)), all = lines.flat();
  const right = Math.max(...all.map(p => p[0])), low = Math.min(...all.map(p => p[1])), high = Math.max(...all.map(p => p[1]));
  const width = Math.max(300, box.clientWidth);  // in pixels, so that the labels keep their size on a phone
  box.setAttribute("viewBox", `0 0 ${width} 300`);
  const x = v => 50 + (width - 60) * v / right, y = v => 270 - 245 * (v - low) / (high - low || 1);
  for (let n = 0; n <= 4; n++) {
    const value = low + (high - low) * n / 4, step = Math.round(right * n / 4);
    box.append(shape("line", {x1: 50, x2: width - 10, y1: y(value), y2: y(value), stroke: "var(--line)"}));
    for (const [text, set] of [[value.toFixed(2), {x: 44, y: y(value) + 4, "text-anchor": "end"}],
                               [step, {x: x(step), y: 292, "text-anchor": "middle"}]]) {
      const label = shape("text", set); label.textContent = text; box.append(label);
    }
  }
  lines.forEach((line, n) => {
    const colour = colours[n % colours.length], key = made("span", picked[n].run);
    box.append(shape("polyline", {points: line.map(p => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" "),
      fill: "none", stroke: colour, "stroke-width": 2}));
    key.style.setProperty("--c", colour); keys.append(key);
  });
  compare(picked);
}

function compare(picked) {
  const place = document.getElementById("compare"); place.replaceChildren();
  if (picked.length !== 2) { place.append(made("p", "Choose exactly two runs to see them side by side.")); return; }
  const table = made("table"), head = made("tr"), rows = [];
  head.append(made("th"), ...picked.map(run => made("th", run.run))); table.append(head);
  for (const key of ["recipe", "schedule", "rank", "learning_rate", "seed", "records", "steps", "minutes", "tokens_per_second",
                     "held_out", "accuracy", "questions", "verdict", "commit", "machine"]) rows.push([key.replaceAll("_", " "), r => r[key]]);
  for (const phase of ["A", "B", "C"]) for (const key of ["steps", "final_loss", "held_out"])
    rows.push(["phase " + phase + ", " + key.replaceAll("_", " "), r => (r.phases.find(p => p.phase === phase) || {})[key]]);
  for (const [name, of] of rows) {
    const row = made("tr"), values = picked.map(of); row.append(made("td", name), ...values.map(v => made("td", v ?? "–")));
    if (values[0] !== values[1]) row.className = "on"; table.append(row);
  }
  place.append(table);
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const cell = button.parentElement, up = cell.getAttribute("aria-sort") !== "ascending", column = cell.cellIndex;
  for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
  cell.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => { const v = row.cells[column].dataset.value, n = parseFloat(v); return v === "" ? null : isNaN(n) || cell.dataset.text ? v : n; };
  [...body.rows].sort((a, b) => { const one = value(a), two = value(b);
    if (one === null || two === null) return (one === null) - (two === null);
    return (one < two ? -1 : one > two ? 1 : 0) * (up ? 1 : -1); }).forEach(row => body.append(row));
});
body.addEventListener("change", draw);
addEventListener("resize", draw);
draw();
