"""What the study's summary says, in lines for people."""

from collections.abc import Callable
from typing import Any


def in_words(summary: dict[str, Any]) -> str:
    """Say what the summary holds, in lines for a terminal and a table in Markdown for each setting."""
    lines = []
    if comparison := summary.get("comparison"):
        name = comparison["metric"].replace("_", " ")
        lines += ["", f"{name}, difference from {comparison['first']} in points, paired by seed:"]
        for row in comparison["differences"]:
            lines.append(f"- {row['setting']}: {_points(row['mean'])} ({_spread(row, _points)}, {row['pairs']} pairs)")
        if comparison["chooses_by_test_set"]:
            lines.append(
                "Warning: this is the test set. To choose a setting by it is to train on it; set data.validation."
            )
    for found in summary["settings"]:
        accuracy, target = found["accuracy"], found["target"]
        lines += [
            "",
            f"{found['setting']}: {found['runs']} runs, {found['diverged']} diverged",
            f"test accuracy: mean {_percent(accuracy['mean'])} ({_spread(accuracy, _percent)}), "
            f"standard deviation {_percent(accuracy['std'])}, median {_percent(accuracy['median'])}, "
            f"from {_percent(accuracy['min'])} to {_percent(accuracy['max'])}",
            f"{target['reached']} of {found['runs']} runs reach {_percent(target['accuracy'])} "
            f"(95 % interval of the share {_percents(target['interval'])})",
            "",
            "| after the last epoch | published | median | 90 % of the runs | percentile |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, row in found["last_epoch"].items():
            show = _percent if name.endswith("acc") else "{:.4f}".format
            if row["median"] is not None:
                low, high = row["band_90"]
                theirs = ("", "") if row["published"] is None else (show(row["published"]), f"{row['percentile']:.0f}")
                lines.append(
                    f"| {name.replace('_', ' ')} | {theirs[0]} | {show(row['median'])} "
                    f"| {show(low)} to {show(high)} | {theirs[1]} |"
                )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _points(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:+.2f}"


def _percents(values: list[float | None]) -> str:
    return " to ".join(map(_percent, values))


def _spread(row: dict[str, Any], show: Callable[[float | None], str]) -> str:
    if "values" in row:
        return f"values {', '.join(map(show, row['values'])) or 'none'}"
    return f"95 % interval {' to '.join(map(show, row['interval']))}"
