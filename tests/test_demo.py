"""`ssmzoo demo`: what its tabs compute, which runs they show, and the page itself in a browser where there is one."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request

import pytest
import torch
from paths import CHECKPOINTS, ROOT

from ssmzoo.cli import demo
from ssmzoo.cli.demo_tabs import classify, restore, segment, subject, walk, write
from ssmzoo.inference.subject import Subject
from ssmzoo.models.detector import Detector
from ssmzoo.models.segmenter import Segmenter
from ssmzoo.presets import read_model_config

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_a_tab_for_every_kind_of_checkpoint():
    found = demo.by_kind([str(CHECKPOINTS)])
    assert set(found) == {"text", "photographs", "pictures", "automaton"}
    assert "checkpoints/sd_ssm_D4" in found["automaton"] and len(found["automaton"]) == 1  # Mamba on D4 has no tab


def test_where_nothing_is_says_so(call, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = call("demo", "empty", entry="ssmzoo")
    assert status == 2 and "nothing to show in empty" in err
    status, _, err = call("demo", "nowhere", entry="ssmzoo")
    assert status == 2 and "no run, checkpoint or folder of them" in err


def test_text_goes_on_from_the_state_as_if_it_had_been_read_at_once():
    run = subject(CHECKPOINTS / "language")
    *_, (first, said, held) = write.write(run, None, "def main", 20, 0)
    assert first.startswith("def main") and "tokens/s" in said and held["seen"] == 28
    *_, (text, said, held) = write.write(run, held, "", 10, 0)
    *_, (whole, _, _) = write.write(run, None, "def main", 30, 0)
    assert text == whole and "read 0 tokens" in said
    *_, (_, said, nothing) = write.write(run, None, "", 10, 0)
    assert nothing is None and "at least one character" in said


def test_a_photograph_is_damaged_and_restored():
    run = subject(CHECKPOINTS / "restoration")
    given = restore.damaged(run).crop((0, 0, 48, 32))
    (before, after), said = restore.restore(run, given)
    scale = run.model.upscale
    assert before.size == after.size == (48 * scale, 32 * scale) and "restored" in said


@pytest.mark.slow
def test_a_digit_is_classified_and_explained():
    torch.manual_seed(0)
    run = subject(CHECKPOINTS / "image")
    found, figure = classify.classify(run, classify.digit())
    assert len(found) == 10 and abs(sum(found.values()) - 1) < 1e-4
    assert {"lrp", "rollout"} <= {axis.get_title() for axis in figure.axes}


@pytest.mark.parametrize("kind", [Segmenter, Detector])
def test_what_is_found_comes_with_the_pixels_that_moved_its_score(monkeypatch, kind):
    torch.manual_seed(0)
    backbone = {k: v for k, v in read_model_config("vmamba")["model"].items() if not str(v).startswith("${")}
    run = Subject("fresh", kind(backbone | {"num_classes": 0}, 4, channels=8).eval(), manifest={"config": {}})
    for name, parameter in run.model.named_parameters():
        if name.endswith("cls_logits.bias"):
            torch.nn.init.zeros_(parameter)  # an untrained detector is sure of nothing
    given = segment.scene(run)
    drawn, said = segment.find(run, given)
    assert given.size == (64, 64) and min(drawn.size) >= 384 and "%" in said
    figure = segment.reasons(run, given)
    maps = [axis.get_images()[0].get_array() for axis in figure.axes[1:]]
    assert 1 <= len(maps) <= segment.SHOWN and all(m.shape == (64, 64) and m.max() > 0 for m in maps)
    monkeypatch.setattr(segment, "scores_of", lambda *_: [])
    assert segment.reasons(run, given) is None


def test_sd_ssm_walks_with_the_automaton():
    run = subject(CHECKPOINTS / "sd_ssm_D4")
    word = walk.random_word(run)
    for at in (1, len(word)):
        said, figure = walk.walk(run, word, at)
        assert said.endswith("right") and len(figure.axes) == 2
    for wrong, words in ((["nosuch"], "is not in the alphabet"), ([], "give 1 to")):
        with pytest.raises(ValueError, match=words):
            walk.walk(run, wrong, 1)


@pytest.mark.slow
def test_every_tab_works_in_a_browser_and_nothing_leaves_the_machine(tmp_path, call):
    pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    short = ["trainer.max_steps=2", "trainer.accelerator=cpu", "data.batch_size=2", "data.num_workers=0", "name=masks"]
    status, _, error = call("model=vmamba", "task=segmentation", "data.val_scenes=2", *short)
    assert status == 0, error
    command = [sys.executable, "-m", "ssmzoo.cli.main", "demo", str(CHECKPOINTS), "runs"]
    command += ["--no-browser", "--port", "7877"]
    url = "http://127.0.0.1:7877"
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        while b"Running on" not in server.stdout.readline():
            assert server.poll() is None
        assert urllib.request.urlopen(url, timeout=60).status == 200
        with sync.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(90_000)
            outside, errors = [], []
            page.on("request", lambda r: None if re.match(rf"{url}|data:|blob:", r.url) else outside.append(r.url))
            page.on("pageerror", lambda e: errors.append(str(e)))
            page.goto(url)
            page.click("text=Begin anew")
            page.wait_for_selector("text=tokens/s")
            page.get_by_role("tab", name="Restore").click()
            page.click("text=One held out")
            page.wait_for_selector("img[src*=file]")
            page.get_by_role("button", name="Restore", exact=True).click()
            page.wait_for_selector("text=right: restored")
            page.get_by_role("tab", name="Classify").click()
            page.click("text=A digit")
            page.locator("img[src*=file]:visible").first.wait_for()
            page.get_by_role("button", name="Classify", exact=True).click()
            page.locator("img[src^='data:image']:visible").first.wait_for()
            page.get_by_role("tab", name="Segment").click()
            page.click("text=Some digits")
            page.locator("img[src*=file]:visible").first.wait_for()
            page.get_by_role("button", name="Find", exact=True).click()
            page.locator("p:visible", has_text=re.compile(r"nothing found|\d %")).first.wait_for()
            page.get_by_role("tab", name="Walk").click()
            page.click("text=Draw at random")
            page.wait_for_selector("text=: right")
            page.click("text=Next symbol")
            page.wait_for_selector("text=the model answers class")
            browser.close()
        assert outside == [] and errors == []
    finally:
        server.terminate()
        server.wait(30)
