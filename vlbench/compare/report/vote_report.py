"""Votes as sentences and tables: in the report of runs, or as a report of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench.compare.report.row_pairs import format_count, format_p
from vlbench.compare.report.vote_statistics import PairVotes, VoteFindings, VoteShare
from vlbench.html_pages import jinja_environment
from vlbench.text_tables import markdown_text
from vlbench.version import __version__

PAGE_TEMPLATE = "vote_page.html.jinja"
MAX_NAMED_LINES = 5  # of lines that are no votes; the others are counted
COLUMNS = (
    *("models", "wins", "losses", "ties", "both bad", "win rate", "95 % interval"),
    *("p (Holm)", "pictures", "shown first"),
)
METHOD_SENTENCE = (
    "Wins and losses are of the first model of a line; the win rate is of the votes that one of "
    "the two won, and ties and both bad are left out of it. Votes about the same picture count as "
    "one unit: intervals are Wilson's for as many votes as these are worth, p is that of the exact "
    "sign test over pictures. Voters are not told apart: whether several people agree is not known."
)
SEEN_SENTENCE = (
    "Not blind: who voted here saw the names of the models. These votes are not counted above."
)


def scope_sentence(findings: VoteFindings) -> str:
    """Return a sentence on how many votes there are, and what is left out."""
    blind = findings.blind_count
    seen = len(findings.files.votes) - blind
    text = f"{format_count(blind, 'blind vote')} in {', '.join(findings.files.names)}"
    text += f"; {format_count(seen, 'vote')} not blind, counted apart" if seen else ""
    repeated = findings.files.repeated
    text += f"; {format_count(repeated, 'repeated line')} counted once" if repeated else ""
    return f"{text}."


def bad_line_sentences(findings: VoteFindings) -> list[str]:
    """Return sentences on the lines that are no votes, [] without any."""
    bad = findings.files.bad_lines
    if not bad:
        return []
    counted = f"{format_count(len(bad), 'line')} left out, as no vote can be read from them"
    more = len(bad) - MAX_NAMED_LINES
    return [f"{counted}:", *bad[:MAX_NAMED_LINES], *([f"and {more:,} more"] if more > 0 else [])]


def pair_sentences(findings: VoteFindings) -> list[str]:
    """Return a sentence for every pair of the blind votes."""
    return [pair_sentence(pair) for pair in findings.pairs]


def pair_sentence(pair: PairVotes) -> str:
    """Return how often one model won over another, and whether that may be chance."""
    if not pair.wins.votes:
        return f"No vote decided between {pair.better} and {pair.worse}."
    caution = "" if pair.is_significant else "; this may be chance"
    return (
        f"{pair.better} won {format_percent(pair.wins.share)} of "
        f"{format_count(pair.wins.votes, 'vote')} that decided between it and {pair.worse} (95 % "
        f"interval {interval_text(pair.wins)} %, p {format_p(pair.corrected_p)} after Holm's "
        f"correction over {format_count(pair.pair_count, 'pair')}{caution})."
    )


def position_sentences(findings: VoteFindings) -> list[str]:
    """Return how often the answer shown first was chosen, a sentence for each number of answers."""
    return [
        _position_sentence(count, first) for count, first in sorted(findings.first_chosen.items())
    ]


def _position_sentence(count: int, first: VoteShare) -> str:
    unbiased = 1 / count
    if first.interval_low > unbiased:
        verdict = "the first place was preferred"
    elif first.interval_high < unbiased:
        verdict = "the first place was avoided"
    else:
        verdict = "no preference for a place is seen"
    return (
        f"Of {count} answers side by side the first was chosen in {format_percent(first.share)} of "
        f"{format_count(first.votes, 'vote')} (95 % interval {interval_text(first)} %; without a "
        f"preference {100 * unbiased:.0f} %): {verdict}."
    )


def pair_cells(pair: PairVotes, is_blind: bool = True) -> list[str]:
    """Return the cells of a line of the table, one for each of `COLUMNS`."""
    return [
        f"{pair.better} over {pair.worse}",
        *(f"{count:,}" for count in (pair.wins.count, pair.losses, pair.ties, pair.both_bad)),
        format_percent(pair.wins.share),
        f"{interval_text(pair.wins)} %",
        format_p(pair.corrected_p).removeprefix("= ") if is_blind else "",
        f"{pair.wins.pictures:,}",
        f"{pair.shown_first:,} of {pair.shown_together:,}",
    ]


def format_percent(share: float | None) -> str:
    """Return a share in percent, "" where there is none."""
    return "" if share is None else f"{100 * share:.1f} %"


def interval_text(share: VoteShare) -> str:
    """Return an interval in percent, without the unit."""
    return f"{100 * share.interval_low:.1f} to {100 * share.interval_high:.1f}"


def votes_markdown(findings: VoteFindings, heading: str = "##") -> str:
    """Return the section as Markdown."""
    lines = [f"{heading} Votes", "", markdown_text(scope_sentence(findings)), ""]
    bad = bad_line_sentences(findings)
    if bad:
        lines += [
            f"**{markdown_text(bad[0])}**",
            "",
            *(f"- {markdown_text(b)}" for b in bad[1:]),
            "",
        ]
    if findings.pairs:
        sentences = [*pair_sentences(findings), *position_sentences(findings)]
        lines += [f"- {markdown_text(one)}" for one in sentences]
        lines += ["", *_markdown_table(findings.pairs, True), "", METHOD_SENTENCE]
    if findings.seen_pairs:
        lines += ["", SEEN_SENTENCE, "", *_markdown_table(findings.seen_pairs, False)]
    return "\n".join(lines)


def _markdown_table(pairs: Sequence[PairVotes], is_blind: bool) -> list[str]:
    lines = [COLUMNS, *(pair_cells(pair, is_blind) for pair in pairs)]
    text = [f"| {' | '.join(map(markdown_text, line))} |" for line in lines]
    return [text[0], f"|---|{'---:|' * (len(COLUMNS) - 1)}", *text[1:]]


def votes_section(findings: VoteFindings) -> dict[str, Any]:
    """Return what `votes.jinja` shows."""
    return {
        "scope": scope_sentence(findings),
        "bad_lines": bad_line_sentences(findings),
        "sentences": [*pair_sentences(findings), *position_sentences(findings)],
        "columns": COLUMNS,
        "lines": [pair_cells(pair) for pair in findings.pairs],
        "seen_lines": [pair_cells(pair, is_blind=False) for pair in findings.seen_pairs],
        "method": METHOD_SENTENCE,
        "seen": SEEN_SENTENCE,
    }


def votes_html(findings: VoteFindings) -> str:
    """Return a page on votes alone."""
    template = jinja_environment(Path(__file__).parent).get_template(PAGE_TEMPLATE)
    text = template.render(votes=votes_section(findings), version=__version__)
    return text.encode("utf-8", "replace").decode()  # a name may have an unpaired surrogate


def votes_json(findings: VoteFindings) -> str:
    """Return a report on votes alone as JSON."""
    return json.dumps({"vlbench": __version__, "votes": votes_record(findings)}, indent=1)


def votes_record(findings: VoteFindings) -> dict[str, Any]:
    """Return the section for JSON: shares from 0 to 1, intervals of 95 %."""
    return {
        "files": findings.files.names,
        "blind": findings.blind_count,
        "not_blind": len(findings.files.votes) - findings.blind_count,
        "repeated_lines": findings.files.repeated,
        "bad_lines": findings.files.bad_lines,
        "pairs": [_pair_record(pair) for pair in findings.pairs],
        "not_blind_pairs": [_pair_record(pair) for pair in findings.seen_pairs],
        "first_chosen": [
            {"answers": count, **_share_record(first)}
            for count, first in sorted(findings.first_chosen.items())
        ],
    }


def _pair_record(pair: PairVotes) -> dict[str, Any]:
    return {
        "better": pair.better,
        "worse": pair.worse,
        "wins": pair.wins.count,
        "losses": pair.losses,
        "ties": pair.ties,
        "both_bad": pair.both_bad,
        "shown_together": pair.shown_together,
        "better_shown_first": pair.shown_first,
        "win_rate": _share_record(pair.wins),
        "p": pair.wins.p_value,
        "p_corrected": pair.corrected_p,
        "tests_in_family": pair.pair_count,
        "more_than_chance": pair.is_significant,
    }


def _share_record(share: VoteShare) -> dict[str, Any]:
    return {
        "share": share.share,
        "interval": [share.interval_low, share.interval_high],
        "votes": share.votes,
        "pictures": share.pictures,
    }
