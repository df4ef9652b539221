"""Questions about pictures: what a text looks like in bytes, folders of one's own, and runs with SSMI and LoRA."""

import json

import numpy as np
import pytest
import torch

from ssmzoo.adapt.ssmi import load_adapter
from ssmzoo.data.loader import Draw
from ssmzoo.data.questions.data import IGNORE, QuestionData, Questions, patches
from ssmzoo.data.questions.sources import ASKED, WORDS

SMALL = ["model.d_model=16", "model.n_layer=1", "model.rank=2", "model.max_share=0.5", "data.batch_size=8", "name=a",
         "task.decoder_steps=2", "task.decoder_batch=4", "task.align_steps=1", "trainer.max_steps=3",
         "trainer.val_check_interval=3", "trainer.limit_val_batches=1", "trainer.accelerator=cpu"]  # fmt: skip


def data(**given):
    found = QuestionData(**given)
    found.setup()
    return found


def written(ids, labels):
    """The text of a sample, and what of it is asked for."""
    answer = bytes(labels[labels != IGNORE].tolist()).decode()
    return bytes(ids.tolist()).decode(), answer


def test_answers_are_asked_byte_by_byte_and_pictures_are_split():
    found = data()
    sample = Questions(found.held_out, found.visual, found.lengths)[Draw(2, 0)]
    text, answer = written(sample["input_ids"], sample["labels"])
    asked = found.held_out[2]
    assert text.startswith(f"\n{asked.question} {asked.answer}") and answer == f"{asked.answer}\n"
    caption, whole = written(sample["caption_ids"], sample["caption_labels"])
    assert caption.startswith("\nit is ") and whole == f"{asked.caption}\n"
    train, val = ({a.picture for a in part} for part in (found.training, found.held_out))
    assert not train & val and len(train) + len(val) == 1797 and len(found.held_out) == 3 * len(val)
    assert all(a.picture in train for a in found.text)
    from sklearn.datasets import load_digits

    assert torch.equal(found.visual[7][1].reshape(4, 4), torch.tensor(load_digits().images[7][:4, 4:] / 16).float())
    for a in found.training[:60]:
        digit = int(load_digits().target[a.picture])
        right = {"which digit?": WORDS[digit], "even?": "yes" if digit % 2 == 0 else "no"}
        assert a.answer == right.get(a.question, "yes" if digit > 4 else "no") and WORDS[digit] in a.caption


def test_text_for_the_decoder_states_facts_half_of_the_time():
    found = data()
    ids, labels = found.text_batch(200, np.random.default_rng(0))
    texts = [bytes(row.tolist()).decode() for row in ids]
    assert 0.35 < np.mean([t.startswith("\nit is ") for t in texts]) < 0.65
    assert (labels[:, :-1] == ids[:, 1:])[labels[:, :-1] != IGNORE].all()
    facts = [t.strip().removeprefix("it is ").split(". even? ") for t in texts if "it is" in t and " even" in t]
    assert len(facts) > 10 and all((WORDS.index(d) % 2 == 0) == (a == "yes") for d, a in facts)


def test_unseen_questions_are_asked_of_held_out_pictures_alone():
    found = data(unseen=["large"])
    kinds = list(ASKED)
    assert {kinds[a.kind] for a in found.training} == {"digit", "even"}
    assert {kinds[a.kind] for a in found.held_out} == set(kinds) == {kinds[a.kind] for a in found.text}
    frequent = found.baselines()["most frequent answer"]
    assert 0.25 < frequent < 0.4  # of the two that were trained


def test_patches_are_cut_row_by_row():
    picture = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    found = patches(picture, 2)
    assert found.shape == (2, 4, 12)
    assert np.array_equal(found[1, 2].numpy(), picture[1, 2:, :2].reshape(-1))


def own(folder, count=4, **change):
    from PIL import Image

    folder.mkdir()
    rows = []
    for i in range(count):
        Image.fromarray(np.full((9, 7), 60 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "dark?", "answer": "yes" if i < 2 else "no"} | change)
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return folder


def test_a_folder_of_ones_own(tmp_path):
    found = data(path=str(own(tmp_path / "a")), image_size=8, patch=4, channels=3, val_fraction=0.25, batch_size=2)
    assert found.sizes == {"vocab_size": 256, "visual_dim": 48} and found.source.kinds == ["dark?"]
    batch = next(iter(found.train_dataloader()))
    assert batch["visual"].shape == (2, 4, 48) and set(batch) == {
        "input_ids", "labels", "caption_ids", "caption_labels", "visual", "kind"
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, given, words",
    [
        ({}, {"patch": 3}, "data.patch = 3 does not divide the pictures' 32 pixels"),
        ({}, {"questions": ["drk?"]}, r"no question is called 'drk\?'; nearest: dark\?"),
        ({}, {"unseen": ["dark?"]}, "no question is left to train on"),
        ({}, {"questions": ["dark?"], "unseen": ["dark?"]}, r"both name dark\?"),
        ({}, {"channels": 2}, "data.channels = 2 must be 1 or 3"),
        ({"answer": " "}, {}, r"questions.jsonl, line 1: answer is ' '; expected a text"),
        ({"question": None}, {}, "line 1: question is None; expected a text"),
        ({"image": "b.png"}, {}, "asks about 1 pictures; two are needed"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path, change, given, words):
    folder = own(tmp_path / "a", **change)
    with pytest.raises(ValueError, match=words) as error:
        data(path=str(folder), **given)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = own(tmp_path / "a")
    (folder / "1.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="1.png"):
        data(path=str(folder))
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match="1.png"):
        data(path=str(folder))
    for text, words in (("{", "line 1: no JSON object"), ("3", "line 1: expected an object .* got int")):
        (folder / "questions.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            data(path=str(folder))
    with pytest.raises(ValueError, match="there is no questions.jsonl in it"):
        data(path=str(tmp_path))


def test_a_run_trains_the_memories_alone_and_is_evaluated(call, tmp_path):
    status, out, err = call("model=ssmi", *SMALL)
    assert (status, err) == (0, ""), err
    assert "parameters are trained (" in out and "decoder: 2 steps on text without pictures" in out
    run = tmp_path / "runs/ssmi/a"
    assert (run / "questions.png").stat().st_size > 1000 and "answers right, most frequent answer" in out
    from ssmzoo.zoo import load_model

    model, _ = load_model(run)
    plain = model.plain_decoder()
    plain.load_state_dict(model.reader.backbone.state_dict())
    again = load_adapter(plain, run / "adapter")
    ids, visual = torch.tensor([[10, 101]]), torch.rand(1, 4, 16)
    assert torch.equal(again(ids, visual=visual).logits, model(ids, visual=visual).logits)
    status, out, err = call("ckpt=runs/ssmi/a", "out=again", entry="eval")
    assert (status, err) == (0, "") and "byte by byte" in out and "noise of 0.4" in out
    small = [a for a in SMALL if not a.startswith(("task.decoder_steps", "name"))]
    small = [a for a in small if not a.startswith("model.rank")]
    lora = ["model.adapter=lora", "model.rank=8", "task.decoder_steps=0", "trainer.max_steps=1"]
    status, out, err = call("model=ssmi", *small, *lora, "init_from=runs/ssmi/a", "name=b")
    assert (status, err) == (0, "") and "decoder: " not in out and "lora_A" in out  # its decoder is taken


def test_lora_without_pictures_and_a_decoder_of_its_own(call):
    from ssmzoo.models.ssmi import VisualDecoder

    small = [a for a in SMALL if not a.startswith(("model.rank", "name"))]
    status, out, err = call("model=ssmi", "model.adapter=lora", "model.inject=none", "model.rank=8", *small, "name=b")
    assert (status, err) == (0, ""), err
    assert "the memories alone" not in out
    decoder = VisualDecoder(visual_dim=16, d_model=16, n_layer=1, rank=2, max_share=0.5).plain_decoder()
    torch.save(decoder.state_dict(), "decoder.pt")
    arms = [a.replace("task.decoder_steps=2", "task.decoder_steps=0") for a in small]
    status, out, err = call("model=ssmi", "model.rank=2", *arms, "init_from=decoder.pt", "name=c")
    assert (status, err) == (0, ""), err
    assert "into model.reader.backbone" in out and "decoder: " not in out
    status, _, err = call("model=ssmi", "model.rank=2", *arms, "name=d")
    assert status == 2 and "the decoder is not trained: give init_from" in err
