"""Automata: known answers, groups, users' own tables and expressions, reproducible strings, held-out test strings."""

import itertools
import json

import numpy as np
import pytest

from ssmzoo.data.automata import Automaton, AutomatonError
from ssmzoo.data.automata_groups import is_group, permutation_matrices, structure
from ssmzoo.data.automata_library import BENCHMARK, automaton, generate_group, group_automaton, group_table
from ssmzoo.data.formal import FormalData
from ssmzoo.data.formal_protocols import FixedSet, FixedSetData, WordProblemData
from ssmzoo.data.formal_strings import IGNORE, prefix_hashes


def answer(language, ids):
    return language.output[language.run(np.array([ids]))[0, -1]]


def test_known_answers():
    assert answer(automaton("parity"), [1, 0, 1, 1]) == 1
    assert answer(automaton("even_pairs"), [0, 1, 0, 1]) == 1 and answer(automaton("even_pairs"), [1]) == 0
    assert answer(automaton("cycle"), [2, 2, 2, 0, 1]) == 2
    assert answer(automaton("D4"), [1, 0, 1, 1]) == 4 + 3  # +1, toggle, -1, -1
    assert answer(automaton("C2xC4"), [1, 0, 1, 1]) == 4 + 3
    assert automaton("A5").state_names[answer(automaton("A5"), [0, 1])] == "21430"


def test_modular_arithmetic_agrees_with_python():
    language, rng = automaton("modular_arithmetic"), np.random.default_rng(0)
    ids, states = language.draw(rng, 200, 9)
    for row, state in zip(ids, states):
        text = "".join("01234+-*"[i] for i in row)
        assert language.output[state[-1]] == eval(text) % 5  # noqa: S307
    assert language.closest_length(40) == 39
    assert (language.output[states[:, 1]] == -1).all()


def test_word_problem_multiplies_on_the_right():
    table, names = group_table("S3")
    for i, j in itertools.product(range(6), repeat=2):
        p, q = (tuple(map(int, names[k].strip("()").split(", "))) for k in (i, j))
        assert names[table[i, j]] == str(tuple(p[x - 1] for x in q))


def test_structure_tells_commutative_and_solvable():
    kinds = {name: structure(automaton(name)) for name in ("C2xC4", "D4", "A5", "word_A4_x_Z5", "even_pairs", "C2xC30")}
    assert [kinds[n].commutative for n in ("C2xC4", "C2xC30", "D4", "A5")] == [True, True, False, False]
    assert kinds["A5"].solvable is False and kinds["word_A4_x_Z5"].solvable is True
    assert kinds["even_pairs"].is_group is False and kinds["A5"].size == 60


def test_group_from_generators():
    swap, rotate = [1, 0, 2, 3], [1, 2, 3, 0]
    language = group_automaton([swap, rotate])
    assert language.num_states == 24 and language.num_symbols == 2 and is_group(language)
    assert (permutation_matrices(language).sum(1) == 1).all()
    with pytest.raises(AutomatonError, match=r"generators\[1\].*not a permutation"):
        generate_group([swap, [0, 0, 1, 2]])
    with pytest.raises(AutomatonError, match="not a group"):
        permutation_matrices(automaton("even_pairs"))


def test_users_own_automaton(tmp_path):
    table = {
        "symbols": ["a", "b"],
        "state_names": ["no", "yes"],
        "delta": [["no", "yes"], ["yes", "no"]],
        "accepting": ["yes"],
        "initial_state": "no",
    }
    (tmp_path / "mine.json").write_text(json.dumps(table))
    (tmp_path / "mine.yaml").write_text("delta: [[0, 1], [1, 0]]\noutput: [0, 1]\nsymbols: [a, b]\n")
    for file in ("mine.json", "mine.yaml"):
        language = Automaton.from_file(tmp_path / file)
        assert answer(language, language.encode(["abb"])[0]) == 0
    with pytest.raises(ValueError, match="symbol 'c' is not in the alphabet"):
        language.encode(["abc"])
    again = Automaton.from_dict(language.to_dict())
    assert (again.delta == language.delta).all() and again.symbols == language.symbols


def test_regular_expression():
    pytest.importorskip("automata")
    language = Automaton.from_regex("(ab)*", "ab")
    assert [answer(language, language.encode([w])[0]) for w in ("ab", "abab", "aba", "ba")] == [1, 1, 0, 0]
    assert language.num_states == 3
    with pytest.raises(AutomatonError, match=r"regex '\(ab' .* does not parse"):
        Automaton.from_regex("(ab", "ab")


@pytest.mark.parametrize(
    "table, message",
    [
        ({"delta": [[0, 1], [0]]}, r"delta\[1\] lacks 1 of 2 transitions"),
        ({"delta": [[0, 1], [0, None]]}, r"delta\[1\] lacks 1"),
        ({"delta": [[0, 2], [0, 1]]}, r"delta\[0\]\[1\] is 2"),
        ({"delta": [[0, 1], [-1, -1]]}, "without any transition"),
        ({"delta": [[0, 1], [1, 0]], "output": [0]}, "output has shape"),
        ({"delta": [[0, 1], [1, 0]], "symbols": ["a"]}, "symbols has 1 names"),
        ({"delta": [[0, 1], [1, 0]], "initial_state": 2}, "initial_state is 2"),
        ({"delta": [["x", "x"]], "state_names": ["y"]}, "names the state 'x'"),
        ({"delta": [[0]], "colour": 1}, "unknown key 'colour'"),
        ({"output": [0]}, "key 'delta'"),
    ],
)
def test_bad_tables_name_the_field(table, message):
    with pytest.raises(AutomatonError, match=message):
        Automaton.from_dict(table)


def test_unreachable_states_warn():
    with pytest.warns(UserWarning, match="no string reaches 1 of 3 states"):
        Automaton([[0, 1], [1, 0], [0, 2]])


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown language 'parityy'"):
        automaton("parityy")
    with pytest.raises(ValueError, match="length is 0"):
        automaton("parity").draw(np.random.default_rng(0), 1, 0)
    with pytest.raises(ValueError, match="outside the alphabet"):
        automaton("parity").run(np.array([[0, 2]]))
    for arguments, message in (
        ({"min_length": 0}, "min_length is 0"),
        ({"curriculum": "steep"}, "increasing, uniform, fixed"),
        ({"query_token": True}, "supervise=last"),
        ({"regex": "a*"}, "alphabet"),
        ({"language": "even_pairs", "group": True}, "not a permutation"),
        ({"regex": "a*", "alphabet": "a", "automaton": "x.yaml"}, "both given"),
    ):
        with pytest.raises(ValueError, match=message):
            FormalData(**arguments)


@pytest.mark.parametrize("language", ["parity", "modular_arithmetic", "A5"])
@pytest.mark.parametrize("skewed", [0.0, 1.0])
def test_batches_follow_from_the_seed_and_are_right(language, skewed):
    data, again, other = (FormalData(language, batch_size=16, skewed=skewed, seed=s, held_out=0) for s in (3, 3, 4))
    batch = data.training(40)
    assert all((again.training(40)[k] == v).all() for k, v in batch.items())
    assert not (other.training(40)["input_ids"] == batch["input_ids"]).all()
    output = data.language.output[data.language.run(batch["input_ids"].numpy())]
    assert (np.where(output < 0, IGNORE, output) == batch["labels"].numpy()).all()


def test_uniform_strings_and_skewed_strings():
    rng, language = np.random.default_rng(0), automaton("cycle")
    ids, _ = language.draw(rng, 3000, 10)
    assert np.abs(np.bincount(ids.ravel()) / ids.size - 1 / 3).max() < 0.01
    ids, _ = language.draw(rng, 3000, 40, weights=rng.exponential(size=(3000, 3)))
    assert (ids == 0).mean(1).std() > 0.15  # frequencies differ from string to string


def test_resume_continues_the_stream():
    loader = FormalData("D4", batch_size=4).train_dataloader()
    iterator = iter(loader)
    [next(iterator) for _ in range(5)]
    state, sixth = loader.state_dict(), next(iterator)
    fresh = FormalData("D4", batch_size=4).train_dataloader()
    fresh.load_state_dict(state)
    assert (next(iter(fresh))["input_ids"] == sixth["input_ids"]).all()


def test_test_strings_are_never_trained_on():
    data = FormalData("parity", batch_size=64, max_length=24, test_length=30, test_samples=64, curriculum="fixed")
    trained = set()
    for index in range(64):
        batch = data.training(index)
        hashes = prefix_hashes(batch["input_ids"].numpy())
        trained |= set(hashes[batch["labels"].numpy() != IGNORE].tolist())
    for mode in ("prefixes", "independent"):
        data.test_mode = mode
        tested, shared = 0, 0
        for strings in data.test_sets():
            hashes = strings.hashes[:, data.held_out.first - 1 :][
                strings.labels[:, data.held_out.first - 1 :] != IGNORE
            ]
            tested, shared = tested + len(hashes), shared + len(trained & set(hashes.tolist()))
        assert tested > 500 and shared == 0
    data.test_mode = "prefixes"
    counts = sum((s.labels != IGNORE).sum(0)[:24] for s in data.test_sets() if s.labels.shape[1] >= 24)
    assert counts.min() > 0  # every length is tested


def test_query_token_takes_the_answer():
    data = FormalData("parity", supervise="last", query_token=True, curriculum="uniform", held_out=0, batch_size=8)
    batch = data.training(3)
    assert data.sizes["num_symbols"] == 3 and (batch["input_ids"][:, -1] == 2).all()
    assert (batch["labels"][:, :-1] == IGNORE).all()
    assert (batch["labels"][:, -1] == batch["input_ids"][:, :-1].sum(1) % 2).all()


def test_fixed_sets():
    ids, label = next(FixedSet("parity").samples(1234))
    assert label == (1 if int((ids == 2).sum()) % 2 == 0 else 2)
    data = FixedSetData("cycle_nav", batch_size=4, val_samples=8)
    batch = data._batch(0)
    data._batch(1)
    assert (data._batch(0)["input_ids"] == batch["input_ids"]).all()
    assert ((batch["labels"] != IGNORE).sum(1) == 1).all() and (batch["mask"] == (batch["input_ids"] != 0)).all()
    with pytest.raises(ValueError, match="the fixed sets are"):
        FixedSet("A5")


def test_word_problem_batches_begin_with_bos():
    data = WordProblemData("S3", batch_size=4, max_length=6, strict_len=True, test_lengths=[8], val_samples=4)
    lengths = set()
    for index in range(20):
        batch = data._batch(index)
        assert (batch["input_ids"][:, 0] == 7).all() and (batch["labels"][:, 0] == 7).all()
        lengths.add(batch["input_ids"].shape[1] - 1)
    assert lengths == {2, 6} and data.sizes["vocab_size"] == 13


@pytest.mark.parametrize("language", BENCHMARK)
def test_every_state_of_a_benchmark_is_reachable(language):
    found = automaton(language)
    assert len(found.reachable()) == found.num_states
