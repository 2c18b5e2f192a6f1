"""A model card: what a checkpoint is and how well it does, as the Markdown of a repository's front page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Description
from ..errors import reading
from ..files import exists, require_regular
from ..provenance import describe
from ..types import PolicySpec
from .report import LARGEST_REPORT, difference_cell, mean_cell

REPORTS = ("presets/report.json", "report/report.json")
"""Where a checkpoint's folder has the report that a card shows, the first that is there."""


def checkpoint_report(folder: Path, weights_sha256: str) -> dict[str, Any] | None:
    """The report of ``evaluate`` that is in a checkpoint's folder; None: there is none that says that it is
    of these weights, and of undisturbed episodes.

    Raises:
        InputError: it can't be read.
    """
    for path in (folder / name for name in REPORTS):
        if not exists(path):
            continue
        require_regular(path, LARGEST_REPORT)
        with reading(str(path), "evaluate the checkpoint again, or remove the report"):
            report = dict(json.loads(path.read_bytes()))
        plain = report.get("samplers") and not report.get("disturbances")
        if report.get("weights_sha256") == weights_sha256 and plain:
            return report
    return None


def model_card(
    repo: str,
    about: Description,
    students: Mapping[str, Description],
    report: Mapping[str, Any] | None,
    license_name: str | None = None,
) -> str:
    """Builds the card.

    Args:
        repo: ``OWNER/NAME``, where the checkpoint can be loaded from.
        students: of the policy, by the names of their folders.
        report: as ``checkpoint_report`` finds it; None: the card says that nothing was measured.
        license_name: as the Hub has it, as ``mit``; None: the card names no license.
    """
    hashes = {"weights": about.sha256}
    hashes |= {f"weights of {name}": each.sha256 for name, each in students.items()}
    dataset = about.info.get("dataset", {})
    if dataset.get("fingerprint"):
        hashes[f"data ({dataset.get('name', 'unnamed')})"] = dataset["fingerprint"]
    parts = [
        _front_matter(about.spec, license_name),
        f"# {repo.split('/')[-1]}",
        in_words(about.spec),
        _use(repo, about.spec),
        _measured(report),
        f"## Hashes\n\n{_markdown([{'of': name, 'SHA-256': f'`{each}`'} for name, each in hashes.items()])}",
    ]
    return "\n\n".join(parts) + "\n"


def in_words(spec: PolicySpec) -> str:
    """A policy's spec as sentences of Markdown."""
    widths, contract = "-".join(map(str, spec.down_dims)), spec.contract
    fields = []
    for field in contract.observation:
        about = (f"{field.size} numbers" if field.size else "", field.unit)
        fields.append(f"`{field.key}` ({', '.join(filter(None, about))})".removesuffix(" ()"))
    action = (contract.action_kind, ", ".join(contract.action_names), contract.action_unit)
    sentences = [
        f"A Diffusion Policy for the task `{spec.task}`: network `{spec.network}` with {widths} channels.",
        f"It observes {spec.obs_dim} numbers at each of {spec.n_obs_steps} steps"
        + (f": {', '.join(fields)}." if fields else "."),
        f"It plans {spec.horizon} actions of {spec.action_dim} numbers ({'; '.join(filter(None, action))}), "
        f"of which {spec.n_action_steps} are executed, at {spec.control_hz:g} per second.",
        f"It was trained to predict `{spec.prediction}`, with the noise schedule `{spec.schedule}` of "
        f"{spec.n_train_steps} steps.",
    ]
    return "\n".join(sentences)


def _front_matter(spec: PolicySpec, license_name: str | None) -> str:
    import yaml

    values: dict[str, Any] = {"library_name": "paradiffpolicy", "pipeline_tag": "robotics"}
    if license_name is not None:
        values["license"] = license_name
    values["tags"] = list(dict.fromkeys(["robotics", "diffusion-policy", "real-time", spec.task]))
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _use(repo: str, spec: PolicySpec) -> str:
    return f"""## Use

```python
import paradiffpolicy as pdp

policy = pdp.load_policy("{repo}")
plan = policy.plan(observation)  # {spec.obs_dim} numbers, or a dict by field
plan.executed_actions  # [1, {spec.n_action_steps}, {spec.action_dim}]
```

`pip install 'paradiffpolicy[hub]'` has what this needs."""


def _measured(report: Mapping[str, Any] | None) -> str:
    """The report's table, and how it was made."""
    title = "## Measured"
    if report is None:
        return f"{title}\n\nThere is no report of these weights."
    with reading("the checkpoint's report", "evaluate the checkpoint again, or remove the report"):
        reference = report["reference"]
        rows = [_row(name, values, reference) for name, values in report["samplers"].items()]
        first, last = report["seeds"]
        how = describe(report["machine"])
        note = (
            f"Closed loop on seeds {first} to {last}, {report.get('date', 'no date')}, on {how}. "
            f"Differences are to `{reference}`, seed by seed, with the interval that was tested and its "
            "confidence."
        )
    return f"{title}\n\n{_markdown(rows)}\n\n{note}"


def _row(name: str, values: Mapping[str, Any], reference: str) -> dict[str, str]:
    score, success = values["difference_to_reference"], values.get("success")
    compared = values.get("success_difference_to_reference")
    return {
        "sampler": f"`{name}`",
        "network calls per plan, in sequence": f"{values['iterations_per_plan']['mean']:.1f}",
        "score ± s.e.": mean_cell(values["score"]),
        "success [95 %]": mean_cell(success, percent=True) if success else "unknown",
        "score against the reference": "reference" if name == reference else difference_cell(score),
        "verdict on the score": score["verdict"] if score else "",
        "success against the reference": "" if name == reference else difference_cell(compared, percent=True),
        "verdict on success": compared["verdict"] if compared else "",
    }


def _markdown(rows: list[dict[str, str]]) -> str:
    """A table of Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
