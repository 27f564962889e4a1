"""Families of tests: what is corrected together, and why.

Holm's method keeps the chance of one or more false claims in a family at 5 %, however its tests
depend on each other. A report has three kinds of families:

    main outcome    all pairs of rows on the runs' own questions. It is chosen before the runs
                    (every run is asked them), so that what else is asked costs it nothing.
    further tasks   all pairs on all further tasks together: whoever looks through several tasks for
                    one that a row wins is looking through all of these tests.
    kinds           all pairs on all kinds of questions of one table. They say where a difference
                    comes from and are exploratory: each table is a family of its own.

This is how clinical trials order primary endpoints, secondary endpoints and subgroups (FDA 2022,
Multiple Endpoints in Clinical Trials: Guidance for Industry).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from vlbench.compare.report.detectable_difference import describe_points
from vlbench.compare.report.paired_statistics import RowStatistics, holm_correction
from vlbench.compare.report.row_pairs import RowPair, all_pairs

MAX_NAMED_PAIRS = 4  # in a cell of a table
TestedPairs = Set[frozenset[str]]
"""Names of rows of which two are compared."""
FAMILY_SENTENCE = (
    "Holm's correction is over one family of tests at a time, and in each of them the chance of "
    "any false claim is at most 5 %: the pairs of rows on the runs' own questions, which are the "
    "main outcome; the pairs on all further tasks together; and for each table of kinds of "
    "questions its pairs on all of its kinds together, which is exploratory."
)


def compare_family(
    tables: Sequence[tuple[Sequence[str], RowStatistics]], tested: TestedPairs | None = None
) -> list[list[RowPair]]:
    """Return the differences of pairs of rows, for each of several sets of questions.

    A table is the names of the rows, in the order of their statistics, and the statistics. All
    pairs are `tested`, or those of these names. p-values and detectable differences are those of
    one family: these pairs of all tables.
    """
    tests = [
        (table, pair)
        for table, (names, _) in enumerate(tables)
        for pair in all_pairs(len(names))
        if tested is None or frozenset(names[row] for row in pair) in tested
    ]
    pairs_of_table: list[list[RowPair]] = [[] for _ in tables]
    found = []
    for table, (first, second) in tests:
        names, statistics = tables[table]
        if statistics.accuracies[first] < statistics.accuracies[second]:
            first, second = second, first
        difference = statistics.difference(first, second, pair_count=len(tests))
        found.append((table, names[first], names[second], difference))
    corrected_ps = holm_correction([difference.p_value for *_, difference in found])
    for (table, better, worse, difference), corrected_p in zip(found, corrected_ps, strict=True):
        pairs_of_table[table].append(RowPair(better, worse, difference, corrected_p, len(tests)))
    return pairs_of_table


def name_significant(pairs: Sequence[RowPair], labels: Mapping[str, str]) -> str:
    """Return the pairs whose difference is more than chance, "none" without any; "" for no pair.

    `labels` maps the names of rows to those of the table: "A over B by 4.1 (p = 0.003)". Of many
    pairs the first are named and the others counted; the JSON report has all.
    """
    found = [
        f"{labels[pair.better]} over {labels[pair.worse]} by {100 * pair.difference.mean:.1f} "
        f"(p {pair.corrected_p_text})"
        for pair in pairs
        if pair.is_significant
    ]
    more = len(found) - MAX_NAMED_PAIRS
    named = [*found[:MAX_NAMED_PAIRS], f"{more} more"] if more > 1 else found
    return "; ".join(named) or ("none" if pairs else "")


def detectable_text(pairs: Sequence[RowPair]) -> str:
    """Return the points that any pair would show in 80 of 100 repetitions; "" without a pair.

    Where one of them could not show any difference, it is "none".
    """
    if not pairs:
        return ""
    largest = max(pair.difference.smallest_detectable for pair in pairs)
    pictures = pairs[0].difference.uncertainty.question_count
    return describe_points(largest, pictures).removesuffix(" points")
