"""The folder of a run: which files turnrow writes there, when it may start, and how they are written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turnrow.errors import UserError
from turnrow.files import file_above

if TYPE_CHECKING:
    from turnrow.training.recipe import Recipe

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside ``output_dir``. A folder holds a run from the moment that ``recipe.yaml`` is there."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, written when the run starts."""
        return self.root / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Trainer's checkpoints, for ``--resume``."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """What was trained."""
        return self.root / "adapter"

    @property
    def metrics(self) -> Path:
        """The figures; written last, so a run is finished when this file is there."""
        return self.root / "metrics.json"

    @property
    def predictions(self) -> Path:
        """One line per row of the test split."""
        return self.root / "predictions.jsonl"

    @property
    def history(self) -> Path:
        """What was logged while training, one line per entry."""
        return self.root / "history.jsonl"

    @property
    def curve(self) -> Path:
        """Loss and metric over the steps."""
        return self.root / "curve.png"

    @property
    def report(self) -> Path:
        """The run on one page."""
        return self.root / "report.html"

    def written(self) -> list[Path]:
        """Those of our files and folders that are there."""
        ours = (
            self.metrics,
            self.report,
            self.curve,
            self.predictions,
            self.history,
            self.adapter,
            self.checkpoints,
            self.recipe,
        )
        return [path for path in ours if path.exists()]

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Refuse to start where that would lose or mix up something; changes nothing.

        Raises:
            UserError: the folder holds a run and neither flag is given; it holds files of our names but no run; or
                `resume` is asked with a recipe other than the one that the run was started with.
        """
        if resume and overwrite:
            raise UserError("--resume continues the run in the folder and --overwrite deletes it; choose one")
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"output_dir {str(self.root)!r} is a file; choose a folder")
        if (above := file_above(self.root)) is not None:
            raise UserError(f"output_dir {str(self.root)!r} lies under {str(above)!r}, which is a file; choose another")
        there = self.written()
        if there and not self.recipe.exists():
            raise UserError(
                f"output_dir {str(self.root)!r} has {', '.join(path.name for path in there)}, which turnrow would write, "
                "but no recipe.yaml, so it is no run of turnrow; choose another output_dir or move these away"
            )
        if not there or overwrite:
            return
        if not resume:
            state = "a finished run" if self.metrics.exists() else "an unfinished run"
            raise UserError(
                f"output_dir {str(self.root)!r} already holds {state}; continue it with --resume, delete it and start "
                "anew with --overwrite, or choose another output_dir"
            )
        self._check_same(recipe)

    def open(self, recipe: Recipe) -> None:
        """Begin or continue: from here on the folder holds a run."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if not self.recipe.exists():
            recipe.to_yaml(self.recipe)

    def clear(self) -> None:
        """Remove what turnrow wrote, the recipe last; everything else in the folder stays."""
        self._remove_leftovers()
        for path in self.written():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _remove_leftovers(self) -> None:
        """Remove the temporary files and folders of a killed process."""
        for name in (
            "adapter",
            "curve.png",
            "history.jsonl",
            "metrics.json",
            "predictions.jsonl",
            "recipe.yaml",
            "report.html",
        ):
            for path in self.root.glob(f".{name}.*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check_same(self, recipe: Recipe) -> None:
        from turnrow.training.recipe import Recipe

        before = Recipe.from_yaml(self.recipe).to_dict()
        now = recipe.to_dict()
        changed = [
            f"{name} was {before[name]!r} and is now {now[name]!r}"
            for name in now
            # The folder may have been moved; that changes nothing of the run.
            if name != "output_dir" and before[name] != now[name]
        ]
        if changed:
            raise UserError(
                f"cannot resume {str(self.root)!r} with another recipe: {'; '.join(changed)}. A resumed run is the same "
                "run; give the same recipe, or start anew with --overwrite or in another output_dir"
            )
