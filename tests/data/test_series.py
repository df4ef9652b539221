"""Series from files, published layouts and the embedded recording; what is no series is refused in one sentence."""

import numpy as np
import pytest
import torch

from ssmzoo.data.series.data import SeriesData
from ssmzoo.data.series.files import read_table
from ssmzoo.data.series.recording import GAP, LENGTHS, inject, recording
from ssmzoo.tasks.metrics.anomaly import segments


def numbers(rows=400, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return np.sin(np.arange(rows)[:, None] / 5 + np.arange(channels)) + 0.1 * rng.normal(size=(rows, channels))


def write_csv(file, values, names=None, **columns):
    """Values with columns of strings in front."""
    names = names or [f"c{i}" for i in range(values.shape[1])]
    lines = [",".join([*columns, *names])]
    lines += [",".join([*(str(c[i]) for c in columns.values()), *map(str, row)]) for i, row in enumerate(values)]
    file.write_text("\n".join(lines) + "\n")
    return file


def data(path=None, **options):
    made = SeriesData(None if path is None else str(path), **({"window": 20, "batch_size": 8} | options))
    made.setup("fit")
    return made


def refusal(path=None, **options):
    with pytest.raises(ValueError) as error:
        data(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_windows_are_standardised_by_the_training_part(tmp_path):
    values = numbers() * [1, 50, 0.01] + [0, 7, -3]
    made = data(write_csv(tmp_path / "a.csv", values), test_fraction=0.25, val_fraction=0.2)
    mean, deviation = values[:300].mean(0), values[:300].std(0)
    test = made.part("test")
    assert np.allclose(test.values, (values[300:] - mean) / deviation, atol=1e-5) and test.labels is None
    assert made.sizes == {"enc_in": 3} and len(made.train_dataloader().dataset) == 240 - 20 + 1
    batch = next(iter(made.train_dataloader()))["x"]
    assert batch.shape == (8, 20, 3) and batch.dtype == torch.float32
    held = torch.cat([b["x"] for b in made.val_dataloader()]).flatten(0, 1)
    assert np.allclose(held, (values[240:300] - mean) / deviation, atol=1e-5)  # never trained on


def test_the_tail_is_covered_or_dropped(tmp_path):
    file = write_csv(tmp_path / "a.csv", numbers(410))
    assert data(file, test_fraction=0.5).part("test").starts == [*range(0, 200, 20), 185]
    dropped = data(file, test_fraction=0.5, tail="drop").part("test")
    assert list(dropped.starts) == [*range(0, 200, 20)] and len(dropped.values) == 200


def test_validation_as_published_looks_at_the_test_part(tmp_path):
    made = data(write_csv(tmp_path / "a.csv", numbers()), validation="test", score_stride=1)
    assert len(made.train_dataloader().dataset) == 200 - 20 + 1 == len(made.val_dataloader().dataset)
    assert len(made.part("train").starts) == 181


def test_formats_hold_the_same_series(tmp_path):
    values = numbers(60)
    stamps = [f"2024-01-01 00:{i:02d}:00" for i in range(60)]
    label = (np.arange(60) > 50).astype(int)
    write_csv(tmp_path / "a.csv", values, timestamp=stamps, label=label)
    (tmp_path / "b.txt").write_text("\n".join(" ".join(map(str, row)) for row in values))
    np.save(tmp_path / "c.npy", values)
    tables = [read_table(tmp_path / name) for name in ("a.csv", "b.txt", "c.npy")]
    for table in tables:
        assert np.allclose(table.values, values)
    assert tables[0].names == ["c0", "c1", "c2"] and tables[0].labels.sum() == 9
    assert tables[0].times.dtype.kind == "M" and tables[1].labels is None


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra series")
    from pyarrow import parquet

    values = numbers(60)
    columns = {f"c{i}": values[:, i] for i in range(3)} | {"label": np.arange(60) > 50}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert np.allclose(table.values, values) and table.labels.sum() == 9


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install '.[series]'" in refusal(tmp_path / "a.parquet")


def folder(tmp_path, kind):
    """The layouts in which published sets come; (folder, options, labels)."""
    train, test, label = numbers(100), numbers(80, seed=1), np.arange(80) % 40 > 35
    place = tmp_path / kind
    place.mkdir()
    if kind in ("SMD", "MSL", "SMAP"):
        for name, part in (("train", train), ("test", test), ("test_label", label)):
            np.save(place / f"{kind}_{name}.npy", part)
    elif kind == "PSM":
        for name, part in (("train", train), ("test", test)):
            part = part.copy()
            part[3, 1] = np.nan
            write_csv(place / f"{name}.csv", part, **{"timestamp_(min)": range(len(part))})
        write_csv(place / "test_label.csv", label[:, None].astype(int), ["label"], **{"timestamp_(min)": range(80)})
    elif kind == "SWaT":
        write_csv(place / "swat_train2.csv", np.c_[train, np.zeros(100)], ["a", "b", "c", "last"])
        write_csv(place / "swat2.csv", np.c_[test, label], ["a", "b", "c", "last"])
    elif kind == "machines":
        for part, series in (("train", train), ("test", test), ("test_label", label[:, None].astype(int))):
            (place / part).mkdir()
            for name in ("machine-1-1", "machine-1-2"):
                np.savetxt(place / part / f"{name}.txt", series, delimiter=",")
    else:
        for part, series in (("train", train), ("test", test)):
            (place / part).mkdir()
            for name in ("A-1", "T-1"):
                np.save(place / part / f"{name}.npy", series)
        rows = ["chan_id,spacecraft,anomaly_sequences,class,num_values"]
        rows += ['A-1,SMAP,"[[36, 39], [76, 79]]","[point]",80', 'T-1,MSL,"[[0, 3]]","[point]",80']
        (place / "labeled_anomalies.csv").write_text("\n".join(rows))
    return place, label


@pytest.mark.parametrize(
    "kind, options, copies",
    [
        ("SMD", {"layout": "SMD"}, 1),
        ("MSL", {"layout": "MSL"}, 1),
        ("SMAP", {}, 1),
        ("PSM", {"layout": "PSM"}, 1),
        ("SWaT", {"layout": "SWaT"}, 1),
        ("machines", {"layout": "SMD"}, 2),
        ("machines", {"entity": "machine-1-2"}, 1),
        ("telemetry", {"layout": "SMAP"}, 1),
    ],
)
def test_published_layouts(tmp_path, kind, options, copies):
    place, label = folder(tmp_path, kind)
    made = data(place, **options)
    assert made.parts.train.shape == (100 * copies, 3) and made.parts.test.shape == (80 * copies, 3)
    assert (made.parts.labels == np.tile(label, copies)).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v: v[:30], "training part of .* has 12 points, fewer than data.window = 20"),
        (lambda v: np.where(np.arange(len(v))[:, None] == 7, np.nan, v), "row 8, c0: no value .* data.missing=zero"),
        (lambda v: np.where(np.arange(len(v))[:, None] == 7, np.inf, v), "row 8, c0: an infinite value"),
        (lambda v: np.zeros_like(v), "every channel of the training part of .* is constant"),
        (lambda v: v[:, :0], "no channel beside time and label"),
    ],
    ids=["short", "NaN", "infinite", "constant", "no channel"],
)
def test_series_that_cannot_serve_are_refused(tmp_path, change, words):
    import re

    values = change(numbers())
    file = write_csv(tmp_path / "a.csv", values, time=range(len(values)))
    assert re.search(words, refusal(file))


def test_one_constant_channel_is_kept_and_named(tmp_path, capsys):
    values = numbers()
    values[:, 1] = 4
    made = data(write_csv(tmp_path / "a.csv", values))
    assert "constant in the training part, so centred and not scaled: c1" in capsys.readouterr().out
    assert (made.part("test").values[:, 1] == 0).all() and "c1" in made.notes[0]


def test_empty_cells_become_zero_or_are_bridged(tmp_path):
    values = numbers()
    values[100, 2] = np.nan
    file = write_csv(tmp_path / "a.csv", values)
    assert data(file, missing="zero").parts.train[100, 2] == 0
    between = data(file, missing="interpolate").parts.train[100, 2]
    assert between == pytest.approx((values[99, 2] + values[101, 2]) / 2)


def test_time_stamps_must_rise(tmp_path):
    stamps = [f"2024-01-01 {i // 60:02d}:{i % 60:02d}:00" for i in range(400)]
    back, again = stamps.copy(), stamps.copy()
    back[9], again[9] = stamps[3], stamps[8]
    assert "row 10: the time stamp 2024-01-01 00:03:00 goes back; sort the rows" in refusal(
        write_csv(tmp_path / "a.csv", numbers(), timestamp=back)
    )
    assert "row 10: the time stamp 2024-01-01 00:08:00 is the one before again" in refusal(
        write_csv(tmp_path / "b.csv", numbers(), date=again)
    )
    words = refusal(write_csv(tmp_path / "c.csv", numbers(), when=["yesterday"] * 400), time="when")
    assert "'yesterday' are not understood" in words
    assert data(write_csv(tmp_path / "d.csv", numbers(), when=range(400)), time="when").sizes == {"enc_in": 3}


def test_labels_of_another_length_or_kind_are_refused(tmp_path):
    place, _ = folder(tmp_path, "SMD")
    np.save(place / "SMD_test_label.npy", np.zeros(79))
    assert "79 labels for the 80 points" in refusal(place)
    np.save(place / "SMD_test_label.npy", np.full(80, 2))
    assert "row 1: label '2'; expected 0 or 1" in refusal(place)
    np.save(place / "SMD_test_label.npy", np.zeros((80, 3)))
    assert "3 columns of labels; expected one" in refusal(place)


def test_labels_without_an_anomaly_leave_scores_only(tmp_path, capsys):
    file = write_csv(tmp_path / "a.csv", numbers(), label=["normal"] * 400)
    assert data(file).part("test").labels is None and "mark no anomaly" in capsys.readouterr().out


def test_files_that_are_no_series_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3\n")
    assert "row 2: 1 cells, but 2 columns" in refusal(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("x,y\n1,2\n3,four\n")
    assert "column y, row 2: 'four' is no number" in refusal(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("x,y\n")
    assert "holds no rows" in refusal(tmp_path / "c.csv")
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "is no array of numbers" in refusal(tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.zeros((2, 3, 4)))
    assert "expected numbers of (time, channels)" in refusal(tmp_path / "e.npy")
    (tmp_path / "f.zip").write_text("")
    assert "expected one of .csv, .txt, .npy, .parquet" in refusal(tmp_path / "f.zip")
    assert "there is no such file or folder" in refusal(tmp_path / "g.csv")
    (tmp_path / "h").mkdir()
    np.save(tmp_path / "h" / "train.npy", numbers())
    assert "lacks test.csv (or .npy, .parquet); there: train.npy" in refusal(tmp_path / "h")
    np.save(tmp_path / "h" / "test.npy", numbers(channels=2))
    assert "have 3 and 2 channels" in refusal(tmp_path / "h")


def test_options_that_do_not_fit_are_refused(tmp_path):
    file = write_csv(tmp_path / "a.csv", numbers())
    assert "no channel 'c9'; there: c0, c1, c2" in refusal(file, channels=["c9"])
    assert "has no column 'wann'" in refusal(file, time="wann")
    assert "choose one of auto, SMD" in refusal(file, layout="SMDD")
    assert "data.entity goes with data.path" in refusal(entity="machine-1-1")
    assert "data.stride = 0; it must be at least 1" in refusal(stride=0)
    place, _ = folder(tmp_path, "machines")
    assert "machine-1-1, machine-1-2" in refusal(place, entity="machine-9")


def test_the_embedded_recording_has_anomalies_of_every_kind_by_seed():
    train, test = recording()
    assert train.shape == (3200, 1) and test.shape == (2480, 1)
    unit = float(train.std())
    changed, labels, notes = inject(test, unit, 2, 3)
    runs = segments(labels)
    assert len(runs) == len(notes) == 2 * len(LENGTHS) and (changed[~labels] == test[~labels]).all()
    assert min(b[0] - a[1] for a, b in zip(runs, runs[1:])) >= GAP and runs[0][0] >= GAP and runs[-1][1] <= len(test)
    for (start, end), note in zip(runs, notes):
        kind, low, high = note.split()[0], *LENGTHS[note.split()[0]]
        assert low <= end - start <= high and np.abs(changed - test)[start:end].max() > 0, kind
    again, other = inject(test, unit, 2, 3), inject(test, unit, 2, 4)
    assert (again[0] == changed).all() and (other[1] != labels).any()
    with pytest.raises(ValueError, match="do not fit into 2480 points"):
        inject(test, unit, 20, 0)


def test_a_run_goes_on_with_the_same_series_only():
    made, other = data(), data(seed=1)
    assert made.state_dict()["sha256"] != other.state_dict()["sha256"]
    assert "a neuron's membrane potential" in made.describe()["series"]
