"""Settings that are allowed and yet look wrong: against the papers, and against the run itself.

`validate` refuses what cannot run; this tells of what can and probably should not. Each finding has a stable
id, a severity and the source of the rule: an `error` wastes the run, a `warning` wants a reason, a `note` is
worth knowing. The rules are in `lint_model` (architecture) and `lint_run` (training, layout, data, time).
"""

from collections.abc import Sequence

from megads.plan import lint_model, lint_run
from megads.plan.findings import SEVERITIES, Finding, Run


def lint(run: Run) -> list[Finding]:
    """All findings, the worst first. The configuration must have passed `validate.check`."""
    rules = (*lint_model.RULES, *lint_run.RULES)
    findings = [finding for rule in rules for finding in rule(run)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def is_refused(findings: Sequence[Finding], strict: bool) -> bool:
    """Whether a run should not start: with an error, or, if `strict`, with a warning."""
    refused = SEVERITIES[: 2 if strict else 1]
    return any(finding.severity in refused for finding in findings)
