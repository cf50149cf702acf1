"""The metrics: of test rows with what a model predicts, of choices with their likelihoods, of answers in words.

Each is a number a row whose mean is the metric or, where the table in `models.kinds` says so, one number in all; None
where it is not defined. What libraries compute is theirs: scikit-learn, scipy, rouge-score, sacrebleu.
"""

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlotr.errors import InputError
from fedlotr.evaluation.marks import Chosen, Said
from fedlotr.evaluation.results import Results

Numbers = npt.NDArray[np.float64]

NEEDS = {
    "macro_f1": "sklearn.metrics",
    "matthews": "sklearn.metrics",
    "rouge_l": "rouge_score.rouge_scorer",
    "chrf": "sacrebleu.metrics",
}
"""Metric -> the module of the extra `scores` that computes it."""


def accuracy(rows: Results) -> Numbers:
    """1 where the class is predicted, else 0."""
    return np.array(rows.labels == rows.predictions, np.float64)


def macro_f1(rows: Results) -> float | None:
    """scikit-learn's F1, averaged over the classes that are there or predicted."""
    return float(_library("macro_f1").f1_score(rows.labels, rows.predictions, average="macro", zero_division=0.0))


def matthews(rows: Results) -> float | None:
    """scikit-learn's Matthews correlation; 0 where all rows, or all predictions, are of one class."""
    return float(_library("matthews").matthews_corrcoef(rows.labels, rows.predictions))


def rmse(rows: Results) -> float | None:
    """In the labels' unit."""
    return math.sqrt(float(rows.losses.mean()))


def pearson(rows: Results) -> float | None:
    """The correlation of predictions and labels; None where either are all alike."""
    return _correlation("pearsonr", rows)


def spearman(rows: Results) -> float | None:
    """The correlation of their ranks; None where either are all alike."""
    return _correlation("spearmanr", rows)


def perplexity(rows: Results) -> float | None:
    """Over all target tokens of the rows; bounded, as in `Scores`."""
    return math.exp(min(float(rows.losses.sum() / rows.targets.sum()), 700))


def choice(rows: Chosen) -> Numbers:
    """1 where the right choice is the likeliest, else 0; of two alike the first counts, as numpy's argmin has it."""
    return np.array(rows.losses.argmin(1) == rows.right, np.float64)


def choice_norm(rows: Chosen) -> Numbers:
    """As `choice`, by the likelihood divided by the choice's characters, as lm-evaluation-harness normalises it."""
    return np.array((rows.losses / rows.lengths).argmin(1) == rows.right, np.float64)


def exact_match(rows: Said) -> Numbers:
    """1 where something is extracted of both answers, and the same, else 0."""
    pairs = zip(rows.wanted_extract, rows.said_extract, strict=True)
    return np.array([float(wanted is not None and wanted == said) for wanted, said in pairs])


def rouge_l(rows: Said) -> Numbers:
    """rouge-score's F-measure of ROUGE-L, with stemming."""
    scorer = _library("rouge_l").RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(rows.wanted, rows.said, strict=True)
    return np.array([scorer.score(wanted, said)["rougeL"].fmeasure for wanted, said in pairs])


def chrf(rows: Said) -> float | None:
    """sacrebleu's chrF2 over all rows, 0 to 100."""
    return float(_library("chrf").CHRF().corpus_score(list(rows.said), [list(rows.wanted)]).score)


def _correlation(name: str, rows: Results) -> float | None:
    if min(np.ptp(rows.labels), np.ptp(rows.predictions)) == 0:
        return None
    from scipy import stats

    return float(getattr(stats, name)(rows.labels, rows.predictions).statistic)


def check_library(metric: str) -> None:
    """Raise InputError where the library of a metric is not installed."""
    if metric in NEEDS:
        _library(metric)


def _library(metric: str) -> Any:
    try:
        return importlib.import_module(NEEDS[metric])
    except ImportError as error:
        package = NEEDS[metric].partition(".")[0]
        raise InputError(
            f"--score {metric}: {package} computes it, which is not installed; pip install 'fedlotr[scores]'"
        ) from error


Extract = Callable[[str], str | None]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_LETTERS = (
    re.compile(r"^\s*\(?([A-Z])\)?(?:[.):,\s]*$|[.):])"),
    re.compile(r"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*\(?([A-Z])\)?(?![A-Za-z'])"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z']|\s+[a-z])"),
)
"""How an answer names a choice, the plainest first."""


def last_number(text: str) -> str | None:
    """The last number, without separators and useless zeros: "It is $1,250.50." -> "1250.5"."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, point, rest = digits.partition(".")
    digits = f"{whole.lstrip('0') or '0'}{point}{rest}"
    return digits if digits == "0" else f"{sign}{digits}"


def letter(text: str) -> str | None:
    """The capital letter of a choice: "B", "(B) a dog", "The answer is B." -> "B"; not the "A" of "A dog barks"."""
    return next((found[1] for pattern in _LETTERS if (found := pattern.search(text)) is not None), None)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces within it balanced, without white space around it."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[begin:at].strip()
    return None


def whole_text(text: str) -> str | None:
    """All of it, without white space around it."""
    return text.strip()


EXTRACTS: dict[str, Extract] = {"all": whole_text, "last-number": last_number, "letter": letter, "boxed": boxed}
"""Name -> what it takes of an answer."""


def extract_of(name: str) -> Extract:
    """One of `EXTRACTS`, or a regular expression: its first group, or all of it, where it matches last.

    Raises InputError for what is no regular expression.
    """
    if name in EXTRACTS:
        return EXTRACTS[name]
    try:
        pattern = re.compile(name)
    except re.error as error:
        names = ", ".join(EXTRACTS)
        raise InputError(
            f"--extract {name}: neither one of {names} nor a regular expression ({error}); an example: '#### (.+)'"
        ) from error

    def matched(text: str) -> str | None:
        found = [*pattern.finditer(text)]
        return None if not found else (found[-1][1 if pattern.groups else 0] or "").strip()

    return matched
