"""Counts of the server in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from vlbench.serve.answer_request import AnswerEnd
from vlbench.serve.api.served_model import ServedModel

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKET_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histograms of seconds."""


class Histogram:
    """How many times took at most so many seconds."""

    def __init__(self) -> None:
        """Have counted nothing."""
        self.bucket_counts = [0] * (len(BUCKET_BOUNDS) + 1)
        self.total_seconds = 0.0

    def count_seconds(self, seconds: float) -> None:
        """Count a time."""
        self.bucket_counts[bisect_left(BUCKET_BOUNDS, seconds)] += 1
        self.total_seconds += seconds

    def sample_lines(self, name: str, labels: str) -> Iterable[str]:
        """Give the lines of the histogram; counts of buckets include those of smaller ones."""
        bounds = [*(f"{bound:g}" for bound in BUCKET_BOUNDS), "+Inf"]
        total = 0
        for bound, count in zip(bounds, self.bucket_counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.total_seconds:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


class ServerMetrics:
    """What is counted since the start. For one thread, the event loop's."""

    def __init__(self) -> None:
        """Have counted nothing."""
        self._responses: Counter[int] = Counter()
        self._answers: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first_token: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._whole_answer: defaultdict[str, Histogram] = defaultdict(Histogram)

    def count_response(self, status: int) -> None:
        """Count a response of any address by its status."""
        self._responses[status] += 1

    def count_answer(self, model_name: str, end: AnswerEnd) -> None:
        """Count an answer that has ended, its tokens and times."""
        self._answers[model_name, end.finish_reason] += 1
        for kind in ("prompt", "visual", "cached", "completion"):
            self._tokens[model_name, kind] += getattr(end, f"{kind}_tokens")
        if end.seconds_to_first_token is not None:
            self._first_token[model_name].count_seconds(end.seconds_to_first_token)
        self._whole_answer[model_name].count_seconds(end.seconds)

    def count_failure(self, model_name: str) -> None:
        """Count an answer that ended with an error."""
        self._answers[model_name, "error"] += 1

    def render_text(self, models: Iterable[ServedModel]) -> str:
        """Return all counts, with the requests that are answered and those that wait."""
        engines = {_label_text("model", model.name): model.engine.counts() for model in models}
        statuses = {_label_text("status", status): n for status, n in self._responses.items()}
        answers = {
            _label_text("model", model, reason=reason): n
            for (model, reason), n in self._answers.items()
        }
        tokens = {
            _label_text("model", model, kind=kind): n for (model, kind), n in self._tokens.items()
        }
        lines = [
            *_sample_lines("responses_total", "counter", "Responses by HTTP status", statuses),
            *_sample_lines("answers_total", "counter", "Answers by how they ended", answers),
            *_sample_lines("tokens_total", "counter", "Tokens by kind", tokens),
            *_sample_lines(
                "requests_running",
                "gauge",
                "Requests that are being answered",
                {model: counts.rows_running for model, counts in engines.items()},
            ),
            *_sample_lines(
                "requests_waiting",
                "gauge",
                "Requests that wait for a row",
                {model: counts.requests_waiting for model, counts in engines.items()},
            ),
            *_histogram_lines("time_to_first_token_seconds", self._first_token),
            *_histogram_lines("answer_seconds", self._whole_answer),
        ]
        return "\n".join(lines) + "\n"


def _label_text(name: str, value: object, **others: object) -> str:
    pairs = {name: value, **others}
    return ",".join(f'{key}="{_escape_value(str(one))}"' for key, one in pairs.items())


def _escape_value(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _sample_lines(name: str, kind: str, help: str, values: Mapping[str, int]) -> list[str]:
    name = f"vlbench_{name}"
    head = [f"# HELP {name} {help}.", f"# TYPE {name} {kind}"]
    return [*head, *(f"{name}{{{labels}}} {value}" for labels, value in values.items())]


def _histogram_lines(name: str, histograms: Mapping[str, Histogram]) -> list[str]:
    name = f"vlbench_{name}"
    lines = [f"# HELP {name} Seconds from a request's arrival.", f"# TYPE {name} histogram"]
    for model_name, histogram in histograms.items():
        lines += histogram.sample_lines(name, _label_text("model", model_name))
    return lines
