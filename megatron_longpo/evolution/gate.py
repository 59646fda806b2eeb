"""The gate of a round: by the comparison's figures, does the next round begin with the new model?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_longpo.errors import ConfigError, DataError, one_line
from megatron_longpo.evaluation.compare import Difference, read_comparison
from megatron_longpo.evolution.plan import Origin, Planner
from megatron_longpo.evolution.settings import GateRule
from megatron_longpo.runtime.checked_json import read_checked, write_checked

Decision = Literal["go", "back", "stop"]
_SEVERITY: tuple[Decision, ...] = ("go", "back", "stop")


def decide(rules: Sequence[GateRule], comparison: Path, method: str) -> dict[str, Any]:
    """Apply the rules to a comparison.

    Args:
        rules: rules of the gate; without any the decision is ``go``.
        comparison: folder of the comparison.
        method: name of the evaluation whose lines count.

    Returns:
        Content of gate.json: the decision, the most severe of all rules', and each rule with its value.

    Raises:
        ConfigError: the comparison has no line that a rule is about.
    """
    findings: list[dict[str, Any]] = []
    decision: Decision = "go"
    lines = [line for line in read_comparison(comparison) if line.other == method] if rules else []
    for rule in rules:
        value = _value(rule, lines, comparison)
        passed = (rule.at_least is None or value >= rule.at_least) and (rule.at_most is None or value <= rule.at_most)
        if not passed:
            decision = max(decision, rule.otherwise, key=_SEVERITY.index)
        findings.append({"rule": vars(rule), "value": value, "passed": passed})
    return {"decision": decision, "rules": findings}


def write_gate(path: Path, content: dict[str, Any]) -> None:
    """Write gate.json."""
    write_checked(path, content)


def read_gate(path: Path) -> Decision | None:
    """The decision of a round's gate; None if it has not been made.

    Raises:
        DataError: the file cannot be read.
    """
    content = _read(path)
    decision: Decision | None = None if content is None else content["decision"]
    return decision


def _read(path: Path) -> dict[str, Any] | None:
    """Content of gate.json; None if there is none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = read_checked(path)
        if content["decision"] not in _SEVERITY:
            raise ValueError(f"decision {content['decision']!r}")
        describe(content)
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: holds no decision ({one_line(error)}); remove it, and decide again with --redo {path.parent.name}/gate"
        ) from None


def described(path: Path) -> str:
    """The decision of a round's gate in one line.

    Raises:
        DataError: the file cannot be read.
    """
    content = _read(path)
    return "not decided" if content is None else describe(content)


def describe(content: dict[str, Any]) -> str:
    """The decision in one line.

    Args:
        content: content of gate.json.
    """
    words = {"go": "go on with the new model", "back": "go back to the model of before", "stop": "stop"}
    reasons = [
        f"{'passed' if finding['passed'] else 'failed'}: {rule['suite']} {rule['name']} {rule['length']} {rule['figure']} "
        f"{finding['value']:.4g}"
        + "".join(f", {k} {rule[k]:g}" for k in ("at_least", "at_most") if rule[k] is not None)
        for finding in content["rules"]
        for rule in [finding["rule"]]
    ]
    return words[content["decision"]] + (f" ({'; '.join(reasons)})" if reasons else "")


def origin_of(planner: Planner, index: int) -> Origin | None:
    """The model that a round begins with; None while an earlier gate has not decided, or if one said stop.

    Args:
        planner: planner of the rounds.
        index: number of the round, from 0.
    """
    evolution = planner.evolution
    origin = Origin(Path(str(evolution.evolve.model)))
    for round_ in evolution.rounds[:index]:
        folder = planner.folder(round_.name)
        decision = read_gate(folder.gate)
        if decision is None or decision == "stop":
            return None
        if decision == "go":
            method = evolution.main_method
            origin = Origin(folder.model(method), f"{round_.name}/export:{method}")
    return origin


def _value(rule: GateRule, lines: Sequence[Difference], comparison: Path) -> float:
    found = [line for line in lines if (line.suite, line.name) == (rule.suite, rule.name)]
    # A single length has no mean over all lengths.
    if rule.length != "all" or len(found) > 1:
        found = [line for line in found if line.length == rule.length]
    if found:
        return float(getattr(found[0], rule.figure))
    known = ", ".join(f"{line.suite} {line.name} {line.length}" for line in lines)
    raise ConfigError(
        f"the gate's rule is about {rule.suite} {rule.name} {rule.length}, but {comparison}/comparison.json has only {known}; "
        "name one of these as suite, name and length"
    )
