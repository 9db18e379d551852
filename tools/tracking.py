"""A profile as a run of Weights & Biases: only where it was asked for, by `--log wandb`.

Where it goes is wandb's own matter: WANDB_MODE=offline keeps it in a folder, WANDB_PROJECT and WANDB_ENTITY name a
place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError, MissingError
from optimize.profiles.reading import RECORD, write_profile

from .report import PAGE, write_report
from .report_words import fastest, groups

if TYPE_CHECKING:
    from optimize.profiles.schema import Profile

PROJECT = "optimize-profile"


def log_to_wandb(profile: Profile, folder: Path | str) -> str:
    """Logs the record's rows, a summary, and the report in `folder` (written where it is not there yet).

    Gives the run's address, or offline the folder that `wandb sync` takes. Raises MissingError without wandb, and where
    it would have to ask for a key.
    """
    wandb = wandb_module()
    folder = Path(folder)
    page = folder / PAGE if (folder / PAGE).is_file() else write_report(profile, folder)
    record = folder / RECORD if (folder / RECORD).is_file() else write_profile(profile, folder / RECORD)
    run = started(wandb, profile, folder)
    try:
        run.log(
            {"rows": table_of(wandb, profile), "report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}
        )
        run.summary.update(summary_of(profile))
        artifact = wandb.Artifact(
            f"profile-{run.id}", type="profile", metadata={"schema_version": profile.schema_version}
        )
        artifact.add_file(str(record))
        artifact.add_file(str(page))
        run.log_artifact(artifact)
        where = str(Path(run.dir).parent if run.offline else run.url)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
    return where


def wandb_module() -> Any:
    try:
        import wandb
    except ImportError as e:
        raise MissingError(
            "logging to Weights & Biases needs wandb", got=e, mend='pip install "optimize[wandb]"'
        ) from e
    return wandb


def started(wandb: Any, profile: Profile, folder: Path) -> Any:
    """A run that watches nothing by itself: neither this machine, nor its code, nor what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    quiet = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            job_type="profile",
            config=config_of(profile),
            settings=quiet,
        )
    except wandb.errors.UsageError as e:  # no key, and nobody to ask for one
        raise MissingError("wandb is not logged in", got=e, mend="`wandb login`, or WANDB_MODE=offline") from e
    except wandb.errors.CommError as e:
        raise InputError("wandb does not take the run", got=e, mend="WANDB_MODE=offline, and `wandb sync` later") from e


def config_of(profile: Profile) -> dict[str, Any]:
    whole = profile.model_dump(mode="json", include={"made", "source", "command", "machine", "settings", "limits"})
    return {**whole, "wishes": profile.choice.wishes if profile.choice else []}


def table_of(wandb: Any, profile: Profile) -> Any:
    """Every row, also those that failed; a column that only some rows have is empty in the others."""
    rows = profile.as_rows()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])


def summary_of(profile: Profile) -> dict[str, Any]:
    """Figures to compare runs by: each measured median, the winners, and the choice. Estimates are not among them."""
    found: dict[str, Any] = {"busy": profile.load.busy}
    for state in ("measured", "inconclusive", "failed", "skipped"):
        found[f"rows/{state}"] = sum(r.state == state for r in profile.rows)
    for component, shape, rows in groups(profile):
        here = f"{component}/{shape}"
        for row in rows:
            if row.timing is not None and row.state == "measured":
                found[f"{here}/{row.backend}/{row.precision}/median_ms"] = row.timing.median_ms
        if (winner := fastest(rows)) is not None:
            found[f"{here}/fastest"] = winner.candidate
    if profile.choice is not None:
        found["wishes_met"] = profile.choice.met
        for pick in profile.choice.picks:
            found[f"{pick.component}/{pick.shape}/picked"] = f"{pick.backend} {pick.precision}"
            found[f"{pick.component}/{pick.shape}/picked_ms"] = pick.latency_ms
    return found
