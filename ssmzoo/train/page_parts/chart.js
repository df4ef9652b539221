// Curves on a canvas: drag to zoom into a stretch of steps, double-click to see all; all charts of a page zoom together.
"use strict";
const zoom = { range: null, charts: [] };

function show(range) { zoom.range = range; for (const chart of zoom.charts) chart.draw(); }

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw) || power;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(low); e <= Math.ceil(high); e++)
    for (const m of high - low < 1.5 ? [1, 2, 3, 5, 7] : high - low < 4 ? [1, 3] : [1]) {
      const v = e + Math.log10(m);
      if (v >= low && v <= high) found.push(v);
    }
  return found;
}

function shown(v) {
  const a = Math.abs(v);
  if (a >= 1e6 || (a > 0 && a < 1e-3)) return v.toExponential(1).replace("e+", "e");
  return a >= 1000 ? v.toLocaleString("en") : String(+v.toPrecision(4));
}

function smooth(values, weight) {
  let mean = null;
  return values.map(v => { mean = mean === null ? v : weight * mean + (1 - weight) * v; return mean; });
}

class Chart {
  constructor(element, spec) {
    this.spec = spec;
    this.hidden = new Set();
    this.log = false;
    this.weight = 0;
    element.innerHTML = "";
    const head = document.createElement("h3");
    head.textContent = spec.title;
    this.canvas = document.createElement("canvas");
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    element.append(head, this.tools(), this.canvas, this.legend(), this.tip);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    zoom.charts.push(this);
  }

  tools() {
    const box = document.createElement("span");
    box.className = "tools";
    const positive = this.spec.series.every(s => s.y.every(v => v > 0));
    if (positive) box.append(this.tool("checkbox", "log", e => { this.log = e.checked; }));
    if (this.spec.series.some(s => s.y.length > 20))
      box.append(this.tool("range", "smooth", e => { this.weight = e.value / 100; }));
    return box;
  }

  tool(type, name, apply) {
    const label = document.createElement("label"), input = document.createElement("input");
    input.type = type;
    if (type === "range") { input.max = 98; input.value = 0; input.style.width = "5rem"; input.style.verticalAlign = "middle"; }
    input.addEventListener("input", () => { apply(input); this.draw(); });
    label.append(name + " ", input);
    return label;
  }

  legend() {
    const box = document.createElement("div");
    box.className = "legend";
    for (const s of this.spec.series) {
      const button = document.createElement("button"), mark = document.createElement("i");
      mark.style.background = s.color;
      button.setAttribute("aria-pressed", "true");
      button.append(mark, s.name);
      button.addEventListener("click", () => {
        this.hidden.has(s) ? this.hidden.delete(s) : this.hidden.add(s);
        button.setAttribute("aria-pressed", String(!this.hidden.has(s)));
        this.draw();
      });
      box.append(button);
    }
    return box;
  }

  listen() {
    const canvas = this.canvas, at = e => e.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointerdown", e => { this.from = this.to = at(e); canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointermove", e => { if (this.from != null) this.to = at(e); this.point = at(e); this.draw(); });
    canvas.addEventListener("pointerleave", () => { this.point = null; this.draw(); });
    canvas.addEventListener("pointerup", () => {
      const [a, b] = [this.from, this.to].map(x => this.toStep(x)).sort((p, q) => p - q);
      const far = Math.abs(this.to - this.from) > 6;
      this.from = this.to = null;
      if (far) show([a, b]);
    });
    canvas.addEventListener("dblclick", () => show(null));
  }

  toStep(x) {
    const [low, high] = this.steps;
    return low + Math.min(1, Math.max(0, (x - this.left) / (this.right - this.left))) * (high - low);
  }

  draw() {
    const ratio = window.devicePixelRatio || 1, width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    if (!width) return;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const g = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    g.scale(ratio, ratio);
    const line = style.getPropertyValue("--line"), soft = style.getPropertyValue("--soft");
    const scale = v => this.log ? Math.log10(v) : v;
    const all = this.spec.series.filter(s => !this.hidden.has(s));
    const xs = all.flatMap(s => [s.x[0], s.x[s.x.length - 1]]);
    this.steps = zoom.range || [Math.min(...xs), Math.max(...xs)];
    const [x0, x1] = this.steps;
    const lines = all.map(s => ({ ...s, y: this.weight && s.y.length > 20 ? smooth(s.y, this.weight) : s.y }));
    const ys = lines.flatMap(s => s.y.filter((_, i) => s.x[i] >= x0 && s.x[i] <= x1)).map(scale);
    let low = Math.min(...ys), high = Math.max(...ys);
    if (!isFinite(low)) { low = 0; high = 1; }
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    low -= room; high += room;
    this.left = 58; this.right = width - 8;
    const top = 8, bottom = height - 22;
    const X = v => this.left + (v - x0) / (x1 - x0 || 1) * (this.right - this.left);
    const Y = v => bottom - (scale(v) - low) / (high - low) * (bottom - top);
    g.font = "11px system-ui, sans-serif";
    g.fillStyle = soft; g.strokeStyle = line; g.lineWidth = 1;
    for (const t of this.log ? logTicks(low, high) : ticks(low, high, height / 50)) {
      const value = this.log ? 10 ** t : t, y = Y(value);
      g.beginPath(); g.moveTo(this.left, y); g.lineTo(this.right, y); g.stroke();
      g.textAlign = "right"; g.fillText(shown(value), this.left - 6, y + 4);
    }
    for (const t of ticks(x0, x1, width / 110)) { g.textAlign = "center"; g.fillText(shown(t), X(t), height - 6); }
    g.save(); g.beginPath(); g.rect(this.left, top - 4, this.right - this.left, bottom - top + 8); g.clip();
    for (const s of lines) {
      g.strokeStyle = g.fillStyle = s.color; g.lineWidth = 1.6; g.setLineDash(s.dash || []);
      g.beginPath();
      s.x.forEach((x, i) => i ? g.lineTo(X(x), Y(s.y[i])) : g.moveTo(X(x), Y(s.y[i])));
      g.stroke(); g.setLineDash([]);
      if (s.x.length < 40) for (let i = 0; i < s.x.length; i++) { g.beginPath(); g.arc(X(s.x[i]), Y(s.y[i]), 2.2, 0, 7); g.fill(); }
    }
    if (this.from != null) { g.globalAlpha = 0.15; g.fillStyle = soft; g.fillRect(this.from, top, this.to - this.from, bottom - top); g.globalAlpha = 1; }
    g.restore();
    this.readout(g, lines, X, Y);
  }

  readout(g, lines, X, Y) {
    const inside = this.point != null && this.point >= this.left && this.from == null && lines.length;
    this.tip.style.display = inside ? "block" : "none";
    if (!inside) return;
    const step = this.toStep(this.point);
    const near = lines.map(s => s.x.reduce((best, x, i) => Math.abs(x - step) < Math.abs(s.x[best] - step) ? i : best, 0));
    this.tip.textContent = lines.slice(0, 12).map((s, k) => `${s.name}: ${shown(s.y[near[k]])} at ${shown(s.x[near[k]])}`).join("\n");
    lines.forEach((s, k) => { g.fillStyle = s.color; g.beginPath(); g.arc(X(s.x[near[k]]), Y(s.y[near[k]]), 3.5, 0, 7); g.fill(); });
    const right = this.point > this.canvas.clientWidth / 2;
    this.tip.style.left = right ? "auto" : `${this.point + 24}px`;
    this.tip.style.right = right ? `${this.canvas.clientWidth - this.point + 24}px` : "auto";
    this.tip.style.top = `${this.canvas.offsetTop + 8}px`;
  }
}

function sortable(table) {
  const heads = [...table.querySelectorAll("th[data-key]")], body = table.tBodies[0];
  heads.forEach(head => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", at = head.cellIndex;
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
    [...body.rows].sort((a, b) => {
      const [p, q] = [value(a), value(b)], empty = (p === "") - (q === "");
      if (empty) return empty;
      const order = isNaN(p) || isNaN(q) ? p.localeCompare(q, "en", { numeric: true }) : p - q;
      return up ? order : -order;
    }).forEach(row => body.append(row));
  }));
}

document.addEventListener("DOMContentLoaded", () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  document.querySelectorAll("table.sortable").forEach(sortable);
  const box = document.querySelector(".charts"), choice = document.getElementById("metric");
  const fill = specs => {
    box.innerHTML = ""; zoom.charts = []; zoom.range = null;
    specs.forEach((spec, i) => {
      const element = document.createElement("div");
      element.className = i ? "chart" : "chart large";
      box.append(element);
      new Chart(element, spec);
    });
  };
  if (!choice) return fill(data);
  const chosen = () => fill(data.filter(spec => spec.title === choice.value));
  choice.addEventListener("change", chosen);
  chosen();
});
