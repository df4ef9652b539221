"""Automata of strangers: minimal tables of random expressions, and limits on what grows without bound."""

import json
import random
import warnings

import pytest

from ssmzoo.data.automata import Automaton, AutomatonError
from ssmzoo.data.automata_regex import MOST_POSITIONS, MOST_STATES, written_out


def expression(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice("abc")
    parts = [expression(rng, depth - 1) for _ in range(2)]
    return rng.choice(["({0}|{1})", "({0})*", "({0})?", "({0})+", "({0}){{1,2}}", "{0}{1}"]).format(*parts)


@pytest.mark.parametrize("seed", range(40))
def test_tables_are_minimal_and_accept_what_the_expression_does(seed):
    from automata.fa.dfa import DFA
    from automata.fa.nfa import NFA

    rng = random.Random(seed)
    regex = expression(rng, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = Automaton.from_regex(regex, "abc")
    known = DFA.from_nfa(NFA.from_regex(regex, input_symbols=set("abc"))).minify().to_complete()
    assert table.num_states == len(known.states) and table.reachable() == list(range(table.num_states))
    for _ in range(20):
        word = [rng.choice("abc") for _ in range(rng.randrange(1, 9))]
        assert table.output[table.run(table.encode([word]))[0, -1]] == known.accepts_input(word)


@pytest.mark.parametrize("regex, size", [("abc", 3), ("a{3}", 3), ("(ab){2,5}", 10), ("a{4,}", 5), ("(a|b)&(cd)", 4),
                                         ("((a{3}){3}b)*", 10), ("[abc]d", 2), ("", 1)])  # fmt: skip
def test_sizes_with_repetitions_written_out(regex, size):
    assert written_out(regex) == size


@pytest.mark.parametrize("regex, limit", [
    ("(a|b)*a(a|b){30}", f"more than {MOST_STATES} states"),
    ("((a{1,99}){1,99}){1,99}", f"more than {MOST_POSITIONS};"),
    ("a{99999999999999999999999}", f"more than {MOST_POSITIONS};"),
    ("&".join(["(a*b*)"] * 40), f"more than {MOST_POSITIONS};"),
])  # fmt: skip
def test_exponential_expressions_are_refused_with_the_number(regex, limit):
    with pytest.raises(AutomatonError, match=limit):
        Automaton.from_regex(regex, "ab")


def test_alias_bombs_and_endless_nesting_in_automaton_files(tmp_path):
    levels = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    bomb, nested = tmp_path / "bomb.yaml", tmp_path / "nested.json"
    many = tmp_path / "many.json"
    many.write_text(json.dumps({"delta": [[i + 1] for i in range(20_000)] + [[0]]}))
    with pytest.raises(AutomatonError, match="many.json has 20,001 states, more than 20,000"):
        Automaton.from_file(many)
    bomb.write_text("\n".join(levels) + "\ndelta: *a11\n")
    nested.write_text("[" * 200_000)
    for file in (bomb, nested):
        with pytest.raises(
            AutomatonError, match=f"{file.name} cannot be read as YAML or JSON: .*(aliases|nested|valid)"
        ):
            Automaton.from_file(file)
