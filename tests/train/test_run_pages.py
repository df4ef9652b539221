"""report.html and `ssmzoo runs --html`: whole, small, safe, without a network; tried in a browser if one is here."""

import json
import re
import shutil
import subprocess

import pytest

from ssmzoo.train.page import PICTURES, charts, read_report
from ssmzoo.train.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders with crowded curves, one with a picture and words that would be HTML."""
    from PIL import Image

    top = tmp_path_factory.mktemp("pages")
    for i, name in enumerate(("a", "b")):
        folder = top / "runs" / "mamba" / name
        folder.mkdir(parents=True)
        rows = [f"{k},{5 / (k + 1 + i)},{'' if k % 100 else 1 + i}" for k in range(1, 9_001)]
        (folder / "metrics.csv").write_text("\n".join(["step,train/loss,val/loss", *rows, ""]))
        (folder / "config.yaml").write_text(f"seed: {i}\nmodel_name: mamba\nname: {name}\n")
        (folder / "status.txt").write_text("finished\n")
        noise = Image.effect_noise((1600, 1600), 90).convert("RGB")
        noise.save(folder / "found.png")
        texts = {"sampled continuation": "<script>alert(1)</script> & more"}
        write_report(folder, f"mamba: {name}", "train.py x=<b>", {"loss": "1 < 2"}, texts, [folder / "found.png"])
    return top / "runs"


def data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_a_run_folder_gets_a_page_that_holds_all_of_it(runs):
    file = runs / "mamba" / "a" / "report.html"
    page = file.read_text(encoding="utf-8")
    assert file.stat().st_size < 1_000_000 and (runs / "mamba/a/found.png").stat().st_size > PICTURES
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "x=&lt;b&gt;" in page
    assert "1 &lt; 2" in page and "data:image/jpeg;base64," in page and "seed: 0" in page
    assert "http://" not in page and "https://" not in page
    loss = data(page)[0]
    assert loss["title"] == "loss" and [s["name"] for s in loss["series"]] == ["train/loss", "val/loss"]
    x, y = loss["series"][0]["x"], loss["series"][0]["y"]
    assert x == sorted(x) and x[0] == 1 and y[0] == 2.5 and len(x) <= 8000  # the extremes stay


def test_what_was_written_is_read_again(runs):
    report = read_report((runs / "mamba/a/report.md").read_text(encoding="utf-8"))
    assert report.title == "mamba: a" and report.rows == {"loss": "1 < 2"} and report.figures == ["found.png"]
    assert report.texts == {"sampled continuation": "<script>alert(1)</script> & more"}


def test_numbers_that_are_none_leave_no_curve():
    made = charts([{"step": 1.0, "val/x": float("nan")}, {"step": 2.0, "train/x": 1.0}])
    assert [(c["title"], [s["name"] for s in c["series"]]) for c in made] == [("x", ["train/x"])]


def test_a_page_of_runs_has_a_row_and_a_curve_each(runs, call, tmp_path):
    status, out, _ = call("runs", str(runs), "--html", "all.html", entry="ssmzoo")
    assert status == 0 and "2 runs in all.html" in out
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert len(page) < 1_000_000 and page.count("<tr>") == 3 and 'mamba/a/report.html"' in page
    assert [s["name"] for s in data(page)[0]["series"]] == ["mamba/a", "mamba/b"]
    assert '<th data-key="seed">' in page
    status, _, err = call("runs", str(runs), "--html", "nowhere/all.html", entry="ssmzoo")
    assert status == 2 and "there is no folder" in err
    status, out, _ = call("runs", "compare", str(runs / "mamba/a"), "--html", "one.html", entry="ssmzoo")
    assert status == 0 and "1 runs in one.html" in out


TRY = """
<script>document.addEventListener("DOMContentLoaded", () => setTimeout(() => {
  const say = (name, value) => document.body.setAttribute("data-" + name, value);
  const head = [...document.querySelectorAll("th[data-key]")].find(h => h.textContent === "seed");
  head.click(); head.click();
  say("first", document.querySelector("tbody tr").cells[0].textContent);
  const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
  const event = (kind, x) => canvas.dispatchEvent(new PointerEvent(kind, {clientX: box.left + x, pointerId: 1}));
  canvas.setPointerCapture = () => {};
  event("pointerdown", 200); event("pointermove", 400); event("pointerup", 400);
  say("zoom", JSON.stringify(zoom.range));
  canvas.dispatchEvent(new MouseEvent("dblclick"));
  say("all", JSON.stringify(zoom.range));
}, 300));</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_columns_sort_and_curves_zoom_in_a_browser(runs, call, tmp_path):
    call("runs", str(runs), "--html", "all.html", entry="ssmzoo")
    file = tmp_path / "all.html"
    file.write_text(file.read_text(encoding="utf-8").replace("</body>", TRY), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    page = subprocess.run([*command, f"file://{file}"], capture_output=True, text=True, timeout=120).stdout
    found = dict(re.findall(r'data-(first|zoom|all)="([^"]*)"', page))
    low, high = json.loads(found["zoom"])
    assert found["first"] == "mamba/b" and 0 < low < high < 9_000 and found["all"] == "null"
